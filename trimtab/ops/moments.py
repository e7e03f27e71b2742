"""Figures of plain numbers: running moments and correlation. Without torch, so that reports can use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
