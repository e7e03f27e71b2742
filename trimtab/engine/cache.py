"""A key/value cache with its memory set aside beforehand, in slots: each holds one row, and each row is as long as it is.

The library's growing cache copies everything it holds at every token; this one writes into place. A row that has stopped leaves its
slot to another, so the live ones do not pay for it. `SlotCache` is the form that a transformers model takes; the decoder of `blocks`
writes into the same tensors itself.

Shapes: s slots, b rows (of a decoding step those in the first b slots), h key heads, d numbers per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Place:
    """Where the next forward pass writes; one for all layers.

    A prefill puts row `sources[i]` of the pass into slot `slots[i]` (a row into several slots: k completions of one prompt). A step
    puts the one token of row i at column `columns[i]` of slot i, and sees `width` columns.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self.sources: Tensor | None = None
        self.columns: Tensor | None = None
        self.rows: Tensor | None = None
        self.width = 0

    def prefill(self, slots: Sequence[Sequence[int]], device: torch.device) -> None:
        self.sources = torch.tensor([i for i, own in enumerate(slots) for _ in own], device=device)
        self.slots = torch.tensor([slot for own in slots for slot in own], device=device)
        self.width = 0

    def step(self, columns: Tensor, width: int) -> None:
        self.slots = self.sources = None
        self.columns, self.width = columns, width
        self.rows = torch.arange(len(columns), device=columns.device)


class SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # its base has an untyped __init_subclass__
    """Keys and values of one layer, `[s h capacity d]`."""

    is_croppable = False

    def __init__(self, slots: int, capacity: int, place: Place) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.capacity, self.place = slots, capacity, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.slots, key_states.shape[1], self.capacity)
        # zeros: a shorter row's masked columns are multiplied by 0, and what lay in memory may be nan
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write `[b h n d]` where `place` says; what the rows of this pass see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        place = self.place
        if place.slots is not None:
            n = key_states.shape[-2]
            self.keys[place.slots, :, :n] = key_states[place.sources]
            self.values[place.slots, :, :n] = value_states[place.sources]
            return key_states, value_states
        assert place.rows is not None
        self.keys[place.rows, :, place.columns] = key_states[:, :, 0]
        self.values[place.rows, :, place.columns] = value_states[:, :, 0]
        b = len(place.rows)
        return self.keys[:b, :, : place.width], self.values[:b, :, : place.width]

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` columns of some slots into others."""
        assert self.keys is not None and self.values is not None
        self.keys[targets, :, :width] = self.keys[sources, :, :width]
        self.values[targets, :, :width] = self.values[sources, :, :width]

    def get_seq_length(self) -> int:
        return max(self.place.width - 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.place.width or query_length), 0


class SlotCache(Cache):
    """One `SlotLayer` per decoder layer."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self.place = Place()
        self.own = [SlotLayer(slots, capacity, self.place) for _ in range(layers)]
        super().__init__(layers=list(self.own))

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy rows into the slots of rows that have stopped."""
        for layer in self.own:
            layer.move(sources, targets, width)
