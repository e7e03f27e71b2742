"""What lies between the products of a block, each as one pass over its numbers (`ops/fused.py`).

Shapes: n tokens or rows, h query heads, j key heads, e numbers per head, d hidden size, s slots, c columns of the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.fused import fused


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps), moments in float32, rounded to the type of x before w as transformers does (arXiv:1910.07467)."""
    wide = x.float()
    r: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * r).to(x.dtype).mul_(weight)


@fused
def add_rms(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y `[n d]`, and its norm."""
    x = x + y
    return x, rms(x, weight, eps)


@fused
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[n 2f]`"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def turn(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: int, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[n h e]`, keys and values `[n j e]` of `[n (h + 2 j) e]`, the first two turned to their positions (arXiv:2104.09864).

    Args:
        cos, sin: `[n 1 e]`; the first half of sin with its sign changed, as the halves of a head are swapped and not negated.
        scale: `[(h + j) e]` of the norms on queries and keys, or None.
    """
    qk, value = qkv[:, :-keys], qkv[:, -keys:]
    if scale is not None:
        qk = rms(qk, scale, eps)
    half = qk.shape[-1] // 2
    qk = torch.addcmul(qk * cos, torch.cat([qk[..., half:], qk[..., :half]], dim=-1), sin)
    return qk[:, :-keys], qk[:, -keys:], value


@fused
def turn_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | None,
    eps: float,
) -> Tensor:
    """`turn`, and the keys and values of row i written to k and v `[s j c e]` at slot `rows[i]`, column `columns[i]`; the queries."""
    q, key, value = turn(qkv, cos, sin, k.shape[1], scale, eps)
    k[rows, :, columns] = key
    v[rows, :, columns] = value
    return q
