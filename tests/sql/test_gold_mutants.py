# ruff: noqa: E501  # a query is read best on one line
"""The mutants of a query, listed by hand, and that none of them is a change without a difference."""

from __future__ import annotations

import pytest

from trimtab.sql.gold_mutants import mutants
from trimtab.sql.schema import Schema, from_ddl

pytestmark = pytest.mark.unit

DDL = """CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT, genre TEXT, price INTEGER, pages INTEGER, author_id INTEGER, day DATE);
CREATE TABLE author (id INTEGER PRIMARY KEY, name TEXT);"""


@pytest.fixture(scope="module")
def schema() -> Schema:
    found = from_ddl(DDL, "sqlite")
    assert found is not None
    return found


def texts(gold: str, schema: Schema, dialect: str = "sqlite") -> set[str]:
    return {m.sql for m in mutants(gold, dialect, schema)}


def test_by_hand(schema: Schema) -> None:
    gold = "SELECT genre FROM book WHERE price > 55 AND title LIKE 'The%'"
    assert texts(gold, schema) == {
        "SELECT DISTINCT genre FROM book WHERE price > 55 AND title LIKE 'The%'",
        "SELECT title FROM book WHERE price > 55 AND title LIKE 'The%'",
        "SELECT genre FROM book",
        "SELECT genre FROM book WHERE price > 55",
        "SELECT genre FROM book WHERE title LIKE 'The%'",
        "SELECT genre FROM book WHERE price > 55 OR title LIKE 'The%'",
        "SELECT genre FROM book WHERE price >= 55 AND title LIKE 'The%'",
        "SELECT genre FROM book WHERE price < 55 AND title LIKE 'The%'",
        "SELECT genre FROM book WHERE price > 56 AND title LIKE 'The%'",
        "SELECT genre FROM book WHERE price > 54 AND title LIKE 'The%'",
        "SELECT genre FROM book WHERE pages > 55 AND title LIKE 'The%'",
        "SELECT genre FROM book WHERE author_id > 55 AND title LIKE 'The%'",
        "SELECT genre FROM book WHERE price > 55 AND NOT title LIKE 'The%'",
        "SELECT genre FROM book WHERE price > 55 AND title = 'The'",
        "SELECT genre FROM book WHERE price > 55 AND title LIKE '%The%'",
        "SELECT genre FROM book WHERE price > 55 AND title LIKE 'The'",
        "SELECT genre FROM book WHERE price > 55 AND genre LIKE 'The%'",
    }


@pytest.mark.parametrize(
    ("gold", "there"),
    [
        ("SELECT DISTINCT genre FROM book", "SELECT genre FROM book"),
        ("SELECT COUNT(genre) FROM book", "SELECT COUNT(DISTINCT genre) FROM book"),
        ("SELECT AVG(price) FROM book", "SELECT SUM(price) FROM book"),
        ("SELECT title FROM book ORDER BY price DESC, id LIMIT 3", "SELECT title FROM book ORDER BY price, id LIMIT 3"),
        ("SELECT title FROM book ORDER BY price DESC, id LIMIT 3", "SELECT title FROM book ORDER BY price DESC, id LIMIT 4"),
        ("SELECT title FROM book ORDER BY price DESC, id LIMIT 3", "SELECT title FROM book ORDER BY price DESC, id"),
        ("SELECT title FROM book ORDER BY price DESC, id LIMIT 3", "SELECT title FROM book ORDER BY id LIMIT 3"),
        ("SELECT title FROM book WHERE day >= '2024-03-01'", "SELECT title FROM book WHERE day >= '2024-02-29'"),
        ("SELECT title FROM book WHERE price BETWEEN 3 AND 9", "SELECT title FROM book WHERE (price > 3 AND price < 9)"),
        ("SELECT title FROM book WHERE genre IN ('a', 'b')", "SELECT title FROM book WHERE genre IN ('b')"),
        ("SELECT title FROM book WHERE genre IS NOT NULL", "SELECT title FROM book WHERE genre IS NULL"),
        ("SELECT genre FROM book GROUP BY genre HAVING COUNT(*) > 2", "SELECT genre FROM book GROUP BY genre HAVING COUNT(*) >= 2"),
        ("SELECT b.title FROM book AS b JOIN author AS a ON b.author_id = a.id", "SELECT b.title FROM book AS b LEFT JOIN author AS a ON b.author_id = a.id"),
        ("SELECT id FROM book UNION SELECT id FROM author", "SELECT id FROM book UNION ALL SELECT id FROM author"),
        ("SELECT price + pages FROM book", "SELECT price - pages FROM book"),
    ],
)  # fmt: skip
def test_each_kind_of_change(schema: Schema, gold: str, there: str) -> None:
    assert there in texts(gold, schema)


