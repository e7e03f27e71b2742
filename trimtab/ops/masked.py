"""Sums, means and moments over the real entries of a padded array.

Shapes: b rows, t entries in the longest of them, padded on the right; `mask` says which entries are real.

Padding may hold anything, nan included: it is selected away rather than multiplied by zero. Where nothing is real,
sums, means, variances and whitened values are 0, so that an empty batch gives a finite zero and not 0 / 0.

`reduce` adds a tensor of sums over all workers; alone, a process is its own sum. Every figure that describes a batch
goes through it, so that a result does not depend on how many workers share the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduce: TypeAlias = Callable[[Tensor], Tensor]


def alone(total: Tensor) -> Tensor:
    """The `reduce` of a single process: its sums are the sums."""
    return total


def zero_padding(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """`x` with 0 for padding; no gradient, and no nan, passes through a padded entry."""
    return torch.where(mask, x, 0.0)


def masked_sum(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, reduce: Reduce = alone) -> Float[Tensor, ""]:
    """Sum of the real entries."""
    return reduce(zero_padding(x, mask).sum())


def masked_mean(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, reduce: Reduce = alone) -> Float[Tensor, ""]:
    """Mean of the real entries: sum / count."""
    count = reduce(mask.sum())
    return masked_sum(x, mask, reduce=reduce) / count.clamp(min=1)


def masked_var(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, reduce: Reduce = alone) -> Float[Tensor, ""]:
    """Biased variance of the real entries: the mean of (x - mean)^2, dividing by n and not by n - 1."""
    mean = masked_mean(x, mask, reduce=reduce)
    return masked_mean((x - mean) ** 2, mask, reduce=reduce)


def whiten(
    x: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    reduce: Reduce = alone,
) -> Float[Tensor, "b t"]:
    """(x - mean) / sqrt(var + eps) over the real entries; padding becomes 0.

    `shift_mean=False` adds the mean back: the spread becomes 1 and the mean stays. Rewards are whitened so, because
    moving the mean of per-token rewards would pay or fine every token for existing (detail 8 of
    docs/algorithms/ppo.md).
    """
    mean = masked_mean(x, mask, reduce=reduce)
    var = masked_var(x, mask, reduce=reduce)
    whitened = (x - mean) * torch.rsqrt(var + eps)
    return zero_padding(whitened if shift_mean else whitened + mean, mask)


def row_sum(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Sum of each row's real entries."""
    return zero_padding(x, mask).sum(dim=-1)


def row_mean(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Mean of each row's real entries."""
    return row_sum(x, mask) / lengths(mask).clamp(min=1)


def lengths(mask: Bool[Tensor, "b t"]) -> Int[Tensor, " b"]:
    """How many real entries each row has."""
    return mask.sum(dim=-1)


def is_last(mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """True at the last real entry of each row; nowhere in a row of padding."""
    after = torch.zeros_like(mask)
    after[:, :-1] = mask[:, 1:]
    return mask & ~after
