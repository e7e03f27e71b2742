"""Several opinions of one answer as one score, and how far they are apart.

Shapes: m members, n answers.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Ensemble = Literal["mean", "min", "mean_minus_std"]


def combine(scores: Float[Tensor, "m n"], kind: Ensemble, coef: float = 1.0) -> Float[Tensor, " n"]:
    """One score per answer.

        mean              mean over the members
        min               the lowest: worst-case optimisation, Coste et al. (2310.02743), equation 3
        mean_minus_std    mean - coef x std: Eisenstein et al. (2312.09244), section 4

    The last two pay for doubt: an answer far from what the members were trained on divides them, and gains less.
    """
    match kind:
        case "mean":
            return scores.mean(dim=0)
        case "min":
            return scores.amin(dim=0)
        case "mean_minus_std":
            return scores.mean(dim=0) - coef * disagreement(scores)


def disagreement(scores: Float[Tensor, "m n"]) -> Float[Tensor, " n"]:
    """The biased standard deviation over the members, sqrt(mean of (r - mean)^2)."""
    return scores.std(dim=0, unbiased=False)
