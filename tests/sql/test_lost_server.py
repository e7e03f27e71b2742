"""A PostgreSQL server that goes away gives no verdict. A stand-in for its driver; test_postgres.py has the same of a real one."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from trimtab.errors import DataError
from trimtab.sql.cached import CachedJudge
from trimtab.sql.execute import Limits
from trimtab.sql.judge import Database, Judge
from trimtab.sql.postgres import Server
from trimtab.sql.sandbox import Sandbox
from trimtab.sql.verdicts import Outcome

pytestmark = pytest.mark.unit

GONE = psycopg.OperationalError("server closed the connection unexpectedly")
SHUT = psycopg.errors.AdminShutdown("terminating connection due to administrator command")


class Connection:
    """A connection on which a statement ends in an error, or in one row."""

    description = ()

    def __init__(self, fails: Callable[[str], Exception | None]) -> None:
        self.fails, self.closed, self.read_only, self.rows = fails, False, False, [(1,)]
        self.begun = False

    def execute(self, sql: Any) -> Connection:
        if self.closed:
            raise psycopg.OperationalError("the connection is closed")
        text = sql.decode() if isinstance(sql, bytes) else sql
        error = None if text.startswith("SET LOCAL") or "rolsuper" in text or not self.begun else self.fails(text)
        self.begun |= text.startswith("SET LOCAL")
        if error is not None:
            raise error
        return self

    def fetchone(self) -> tuple[bool]:
        return (False,)

    def fetchmany(self, _: int) -> list[tuple[int]]:
        rows, self.rows = self.rows, []
        return rows

    def cursor(self, name: str) -> Connection:
        return self

    def rollback(self) -> None:
        self.execute("ROLLBACK")

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The outcome of one statement, given what becomes of each connection in turn: an error of its own, or of its statements."""

    def run(*connections: Any) -> Outcome:
        left = list(connections)

        def connect(address: str, **_: Any) -> Connection:
            one = left.pop(0)
            if isinstance(one, Exception):
                raise one
            return Connection(one)

        monkeypatch.setattr(psycopg, "connect", connect)
        found = Server("postgresql://reader@host/db", Limits(seconds=60)).run("SELECT id FROM t", "postgres")
        assert not left
        return found

    return run


def always(error: Exception | None) -> Callable[[str], Exception | None]:
    return lambda _: error


@pytest.mark.parametrize("error", [GONE, SHUT, psycopg.InterfaceError("the connection is lost")])
def test_a_lost_connection_is_opened_once_more(ran: Callable[..., Outcome], error: Exception) -> None:
    assert ran(always(error), always(None)).rows == ((1,),)
    found = ran(always(error), psycopg.OperationalError("connection refused"))
    assert found.broken and found.error == "exec_error" and "connection refused" in found.message
    assert ran(always(error), always(error), always(error)).broken


def test_a_connection_that_is_lost_with_its_last_statement_has_given_its_rows(ran: Callable[..., Outcome]) -> None:
    assert ran(lambda sql: GONE if sql == "ROLLBACK" else None).rows == ((1,),)


def test_what_the_statement_does_is_its_own(ran: Callable[..., Outcome]) -> None:
    """A refusal on a good connection; and a statement that ends every connection of a server that answers others."""
    found = ran(always(psycopg.errors.UndefinedColumn("no column")))
    assert found.error == "unknown_identifier" and not found.broken
    assert ran(always(psycopg.errors.QueryCanceled("too long"))).error == "timeout"
    fatal = lambda sql: None if sql == "SELECT 1" else GONE  # noqa: E731
    found = ran(fatal, fatal, fatal)
    assert found.error == "exec_error" and not found.broken


def test_no_server_is_an_error_of_the_judge_and_nothing_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        address = f"postgresql://reader@127.0.0.1:{probe.getsockname()[1]}/db"
        there = Database(paths=(str(path),), dialect="postgres")
        gold, query = "SELECT name FROM t", "SELECT t.name FROM t"
        with Judge() as judge:
            assert judge.sandbox.run(gold, (str(path), address), "postgres")[-1].broken
            cached = CachedJudge(judge)
            with pytest.raises(DataError, match="cannot be asked") as caught:
                cached.verdict(query, gold, Database(paths=(address,), dialect="postgres"))
            assert (
                caught.value.where == address and "no server" in caught.value.why and "--resume" in caught.value.remedy
            )
            # a server that goes away when gold is known
            assert cached.verdict(gold, gold, there).kind == "equal"
            lost = Outcome(error="exec_error", message="no server: it has gone", broken=True)
            with monkeypatch.context() as patch:
                patch.setattr(Sandbox, "run", lambda *_, **__: [lost])
                for ask in (lambda: cached.verdict(query, gold, there), lambda: judge.official(query, gold, there)):
                    with pytest.raises(DataError, match="cannot be asked"):
                        ask()
            assert cached.verdicts([(query, gold, there)])[0][1] is False
            assert cached.verdict(query, gold, there).kind == "equal"
