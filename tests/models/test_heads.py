"""Value heads: their start, their files, those of other tools, and those that do not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.errors import AdapterError
from trimtab.models.heads import RECORD, WEIGHTS, HeadRecord, ValueHead, load_head, save_head

pytestmark = pytest.mark.unit


def test_start() -> None:
    zero = ValueHead(8)
    assert zero.summary.weight.abs().sum() == 0
    drawn = ValueHead(4096, seed=1)
    assert drawn.summary.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert drawn.summary.bias.item() == 0
    assert torch.equal(drawn.summary.weight, ValueHead(4096, seed=1).summary.weight)
    assert not torch.equal(drawn.summary.weight, ValueHead(4096, seed=2).summary.weight)
    assert not any(p.requires_grad for p in ValueHead(8, trainable=False).parameters())


def test_by_hand_and_in_float32() -> None:
    head = ValueHead(2)
    with torch.no_grad():
        head.summary.weight.copy_(torch.tensor([[2.0, -1.0]]))
        head.summary.bias.fill_(0.5)
    assert head(torch.tensor([[3.0, 1.0], [0.0, 4.0]])).tolist() == [5.5, -3.5]
    assert head(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_saved_and_loaded(tmp_path: Path) -> None:
    head = ValueHead(8, seed=3)
    record = HeadRecord(readout="stop", template="qwen", default_system="是", cutoff_len=64)
    save_head(head, tmp_path, record)
    assert sorted(load_file(tmp_path / WEIGHTS)) == ["v_head.summary.bias", "v_head.summary.weight"]
    again, found = load_head(tmp_path, 8)
    assert found == record
    assert torch.equal(again.summary.weight, head.summary.weight)
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("pickled", [False, True])
def test_a_head_of_another_tool_is_read_at_the_last_token(pickled: bool, tmp_path: Path) -> None:
    state = {"v_head.summary.weight": torch.arange(8.0)[None], "v_head.summary.bias": torch.tensor([2.0])}
    if pickled:
        torch.save(state, tmp_path / "value_head.bin")
    else:
        save_file(state, tmp_path / WEIGHTS)
    head, record = load_head(tmp_path, 8)
    assert record.readout == "last"
    assert head(torch.ones(1, 8)).tolist() == [30.0]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="this folder holds neither"):
        load_head(tmp_path, 8)
    for name, kind in (("config.json", "a model"), ("adapter_config.json", "an adapter")):
        (tmp_path / name).write_text("{}", encoding="utf-8")
        with pytest.raises(AdapterError, match=f"no value head(.|\n)*this folder holds {kind} without one"):
            load_head(tmp_path, 8)
    save_head(ValueHead(8), tmp_path, HeadRecord())
    with pytest.raises(AdapterError, match="8 wide, the hidden states are 16 wide"):
        load_head(tmp_path, 16)
    save_file({"something": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="missing"):
        load_head(tmp_path, 8)
    (tmp_path / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(AdapterError, match="broken"):
        load_head(tmp_path, 8)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / RECORD).unlink()
    torch.save({"x": ValueHead(8)}, tmp_path / "value_head.bin")  # more than tensors: not opened
    with pytest.raises(AdapterError, match=r"value_head\.bin"):
        load_head(tmp_path, 8)
