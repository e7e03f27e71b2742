"""Do probabilities come true as often as they say? Without torch, so that reports can use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
