"""A learned reward: the reward model's adapter and head on the frozen base, read at the end marker."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.models.forward import Layout, plan, score_rows
from trimtab.models.roles import Roles
from trimtab.rewards import Answer
from trimtab.types import TokenRow


class ModelReward:
    """The `reward` role of a set of roles."""

    name = "model"

    def __init__(self, roles: Roles, *, budget: int, layout: Layout = "padded", role: str = "reward") -> None:
        self._roles, self._role, self._budget, self._layout = roles, role, budget, layout

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return score_rows_as(
            self._roles, self._role, [a.row for a in answers], budget=self._budget, layout=self._layout
        )


def score_rows_as(
    roles: Roles,
    role: str,
    rows: Sequence[TokenRow],
    *,
    budget: int,
    layout: Layout = "padded",
    unit: int | Sequence[int] = 1,
) -> list[float]:
    """Scores of any number of rows, in order, without gradients: the one scoring path of evaluation, PPO and `get_scores`.

    Equal rows are scored once, so that a text cut at its end and the same text finished have the same score to the last bit.
    """
    distinct = list(dict.fromkeys(rows)) if unit == 1 else list(rows)
    scores = [0.0] * len(distinct)
    for chunk in plan(distinct, budget, layout=layout, unit=unit):
        with torch.no_grad(), roles.enter(role) as spec:
            if spec.head is None:
                raise RuntimeError(f"role {role!r} has no head")
            found = score_rows(roles.model, [distinct[i] for i in chunk], spec.head, layout=layout)
        for i, value in zip(chunk, found.tolist(), strict=True):
            scores[i] = value
    if unit != 1:
        return scores
    by_row = dict(zip(distinct, scores, strict=True))
    return [by_row[row] for row in rows]
