"""Tokens of a micro-batch, which shrink when they turn out to be too many for the device. Results do not depend on them, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

LEAST = 64
"""Tokens below which halving stops: what does not fit then does not fit."""


@dataclass(slots=True)
class Budget:
    """Attributes:
    tokens: of a micro-batch, padding counted.
    say: where a line about a smaller one goes.
    """

    tokens: int
    say: Callable[[str], None] = print

    def attempt(self, work: Callable[[int], T], undo: Callable[[], None] = lambda: None) -> T:
        """`work(tokens)`; when the device runs out of memory, once more from the start with half as many, and so on.

        A longer row than the budget goes alone (`models/layout.plan`), so halving ends at `LEAST` and the error is the user's.

        Args:
            undo: takes back what a broken-off attempt left (gradients of its first micro-batches).
        """
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError:
                if self.tokens <= LEAST:
                    raise
            # only here, when the error and the frames that hold its tensors are gone
            undo()
            self.tokens = max(LEAST, self.tokens // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.say(f"out of memory: going on with {self.tokens} tokens a pass (the results are the same)")
