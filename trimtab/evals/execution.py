"""Answers to the rows of a built set, judged in every way that the report shows: one `JudgedRow` per row.

A row that cannot be judged (`evals/execution_accuracy.why_not`) has the verdict `unverified` whatever its answer, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.evals import reference
from trimtab.evals.execution_accuracy import why_not
from trimtab.sql.cached import CachedJudge, Task, shared_judge
from trimtab.sql.classes import query_classes
from trimtab.sql.rows import SqlRow, row_of
from trimtab.sql.verdicts import Kind
from trimtab.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRow:
    """What execution says of the answer to one row.

    Attributes:
        where: the row, as `file:number`.
        databases: what it was run on.
        kind, message: the verdict on the (greedy) answer over all instances.
        instances: right on each instance alone; None where that one cannot tell.
        samples: right or not, of each sampled answer.
        test_suite, bird: what two public evaluators say of the answer.
        weight: share of wrong versions of the gold query that the row's databases tell from it.
    """

    where: str
    gold: str
    answer: str
    databases: tuple[str, ...]
    kind: Kind
    message: str = ""
    instances: tuple[bool | None, ...] = ()
    samples: tuple[bool, ...] = ()
    test_suite: bool = False
    bird: bool = False
    classes: tuple[str, ...] = ()
    weight: float = 1.0

    @property
    def verifiable(self) -> bool:
        return self.kind != "unverified"

    @property
    def right(self) -> bool:
        return self.kind == "equal"


def judge_rows(
    answers: Sequence[str], examples: Sequence[Example], samples: Sequence[Sequence[str]] = ()
) -> list[JudgedRow]:
    """Every answer on every instance of its row.

    Args:
        samples: further answers to each row, as many to each; none at all when there are none.

    Raises:
        DataError: a row without databases or without a reference.
    """
    judge = shared_judge()
    rows = [row_of(example) for example in examples]
    golds = [reference(example) for example in examples]
    reasons = [why_not(example, row) for example, row in zip(examples, rows, strict=True)]
    further = samples or [()] * len(answers)
    known = [i for i, reason in enumerate(reasons) if reason is None]
    verdicts = iter([v for v, _ in judge.verdicts([(answers[i], golds[i], rows[i].database) for i in known])])
    drawn = iter(judge.verdicts([(text, golds[i], rows[i].database) for i in known for text in further[i]]))
    alone = iter(judge.verdicts([task for i in known for task in _alone(answers[i], golds[i], rows[i])]))
    official = iter(judge.officials([(answers[i], golds[i], rows[i].database) for i in known]))
    found = []
    for example, row, gold, answer, texts, reason in zip(examples, rows, golds, answers, further, reasons, strict=True):
        judged = JudgedRow(
            where=str(example.origin),
            gold=gold,
            answer=answer,
            databases=row.database.paths,
            kind="unverified",
            message=reason or "",
            classes=query_classes(gold, row.database.dialect),
            weight=row.weight,
        )
        if reason is None:
            verdict, others = next(verdicts), next(official)
            judged = replace(
                judged,
                kind=verdict.kind,
                message=verdict.message,
                samples=tuple(next(drawn)[0].kind == "equal" for _ in texts),
                instances=tuple(_told(judge, gold, row, i, next(alone)[0].kind) for i in range(len(judged.databases))),
                test_suite=others.test_suite,
                bird=others.bird,
            )
        found.append(judged)
    return found


def _alone(answer: str, gold: str, row: SqlRow) -> list[Task]:
    """The same question on each instance alone."""
    return [(answer, gold, replace(row.database, paths=(path,))) for path in row.database.paths]


def _told(judge: CachedJudge, gold: str, row: SqlRow, instance: int, kind: Kind) -> bool | None:
    """Right on this instance; None where its gold has no determined rows, whatever the answer is."""
    return kind == "equal" if judge.judge.gold(gold, row.database, instance).verifiable else None
