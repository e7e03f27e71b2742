"""Products in bfloat16 by `products.c`: y = x_1 W_1^T + x_2 W_2 + ... + bias in one pass, on CPUs that have the instructions.

A layer with its adapters is one such sum, [x | x A^T] [W | s B]^T without either being put together; so is the gradient of its input.
Beside oneDNN's products of the same shapes: 1.1 times as fast for 64 rows and more, 1.5 times for one (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from functools import cache

import torch
from torch import Tensor

from trimtab.ops import native

_LAID_OUT, _BY_COLUMN, _BY_ROW = 0, 1, 2  # as products.c has them


class LaidOut:
    """A weight `[n k]` in the order that is multiplied in: for products of few rows, made many times. The weight is not kept."""

    def __init__(self, weight: Tensor) -> None:
        self.n, self.k = weight.shape
        functions = native.kernels()
        self.numbers = torch.empty(functions.trimtab_laid_out(self.n, self.k), dtype=torch.bfloat16)
        self.place = self.numbers.data_ptr()
        weight = weight.detach().contiguous()
        functions.trimtab_lay_out(weight.data_ptr(), self.n, self.k, self.numbers.data_ptr(), torch.get_num_threads())


Part = tuple[Tensor, "Tensor | LaidOut", bool]
"""x `[m k]`, W, and whether W stands on its side: False: x W^T of W `[n k]` or laid out; True: x W of W `[k n]`."""


def takes(*arrays: Tensor) -> bool:
    """Are these products to be had? bfloat16 on such a CPU, each row in one piece."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1 for x in arrays) and are_there()
    )


MOST = 8
"""Parts of a sum, as products.c has it."""


def sums(parts: Sequence[Part], n: int, *, bias: Tensor | None = None) -> Tensor:
    """The sum of up to eight products `[m n]`, rounded once.

    Raises:
        ValueError: sizes or types that do not belong together: the C functions would read past the end.
    """
    words: list[int] = []
    x = parts[0][0]
    m = x.shape[0]  # len(x) of a tensor takes as long as the rest of a line: it is a function in Python
    fits = len(parts) <= MOST and (
        bias is None or (bias.shape == (n,) and bias.dtype == x.dtype and bias.is_contiguous())
    )
    for own, weight, sideways in parts:
        rows, k = own.shape
        fits = fits and rows == m and k > 0 and own.dtype == torch.bfloat16 and own.stride(1) == 1
        if isinstance(weight, LaidOut):
            fits = fits and weight.n == n and weight.k == k
            words += (own.data_ptr(), own.stride(0), k, weight.place, 0, _LAID_OUT)
        else:
            fits = fits and weight.shape == ((k, n) if sideways else (n, k)) and weight.dtype == own.dtype
            how = _BY_ROW if sideways else _BY_COLUMN
            words += (own.data_ptr(), own.stride(0), k, weight.data_ptr(), weight.stride(0), how)
    if not fits:
        raise ValueError("products of sizes or types that do not belong together")
    y = x.new_empty(m, n)
    native.kernels().trimtab_products(
        (c_int64 * len(words))(*words), len(parts), None if bias is None else bias.data_ptr(), False,
        y.data_ptr(), n, m, n, torch.get_num_threads(),
    )  # fmt: skip
    return y


class Gated:
    """silu(x G^T) * (x U^T) in one pass, G and U `[f k]` laid out together; f a multiple of `native`'s vector."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.f, k = gate.shape
        vector = native.kernels().trimtab_vector()
        self.both = LaidOut(torch.stack([gate.view(-1, vector, k), up.view(-1, vector, k)], dim=1).view(-1, k))

    def __call__(self, x: Tensor, room: int = 0) -> Tensor:
        """x `[m k]` -> `[m f + room]`, of which the last columns are empty."""
        if x.shape[1] != self.both.k or x.dtype != torch.bfloat16 or x.stride(1) != 1:
            raise ValueError("products of sizes or types that do not belong together")
        m, k = x.shape
        y = x.new_empty(m, self.f + room)
        words = (c_int64 * 6)(x.data_ptr(), x.stride(0), k, self.both.place, 0, _LAID_OUT)
        native.kernels().trimtab_products(
            words, 1, None, True, y.data_ptr(), y.stride(0), m, self.both.n, torch.get_num_threads()
        )
        return y


def are_there() -> bool:
    """Has this CPU the instructions, and do the products come out right?"""
    return native.library() is not None and _are_right()


@cache
@torch.no_grad()
def _are_right() -> bool:
    """Tried once, with remainders in every direction."""
    if not native.kernels().trimtab_has_products():
        return False
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 40, 7), (17, 33, 64), (30, 96, 72)):
        x, w, u, v, b = (
            torch.randn(shape, generator=generator).bfloat16() for shape in ((m, k), (n, k), (m, 5), (5, n), (n,))
        )
        want = x.float() @ w.float().T + u.float() @ v.float() + b.float()
        for weight in (w, LaidOut(w)):
            got = sums([(x, weight, False), (u, v, True)], n, bias=b)
            if not float((got.float() - want).abs().max()) <= 1e-2 * float(want.abs().max()):
                return False
    return True
