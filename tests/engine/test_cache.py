"""The preallocated cache holds what the library's growing one holds."""

from __future__ import annotations

import pytest
import torch

from trimtab.engine.cache import SlotCache, SlotLayer

pytestmark = pytest.mark.engine


def columns(start: int, stop: int, rows: int = 3) -> torch.Tensor:
    """`[rows, 1, stop - start, 2]`: every entry says which row and column it is."""
    row = torch.arange(rows).view(rows, 1, 1, 1) * 100
    return (row + torch.arange(start, stop).view(1, 1, -1, 1)).expand(rows, 1, stop - start, 2).float()


def test_writes_into_place_and_returns_what_is_filled() -> None:
    layer = SlotLayer(capacity=8)
    keys, values = layer.update(columns(0, 3), -columns(0, 3))
    assert torch.equal(keys, columns(0, 3))
    storage = layer.keys.data_ptr()
    keys, values = layer.update(columns(3, 4), -columns(3, 4))
    assert torch.equal(keys, columns(0, 4))
    assert torch.equal(values, -columns(0, 4))
    assert layer.keys.data_ptr() == storage  # nothing was copied
    assert (layer.get_seq_length(), layer.get_mask_sizes(1)) == (4, (5, 0))


def test_rows_leave_and_are_repeated() -> None:
    cache = SlotCache(layers=2, capacity=6)
    for layer in range(2):
        cache.update(columns(0, 3), columns(0, 3), layer)
    cache.keep(torch.tensor([2, 2, 0]))
    keys, _ = cache.update(columns(3, 4), columns(3, 4), 1)
    expected = torch.cat([columns(0, 3)[[2, 2, 0]], columns(3, 4)], dim=2)
    assert torch.equal(keys, expected)
    assert cache.get_seq_length() == 3  # of the first layer, which has not been updated
