"""A price on length: what an answer of n tokens loses.

    -c max(0, n - n0)          c: reward_length_penalty, n0: reward_length_free

n counts the answer's tokens as drawn, its end marker among them. Linear, so that it acts on a policy as a price per token does: an
answer gains by one more token only if that adds more than c to the rest of the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.rewards import Answer


def length_penalty(tokens: int, coef: float, free: int = 0) -> float:
    """-coef max(0, tokens - free)."""
    return -coef * max(0, tokens - free)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthPenalty:
    """The price as a source of reward."""

    coef: float
    free: int = 0
    name: str = "length"

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [length_penalty(len(answer.completion.token_ids), self.coef, self.free) for answer in answers]
