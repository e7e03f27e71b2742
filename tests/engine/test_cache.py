"""The preallocated cache puts what a forward pass makes where the scheduler says, and shows each row its own."""

from __future__ import annotations

import pytest
import torch

from trimtab.engine.cache import SlotCache

pytestmark = pytest.mark.engine

CPU = torch.device("cpu")


def columns(start: int, stop: int, rows: int = 3) -> torch.Tensor:
    """`[rows, 1, stop - start, 2]`: every entry says which row and column it is."""
    row = torch.arange(rows).view(rows, 1, 1, 1) * 100
    return (row + torch.arange(start, stop).view(1, 1, -1, 1)).expand(rows, 1, stop - start, 2).float()


def test_prompts_lie_in_the_slots_of_their_completions() -> None:
    cache = SlotCache(layers=2, slots=5, capacity=8)
    cache.place.prefill([(4,), (0, 3), (1,)], CPU)
    keys, values = cache.update(columns(0, 3), -columns(0, 3), 1)
    assert torch.equal(keys, columns(0, 3)) and torch.equal(values, -columns(0, 3))  # a prompt sees itself
    held = cache.own[1].keys
    assert held is not None
    for slot, source in ((4, 0), (0, 1), (3, 1), (1, 2)):
        assert torch.equal(held[slot, :, :3], columns(0, 3)[source])


def test_a_step_writes_each_row_at_its_own_length_and_into_place() -> None:
    cache = SlotCache(layers=1, slots=3, capacity=8)
    cache.place.prefill([(0,), (1,), (2,)], CPU)
    cache.update(columns(0, 3), -columns(0, 3), 0)
    storage = cache.own[0].keys.data_ptr()  # type: ignore[union-attr]
    cache.place.step(torch.tensor([3, 1]), 4)  # the second row is shorter; the third slot is free
    keys, values = cache.update(columns(7, 8, rows=2), -columns(7, 8, rows=2), 0)
    assert keys.shape == (2, 1, 4, 2)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 7]
    assert keys[1, 0, :2, 0].tolist() == [100, 107]  # what follows is older than the row and masked
    assert torch.equal(values[:, :, 1], torch.tensor([[[-1.0, -1.0]], [[-107.0, -107.0]]]))
    assert keys.data_ptr() == storage  # nothing was copied
    assert (cache.get_seq_length(), cache.own[0].get_mask_sizes(1)) == (3, (4, 0))


def test_the_last_rows_move_into_the_slots_of_those_that_stop() -> None:
    cache = SlotCache(layers=2, slots=4, capacity=6)
    cache.place.prefill([(0,), (1,), (2,)], CPU)
    for layer in range(2):
        cache.update(columns(0, 3), columns(0, 3), layer)
    cache.move(torch.tensor([2]), torch.tensor([0]), 3)
    for layer in cache.own:
        assert layer.keys is not None and layer.values is not None
        assert torch.equal(layer.keys[0, :, :3], columns(0, 3)[2])
        assert torch.equal(layer.values[1, :, :3], columns(0, 3)[1])
