"""Figures that describe a run: running moments, explained variance, calibration, correlation.

Shapes: n values; b rows, t scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.masked import Reduce, alone, masked_var


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningMoments:
    """Mean and spread of everything seen so far: count n, mean, and m2 = the sum of (x - mean)^2.

    A value: `merge` returns a new one. Being three numbers, it goes into a checkpoint as it is.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def merge(self, values: Sequence[float]) -> RunningMoments:
        """With one more batch. Chan, Golub and LeVeque (1983): with d = mean_b - mean_a,

            n = n_a + n_b        mean = mean_a + d n_b / n        m2 = m2_a + m2_b + d^2 n_a n_b / n

        which loses no digits where the sum of squares less the square of the sum would.
        """
        if not values:
            return self
        batch_mean = math.fsum(values) / len(values)
        batch_m2 = math.fsum((x - batch_mean) ** 2 for x in values)
        count = self.count + len(values)
        shift = batch_mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + shift * len(values) / count,
            m2=self.m2 + batch_m2 + shift**2 * self.count * len(values) / count,
        )

    @property
    def std(self) -> float:
        """Biased standard deviation, sqrt(m2 / n); 0 before anything was seen."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    @property
    def unit(self) -> float:
        """`std` where a number is needed to measure or divide by: 1 as long as nothing has varied."""
        return self.std or 1.0


def explained_variance(
    values: Float[Tensor, "b t"],
    returns: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    reduce: Reduce = alone,
) -> Float[Tensor, ""]:
    """1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 no better than a constant, below 0 worse.

    Where the returns do not vary there is nothing to explain, and the answer is 0.
    """
    total = masked_var(returns, mask, reduce=reduce)
    unexplained = masked_var(returns - values, mask, reduce=reduce)
    return torch.where(total > 0, 1 - unexplained / total, torch.zeros_like(total))


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r, for instance of reward with length; 0 where either does not vary.

    Raises:
        ValueError: sequences of different length.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values cannot be correlated with {len(y)}")
    a, b = RunningMoments().merge(x), RunningMoments().merge(y)
    if a.m2 == 0 or b.m2 == 0:
        return 0.0
    return math.fsum((p - a.mean) * (q - b.mean) for p, q in zip(x, y, strict=True)) / math.sqrt(a.m2 * b.m2)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Predictions with probability in [low, high): how many, what they said on average, and how often it was so."""

    low: float
    high: float
    count: int
    probability: float
    frequency: float


def calibration_bins(
    probabilities: Sequence[float], outcomes: Sequence[bool], *, bins: int = 10, low: float = 0.0, high: float = 1.0
) -> tuple[CalibrationBin, ...]:
    """Predictions sorted into `bins` equal parts of [low, high]; the top one includes `high`. Empty bins have count 0.

    For a reward model the prediction is "the answer that I prefer is the chosen one": probability sigmoid(|r_w -
    r_l|), which is never below 0.5, outcome r_w > r_l.

    Raises:
        ValueError: as many probabilities as outcomes are needed.
    """
    if len(probabilities) != len(outcomes):
        raise ValueError(f"{len(probabilities)} probabilities for {len(outcomes)} outcomes")
    width = (high - low) / bins
    held: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for probability, outcome in zip(probabilities, outcomes, strict=True):
        held[min(max(int((probability - low) / width), 0), bins - 1)].append((probability, outcome))
    return tuple(
        CalibrationBin(
            low=low + i * width,
            high=low + (i + 1) * width,
            count=len(inside),
            probability=math.fsum(p for p, _ in inside) / max(len(inside), 1),
            frequency=sum(o for _, o in inside) / max(len(inside), 1),
        )
        for i, inside in enumerate(held)
    )


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: the mean of |probability - frequency| over predictions (Naeini et al. 2015)."""
    total = sum(bin.count for bin in bins)
    return math.fsum(bin.count * abs(bin.probability - bin.frequency) for bin in bins) / max(total, 1)
