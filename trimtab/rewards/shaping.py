"""From raw scores to the score that an algorithm credits: normalise, clip, charge for a missing end. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def shape_scores(
    raw: Sequence[float],
    finished: Sequence[bool],
    *,
    mean: float,
    std: float,
    normalise: bool,
    clip: float | None,
    missing_eos_penalty: float,
    missing_eos_mode: Literal["subtract", "replace"],
    overlong: Sequence[float] = (),
) -> list[float]:
    """Shaped scores, in order.

    Args:
        raw: the rewards, every completion scored as if finished.
        mean, std: running moments of the raw scores, this batch included; used when `normalise` (`score_norm`).
        clip: shaped scores are kept within [-clip, clip] before the penalty; None = off.
        missing_eos_penalty: subtracted from an unfinished completion's score, so that it scores exactly this much below the same
            text finished; `replace` gives it minus the penalty whatever it says (arXiv:1909.08593).
        overlong: taken off each score at the end (`overlong_cost`).
    """
    shaped = []
    for score, done, cost in zip(raw, finished, overlong or [0.0] * len(raw), strict=True):
        value = (score - mean) / (std or 1.0) if normalise else score
        if clip is not None:
            value = min(max(value, -clip), clip)
        if not done:
            value = -missing_eos_penalty if missing_eos_mode == "replace" else value - missing_eos_penalty
        shaped.append(value - cost)
    return shaped


def overlong_cost(length: int, limit: int, buffer: int, penalty: float) -> float:
    """What an answer of so many tokens pays for coming near the limit: 0 up to limit - buffer, then evenly up to `penalty` at the limit.

    DAPO's soft overlong punishment (Yu et al. 2503.14476, equation 13): (length - (limit - buffer)) / buffer within the buffer.
    """
    if not buffer:
        return 0.0
    return penalty * min(max((length - (limit - buffer)) / buffer, 0.0), 1.0)
