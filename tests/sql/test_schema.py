"""Schemas as DDL, prompt lines and Spider folders give them, and as gold queries alone do."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trimtab.sql.assign import NONE, Ask, assign
from trimtab.sql.infer import analyse, complete
from trimtab.sql.schema import (
    Link,
    Schema,
    create_statements,
    from_ddl,
    from_json,
    from_lines,
    from_spider,
    from_sqlite,
    kind_of,
)

pytestmark = pytest.mark.unit

DDL = """
CREATE TABLE author (id INTEGER PRIMARY KEY, name VARCHAR(40) NOT NULL, born DATE);
CREATE TABLE book (isbn TEXT UNIQUE, title TEXT, price NUMERIC(8, 2), author_id INT REFERENCES author, lent TIMESTAMP,
  sold BOOLEAN, "odd)" TEXT DEFAULT ')', PRIMARY KEY (isbn));
CREATE TABLE copy (isbn TEXT, number INTEGER, FOREIGN KEY (isbn) REFERENCES book (isbn), PRIMARY KEY (isbn, number));
"""


def no_constant(_: str) -> Any:
    return None


def facts_of(gold: str, dialect: str = "sqlite", known: Schema | None = None, constant: Any = no_constant) -> Any:
    found = analyse(gold, dialect, known, constant)
    assert found is not None
    return found


def kinds(schema: Schema, table: str) -> dict[str, str]:
    found = schema.table(table)
    assert found is not None
    return {c.name: c.kind + (f" {c.pattern}" if c.pattern else "") for c in found.columns}


def test_ddl_gives_kinds_keys_and_links() -> None:
    schema = from_ddl(DDL, "sqlite")
    assert schema is not None
    assert kinds(schema, "BOOK") == {
        "isbn": "text", "title": "text", "price": "real", "author_id": "integer", "lent": "timestamp", "sold": "boolean", "odd)": "text",
    }  # fmt: skip
    author, book, copy = schema.tables
    assert (author.primary, book.primary, copy.primary) == (("id",), ("isbn",), ("isbn", "number"))
    assert [c.required for c in author.columns] == [True, True, False]
    assert [c.unique for c in copy.columns] == [False, False]  # only together
    assert schema.links == (Link("book", "author_id", "author", "id", True), Link("copy", "isbn", "book", "isbn", True))


def test_ddl_is_found_among_prose() -> None:
    prompt = "Given:\ncreate table `订单` (`编号` int(11) NOT NULL COMMENT '主键)', `日期` datetime);\n查询订单数。"
    assert len(create_statements(prompt)) == 1
    schema = from_ddl(prompt, "mysql")
    assert schema is not None
    assert kinds(schema, "订单") == {"编号": "integer", "日期": "timestamp"}
    assert from_ddl("please create table", "sqlite") is None


def test_the_statements_make_the_tables() -> None:
    schema = from_ddl(DDL, "sqlite")
    assert schema is not None
    with closing(sqlite3.connect(":memory:")) as db:
        for statement in schema.ddl():
            db.execute(statement)
        assert [r[1] for r in db.execute("PRAGMA table_info(book)")][-1] == "odd)"


@pytest.mark.parametrize(
    ("line", "columns"),
    [
        ("book(id, title, genre)", ["id", "title", "genre"]),
        ("- 商品（编号，名称、价格）", ["编号", "名称", "价格"]),
        ("t(a INTEGER, b: varchar(20), c)", ["a", "b", "c"]),
        ("List the books (all of them)", None),
        ("SELECT count(id)", None),
        ("f(1, 2)", None),
        ("t(a, a)", None),
    ],
)
def test_prompt_lines(line: str, columns: list[str] | None) -> None:
    schema = from_lines(f"Tables:\n{line}\nHow many?")
    if columns is None:
        assert schema is None
    else:
        assert schema is not None
        assert [c.name for c in schema.tables[0].columns] == columns


def test_declared_types() -> None:
    declared = [
        "INT",
        "bigint(20)",
        "NUMBER(10)",
        "number(10, 2)",
        "decimal",
        "double precision",
        "varchar2(9)",
        "datetime",
        "date",
        "bool",
        "",
    ]
    assert [kind_of(d) for d in declared] == [
        "integer", "integer", "integer", "real", "real", "real", "text", "timestamp", "date", "boolean", "",
    ]  # fmt: skip


def test_a_query_is_read_through_its_aliases() -> None:
    facts = facts_of(
        "SELECT b.title FROM book AS b JOIN author a ON b.author_id = a.id WHERE a.country = 'Peru' AND NOT b.price <= 20 "
        "AND b.id IN (SELECT book_id FROM loan WHERE days BETWEEN 3 AND 5) ORDER BY b.price LIMIT 2"
    )
    assert sorted(facts.sources) == ["author", "book", "loan"]
    told = {(facts.table(c.place), c.place[1], c.op, c.values, c.negated) for c in facts.conditions}
    assert told == {
        ("author", "country", "=", ("Peru",), False),
        ("book", "price", "<=", (20,), True),
        ("loan", "days", "between", (3, 5), False),
    }
    pairs = {frozenset({(facts.table(a), a[1]), (facts.table(b), b[1])}) for a, b in facts.joined}
    assert pairs == {
        frozenset({("book", "author_id"), ("author", "id")}),
        frozenset({("book", "id"), ("loan", "book_id")}),
    }
    assert facts.limited
    assert [(facts.table(p), p[1]) for p in facts.ordered] == [("book", "price")]


def test_columns_of_derived_tables_lead_to_their_source() -> None:
    facts = facts_of("WITH x AS (SELECT price AS p FROM book) SELECT p FROM x WHERE p > 7")
    (condition,) = facts.conditions
    assert (facts.table(condition.place), condition.place[1], condition.values) == ("book", "price", (7,))


def test_evidence_for_kinds() -> None:
    golds = [
        "SELECT * FROM 合同 WHERE TO_DATE(到期, 'YYYY/MM/DD') > NOW()",
        "SELECT SUM(总额), AVG(占比) FROM 合同 WHERE 占比 > 0.5 AND EXTRACT(YEAR FROM 签订) = 2024",
        "SELECT 标题 FROM 合同 WHERE 标题 LIKE '%采购%' AND 录入 > '2024-01-01 08:00:00' AND 有效 = TRUE",
        "SELECT COUNT(*) FROM 合同 JOIN 客户 ON 合同.客户号 = 客户.编号 WHERE 客户.等级 = 3",
    ]
    schema = complete(None, [facts_of(g, "postgres") for g in golds])
    assert kinds(schema, "合同") == {
        "编号": "integer", "到期": "text %Y/%m/%d", "总额": "integer", "占比": "real", "签订": "date", "标题": "text", "录入": "timestamp",
        "有效": "boolean", "客户号": "integer",
    }  # fmt: skip
    assert kinds(schema, "客户") == {"编号": "integer", "等级": "integer"}
    assert [(k.table, k.column, k.to, k.key) for k in schema.links] == [("合同", "客户号", "客户", "编号")]


def test_what_is_declared_stays_and_text_may_hold_dates() -> None:
    schema = from_ddl("CREATE TABLE t (id INT PRIMARY KEY, d TEXT, n TEXT)", "sqlite")
    whole = complete(schema, [facts_of("SELECT id FROM t WHERE strftime('%Y', d) = '2020' AND n > 3 AND missing = 1")])
    assert kinds(whole, "t") == {"id": "integer", "d": "text %Y-%m-%d", "n": "text"}


def test_names_decide_where_no_query_does() -> None:
    schema = from_lines("author(id, name)\nbook(id, title, price, publish_date, author_id)")
    assert schema is not None
    whole = complete(schema, [facts_of("SELECT title FROM book", known=schema)])
    assert kinds(whole, "book") == {
        "id": "integer",
        "title": "text",
        "price": "integer",
        "publish_date": "date",
        "author_id": "integer",
    }
    assert [(k.table, k.column, k.to, k.key) for k in whole.links] == [("book", "author_id", "author", "id")]
    assert whole.table("book").primary == ("id",)  # type: ignore[union-attr]


def test_rows_that_show_parts_of_one_database_share_it() -> None:
    asks = [
        Ask(gold="SELECT a FROM x", text="x(id, a)"),
        Ask(gold="SELECT b FROM y", text="y(id, b)"),
        Ask(gold="SELECT x.a FROM x JOIN y ON x.id = y.id", text="x(id, a)\ny(id, b)"),
        Ask(gold="SELECT c FROM y", text="y(id, c)"),  # another y
        Ask(gold="SELECT a FROM x", text="x(id, a)", key="elsewhere"),
    ]
    names, schemas = assign(asks, "sqlite", no_constant)
    assert names[0] == names[1] == names[2]
    assert len({names[0], names[3], names[4]}) == 3
    assert [t.name for t in schemas[names[0]].tables] == ["x", "y"]


def test_rows_that_show_nothing_are_joined_by_their_tables() -> None:
    asks = [
        Ask(gold="SELECT a FROM x WHERE b > 1"),
        Ask(gold="SELECT p FROM z"),
        Ask(gold="SELECT x.c FROM x, y WHERE x.id = y.x_id"),
        Ask(gold="this is no SQL at all ((("),
    ]
    names, schemas = assign(asks, "sqlite", no_constant)
    assert names == ["x", "z", "x", NONE]
    assert [(t.name, [c.name for c in t.columns]) for t in schemas["x"].tables] == [
        ("x", ["b", "a", "c", "id"]),
        ("y", ["x_id"]),
    ] or {t.name: {c.name for c in t.columns} for t in schemas["x"].tables} == {
        "x": {"a", "b", "c", "id"},
        "y": {"x_id"},
    }
    assert schemas[NONE].tables == ()


def spider(folder: Path) -> Path:
    """A Spider folder with one database: singers, their concerts and a column of dates kept as text."""
    entry = {
        "db_id": "stage",
        "table_names_original": ["singer", "concert"],
        "column_names_original": [
            [-1, "*"],
            [0, "id"],
            [0, "name"],
            [0, "age"],
            [1, "singer_id"],
            [1, "held"],
            [1, "fee"],
        ],
        "column_types": ["text", "number", "text", "number", "number", "time", "number"],
        "primary_keys": [1],
        "foreign_keys": [[4, 1]],
    }
    (folder / "tables.json").write_text(json.dumps([entry, {**entry, "db_id": "absent"}]), encoding="utf-8")
    place = folder / "database" / "stage"
    place.mkdir(parents=True)
    with closing(sqlite3.connect(place / "stage.sqlite")) as db:
        db.executescript(
            "CREATE TABLE singer (id INTEGER PRIMARY KEY, name VARCHAR(20), age INT);"
            "CREATE TABLE concert (singer_id INT REFERENCES singer(id), held TEXT, fee REAL);"
            "INSERT INTO singer VALUES (1, 'Adele', 35), (2, 'Björk', 58), (3, 'Cher', 77);"
            "INSERT INTO concert VALUES (1, '2014-05-01', 9.5), (1, '2015-06-02', 8), (2, '2015-07-03', 7);"
        )
    return folder


def test_a_spider_folder(tmp_path: Path) -> None:
    found = from_spider(spider(tmp_path))
    stage, absent = found["stage"], found["absent"]
    assert kinds(stage, "singer") == {"id": "integer", "name": "text", "age": "integer"}
    assert stage.tables[0].columns[1].values == ("Adele", "Björk", "Cher")
    assert {(k.table, k.column, k.to, k.key) for k in stage.links} == {("concert", "singer_id", "singer", "id")}
    assert stage.sample.endswith("stage.sqlite")
    assert kinds(absent, "concert") == {"singer_id": "real", "held": "date", "fee": "real"}
    assert absent.sample == ""


def test_an_instance_says_what_it_was_made_for(tmp_path: Path) -> None:
    schema = complete(None, [facts_of("SELECT * FROM 表 WHERE TO_DATE(到期, 'YYYYMMDD') > NOW()", "postgres")])
    path = tmp_path / "one.sqlite"
    with closing(sqlite3.connect(path)) as db:
        for statement in schema.ddl():
            db.execute(statement)
    assert kinds(from_sqlite(path, Schema(name="x", tables=())), "表") == {"编号": "integer", "到期": "text %Y%m%d"}


@pytest.mark.parametrize("value", [{}, [1], [{"name": "a"}], [{"name": "a", "ddl": "no"}]])
def test_a_list_of_schemas_must_be_one(value: Any) -> None:
    with pytest.raises(ValueError, match=r"name|CREATE"):
        from_json(value, "sqlite")


@pytest.mark.parametrize("text", [None, "[", "{}", '[{"db_id": "x"}]'])
def test_a_spider_folder_must_be_one(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tables.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tables\.json"):
        from_spider(tmp_path)
