# ruff: noqa: E501  # a query is read best on one line
"""The comparison, case by case: what an evaluator by sets, by lists or by text would get wrong."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.sql.compare import compare, plain
from trimtab.sql.judge import Database, Judge
from trimtab.sql.statement import find_statement, is_ordered, tokens
from trimtab.sql.verdicts import KINDS

pytestmark = pytest.mark.unit

MATRIX = [  # answer, gold, verdict
    ("SELECT name FROM t", "SELECT name FROM t", "equal"),
    ("select  Name\nfrom T ;", "SELECT name FROM t", "equal"),
    ("SELECT t.name AS x FROM t AS t", "SELECT name FROM t", "equal"),
    ("SELECT label FROM u", "SELECT DISTINCT label FROM u", "wrong_multiplicity"),
    ("SELECT DISTINCT label FROM u", "SELECT label FROM u", "wrong_multiplicity"),
    ("SELECT y FROM u UNION SELECT y FROM u", "SELECT y FROM u", "wrong_multiplicity"),
    ("SELECT label FROM u UNION ALL SELECT label FROM u", "SELECT label FROM u", "wrong_multiplicity"),
    ("SELECT n, id FROM t", "SELECT id, n FROM t", "wrong_rows"),
    ("SELECT id, n FROM t", "SELECT id FROM t", "wrong_columns"),
    ("SELECT * FROM u", "SELECT id FROM u", "wrong_columns"),
    ("SELECT n FROM t", "SELECT id FROM t", "wrong_rows"),
    ("SELECT id FROM t WHERE n > 3", "SELECT id FROM t WHERE n >= 3", "wrong_rows"),
    ("SELECT 0.1 + 0.2", "SELECT 0.3", "equal"),
    ("SELECT 0.3", "SELECT 0.31", "wrong_rows"),
    ("SELECT 1", "SELECT 1.0", "equal"),
    ("SELECT '1'", "SELECT 1", "wrong_rows"),
    ("SELECT NULL", "SELECT NULL", "equal"),
    ("SELECT NULL", "SELECT 0", "wrong_rows"),
    ("SELECT NULL", "SELECT ''", "wrong_rows"),
    ("SELECT 1 = 1", "SELECT 1", "equal"),
    ("SELECT '2025-01-31 00:00:00'", "SELECT '2025-01-31'", "equal"),
    ("SELECT '2025-01-31T10:00:00'", "SELECT '2025-01-31 10:00:00'", "equal"),
    ("SELECT '2025-01-31 00:00:01'", "SELECT '2025-01-31'", "wrong_rows"),
    ("SELECT 'ann'", "SELECT 'Ann'", "wrong_rows"),
    ("SELECT 'Ann '", "SELECT 'Ann'", "wrong_rows"),
    ("SELECT x'61'", "SELECT 'a'", "wrong_rows"),
    ("SELECT 9007199254740993", "SELECT 9007199254740992", "wrong_rows"),
    ("SELECT 1234567.89", "SELECT 1234567.90", "wrong_rows"),
    ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t ORDER BY id", "wrong_order"),
    ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t", "equal"),
    ("SELECT id FROM t", "SELECT id FROM t ORDER BY id", "wrong_order"),
    ("SELECT id FROM t ORDER BY n, id DESC", "SELECT id FROM t ORDER BY n", "equal"),
    ("SELECT id FROM t ORDER BY n DESC", "SELECT id FROM t ORDER BY n", "wrong_order"),
    ("SELECT id, n FROM t ORDER BY 2, 1 DESC", "SELECT id, n FROM t ORDER BY n", "equal"),
    ("SELECT name FROM t ORDER BY name", "SELECT name FROM t ORDER BY id", "wrong_order"),
    ("SELECT y, COUNT(*) FROM u GROUP BY y ORDER BY COUNT(*) DESC, y", "SELECT y, COUNT(*) FROM u GROUP BY y ORDER BY COUNT(*) DESC", "equal"),
    ("SELECT y, COUNT(*) FROM u GROUP BY y ORDER BY COUNT(*)", "SELECT y, COUNT(*) FROM u GROUP BY y ORDER BY COUNT(*) DESC", "wrong_order"),
    ("SELECT DISTINCT y FROM u ORDER BY y", "SELECT DISTINCT y FROM u ORDER BY y DESC", "wrong_order"),
    ("SELECT id FROM t UNION SELECT y FROM u ORDER BY 1", "SELECT id FROM t UNION SELECT y FROM u ORDER BY 1", "equal"),
    ("SELECT id FROM t UNION SELECT y FROM u ORDER BY 1 DESC", "SELECT id FROM t UNION SELECT y FROM u ORDER BY 1", "wrong_order"),
    ("SELECT id FROM (SELECT id FROM t ORDER BY id DESC)", "SELECT id FROM (SELECT id FROM t ORDER BY id)", "equal"),
    ("SELECT id FROM t ORDER BY n DESC LIMIT 1", "SELECT id FROM t ORDER BY n DESC LIMIT 1", "equal"),
    ("SELECT id FROM t WHERE n = (SELECT MAX(n) FROM t)", "SELECT id FROM t ORDER BY n DESC LIMIT 1", "equal"),
    ("SELECT id FROM t LIMIT 1", "SELECT id FROM t LIMIT 1", "unverified"),
    ("SELECT id FROM t ORDER BY n LIMIT 2", "SELECT id FROM t ORDER BY n LIMIT 2", "unverified"),
    ("SELECT id FROM t ORDER BY n LIMIT 3", "SELECT id FROM t ORDER BY n LIMIT 3", "equal"),
    ("SELECT id FROM t ORDER BY n LIMIT 1 OFFSET 1", "SELECT id FROM t ORDER BY n LIMIT 1 OFFSET 1", "unverified"),
    ("SELECT n FROM t ORDER BY n LIMIT 2", "SELECT n FROM t ORDER BY n LIMIT 2", "equal"),
    ("SELECT COUNT(*) FROM t LIMIT 1", "SELECT COUNT(*) FROM t LIMIT 1", "equal"),
    ("SELECT id FROM t WHERE id IN (SELECT id FROM t LIMIT 2)", "SELECT id FROM t WHERE id IN (SELECT id FROM t LIMIT 2)", "unverified"),
    ("SELECT id FROM t WHERE id > 99", "SELECT id FROM t WHERE 1 = 0", "unverified"),
    ("SELECT id FROM t", "SELECT id FROM t WHERE 1 = 0", "wrong_rows"),
    ("SELECT id FROM t WHERE 1 = 0", "SELECT id FROM t", "wrong_rows"),
    ("SELECT id, n FROM t WHERE 1 = 0", "SELECT id FROM t WHERE 1 = 0", "wrong_columns"),
    ("SELECT id FROM t", "SELECT nothing FROM t", "unverified"),
    ("SELECT id FROM t", "SELECT random() FROM t", "unverified"),
    ("SELECT 城市 FROM t", "SELECT `城市` FROM t", "equal"),
    ("SELECT COUNT(name) FROM t", "SELECT COUNT(*) FROM t", "wrong_rows"),
    ("SELECT SUM(x) FROM t", "SELECT TOTAL(x) FROM t", "equal"),
    ("SELECT t.name FROM t JOIN u ON t.id = u.t_id", "SELECT t.name FROM t, u WHERE t.id = u.t_id", "equal"),
    ("SELECT t.name FROM t LEFT JOIN u ON t.id = u.t_id", "SELECT t.name FROM t JOIN u ON t.id = u.t_id", "wrong_rows"),
    ("SELECT name FROM t WHERE id IN (SELECT t_id FROM u)", "SELECT t.name FROM t JOIN u ON t.id = u.t_id", "wrong_multiplicity"),
    ("SELECT name FROM t WHERE id NOT IN (SELECT t_id FROM u)", "SELECT name FROM t WHERE NOT EXISTS (SELECT 1 FROM u WHERE u.t_id = t.id)", "wrong_rows"),
    ("SELECT date('now')", "SELECT '2025-06-15'", "equal"),
    ("SELECT CURRENT_TIMESTAMP", "SELECT '2025-06-15 12:00:00'", "equal"),
    ("```sql\nSELECT id FROM t\n```", "SELECT id FROM t", "equal"),
    ("The query:\n```\nSELECT id FROM t;\n```\nIt lists all.", "SELECT id FROM t", "equal"),
    ("SELECT id FROM t; This lists all.", "SELECT id FROM t", "equal"),
    ("SQL: SELECT id FROM t", "SELECT id FROM t", "equal"),
    ("答案是：SELECT id FROM t", "SELECT id FROM t", "equal"),
    ("<think>SELECT 1 is wrong</think>\nSELECT id FROM t", "SELECT id FROM t", "equal"),
    ("`SELECT id FROM t`", "SELECT id FROM t", "equal"),
    ("(SELECT id FROM t)", "SELECT id FROM t", "parse_error"),
    ("VALUES (1)", "SELECT 1", "equal"),
    ("WITH a AS (SELECT id FROM t) SELECT id FROM a", "SELECT id FROM t", "equal"),
    ("With pleasure. I cannot.", "SELECT id FROM t", "format_error"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold", "kind"), MATRIX)
def test_the_matrix(judge: Judge, database: Database, answer: str, gold: str, kind: str) -> None:
    found = judge.judge(answer, gold, database)
    assert (found.kind, found.kind in KINDS) == (kind, True), found.message


def test_two_instances_tell_what_one_cannot(judge: Judge, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.executescript("CREATE TABLE t (id INTEGER, n INTEGER); INSERT INTO t VALUES (1, 3), (2, 7)")
    gold, answer = "SELECT id FROM t WHERE n = 5", "SELECT id FROM t WHERE n > 3 AND n < 6"
    one = Database(paths=(str(path),))
    assert judge.judge(answer, gold, one).kind == "equal"
    found = judge.judge("SELECT id FROM t WHERE n > 3", gold, Database(paths=(str(path), str(other))))
    assert (found.kind, found.instance, found.per_instance) == ("wrong_rows", 1, ("equal", "wrong_rows"))
    # Empty on the second instance: the first still verifies.
    both = judge.judge(answer, gold, Database(paths=(str(other), str(path))))
    assert (both.kind, both.per_instance) == ("equal", ("unverified", "equal"))


def test_columns_in_another_order_are_an_option(database: Database) -> None:
    with Judge(permuted=True) as loose:
        assert loose.judge("SELECT n, id FROM t", "SELECT id, n FROM t", database).kind == "equal"
        assert loose.judge("SELECT n, n FROM t", "SELECT id, n FROM t", database).kind == "wrong_rows"
        assert (
            loose.judge("SELECT n, id FROM t ORDER BY id", "SELECT id, n FROM t ORDER BY id DESC", database).kind
            == "wrong_order"
        )


def test_quoted_values_are_strings_only_where_a_value_is_due(judge: Judge, path: Path) -> None:
    old = Database(paths=(str(path),), quoted_values=True)
    gold = "SELECT id FROM t WHERE name = 'Bob'"
    assert judge.judge('SELECT id FROM t WHERE name = "Bob"', gold, old).kind == "equal"
    assert judge.judge('SELECT id FROM t WHERE name IN ("Bob", "x")', gold, old).kind == "equal"
    assert judge.judge('SELECT "Bob" FROM t', gold, old).kind == "unknown_identifier"
    assert judge.judge('SELECT id FROM t WHERE "name" = "Bob"', gold, old).kind == "equal"


@pytest.mark.parametrize(
    ("answer", "gold", "ours", "suite", "bird"),
    [
        ("SELECT label FROM u", "SELECT DISTINCT label FROM u", "wrong_multiplicity", True, True),
        ("SELECT n, id FROM t", "SELECT id, n FROM t", "wrong_rows", True, False),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", "equal", False, False),
        ("SELECT id FROM t WHERE 0", "SELECT id FROM t WHERE id < 0", "unverified", True, True),
        ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t ORDER BY id", "wrong_order", False, True),
        ("SELECT label FROM u UNION ALL SELECT label FROM u", "SELECT label FROM u", "wrong_multiplicity", False, True),
        ("SELECT nam FROM t", "SELECT name FROM t", "unknown_identifier", False, False),
    ],
)
def test_the_public_evaluators_beside_ours(
    judge: Judge, database: Database, answer: str, gold: str, ours: str, suite: bool, bird: bool
) -> None:
    found = judge.official(answer, gold, database)
    assert (judge.judge(answer, gold, database).kind, found.test_suite, found.bird) == (ours, suite, bird)


def test_judging_is_the_same_every_time_and_over_many_workers(database: Database) -> None:
    tasks = [(answer, gold, database) for answer, gold, _ in MATRIX]
    with Judge() as one, Judge(workers=2) as two:
        assert one.judge_many(tasks) == one.judge_many(tasks) == two.judge_many(tasks)


values = st.one_of(st.none(), st.integers(-3, 3), st.floats(-2, 2), st.sampled_from(["a", "b", ""]))
bags = st.lists(st.tuples(values, values), max_size=8)


@pytest.mark.property
@given(bags, st.randoms(use_true_random=False))
def test_a_bag_equals_its_permutation_and_noise(rows: list[tuple[object, ...]], random: object) -> None:
    shuffled = [tuple(v + 1e-13 if isinstance(v, float) else v for v in row) for row in rows]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    found = compare(shuffled, rows, columns=(2, 2)).kind
    assert found == ("equal" if rows else "unverified")


@pytest.mark.property
@given(bags, bags)
def test_the_verdict_on_bags_does_not_depend_on_the_side(
    left: list[tuple[object, ...]], right: list[tuple[object, ...]]
) -> None:
    assert compare(left, right, columns=(2, 2)).kind == compare(right, left, columns=(2, 2)).kind


@pytest.mark.property
@given(st.text(max_size=60), st.sampled_from(["sqlite", "mysql", "postgres", "tsql"]))
def test_tokens_lose_nothing(text: str, dialect: str) -> None:
    assert "".join(t.text for t in tokens(text, dialect)) == text
    find_statement(text)


def test_groups_are_bags_in_order() -> None:
    gold = [(1, "a"), (1, "b"), (2, "c")]
    assert compare([(1, "b"), (1, "a"), (2, "c")], gold, columns=(2, 2), groups=(2, 1)).kind == "equal"
    assert compare([(1, "b"), (2, "c"), (1, "a")], gold, columns=(2, 2), groups=(2, 1)).kind == "wrong_order"


def test_plain_values() -> None:
    assert [plain(v) for v in (True, 2.0, "2024-01-05 00:00:00", "2024-1-5", "x-1", 2.5)] == [
        1,
        2,
        "2024-01-05",
        "2024-01-05",
        "x-1",
        2.5,
    ]


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT 1 ORDER BY 1", True),
        ("(SELECT 1 ORDER BY 1)", True),
        ("SELECT (SELECT 1 ORDER BY 1)", False),
        ("SELECT ROW_NUMBER() OVER (ORDER BY a)", False),
        ("SELECT 'ORDER BY'", False),
    ],
)
def test_is_ordered(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered
