"""Small tokenizers and configs of our own making; nothing here touches the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "How many towns are there?\nSELECT count(*) FROM towns;\n\n",
    "user\nassistant\nsystem\nHuman: Assistant: You are",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILY_TOKENS = {
    "gemma": ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    "phi4": ["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    "glm4": ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "deepseek": ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    "llama2": ["</s>", "<s>"],
}


def make_tokenizer(special: list[str], eos: str | None, template: str | None, bos: str | None = None) -> Any:
    """A byte-level BPE with a few merges (words, blanks, newlines) and the given special tokens.

    With Llama 3's tokens it also cuts words as Llama 3 does, which keeps newlines together; else as GPT-2 does.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if "<|eot_id|>" in special:
        words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+|[^\s\p{L}]+"), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 60,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """ChatML tokens, end of text `<|endoftext|>`, a Jinja template of the same format."""
    return make_tokenizer(CHATML_TOKENS, "<|endoftext|>", CHATML)


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    return make_tokenizer


@pytest.fixture(scope="session")
def jinja() -> dict[str, str]:
    return {"chatml": CHATML, "qwen": QWEN, "llama3": LLAMA3}


@pytest.fixture(scope="session")
def special() -> dict[str, list[str]]:
    return {"chatml": CHATML_TOKENS, "llama3": LLAMA3_TOKENS, **FAMILY_TOKENS}


@pytest.fixture
def config() -> Callable[..., SimpleNamespace]:
    """A config with the keys that data reads, as the defaults have them."""

    def build(**given: Any) -> SimpleNamespace:
        defaults: dict[str, Any] = {
            "stage": "sft",
            "dataset": ("rows",),
            "eval_dataset": (),
            "dataset_dir": "data",
            "cutoff_len": 2048,
            "max_samples": None,
            "val_size": 0.0,
            "mix_strategy": "concat",
            "interleave_probs": (),
            "seed": 42,
            "data_seed": None,
            "cache_dir": None,
            "hf_hub_token": None,
            "ms_hub_token": None,
            "mask_history": False,
            "train_on_prompt": False,
        }
        return SimpleNamespace(**{**defaults, **given})

    return build


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write a data file (text, bytes, or a value as JSON) into a fresh folder; returns its path."""

    def put(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            path.write_text(text, encoding="utf-8", newline="")
        return path

    return put
