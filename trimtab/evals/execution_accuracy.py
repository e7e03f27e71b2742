"""Execution accuracy: the answer's query gives the rows of the reference's on every database of the row (docs/sql.md).

Rows are those that `trimtab sql build` writes. Where nothing can be concluded (column `unverified`, or the reference's own query has no
determined rows on any database) there is no score, whatever the answer.
"""

from __future__ import annotations

from trimtab.evals import reference
from trimtab.sql.cached import shared_judge
from trimtab.sql.rows import SqlRow, row_of
from trimtab.types import Example


def score(predictions: list[str], examples: list[Example]) -> list[float | None]:
    """1.0 for each prediction that is right, 0.0 for a wrong one, None where that cannot be said.

    Raises:
        DataError: a row without databases or without a reference.
    """
    judge = shared_judge()
    rows = [row_of(example) for example in examples]
    verifiable = [why_not(example, row) is None for example, row in zip(examples, rows, strict=True)]
    tasks = [
        (text, reference(example), row.database)
        for text, example, row, judged in zip(predictions, examples, rows, verifiable, strict=True)
        if judged
    ]
    found = iter(judge.verdicts(tasks))
    return [float(next(found)[0].kind == "equal") if judged else None for judged in verifiable]


def why_not(example: Example, row: SqlRow) -> str | None:
    """Why no answer to this row can be judged; None where one can."""
    return row.unverified or shared_judge().why_unverified(reference(example), row.database)
