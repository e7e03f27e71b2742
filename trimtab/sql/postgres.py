"""The same contract on a PostgreSQL server: reading only, within limits. Runs in the worker process.

Each statement is its own read-only transaction that is rolled back, with statement_timeout and lock_timeout, read through a
server-side cursor (which takes nothing but a query) up to the row limit. The role must not be a superuser: a superuser reads the
server's files from inside a SELECT. `copy_in` loads an SQLite file into a schema, for users; no command calls it.
"""

from __future__ import annotations

import datetime as dt
import decimal
import itertools
import json
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError
from trimtab.sql import functions
from trimtab.sql.dialects import Untranslatable, translate
from trimtab.sql.statement import tokens, without_end
from trimtab.sql.verdicts import Kind, Outcome

if TYPE_CHECKING:
    from trimtab.sql.execute import Limits

_DENIED = re.compile(
    r"pg_\w+|lo_\w+|dblink\w*|set_config|current_setting|nextval|setval|currval|lastval|query_to_\w+|table_to_\w+|cursor_to_\w+|database_to_\w+|schema_to_\w+"
    r"|txid_\w+|inet_\w+|random|gen_random_uuid|clock_timestamp|timeofday|version|xmlparse|xpath\w*|ts_stat|brin_\w+|gin_\w+|has_\w+privilege|repeat|lpad|rpad|array_fill",
    re.IGNORECASE,
)


class Server:
    """One connection to a server.

    Args:
        address: `postgresql://role:password@host:port/database`.
    """

    def __init__(self, address: str, limits: Limits) -> None:
        self.address, self.limits = address, limits
        self.connection: Any = None

    def _connect(self) -> Any:
        import psycopg

        if self.connection is None or self.connection.closed:
            # Less than the worker's wall clock: a server that is silent is no answer that takes too long.
            connection = psycopg.connect(self.address, connect_timeout=3, autocommit=False)
            connection.read_only = True
            row = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
            connection.rollback()
            if row and row[0]:
                connection.close()
                raise superuser_refused()
            self.connection = connection
        return self.connection

    def run(self, statement: str, dialect: str) -> Outcome:
        import psycopg

        try:
            sql = without_end(translate(statement, dialect, "postgres"), "postgres")
        except Untranslatable as error:
            return Outcome(error=error.kind, message=str(error))
        pieces = [t for t in tokens(sql, "postgres") if t.kind not in ("space", "comment")]
        for token, after in itertools.pairwise(pieces):
            if after.text == "(" and token.kind in ("word", "double") and _DENIED.fullmatch(token.text.strip('"')):
                return Outcome(error="exec_error", message=f"{token.text}() is not allowed here")
        if any(
            (t.kind in ("word", "double") and t.text.strip('"').lower() in ("pg_catalog", "information_schema"))
            or t.text.strip('"').lower().startswith("pg_")
            for t in pieces
        ):
            return Outcome(error="exec_error", message="the catalogue may not be read")
        try:
            outcome = self._read(self._connect(), sql)
            if outcome.broken:  # once more, on a new connection
                outcome = self._read(self._connect(), sql)
            if outcome.broken and not self._read(self._connect(), "SELECT 1").broken:
                # The server is there: it is this statement that ends its connection, say by a value that no client has room for.
                outcome = replace(outcome, broken=False)
            return outcome
        except ConfigError as error:
            return Outcome(error="exec_error", message=f"{error.what}: {error.why}; {error.remedy}", broken=True)
        except psycopg.Error as error:
            return Outcome(error="exec_error", message=f"no server: {_line(error)}", broken=True)

    def _read(self, connection: Any, sql: str) -> Outcome:
        """The rows of a translated statement."""
        import psycopg

        began = time.monotonic()
        try:
            # The server's own timeout is per batch of rows, and work inside one function does not look at it.
            _alarm(self.limits.seconds + 0.3)
            milliseconds = max(1, int(self.limits.seconds * 1000))
            connection.execute(f"SET LOCAL statement_timeout = {milliseconds}")
            connection.execute(f"SET LOCAL lock_timeout = {milliseconds}")
            with connection.cursor(name="answer") as cursor:
                cursor.execute(sql.encode())
                rows: list[tuple[Any, ...]] = []
                size = 0
                while batch := cursor.fetchmany(256):
                    for row in batch:
                        rows.append(tuple(map(_plain, row)))
                        size += 8 * len(row) + sum(len(v) for v in rows[-1] if isinstance(v, str | bytes))
                    if len(rows) > self.limits.rows or size > self.limits.bytes:
                        return Outcome(
                            error="too_many_rows",
                            message=f"more than {self.limits.rows} rows or {self.limits.bytes} bytes",
                        )
                    if time.monotonic() - began > self.limits.seconds:
                        return Outcome(error="timeout", message=f"more than {self.limits.seconds:g} s")
                return Outcome(columns=tuple(c.name for c in cursor.description or ()), rows=tuple(rows))
        except (psycopg.Error, MemoryError, ValueError, UnicodeError) as error:
            lost = _lost(error)
            if lost:
                connection.close()
            return Outcome(error=_kind(getattr(error, "sqlstate", None)), message=_line(error), broken=lost)
        finally:
            _alarm(0)
            try:
                connection.rollback()
            except psycopg.Error:  # lost: the next statement has a new one
                connection.close()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()


