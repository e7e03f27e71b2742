"""A key/value cache with its memory set aside beforehand, for decoding through a transformers model.

The library's growing cache copies everything it holds at every token; this one writes into place. Rows that have stopped are
taken out with `keep`, so the live ones do not pay for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # its base has an untyped __init_subclass__
    """Keys and values of one layer, `[b, heads, capacity, head size]`, filled up to `length`."""

    is_croppable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        b, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(b, heads, self.capacity, size)
        self.values = value_states.new_empty(b, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class SlotCache(Cache):
    """One `SlotLayer` per decoder layer."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.slots = [SlotLayer(capacity) for _ in range(layers)]
        super().__init__(layers=list(self.slots))

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only, in this order; a row may be named several times (k completions of one prompt)."""
        for layer in self.slots:
            assert layer.keys is not None and layer.values is not None
            layer.keys = _select(layer.keys, rows, layer.length)
            layer.values = _select(layer.values, rows, layer.length)


def _select(tensor: Tensor, rows: Tensor, length: int) -> Tensor:
    new = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    new[:, :, :length] = tensor[:, :, :length].index_select(0, rows)
    return new
