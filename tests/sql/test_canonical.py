"""canonical_sql: what counts as the same query, by hand."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.sql.canonical import canonical_sql, extract_sql

pytestmark = pytest.mark.unit

EQUAL = [
    ("SELECT title FROM book WHERE price > 20;", "select  Title\nfrom BOOK where price>20"),
    ("SELECT title FROM book", 'SELECT "title" FROM `book`'),
    ("SELECT title FROM book", "SELECT [title] FROM [book] -- all of them"),
    ("SELECT title FROM book WHERE city = 'Paris'", 'SELECT title FROM book WHERE city = "Paris"'),
    ("SELECT title FROM book WHERE city IN ('a', 'b')", 'SELECT title FROM book WHERE city IN ("a", "b")'),
    (
        "SELECT title FROM book WHERE price > 20 AND pages < 9",
        "SELECT title FROM book WHERE ((pages < 9) AND (price > 20))",
    ),
    ("SELECT a FROM t WHERE a = 1 AND b = 2 AND c = 3", "SELECT a FROM t WHERE c = 3 AND (b = 2 AND a = 1)"),
    ("SELECT a FROM t WHERE a = 1 AND (b = 2 OR c = 3)", "SELECT a FROM t WHERE (c = 3 OR b = 2) AND a = 1"),
    ("SELECT a FROM t WHERE a = 1 OR b = 2 AND c = 3", "SELECT a FROM t WHERE (c = 3 AND b = 2) OR a = 1"),
    ("SELECT a FROM t WHERE price > 20", "SELECT a FROM t WHERE 20 < price"),
    ("SELECT a FROM t WHERE a <> 1", "SELECT a FROM t WHERE 1 != a"),
    ("SELECT a FROM t WHERE NOT a IN (1, 2)", "SELECT a FROM t WHERE a NOT IN (1, 2)"),
    ("SELECT a FROM t WHERE NOT b IS NULL", "SELECT a FROM t WHERE b IS NOT NULL"),
    ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a ASC"),
    ("SELECT a FROM t LIMIT 10 OFFSET 5", "SELECT a FROM t LIMIT 5, 10"),
    ("SELECT title FROM book", "SELECT b.title FROM book AS b"),
    ("SELECT title FROM book", "SELECT book.title FROM book"),
    ("SELECT count(*) FROM book", "SELECT COUNT(*) AS n FROM book"),
    (
        "SELECT city, COUNT(*) FROM t GROUP BY city HAVING COUNT(*) > 3 ORDER BY COUNT(*) DESC",
        "SELECT city, COUNT(*) AS n FROM t GROUP BY city HAVING n > 3 ORDER BY n DESC",
    ),
    (
        "SELECT book.title FROM book JOIN author ON book.author_id = author.id WHERE author.name = 'Ann'",
        "SELECT b.title FROM book b INNER JOIN author AS a ON a.id = b.author_id WHERE a.name = 'Ann'",
    ),
    ("SELECT a FROM t LEFT JOIN u ON t.x = u.x", "SELECT a FROM t LEFT OUTER JOIN u ON u.x = t.x"),
    (
        "SELECT a FROM t WHERE p > (SELECT AVG(p) FROM t)",
        "SELECT x.a FROM t x WHERE x.p > (SELECT AVG(y.p) FROM t AS y)",
    ),
    ("SELECT e.a FROM emp e JOIN emp m ON e.boss = m.id", "SELECT x.a FROM emp x JOIN emp y ON x.boss = y.id"),
    ("SELECT 姓名 FROM 员工 WHERE 工资 > 100", 'select e."姓名" from `员工` e where (100 < e.工资);'),
    ("SELECT a FROM t", "(SELECT a FROM t)"),
]

DIFFERENT = [
    ("SELECT title FROM book WHERE city = 'Paris'", "SELECT title FROM book WHERE city = 'paris'"),
    ("SELECT a, b FROM t", "SELECT b, a FROM t"),
    ("SELECT a FROM t WHERE a > 1", "SELECT a FROM t WHERE a >= 1"),
    ("SELECT a FROM t WHERE a > b", "SELECT a FROM t WHERE b > a"),
    ("SELECT a FROM t WHERE a = 1 AND (b = 2 OR c = 3)", "SELECT a FROM t WHERE a = 1 AND b = 2 OR c = 3"),
    ("SELECT a FROM t WHERE NOT (a = 1 AND b = 2)", "SELECT a FROM t WHERE NOT a = 1 AND b = 2"),
    ("SELECT a - (b - c) FROM t", "SELECT a - b - c FROM t"),
    ("SELECT a * (b * (c + d)) FROM t", "SELECT a * (b * c + d) FROM t"),
    ("SELECT DISTINCT a FROM t", "SELECT a FROM t"),
    ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a DESC"),
    ("SELECT a FROM t LIMIT 1", "SELECT a FROM t LIMIT 2"),
    ("SELECT COUNT(*) FROM t", "SELECT COUNT(1) FROM t"),
    ("SELECT COUNT(DISTINCT a) FROM t", "SELECT COUNT(a) FROM t"),
    ("SELECT a FROM t WHERE a = 20", "SELECT a FROM t WHERE a = '20'"),
    ("SELECT a FROM t JOIN u ON t.x = u.x", "SELECT a FROM t LEFT JOIN u ON t.x = u.x"),
    ("SELECT t.a FROM t JOIN u ON t.x = u.x", "SELECT u.a FROM t JOIN u ON t.x = u.x"),
    ("SELECT e.a FROM emp e JOIN emp m ON e.boss = m.id", "SELECT m.a FROM emp e JOIN emp m ON e.boss = m.id"),
    ('SELECT "Order Date" FROM t', "SELECT order_date FROM t"),
    # the inner table's column is not the outer's
    ("SELECT a FROM t WHERE p > (SELECT AVG(u.p) FROM u)", "SELECT a FROM t WHERE p > (SELECT AVG(t.p) FROM u)"),
    # an alias that other clauses read is not only a name of the answer
    ("SELECT a AS b FROM t GROUP BY b", "SELECT a FROM t GROUP BY b"),
    ("SELECT a AS b, b FROM t", "SELECT a, b FROM t"),
    ("SELECT 书名 FROM 图书", "SELECT 类别 FROM 图书"),
]

NOTHING = [
    "",
    "I cannot answer that.",
    "Sure! Here is the query: SELECT a FROM t;",
    "SELECT",
    "SELECT a FROM",
    "CREATE whatever you like",  # sqlglot would log that it gives up
    "SELECT a, FROM t",
    "SELECT (a FROM t",
    "SELECT a FROM t WHERE",
    "SELECT a FROM t WHERE b = 'x",
    "SELECT a FROM t WHERE a > 3 WHERE a > 3",
    "SELECT a FROM t This query reads the table.",
    "答案是: SELECT 姓名 FROM 员工;",
    "SELECT a FROM t WHERE " + "(" * 5000,
    "SELECT a FROM t WHERE " + "NOT " * 5000 + "a",
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one: str, other: str) -> None:
    assert canonical_sql(one) is not None
    assert canonical_sql(one) == canonical_sql(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one: str, other: str) -> None:
    assert canonical_sql(one) is not None
    assert canonical_sql(other) is not None
    assert canonical_sql(one) != canonical_sql(other)


@pytest.mark.parametrize("text", NOTHING)
def test_no_statement(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert canonical_sql(text) is None
    assert not caplog.records


def test_the_form_itself() -> None:
    got = canonical_sql('select b.Title from BOOK as b where (20 < b.price) and b.city="Rome" order by b.price asc;')
    assert got == "SELECT title FROM book WHERE city = 'Rome' AND price > 20 ORDER BY price"


@pytest.mark.parametrize(("one", "other"), [pair for pair in EQUAL if "(SELECT a FROM t)" not in pair])
def test_canonical_again_is_the_same(one: str, other: str) -> None:
    once = canonical_sql(one)
    assert once is not None
    assert canonical_sql(once) == once


def test_dialect_decides_what_double_quotes_are() -> None:
    quoted, plain = 'SELECT a FROM t WHERE b = "c"', "SELECT a FROM t WHERE b = 'c'"
    assert canonical_sql(quoted, "mysql") == canonical_sql(plain, "mysql")
    assert canonical_sql(quoted, "postgres") != canonical_sql(plain, "postgres")


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("Here:\n```sql\nSELECT a FROM t;\n```\nBye; bye.", "SELECT a FROM t"),
        ("```\nSELECT a FROM t\n```", "SELECT a FROM t"),
        ("```SELECT a\nFROM t```", "SELECT a\nFROM t"),
        ("```sqlite\nSELECT a FROM t", "SELECT a FROM t"),  # never closed
        ("Here it is:\n  SELECT a FROM t;\nThis reads t; all of it.", "SELECT a FROM t"),
        ("SELECT a FROM t WHERE b = 'x;y'; SELECT 2;", "SELECT a FROM t WHERE b = 'x;y'"),
        ("查询如下:\nSELECT 姓名 FROM 员工;", "SELECT 姓名 FROM 员工"),
        ("no query", None),
    ],
)
def test_extract(text: str, sql: str | None) -> None:
    assert extract_sql(text) == sql


def test_the_log_level_is_left_alone() -> None:
    logger = logging.getLogger("sqlglot")
    canonical_sql("SELECT a FROM t WHERE")
    assert logger.disabled is False


WORDS = """SELECT a b t FROM WHERE AND OR NOT ( ) , = < 'x' "y" `z` AS JOIN ON t.a * - IN BETWEEN GROUP_BY ORDER_BY LIMIT 3
UNION COUNT(*) IS NULL . '"""


@pytest.mark.property
@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS.split()), max_size=14))
def test_any_text_has_a_form_or_none(words: list[str]) -> None:
    form = canonical_sql("SELECT " + " ".join(words).replace("_", " "))
    assert form is None or canonical_sql(form) in (form, None)