def _alarm(seconds: float) -> None:
    """End this process after so many seconds of wall time, as a worker may be; 0 stops the clock."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def superuser_refused() -> ConfigError:
    """The error for a role that could do anything."""
    return ConfigError(
        "sql_database: this PostgreSQL role is a superuser",
        why="a superuser can read the server's files, and end its processes, from inside a SELECT",
        remedy="CREATE ROLE reader LOGIN PASSWORD '...'; GRANT USAGE ON SCHEMA ... TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA ... TO reader;",
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _lost(error: BaseException) -> bool:
    """The connection is gone, and the statement need not be why."""
    import psycopg

    state = getattr(error, "sqlstate", None)
    gone = state is None or state.startswith(("08", "57P0"))
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and gone


def _kind(state: str | None) -> Kind:
    """SQLSTATE to verdict."""
    if state in ("57014", "55P03"):
        return "timeout"
    if state in ("42703", "42P01", "42883", "3F000", "42704"):
        return "unknown_identifier"
    if state == "42601":
        return "parse_error"
    if state in ("25006", "42501"):
        return "write_attempt" if state == "25006" else "exec_error"
    return "exec_error"


def _plain(value: Any) -> Any:
    """A server's value as SQLite would hold it."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() and abs(value) < 2**63 else float(value)
    if isinstance(value, dt.datetime):
        return functions.iso(value.replace(tzinfo=None))
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return functions.interval_text(0, value.days, value.seconds + value.microseconds / 1e6)
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return value if isinstance(value, int | float | str | bytes | None) else str(value)


def copy_in(path: str, address: str, schema: str, reader: str = "") -> None:
    """Load the tables of an SQLite file into a new PostgreSQL schema (an old one of that name is dropped).

    Args:
        address: of a role that may create schemas.
        reader: a role that is then given SELECT on them.
    """
    import sqlite3
    from contextlib import closing

    import psycopg
    from psycopg import sql

    with closing(sqlite3.connect(path)) as source, psycopg.connect(address) as target:
        target.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
        target.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        names = [
            n
            for (n,) in source.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            )
        ]
        for name in names:
            quoted = name.replace('"', '""')
            columns = source.execute(f'PRAGMA table_info("{quoted}")').fetchall()
            # Names in lower case: PostgreSQL folds what a query does not quote.
            fields = [
                sql.SQL("{} " + _server_type(str(c[2]))).format(sql.Identifier(str(c[1]).lower())) for c in columns
            ]
            table = sql.Identifier(schema, name.lower())
            target.execute(sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(fields)))
            rows = source.execute(f'SELECT * FROM "{quoted}"').fetchall()
            marks = sql.SQL(", ").join(sql.Placeholder() * len(columns))
            with target.cursor() as cursor:
                cursor.executemany(sql.SQL("INSERT INTO {} VALUES ({})").format(table, marks), rows)
        if reader:
            target.execute(
                sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), sql.Identifier(reader))
            )
            target.execute(
                sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA {} TO {}").format(
                    sql.Identifier(schema), sql.Identifier(reader)
                )
            )


def _server_type(declared: str) -> str:
    kind = declared.upper()
    for sign, name in (("INT", "bigint"), ("TIMESTAMP", "timestamp"), ("DATETIME", "timestamp"), ("DATE", "date"), ("REAL", "double precision"),
                       ("FLOA", "double precision"), ("DOUB", "double precision"), ("NUM", "numeric"), ("DEC", "numeric"), ("BOOL", "integer"),
                       ("BLOB", "bytea")):  # fmt: skip
        if sign in kind:
            return name
    return "text"
