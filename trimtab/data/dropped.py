"""A data row that is not used, and why. Nothing is dropped without one of these."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.types import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """One row left out.

    Attributes:
        origin: the file and row number.
        reason: the kind, the same words for every row of that kind, so that reasons can be counted.
        detail: what this row holds that made it so; "" when the reason says all.
    """

    origin: Origin
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}" + (f" ({self.detail})" if self.detail else "")
