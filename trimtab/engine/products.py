"""x W^T with the weights laid out once for many small products.

On a CPU: a product of few rows spends most of its time putting the matrix into the order that is multiplied in, and does so at every
call. `Product` keeps the matrix in that order: that of our own products where the CPU has the instructions for them (`ops/native`), else
oneDNN's, by private operators of torch. The copy is as large as the weights, lives as long as the decoder that made it, and is made only
after a try has shown that it computes what `linear` does; elsewhere it is `linear`.

On a GPU a small product costs more to start than to compute. `Joined` puts the weights of layers that read the same x below each other,
and A of their adapters below them: one product gives the outputs and what the adapters go on with. The layers' own parameters become
views of it, so nothing is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import count
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.native import products as native

ROWS = 64
"""Rows of a product that the order is chosen for; any number of rows may follow."""


class Product:
    """x W^T + bias, the weights packed.

    Args:
        weight: `[out in]`, bfloat16 or float32 on a CPU; not kept.
        bias: `[out]` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.laid_out = native.LaidOut(weight) if native.takes(weight) else None
        if self.laid_out is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """x `[n in]` -> `[n out]`"""
        if self.laid_out is not None:
            return native.sums([(x, self.laid_out, False)], self.laid_out.n, bias=self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


@cache
def can_pack(dtype: torch.dtype, device: str) -> bool:
    """Are packed products to be had here, and right?"""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return False
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 72, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    try:
        product = Product(weight, bias)
        for rows in (1, 5, ROWS):
            x = torch.randn(rows, 72, generator=generator).to(dtype)
            want = F.linear(x.float(), weight.float(), bias.float())
            if not float((product(x).float() - want).abs().max()) <= tolerance * float(want.abs().max()):
                return False
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- on a GPU

_buffers: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_holders: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_numbers = count(1)


class Joined:
    """x W^T + bias of layers side by side, with their adapters.

    Args:
        layers: with frozen or trained weights, which become views of a buffer at the first call; changing them in place changes it.
        a: `[R in]` of the active adapters, or None.
        sides: s B `[out R]`.
        bias: `[out]` or None.
    """

    def __init__(
        self, layers: Sequence[nn.Module], a: Tensor | None, sides: Tensor | None, bias: Tensor | None
    ) -> None:
        rank = 0 if a is None else len(a)
        # rows of a product whose number is no multiple of eight miss the matrix units
        spare = -(-rank // ALIGNED) * ALIGNED
        self.first, self.a = layers[0], a
        self.weight = _join(layers, spare)
        self.out = len(self.weight) - spare
        self.sides = None if sides is None else F.pad(sides, (0, spare - rank)).t()
        self.bias = None if bias is None else F.pad(bias, (0, spare))
        self._number = next(_numbers)
        self.take()

    def take(self) -> None:
        """Put the own adapters into the buffer, unless they are there: another `Joined` of these layers may have put in its own."""
        if _holders.get(self.first) == self._number:
            return
        if self.a is not None:
            self.weight[self.out : self.out + len(self.a)] = self.a
        _holders[self.first] = self._number

    def __call__(self, x: Tensor) -> Tensor:
        """x `[n in]` -> `[n out]`; after `take`."""
        y = F.linear(x, self.weight, self.bias)
        return y if self.sides is None else y[:, : self.out].addmm_(y[:, self.out :], self.sides)


ALIGNED = 8


@torch.no_grad()
def _join(layers: Sequence[nn.Module], spare: int) -> Tensor:
    """`[out + spare, in]`: the weights below each other, and room; zeros where nothing has been put."""
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    out, place = sum(map(len, weights)), 0
    buffer = _buffers.get(layers[0])
    if buffer is None or len(buffer) < out + spare or not _are_views(weights, buffer):
        buffer = weights[0].new_zeros(out + spare, weights[0].shape[1])
        for weight in weights:
            part = buffer[place : place + len(weight)]
            weight.data = part.copy_(weight)
            place += len(weight)
        _buffers[layers[0]] = buffer
        if buffer.device.type == "cuda":
            # what the weights lay in is of no size that anything else here has
            torch.cuda.empty_cache()
    return buffer[: out + spare]


def _are_views(weights: Sequence[Tensor], buffer: Tensor) -> bool:
    place = buffer.data_ptr()
    for weight in weights:
        if weight.data_ptr() != place or weight.stride() != buffer.stride():
            return False
        place += weight.numel() * weight.element_size()
    return True
