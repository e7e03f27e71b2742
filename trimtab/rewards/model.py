"""Learned rewards: a reward model's adapter and head on the frozen base, read at the end marker; or several of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.models.budget import Budget
from trimtab.models.forward import score_rows
from trimtab.models.layout import Layout, plan
from trimtab.models.roles import Roles
from trimtab.ops.ensemble import Ensemble, combine, disagreement
from trimtab.rewards import Answer, Judged
from trimtab.types import TokenRow


class ModelReward:
    """The `reward` role of a set of roles."""

    name = "model"

    def __init__(self, roles: Roles, *, budget: Budget | int, layout: Layout = "padded", role: str = "reward") -> None:
        self._roles, self._role, self._budget, self._layout = roles, role, budget, layout

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return score_rows_as(
            self._roles, self._role, [a.row for a in answers], budget=self._budget, layout=self._layout
        )


class EnsembleReward:
    """Several reward models, each an adapter and head on the same base, scored one after the other by the one scoring path.

    Its parts: `model` is the score, `model/1`, `model/2` ... are those of the members in the order of the file, and
    `model/disagreement` is their standard deviation.
    """

    name = "model"

    def __init__(self, members: Sequence[ModelReward], *, kind: Ensemble, coef: float = 1.0) -> None:
        self._members, self._kind, self._coef = tuple(members), kind, coef

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return self.judge(answers).scores

    def judge(self, answers: Sequence[Answer]) -> Judged:
        """The combined scores and their parts."""
        each = [member.score(answers) for member in self._members]
        table = torch.tensor(each, dtype=torch.float64)
        scores = combine(table, self._kind, self._coef).tolist()
        members = {f"{self.name}/{number}": own for number, own in enumerate(each, 1)}
        apart = disagreement(table).tolist()
        return Judged(scores=scores, parts={self.name: scores, **members, f"{self.name}/disagreement": apart})


def score_rows_as(
    roles: Roles,
    role: str,
    rows: Sequence[TokenRow],
    *,
    budget: Budget | int,
    layout: Layout = "padded",
    unit: int | Sequence[int] = 1,
) -> list[float]:
    """Scores of any number of rows, in order, without gradients: the one scoring path of evaluation, PPO and `get_scores`.

    Equal rows are scored once, so that a text cut at its end and the same text finished have the same score to the last bit.

    Args:
        budget: tokens of a pass; a `Budget` shrinks when memory runs out.
    """
    distinct = list(dict.fromkeys(rows)) if unit == 1 else list(rows)

    def work(tokens: int) -> list[float]:
        scores = [0.0] * len(distinct)
        for chunk in plan(distinct, tokens, layout=layout, unit=unit):
            with torch.no_grad(), roles.enter(role) as spec:
                if spec.head is None:
                    raise RuntimeError(f"role {role!r} has no head")
                found = score_rows(roles.model, [distinct[i] for i in chunk], spec.head, layout=layout)
            for i, value in zip(chunk, found.tolist(), strict=True):
                scores[i] = value
        return scores

    scores = (budget if isinstance(budget, Budget) else Budget(budget)).attempt(work)
    if unit != 1:
        return scores
    by_row = dict(zip(distinct, scores, strict=True))
    return [by_row[row] for row in rows]
