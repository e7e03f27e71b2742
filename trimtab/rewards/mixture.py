"""Several sources of reward as one number: the sum of their scores by weight, with each part kept for the log."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.errors import RewardError
from trimtab.rewards import Answer, Composite, Judged, Reward


class Mixture:
    """r = sum over sources of weight x score.

    A part is logged as its source gives it, before the weight, so that it means the same in every run.
    """

    name = "reward"

    def __init__(self, sources: Sequence[tuple[float, Reward]]) -> None:
        """
        Args:
            sources: (weight, source); the names of the sources differ.
        """
        self._sources = tuple(sources)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The sums alone."""
        return self.judge(answers).scores

    def judge(self, answers: Sequence[Answer]) -> Judged:
        """The sums and their parts.

        Raises:
            RewardError: a source failed, or gave a number that is not finite.
        """
        totals = [0.0] * len(answers)
        parts: dict[str, list[float]] = {}
        for weight, source in self._sources:
            if isinstance(source, Composite):
                judged = source.judge(answers)
                scores, own = judged.scores, dict(judged.parts)
            else:
                scores = source.score(answers)
                own = {source.name: scores}
            for answer, score in zip(answers, scores, strict=True):
                if not math.isfinite(score):
                    raise RewardError(
                        f"the reward {source.name!r} of an answer is {score}",
                        where=str(answer.prompt.example.origin),
                        why="one such number would reach every advantage of the batch; no update has been made with it",
                        remedy="look at this row and at the reward; continue from the last checkpoint",
                    )
            parts |= own
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        return Judged(scores=totals, parts=parts)
