"""The eval tasks on answers whose scores are plain to see."""

from __future__ import annotations

import pytest

from trimtab.errors import ConfigError, DataError
from trimtab.evals import EVALS
from trimtab.evals.exact_match import normalise
from trimtab.types import Example, Message, Origin

pytestmark = pytest.mark.unit


def example(answer: str | None, *, preference: bool = False) -> Example:
    message = None if answer is None else Message(role="assistant", content=answer)
    origin = Origin(file="rows.json", row=7)
    return Example(origin=origin, chosen=message) if preference else Example(origin=origin, response=message)


GOLD = "SELECT title FROM book WHERE price > 20;"
ANSWERS = [
    GOLD,
    "SELECT title\n FROM book  WHERE price > 20 ",
    "select title from book where 20 < price",
    "```sql\nSELECT title FROM book WHERE price > 20;\n```",
    "SELECT title FROM book WHERE price > 20;\nThis lists the titles.",
    "SELECT title FROM book WHERE price > 21;",
    "",
]


@pytest.mark.parametrize(
    ("task", "scores"),
    [("exact_match", [1, 1, 0, 0, 0, 0, 0]), ("sql_match", [1, 1, 1, 1, 1, 0, 0])],
)
@pytest.mark.parametrize("preference", [False, True])
def test_scores(task: str, scores: list[int], preference: bool) -> None:
    rows = [example(GOLD, preference=preference)] * len(ANSWERS)
    assert EVALS.load(task)(ANSWERS, rows) == scores


def test_a_reference_that_is_no_sql_is_compared_as_text() -> None:
    assert EVALS.load("sql_match")(["Paris ", "paris"], [example("Paris;")] * 2) == [1.0, 0.0]


def test_one_score_per_row() -> None:
    for row in EVALS:
        assert row.load()([], []) == []
        with pytest.raises(ValueError, match="zip"):
            row.load()(["a"], [])


@pytest.mark.parametrize("task", ["exact_match", "sql_match"])
def test_a_row_without_reference(task: str) -> None:
    with pytest.raises(DataError, match=r"rows\.json:7"):
        EVALS.load(task)(["a"], [example(None)])


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="sql_match"):
        EVALS.load("sqlmatch")


def test_normalise() -> None:
    assert normalise("  SELECT\t1 \n ; ") == "SELECT 1"
    assert normalise("SELECT 1;;") == "SELECT 1;"
    assert normalise("选择  1；") == "选择 1；"
