"""A claim, the number that was found for it, and what it must be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

EXACT = 1e-12
"""What rounding may leave of an equality in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Something that is said of an algorithm, measured.

    Attributes:
        item: the number of its section in docs/proofs.md.
        text: the claim in a line.
        number: what was found.
        relation: where `number` must be, seen from `bound`.
    """

    item: int
    text: str
    number: float
    relation: Literal["<=", ">="]
    bound: float

    @property
    def held(self) -> bool:
        """Never true of a number that is not one."""
        return self.number <= self.bound if self.relation == "<=" else self.number >= self.bound

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "held": self.held}


def at_most(item: int, text: str, number: float, bound: float) -> Claim:
    return Claim(item=item, text=text, number=float(number), relation="<=", bound=bound)


def at_least(item: int, text: str, number: float, bound: float) -> Claim:
    return Claim(item=item, text=text, number=float(number), relation=">=", bound=bound)


def worst(numbers: Iterable[float]) -> float:
    """The largest; nan if any is nan. (Python's `max` forgets a nan that does not come first, and with it a failure.)"""
    found = list(numbers)
    return math.nan if any(math.isnan(number) for number in found) else max(found)


def table(claims: Sequence[Claim]) -> str:
    """The claims as lines of text, one each, and how many held."""
    width = max(len(claim.text) for claim in claims)
    lines = [f"    {'claim':<{width}}   {'found':>10}   {'must be':>10}   verdict"]
    for claim in claims:
        must = f"{claim.relation} {claim.bound:.0e}" if claim.bound < 1e-2 else f"{claim.relation} {claim.bound:g}"
        verdict = "holds" if claim.held else "DOES NOT HOLD"
        lines.append(f"({claim.item}) {claim.text:<{width}}   {claim.number:>10.3g}   {must:>10}   {verdict}")
    held = sum(claim.held for claim in claims)
    return "\n".join([*lines, f"{held} of {len(claims)} claims hold"])
