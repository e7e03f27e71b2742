"""Tiny random models of three families, with a tokenizer built in code: what tests train and sample in milliseconds.

They are shaped to catch mistakes that round shapes hide: fewer key heads than query heads, biases and norm weights away from
their usual 0 and 1, a head size that is not hidden / heads (qwen3), an embedding longer than the tokenizer, and a
tokenizer that puts a begin token in front by itself (llama).

    family   head    q/k/v biases   q/k norms   chat template   end of turn
    llama    own     no             no          llama3          <|eot_id|>
    qwen2    tied    yes            no          chatml          <|im_end|>
    qwen3    tied    no             yes         chatml          <|im_end|>
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from trimtab.models.packaged import quiet_unless_watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)

VOCAB_SIZE = 300

# The special tokens of chatml and llama3, at the first ids.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)

# After them the 256 bytes, then what these merges make: enough that a text has more than one tokenization, so that a
# test can tell tokens as drawn from tokens encoded again.
_MERGES = (
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġt", "he"),
    ("i", "n"),
    ("Ċ", "Ċ"),
    ("S", "E"),
    ("L", "E"),
    ("SE", "LE"),
    ("Ġ", "Ġ"),
)

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_tiny(family: Family, folder: Path | str, seed: int = 0) -> Path:
    """Save a tiny random model of a family, with tokenizer and chat template, as an ordinary model folder; returns the folder.

    Hidden size 64, 2 layers, 4 query and 2 key heads, float32. The same seed gives the same weights; torch's own random
    state is not touched.
    """
    folder = Path(folder)
    with quiet_unless_watched():
        tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def make_prefix_table(
    folder: Path | str, *, letters: str = "ab", digits: str = "1", depth: int = 2, seed: int = 0
) -> Path:
    """Save a random prefix table (`models/enumerable.py`) with the tokenizer of qwen2 (chatml) as a model folder; returns the folder.

    Args:
        letters: what answers are made of, one character each.
        digits: characters in a question, each of which chooses a table of its own.
        depth: letters of the longest answer.
    """
    from trimtab.models.enumerable import PrefixTableConfig, PrefixTableForCausalLM, register

    register()
    tokenizer = tiny_tokenizer("qwen2")
    ids: Any = tokenizer.convert_tokens_to_ids
    config = PrefixTableConfig(
        letters=tuple(ids(list(letters))),
        end=tokenizer.eos_token_id,
        digits=tuple(ids(list(digits))),
        depth=depth,
        vocab_size=VOCAB_SIZE,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = PrefixTableForCausalLM(config)
    with quiet_unless_watched():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_few_tokens(folder: Path | str, *, letters: str = "ab", seed: int = 0) -> Path:
    """Save a tiny Qwen2 that answers in these letters only (`models/enumerable.py`) as a model folder; returns the folder."""
    from trimtab.models.enumerable import NEVER, FewTokensConfig, FewTokensForCausalLM, register

    register()
    tokenizer = tiny_tokenizer("qwen2")
    ids: Any = tokenizer.convert_tokens_to_ids
    base = tiny_model("qwen2", seed)
    keys = {**base.config.to_dict(), "tie_word_embeddings": False}
    for name in ("model_type", "architectures"):
        keys.pop(name, None)
    with torch.random.fork_rng(devices=[]):
        model: Any = FewTokensForCausalLM(FewTokensConfig(**keys))
    model.load_state_dict({**base.state_dict(), "lm_head.bias": torch.full((VOCAB_SIZE,), NEVER)})
    with torch.no_grad():
        model.lm_head.bias[[*ids(list(letters)), tokenizer.eos_token_id]] = 0.0
    with quiet_unless_watched():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """The model of `make_tiny`, in memory, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kinds: dict[Family, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 32}),
    }
    make_config, make_model, own = kinds[family]
    tokenizer = tiny_tokenizer(family)
    config = make_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    with torch.random.fork_rng(devices=[]):  # making the model draws weights that the lines below replace
        model: PreTrainedModel = make_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(0.1 * noise)
            elif bool((parameter == 1).all()):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def tiny_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of chatml and llama3, and the family's chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in _MERGES)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    special = [AddedToken(piece, special=True, normalized=False) for piece in SPECIAL_TOKENS]
    # transformers loads a Qwen tokenizer as its own class, with its own way to cut text: save one of that class.
    make_tokenizer: Any = Qwen2Tokenizer
    own: dict[str, Any] = {
        "vocab": vocab,
        "merges": list(_MERGES),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    if family == "llama":
        begin = "<|begin_of_text|>"
        backend = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, SPECIAL_TOKENS.index(begin))]
        )
        make_tokenizer = PreTrainedTokenizerFast
        own = {
            "tokenizer_object": backend,
            "bos_token": begin,
            "eos_token": "<|eot_id|>",
            "pad_token": "<|end_of_text|>",
        }
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(clean_up_tokenization_spaces=False, **own)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = _LLAMA3 if family == "llama" else _CHATML
    return tokenizer
