"""What a run needs of its rows before answers are rewarded by execution: databases, and a verdict that means something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.data.dropped import Dropped
from trimtab.data.loader import without
from trimtab.data.stage import StageData
from trimtab.errors import DataError
from trimtab.rewards.sql import ExecutionReward, Worth
from trimtab.sql.cached import CachedJudge, shared_judge
from trimtab.sql.rows import UNVERIFIED, row_of
from trimtab.types import Example

EXECUTED = ("sql_execution", "sql_graded")
"""Ready-made reward functions that run queries."""
UNJUDGED = "its answer cannot be judged by execution"


def execution_reward(config: Any) -> ExecutionReward:
    """The source of `reward_model_type: sql`."""
    worth = Worth(
        equal=config.sql_reward_equal,
        executes=config.sql_reward_executes,
        other=config.sql_reward_else,
        graded=config.sql_partial_credit,
    )
    return ExecutionReward(worth, judge=shared_judge(config.sql_workers))


def judged_rows(data: StageData[Any], judge: CachedJudge) -> StageData[Any]:
    """The data without the rows that cannot be judged, which have no part in the reward: they are dropped, and counted.

    `trimtab sql build` has said so in the column `unverified`. Rows without that column are tried here.

    Raises:
        DataError: a row without a database or without an answer of its own, or none left.
    """
    unfit: dict[int, Dropped] = {}
    for example in _distinct([*data.train_examples, *data.eval_examples]):
        why = unjudged(example, judge)
        if why is not None:
            unfit[id(example)] = Dropped(origin=example.origin, reason=UNJUDGED, detail=why)
    return without(data, unfit) if unfit else data


def declared_rows(data: StageData[Any]) -> StageData[Any]:
    """The data without the rows of which their column `unverified` says why they cannot be judged."""
    unfit = {
        id(example): Dropped(origin=example.origin, reason=UNJUDGED, detail=str(why))
        for example in _distinct([*data.train_examples, *data.eval_examples])
        if (why := example.columns.get(UNVERIFIED))
    }
    return without(data, unfit) if unfit else data


def unjudged(example: Example, judge: CachedJudge) -> str | None:
    """Why answers to this row cannot be judged; None where they can."""
    row = row_of(example)
    if row.unverified is not None:
        return row.unverified
    gold = example.response or example.chosen
    if gold is None or not gold.content.strip():
        raise DataError(
            "a row without a query of its own cannot be judged by execution",
            where=str(example.origin),
            why="an answer is right if it gives the rows of the right query",
            remedy="give every row an answer (column `output`, or the entry's `response`)",
        )
    return None if UNVERIFIED in example.columns else judge.why_unverified(gold.content, row.database)


def _distinct(examples: Sequence[Example]) -> list[Example]:
    return list({id(example): example for example in examples}.values())
