# ruff: noqa: E501  # a query is read best on one line
"""Queries that try to write, to read what is not theirs, to run for ever or to eat the machine: each ends in a verdict, and the next one runs."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from trimtab.sql.compare import compare
from trimtab.sql.execute import Limits
from trimtab.sql.judge import Database, Judge
from trimtab.sql.sandbox import Sandbox, _Worker
from trimtab.sql.statement import find_statement

pytestmark = pytest.mark.unit

_BIG = "printf('%.900000c', 'x')"

REFUSED = {
    "write_attempt": [
        "DROP TABLE t", "DELETE FROM t", "UPDATE t SET n = 1", "INSERT INTO t(id) VALUES (9)", "INSERT OR REPLACE INTO t(id) VALUES (1)", "REPLACE INTO t(id) VALUES (1)",
        "CREATE TABLE z (a)", "CREATE TEMP TABLE z AS SELECT 1", "CREATE TEMPORARY VIEW v AS SELECT 1", "CREATE VIEW v AS SELECT 1", "CREATE INDEX i ON t(n)",
        "CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END", "CREATE VIRTUAL TABLE z USING fts5(a)", "ALTER TABLE t ADD COLUMN q", "ALTER TABLE t RENAME TO z",
        "ATTACH DATABASE '/tmp/z.db' AS z", "ATTACH ':memory:' AS z", "DETACH DATABASE main", "PRAGMA writable_schema = 1", "PRAGMA table_info(t)", "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = WAL", "VACUUM", "VACUUM INTO '/tmp/z.db'", "REINDEX", "ANALYZE", "BEGIN", "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK", "SAVEPOINT s", "RELEASE s",
        "WITH x AS (SELECT 1) DELETE FROM t", "WITH x AS (SELECT 1) INSERT INTO t(id) SELECT 9", "WITH x AS (SELECT 1) UPDATE t SET n = 2", "/* hello */ DROP TABLE t",
        "-- a comment\nDROP TABLE t", "  \n\t DELETE FROM t", "dRoP tAbLe t", "EXECUTE x", "CALL x()", "GRANT ALL ON t TO public", "TRUNCATE TABLE t", "SELECT * INTO z FROM t",
        "SELECT * FROM t FOR UPDATE", "COPY t TO '/tmp/z'", "SET x = 1", "LOAD DATA INFILE 'x' INTO TABLE t", "LOCK TABLE t", "MERGE INTO t USING u ON 1=1 WHEN MATCHED THEN DELETE",
    ],
    "multi_statement": [
        "SELECT 1; SELECT 2", "SELECT 1; DROP TABLE t", "SELECT 1;;SELECT 2", "SELECT 1; -- x\nDELETE FROM t", "SELECT 1 /* ; */; SELECT 2", "SELECT ';'; SELECT 2", "SELECT 1;PRAGMA x",
        "SELECT 1;\n\n\nATTACH 'x' AS y", "SELECT `a;b` FROM t; VACUUM",
    ],
    "exec_error": [
        "SELECT load_extension('x')", "SELECT load_extension('x', 'y')", "SELECT random()", "SELECT randomblob(1000000000)", "SELECT zeroblob(1000000000)", "SELECT hex(zeroblob(900000000))",
        "SELECT sqlite_version()", "SELECT sqlite_source_id()", "SELECT sqlite_compileoption_get(1)", "SELECT sqlite_compileoption_used('x')", "SELECT last_insert_rowid()", "SELECT changes()",
        "SELECT total_changes()", "SELECT * FROM sqlite_master", "SELECT sql FROM sqlite_schema", "SELECT name FROM sqlite_temp_master", "SELECT * FROM main.sqlite_master",
        "SELECT fts3_tokenizer('x')", "SELECT fts3_tokenizer('simple', x'00')", "EXPLAIN SELECT 1", "EXPLAIN QUERY PLAN SELECT 1", "SELECT * FROM t ORDER BY random()", "SELECT ?",
        "SELECT ?1", "SELECT :a", "SELECT @a", "SELECT abs(-9223372036854775807 - 1)", f"SELECT replace({_BIG}, 'x', 'yyyyyyyyyy')", f"SELECT {_BIG} || {_BIG}",
        f"SELECT group_concat({_BIG}) FROM t, u", f"SELECT 'a' LIKE {_BIG}", f"SELECT {_BIG} GLOB {_BIG}", "SELECT name FROM t WHERE 1=1" + " AND 1=1" * 2000, "SELECT sum(9223372036854775807) FROM t",
        "SELECT sum(count(*)) FROM t", "SELECT n FROM t WHERE count(*) > 1", "SELECT id FROM t, u", "SELECT 1 UNION SELECT 1, 2", "SELECT * FROM t LIMIT 'a'",
        "SELECT json('{bad')", "SELECT 1 FROM t JOIN t b ON id = id", "SELECT * FROM dbstat", "SELECT * FROM sqlite_stmt",
        "SELECT likely(1), unlikely(1), sqlite_log(1, 'x')", "SELECT changes() + 1",
    ],
    "unknown_identifier": [
        "SELECT writefile('/tmp/z', 'a')", "SELECT readfile('/etc/passwd')", "SELECT edit('x')", "SELECT nam FROM t", 'SELECT "nam" FROM t', "SELECT `nam` FROM t", "SELECT [nam] FROM t",
        'SELECT name FROM t WHERE name = "Bob"', 'SELECT name FROM t ORDER BY "nothing"', 'SELECT "城镇" FROM t', "SELECT 城镇 FROM t", "SELECT name FROM t，u", "SELECT * FROM nowhere", "SELECT z.id FROM t",
        "SELECT t.id FROM t AS a", "SELECT * FROM other.t", "SELECT pg_sleep(10)", "SELECT sleep(10)", "SELECT benchmark(1000000000, 1)", "SELECT * FROM fsdir('/')", "SELECT eval('SELECT 1')",
        "SELECT id FROM t WHERE EXISTS (SELECT absent FROM u)", "SELECT * FROM generate_series(1, 1000000000)",
    ],
    "parse_error": [
        "SELECT", "SELECT FROM t", "SELECT name FRM t WHERE", "SELECT (1", "SELECT 1)", "SELECT 'abc", "SELECT name,, id FROM t", "SELECT name FROM t WHERE", "SELECT * FROM t WHERE (((", "SELECT /* x",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000, "SELECT " + "a" * 30000, "SELECT name FROM t GROUP name", "SELEC name FROM t", "SELECT 1\x00", "SELECT count(*, 1) FROM t", "SELECT name FROM t LIMIT",
        "SELECT CASE WHEN 1 THEN 2 FROM t", "WITH x AS SELECT 1 SELECT * FROM x", "SELECT #", "SELECT * FROM pragma_table_info('t'",
    ],
    "timeout": [
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r", "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT max(x) FROM r",
        "SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m, t o", "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT 1 FROM r WHERE x = 2",
        "SELECT sum(a.y * b.y) FROM u a, u b, u c, u d, u e, u f, u g, u h, u i, u j, u k, u l", "WITH RECURSIVE r(x) AS (SELECT 1 UNION SELECT (x * 7 + 1) % 100000007 FROM r) SELECT count(*) FROM r",
        "SELECT 1 FROM t WHERE EXISTS (WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT 1 FROM r WHERE x < 0)", f"SELECT instr({_BIG}, printf('%.400000c', 'x') || 'y')",
        "SELECT count(*) FROM (WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r) HAVING count(*) < 0",
    ],
    "too_many_rows": [
        "SELECT 1 FROM t a, t b, t c, t d, t e, t f, t g", "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r", f"SELECT {_BIG} FROM t a, t b",
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT 20000) SELECT x FROM r",
    ],
    "format_error": ["", "hello", "I do not know.", "```\n```", "选择所有的行", "?", "the table t", "```python\nprint(1)\n```"],
}  # fmt: skip
CASES = [(kind, sql) for kind, many in REFUSED.items() for sql in many]

# Two ways to end are both right: which one comes first is the engine's business.
LOOSE = [
    ("WITH RECURSIVE r(x, s) AS (SELECT 1, printf('%.900000c', 'x') UNION ALL SELECT x + 1, s || '' FROM r) SELECT x FROM r ORDER BY s", {"exec_error", "timeout"}),
    ("SELECT a.n FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k ORDER BY 1", {"exec_error", "timeout"}),
    ("SELECT name REGEXP '(a+)+$' FROM t", {"exec_error", "unknown_identifier"}),
    ("SELECT * FROM pragma_table_info('t')", {"exec_error", "write_attempt"}),
    ("SELECT * FROM pragma_database_list", {"exec_error", "write_attempt"}),
    ("SELECT " + ", ".join(["1"] * 5000), {"exec_error", "parse_error"}),
    (" UNION ALL ".join(["SELECT 1"] * 600), {"exec_error", "parse_error"}),
    ("SELECT abs(" * 500 + "1" + ")" * 500, {"exec_error", "parse_error"}),
    ("SELECT * FROM (" * 300 + "SELECT 1" + ")" * 300, {"exec_error", "parse_error"}),
    ("WITH x AS (SELECT * FROM x) SELECT * FROM x", {"exec_error", "unknown_identifier"}),
    ("SELECT printf('%*d', 900000000, 1)", {"exec_error", "timeout", "wrong_rows", "wrong_columns"}),
    (f"SELECT trim({_BIG}, printf('%.99c', 'y') || 'z')", {"exec_error", "timeout", "wrong_rows"}),
    ("SELECT json_extract('" + "[" * 5000 + "]" * 5000 + "', '$')", {"exec_error", "wrong_rows"}),
    ("SELECT strftime('" + "%Y" * 5000 + "', 'now')", {"exec_error", "wrong_rows"}),
    ("SELECT (SELECT count(*) FROM u u1, u u2, u u3, u u4 WHERE u1.y > t.n) FROM t, u, u v, u w, u x, u z", {"timeout", "too_many_rows"}),
]  # fmt: skip


def _digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(("kind", "sql"), CASES, ids=[f"{k}-{i}" for i, (k, _) in enumerate(CASES)])
def test_a_hostile_answer_gets_its_verdict(judge: Judge, database: Database, path: Path, kind: str, sql: str) -> None:
    before = _digest(path.parent)
    assert judge.judge(sql, "SELECT name FROM t", database).kind == kind
    assert _digest(path.parent) == before


@pytest.mark.parametrize(("sql", "kinds"), LOOSE, ids=range(len(LOOSE)))
def test_a_pathological_answer_ends(judge: Judge, database: Database, sql: str, kinds: set[str]) -> None:
    assert judge.judge(sql, "SELECT name FROM t", database).kind in kinds


@pytest.mark.parametrize(
    "answer",
    [
        "/*a*/" * 40 + "x", "/**/" * 16000 + "x", "--\n" * 26000 + "x", "--\n\n\n\n" * 12000 + "x", ":--\n" * 20000, ":with a (" * 8000, "with a(" * 11000,
        (":with " + "(" * 100) * 700, ":/*\n" * 20000, "`" * 80000, "(" * 80000, "```sql " * 11000, "'" * 79999, "/*" * 40000, ":with" + "\n" * 79000, "begin" + " " * 79000,
    ],
    ids=range(16),
)  # fmt: skip
def test_text_that_is_no_query_costs_the_trainer_no_time(answer: str) -> None:
    began = time.process_time()
    find_statement(answer)
    assert time.process_time() - began < 1  # measured: under 0.1 s; before the bounds minutes, or for ever


def test_columns_that_are_alike_cost_the_trainer_no_time() -> None:
    began = time.process_time()
    ones = (1,) * 14
    assert compare([(*ones, 2)], [(*ones, 3)], columns=(15, 15), permuted=True).kind == "wrong_rows"
    assert compare([(2, *ones)], [(*ones, 2)], columns=(15, 15), permuted=True).kind == "equal"
    assert time.process_time() - began < 1


def test_after_all_that_the_judge_still_judges(judge: Judge, database: Database) -> None:
    assert judge.judge("SELECT name FROM t", "SELECT name FROM t", database).kind == "equal"


@pytest.mark.parametrize("dialect", ["postgres", "mysql", "oracle", "tsql"])
@pytest.mark.parametrize(
    ("sql", "kinds"),
    [
        ("SELECT " + "(" * 3000 + "1" + ")" * 3000, {"parse_error", "timeout"}),
        ("SELECT " + "-" * 9000 + "1", {"parse_error", "timeout", "exec_error"}),
        ("SELECT 1 FROM t WHERE " + "NOT " * 4000 + "1 = 1", {"parse_error", "timeout", "exec_error"}),
        ("SELECT '" + "a" * 19000, {"parse_error"}),
        (
            "WITH RECURSIVE r AS (SELECT 1 AS x UNION ALL SELECT x * 2 FROM r) SELECT MAX(x) FROM r",
            {"timeout", "exec_error"},
        ),
        ("DROP TABLE t", {"write_attempt"}),
        ("SELECT 1; SELECT 2", {"multi_statement"}),
    ],
)
def test_hostile_in_another_dialect(judge: Judge, path: Path, dialect: str, sql: str, kinds: set[str]) -> None:
    there = Database(paths=(str(path),), dialect=dialect)
    assert judge.judge(sql, "SELECT name FROM t", there).kind in kinds


def test_a_regular_expression_that_explodes_is_killed(judge: Judge, path: Path) -> None:
    there = Database(paths=(str(path),), dialect="mysql")
    found = judge.judge("SELECT 1 FROM t WHERE REPEAT('a', 40) REGEXP '^(a+)+b$'", "SELECT name FROM t", there)
    assert found.kind == "timeout"


def test_the_step_budget_is_the_same_every_time(path: Path) -> None:
    with Sandbox(limits=Limits(steps=200_000)) as sandbox:
        sql = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT 5000) SELECT max(x) FROM r"
        found = [sandbox.run(sql, (str(path),))[0] for _ in range(3)]
        assert found[0].error is None and len({o.steps for o in found}) == 1 and 0 < found[0].steps < 200_000
        assert sandbox.run(sql.replace("5000", "50000"), (str(path),))[0].error == "timeout"


def test_a_worker_that_is_killed_costs_one_verdict_at_most(path: Path) -> None:
    with Sandbox() as sandbox:
        assert sandbox.run("SELECT 1", (str(path),))[0].rows == ((1,),)
        process = sandbox._all[0].process
        assert process is not None
        process.kill()
        process.wait()
        kinds = [sandbox.run("SELECT 1", (str(path),))[0].error for _ in range(3)]
        assert kinds[1:] == [None, None]


def test_a_deadline_that_is_set_while_the_watcher_falls_asleep_is_kept() -> None:
    worker, killed = _Worker(Limits()), threading.Event()

    class Process:
        def kill(self) -> None:
            killed.set()

    class Asked(threading.Event):
        """A statement comes in the moment before the watcher puts its bell away."""

        def clear(self) -> None:
            if not killed.is_set():
                worker.process, worker.deadline = cast("subprocess.Popen[bytes]", Process()), 0.0
                self.set()
            super().clear()

    first, worker.wake = worker.wake, Asked()
    first.set()
    try:
        assert killed.wait(10) and worker.overdue
    finally:
        worker.process = None
        worker.close()


def test_no_database_is_an_outcome(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.run("SELECT 1", (str(tmp_path / "none.sqlite"),))[0].error == "exec_error"
    (tmp_path / "text.sqlite").write_text("not a database " * 100, encoding="utf-8")
    assert sandbox.run("SELECT 1", (str(tmp_path / "text.sqlite"),))[0].error == "exec_error"
    assert not (tmp_path / "none.sqlite").exists()
