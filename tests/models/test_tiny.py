"""Tiny models: ordinary folders, the same for the same seed, and not rounder than real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.models.tiny import FAMILIES, SPECIAL_TOKENS, VOCAB_SIZE, Family, make_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_as_any_other(family: Family, tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == family
    for name, parameter in tiny_model(family).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert model(torch.tensor([[0, 20, 299]])).logits.shape == (1, 3, VOCAB_SIZE)


def test_seed_decides_and_torch_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = tiny_model("llama", 1), tiny_model("llama", 1), tiny_model("llama", 2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_shapes_that_catch_mistakes() -> None:
    llama, qwen2, qwen3 = (tiny_model(family) for family in FAMILIES)
    for model in (llama, qwen2, qwen3):
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        q = shapes["model.layers.1.self_attn.q_proj.weight"]
        assert shapes["model.layers.1.self_attn.k_proj.weight"][0] * 2 == q[0]
        # No parameter is left at a value that makes a missing use of it invisible.
        assert not any(bool((p == p.flatten()[0]).all()) for p in model.parameters())
    assert "lm_head.weight" in dict(llama.named_parameters())
    assert "lm_head.weight" not in dict(qwen2.named_parameters())
    assert "model.layers.0.self_attn.q_proj.bias" in dict(qwen2.named_parameters())
    assert dict(qwen3.named_parameters())["model.layers.0.self_attn.q_proj.weight"].shape == (128, 64)
    assert "model.layers.0.self_attn.q_norm.weight" in dict(qwen3.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_is_the_same_from_disk(family: Family, tiny_folder: Callable[..., Path]) -> None:
    saved, built = AutoTokenizer.from_pretrained(tiny_folder(family)), tiny_tokenizer(family)
    text = "the SELECT count(*)\n\n  FROM 班级 -- it's 10%"
    assert saved(text).input_ids == built(text).input_ids
    assert saved.decode(saved(text, add_special_tokens=False).input_ids) == text
    assert [saved.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert len(saved) == 274 < VOCAB_SIZE  # 9 special tokens, 256 bytes, 9 merges
    assert (saved.eos_token, saved.pad_token) == (built.eos_token, built.pad_token)


def test_texts_have_more_than_one_tokenization() -> None:
    tokenizer = tiny_tokenizer("qwen2")
    merged = tokenizer("SELE").input_ids
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "SELE"]
    assert len(merged) == 1
    assert tokenizer.decode(spelled) == tokenizer.decode(merged) == "SELE"


def test_special_tokens_are_one_id_each_and_llama_begins_by_itself() -> None:
    assert tiny_tokenizer("qwen3")("<|im_start|>t<|im_end|>").input_ids[::2] == [1, 2]
    assert tiny_tokenizer("llama")("t").input_ids[0] == SPECIAL_TOKENS.index("<|begin_of_text|>")
    assert len(tiny_tokenizer("llama")("t", add_special_tokens=False).input_ids) == 1


def test_chat_templates() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    chatml = tiny_tokenizer("qwen2").apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chatml == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    llama3 = tiny_tokenizer("llama").apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert llama3 == f"<|begin_of_text|>{header('system')}S<|eot_id|>{header('user')}U<|eot_id|>{header('assistant')}"


def test_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_tiny("llama", tmp_path / "tiny")
    assert capfd.readouterr() == ("", "")
