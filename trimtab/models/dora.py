"""DoRA (arXiv:2402.09353): a low-rank adapter that turns the rows of a weight, and a trained length for each of them.

    W' = m (W + s B A) / |W + s B A|        |.| per output row (eq. 5); m starts as |W|, so W' = W before training

The length |W + s B A| is a constant to the gradient (section 4.3). Rows are scaled, not added: a DoRA adapter cannot be stacked with
others, so it stands alone in its role.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A| of every row, in float32, without making B A.

    |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b . (A A^T b)

    Args:
        weight: W `[out in]`; a: A `[r in]`; b: B `[out r]`.
    """
    w = weight.float()
    squared = w.square().sum(1) + 2 * scale * (b * (w @ a.t())).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
    return squared.clamp(min=0).sqrt()


def directed(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    *,
    dropped: bool,
) -> Tensor:
    """y = x W^T + bias with W replaced by W'.

    Args:
        x: the adapter's input `[... in]`, dropout applied; `dropped` says that it was, and then x W^T is not in y.
        magnitude: m `[out]`.
    """
    turn = (magnitude / row_lengths(weight, a.detach(), b.detach(), scale)).to(y.dtype)
    plain = F.linear(x, weight) if dropped else y if bias is None else y - bias
    side = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale
    return y + (turn - 1) * plain + turn * side
