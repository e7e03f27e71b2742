"""What a figure measured on n rows is worth: pass@k, bootstrap intervals, McNemar's exact test. Plain numbers and NumPy.

    pass@k = 1 - C(n - c, k) / C(n, k)                        Chen et al. 2107.03374, eq. 1: n answers to a row, c of them right
    p      = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c))    McNemar 1947, exact: b, c rows that one system alone gets right

An interval is the percentile bootstrap (Efron 1979): rows are drawn with replacement, the mean is taken anew, and the middle 95 % of
those means are given. For a difference of two systems on the same rows the values are the rows' differences: rows stay paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
BLOCK = 4_000_000
"""Row numbers held at once."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k answers is right, unbiased, from n answers of which c are; n >= k."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {c} right of {n} answers")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """sum w x / sum w; NaN where the weights sum to 0, or there are none."""
    if weights is None:
        return math.fsum(values) / len(values) if values else math.nan
    total = math.fsum(weights)
    return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total if total > 0 else math.nan


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """The percentile interval of the (weighted) mean; the same for the same values and seed. NaN where there is no mean."""
    if math.isnan(weighted_mean(values, weights)):
        return math.nan, math.nan
    w = np.ones(len(values)) if weights is None else np.array(weights)
    weighted = w * values
    rng = np.random.default_rng(seed)
    at_once = max(1, BLOCK // len(w))
    means: list[float] = []
    while len(means) < draws:
        which = rng.integers(len(w), size=(min(at_once, draws - len(means)), len(w)))
        sums, counted = weighted[which].sum(axis=1), w[which].sum(axis=1)
        means += [s / n if n > 0 else math.nan for s, n in zip(sums, counted, strict=True)]
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p of b against c, were each row that parts the systems a fair coin; 1 where none does."""
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    both_sides: float = 2 * tail / 2 ** (b + c)
    return min(1.0, both_sides)
