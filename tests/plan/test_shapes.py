"""Sizes of models: published totals, names however they are spelt, and folders read without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimtab.errors import ModelError
from trimtab.models.folder import read_header
from trimtab.models.tiny import FAMILIES, make_tiny
from trimtab.plan.shapes import TABLE, known, shape_of

pytestmark = pytest.mark.unit

PUBLISHED = {  # "total parameters" of each release on its model page
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "yi-6b": 6_061_035_520,
    "yi-34b": 34_388_917_248,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-3b": 3_085_938_688,
    "qwen2-7b": 7_615_616_512,
    "qwen2-14b": 14_770_033_664,
    "qwen2-32b": 32_763_876_352,
    "qwen2-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def test_parameters_are_those_of_the_releases() -> None:
    assert {name: shape.parameters for name, shape in TABLE.items()} == PUBLISHED


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (r"E:\PyCharm\PreTrainModel\qwen2_7b", "qwen2-7b"),
        ("/models/Qwen2.5-7B-Instruct/", "qwen2-7b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("01-ai/Yi-1.5-6B-Chat", "yi-6b"),
        ("smollm2-135m-instruct", "smollm2-135m"),
        ("my-own-17b", None),
        ("qwen2-72b", "qwen2-72b"),
    ],
)
def test_known_by_name(name: str, found: str | None) -> None:
    shape = known(name)
    assert (shape.name if shape else None) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_says_what_the_model_has(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny(family, tmp_path / family)
    shape = shape_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    assert shape.linear == linear
    assert shape.head == head.weight.numel()
    assert shape.adapter(4) == 4 * sum(
        m.in_features + m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head
    )


def test_a_config_without_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}), encoding="utf-8")
    with pytest.raises(ModelError, match="sizes of this model cannot be read"):
        shape_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"abc", "shorter than the length"),
        (b"\xff" * 8 + b"{}", "its header would be"),
        (b"\x02\0\0\0\0\0\0\0{]", "Expecting|broken"),
        (
            b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + b"\0" * 4,
            "promises 80 bytes",
        ),
    ],
)
def test_a_torn_weight_file(content: bytes, why: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=why):
        read_header(file)