@pytest.mark.parametrize(
    ("gold", "never"),
    [
        ("SELECT MAX(price) FROM book", "SELECT DISTINCT MAX(price) FROM book"),
        ("SELECT id, title FROM book", "SELECT DISTINCT id, title FROM book"),
        ("SELECT * FROM book WHERE price > 3", "SELECT DISTINCT * FROM book WHERE price > 3"),
        ("SELECT genre, COUNT(*) FROM book GROUP BY genre", "SELECT DISTINCT genre, COUNT(*) FROM book GROUP BY genre"),
        ("SELECT id FROM book UNION SELECT id FROM author", "SELECT DISTINCT id FROM book UNION SELECT id FROM author"),
        ("SELECT COUNT(id) FROM book", "SELECT COUNT(DISTINCT id) FROM book"),
        (
            "SELECT b.title FROM book AS b JOIN author AS a ON b.author_id = a.id WHERE a.name = 'x'",
            "SELECT b.title FROM book AS b LEFT JOIN author AS a ON b.author_id = a.id WHERE a.name = 'x'",
        ),
    ],
)
def test_changes_that_never_matter_are_not_made(schema: Schema, gold: str, never: str) -> None:
    made = texts(gold, schema)
    assert made
    assert never not in made


def test_gold_is_no_mutant_of_itself_and_no_mutant_comes_twice(schema: Schema) -> None:
    gold = "SELECT title FROM book WHERE (price > 5 OR pages < 9) AND genre = 'x' ORDER BY title"
    made = [m.sql for m in mutants(gold, "sqlite", schema)]
    assert len(made) == len(set(made)) > 15
    assert gold not in made


def test_the_tree_is_whole_again_after_every_change(schema: Schema) -> None:
    gold = "SELECT a.name, COUNT(*) FROM author AS a LEFT JOIN book AS b ON b.author_id = a.id AND b.price > 3 GROUP BY a.name HAVING COUNT(*) > 1"
    assert [m.sql for m in mutants(gold, "sqlite", schema)] == [m.sql for m in mutants(gold, "sqlite", schema)]
    dropped = [m.sql for m in mutants(gold, "sqlite", schema) if m.change == "HAVING dropped"]
    assert dropped == [gold.partition(" HAVING")[0]]


def test_chinese_and_other_dialects(schema: Schema) -> None:
    table = from_ddl("CREATE TABLE 商品 (编号 INT PRIMARY KEY, 名称 TEXT, 类别 TEXT, 价格 INT)", "mysql")
    assert table is not None
    made = texts("SELECT `名称` FROM `商品` WHERE `价格` >= 10 LIMIT 2", table, "mysql")
    assert "SELECT `类别` FROM `商品` WHERE `价格` >= 10 LIMIT 2" in made
    assert "SELECT `名称` FROM `商品` WHERE `价格` > 10 LIMIT 2" in made


def test_too_many_are_thinned_evenly_and_nonsense_has_none(schema: Schema) -> None:
    gold = "SELECT title FROM book WHERE " + " AND ".join(f"price <> {n}" for n in range(30))
    assert len(mutants(gold, "sqlite", schema)) == 40
    assert mutants("not SQL (", "sqlite", schema) == []
