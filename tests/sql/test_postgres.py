"""A real PostgreSQL server, started for these tests where its programs are installed; skipped elsewhere (see CONTRIBUTING.md)."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from trimtab.errors import DataError
from trimtab.sql.judge import Database, Judge
from trimtab.sql.sandbox import Sandbox

pytestmark = pytest.mark.unit

_BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


def _programs() -> Path | None:
    found = shutil.which("initdb")
    return Path(found).parent if found else _BIN if _BIN and (_BIN / "initdb").exists() else None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a superuser on a fresh server, without the user's name; it is stopped at the end."""
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL programs on this machine")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    # PostgreSQL refuses to run as root; the account comes with its package. Its sockets need a short path.
    prefix = ["runuser", "-u", "postgres", "--"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    folder = Path(
        subprocess.run(
            [*prefix, "mktemp", "-d", "/tmp/ttpgXXXXXX"], check=True, capture_output=True, text=True
        ).stdout.strip()
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"

    def call(*words: object) -> None:
        subprocess.run([*prefix, *map(str, words)], check=True, stdout=subprocess.DEVNULL, cwd="/tmp")

    call(programs / "initdb", "-D", data, "-A", "trust", "-U", "boss", "-E", "UTF8", "--locale=C", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    call(programs / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
    try:
        yield f"127.0.0.1:{port}/postgres"
    finally:
        call(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        subprocess.run([*prefix, "rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module")
def loaded(server: str, path: Path) -> str:
    """The address of a reader of the small database, copied into the schema `one`."""
    import psycopg

    from trimtab.sql.postgres import copy_in

    boss = f"postgresql://boss@{server}"
    with psycopg.connect(boss) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
    copy_in(str(path), boss, "one", reader="reader")
    return f"postgresql://reader@{server}?options=-csearch_path%3Done"


AGREE = [
    "SELECT name FROM t",
    "SELECT 城市, COUNT(*) FROM t GROUP BY 城市 ORDER BY COUNT(*) DESC, 城市",
    "SELECT 编号 FROM 委托备案信息 WHERE TO_DATE(备案有效期, 'YYYY-MM-DD') > NOW()",
    "SELECT AVG(x), SUM(n), ROUND(AVG(x)::numeric, 2) FROM t",
    "SELECT EXTRACT(YEAR FROM d), DATE_TRUNC('month', ts), d + INTERVAL '1 month', d - DATE '2025-01-01' FROM t",
    "SELECT t.name, SUM(u.y) FROM t LEFT JOIN u ON t.id = u.t_id GROUP BY t.id, t.name",
    "SELECT id FROM t ORDER BY name",
    "SELECT n / 2, n::float / 2, TO_CHAR(ts, 'YYYY-MM') FROM t",
    "SELECT name FROM t WHERE name LIKE 'b%' OR name ILIKE 'a%'",
    "SELECT id, RANK() OVER (ORDER BY n DESC) FROM t",
    "SELECT d FROM t WHERE d > CURRENT_DATE - 200 AND d < NOW()",
    "SELECT STRING_AGG(name, ',' ORDER BY id) FROM t",
]


SQLITE = [
    "SELECT id FROM t WHERE name LIKE 'b%'",
    "SELECT id FROM t WHERE name NOT LIKE 'B%' ESCAPE '!'",
    "SELECT strftime('%Y', d), COUNT(*) FROM t GROUP BY strftime('%Y', d)",
    "SELECT id FROM t WHERE strftime('%Y-%m', d) = '2025-01'",
    "SELECT id, DATE('now'), datetime('now'), time('now') FROM t WHERE d < DATE('now')",
    "SELECT id FROM t WHERE d > date('now', '-1 year', 'start of month')",
    "SELECT date(ts, '+1 day'), unixepoch(ts) FROM t",
    "SELECT julianday('now') - julianday(ts) FROM t",
    "SELECT n / 2, n * 1.0 / 2, CAST(x AS INTEGER), x FROM t WHERE id = 3",
    "SELECT label, COUNT(*), SUM(y), AVG(y) FROM u GROUP BY label HAVING COUNT(*) > 1 ORDER BY 2 DESC",
    "SELECT name FROM t ORDER BY name",
    "SELECT name FROM t ORDER BY x DESC LIMIT 2",
    "SELECT DISTINCT t.name FROM t JOIN u ON u.t_id = t.id WHERE u.y > (SELECT AVG(y) FROM u)",
    "SELECT id FROM t WHERE id NOT IN (SELECT t_id FROM u WHERE t_id IS NOT NULL)",
    "SELECT id FROM t EXCEPT SELECT t_id FROM u",
    "SELECT name, CASE WHEN n > 2 THEN 'many' ELSE 'few' END FROM t WHERE x BETWEEN -1 AND 2",
    "SELECT 城市, MAX(d), MIN(ts) FROM t WHERE 城市 IS NOT NULL GROUP BY 城市",
    "SELECT id, ifnull(name, '?'), substr(name, 1, 2), upper(name) FROM t",
]
"""What the golds of `examples/text2sql` are made of, in SQLite's own dialect."""


@pytest.mark.parametrize("sql", SQLITE)
def test_a_query_of_sqlite_means_the_same_on_a_server(judge: Judge, loaded: str, path: Path, sql: str) -> None:
    both = [judge.gold(sql, Database(paths=(where,))) for where in (str(path), loaded)]
    assert [g.reason for g in both] == ["", ""] and both[0].outcome.rows
    found, _ = judge._compare(both[1].outcome, both[0])
    assert found == "equal", (both[0].outcome.rows, both[1].outcome.rows)
    assert both[0].groups == both[1].groups
    for answer in (sql, "SELECT id FROM t WHERE id = 1"):
        kinds = [judge.judge(answer, sql, Database(paths=(where,))).kind for where in (str(path), loaded)]
        assert kinds[0] == kinds[1]


def test_a_date_function_that_has_no_translation_is_refused(judge: Judge, loaded: str) -> None:
    found = judge.gold("SELECT date(d, 'weekday 1') FROM t", Database(paths=(loaded,)))
    assert "no translation" in found.reason


@pytest.mark.parametrize("sql", AGREE)
def test_both_engines_give_the_same_rows(judge: Judge, loaded: str, path: Path, sql: str) -> None:
    both = [judge.gold(sql, Database(paths=(where,), dialect="postgres")) for where in (str(path), loaded)]
    assert [g.reason for g in both] == ["", ""] and both[0].outcome.rows
    found, _ = judge._compare(both[0].outcome, both[1])
    assert found == "equal", (both[0].outcome.rows, both[1].outcome.rows)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("SELECT name FROM t", "equal"),
        ("SELECT DISTINCT name, id FROM t", "wrong_columns"),
        ("SELECT nam FROM t", "unknown_identifier"),
        ("SELECT * FROM nowhere", "unknown_identifier"),
        ("SELECT foo(id) FROM t", "unknown_identifier"),
        ("SELECT name FROM t WHERE (", "parse_error"),
        ("SELECT 1 / 0", "exec_error"),
        ("DELETE FROM t", "write_attempt"),
        ("WITH x AS (DELETE FROM t RETURNING id) SELECT * FROM x", "write_attempt"),
        ("SELECT name INTO z FROM t", "write_attempt"),
        ("SELECT name FROM t; DROP TABLE t", "multi_statement"),
        ("SELECT pg_sleep(5)", "exec_error"),
        ("SELECT pg_read_file('/etc/passwd')", "exec_error"),
        ("SELECT lo_import('/etc/passwd')", "exec_error"),
        ("SELECT set_config('statement_timeout', '0', false)", "exec_error"),
        ("SELECT query_to_xml('DELETE FROM t', true, true, '')", "exec_error"),
        ("SELECT rolname FROM pg_roles", "exec_error"),
        ("SELECT table_name FROM information_schema.tables", "exec_error"),
        ('SELECT rolname FROM "pg_roles"', "exec_error"),
        ("SELECT array_length(array_fill(1, ARRAY[130000000]), 1)", "exec_error"),
        ("SELECT format('%1000000000s', 'x')", "timeout"),
        ("SELECT (SELECT count(*) FROM generate_series(1, 9000 + a)) FROM generate_series(1, 10000) AS a", "timeout"),
        ("SELECT repeat('x', 900000000)", "exec_error"),
        ("WITH RECURSIVE r(x) AS (SELECT 1::bigint UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r", "timeout"),
        ("SELECT a.id FROM generate_series(1, 100000) AS a(id)", "too_many_rows"),
    ],
)
def test_verdicts_of_the_server(judge: Judge, loaded: str, answer: str, kind: str) -> None:
    there = Database(paths=(loaded,), dialect="postgres")
    assert judge.sandbox.run("SELECT 1", (loaded,), "postgres")[0].rows == ((1,),)  # the connection is open
    began = time.monotonic()
    found = judge.judge(answer, "SELECT name FROM t", there)
    assert time.monotonic() - began < 3  # 1 s on an idle machine
    assert found.kind == kind, found.message


def test_nothing_was_written_and_a_superuser_is_refused(sandbox: Sandbox, loaded: str, server: str) -> None:
    assert sandbox.run("SELECT COUNT(*) FROM t", (loaded,), "postgres")[0].rows == ((4,),)
    found = sandbox.run("SELECT 1", (f"postgresql://boss@{server}",), "postgres")[0]
    assert found.broken and "superuser" in found.message and "GRANT SELECT" in found.message


def test_a_server_that_goes_away_gives_no_verdict(judge: Judge, loaded: str, server: str) -> None:
    import psycopg

    there = Database(paths=(loaded,), dialect="postgres")
    assert judge.judge("SELECT id FROM t", "SELECT id FROM t", there).kind == "equal"
    with psycopg.connect(f"postgresql://boss@{server}", autocommit=True) as boss:
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'"
        boss.execute(end)
        assert judge.judge("SELECT t.id FROM t", "SELECT id FROM t", there).kind == "equal"  # on a new connection
        boss.execute("ALTER ROLE reader NOLOGIN")
        boss.execute(end)
        with pytest.raises(DataError, match="cannot be asked") as caught:
            judge.judge("SELECT id + 0 FROM t", "SELECT id FROM t", there)
        assert "not permitted to log in" in caught.value.why
        boss.execute("ALTER ROLE reader LOGIN")
    assert judge.judge("SELECT id + 0 FROM t", "SELECT id FROM t", there).kind == "equal"


def test_copy_keeps_every_row(loaded: str, sandbox: Sandbox, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT * FROM u ORDER BY id, y").fetchall()
    assert list(sandbox.run("SELECT * FROM u ORDER BY id, y", (loaded,), "postgres")[0].rows) == rows
