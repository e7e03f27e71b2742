"""x W^T with the weights laid out once for many small products. Calls private operators of torch.

A product of few rows with a bfloat16 matrix on a CPU spends most of its time putting the matrix into the order that oneDNN multiplies
in, and does so at every call. `Product` keeps the matrix in that order. The copy is as large as the weights, lives as long as the
decoder that made it, and is made only after a try has shown that it computes what `linear` does; elsewhere it is `linear`.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64
"""Rows of a product that the order is chosen for; any number of rows may follow."""


class Product:
    """x W^T + bias, the weights packed.

    Args:
        weight: `[out in]`, bfloat16 on a CPU; not kept.
        bias: `[out]` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """x `[n in]` -> `[n out]`"""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


@cache
def can_pack(dtype: torch.dtype, device: str) -> bool:
    """Are packed products to be had here, and right?"""
    if device != "cpu" or dtype != torch.bfloat16:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 72, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    try:
        product = Product(weight, bias)
        for rows in (1, 5, ROWS):
            x = torch.randn(rows, 72, generator=generator).to(dtype)
            want = F.linear(x.float(), weight.float(), bias.float())
            if not float((product(x).float() - want).abs().max()) <= 1e-2 * float(want.abs().max()):
                return False
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return True
