"""One statement on one SQLite file, reading only and within limits. Runs in a worker process; `sandbox.py` speaks to it.

What stops a statement, from the cheapest to the last: its text (`statement.refuse`), the authorizer (reading the file's own
tables, and functions on a list), lengths and depths (sqlite3 limits), a budget of virtual machine steps, SQLite's own memory limit,
rows and bytes read; then the process: CPU clock, address space, no file of any size may be written.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.sql import functions
from trimtab.sql.dialects import Untranslatable, translate
from trimtab.sql.statement import double_quoted_values, refuse, without_end
from trimtab.sql.verdicts import Kind, Outcome

_PERIOD = 1000  # steps between two looks at the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one statement may use on one database.

    Attributes:
        steps: virtual machine instructions of SQLite: the same on every machine.
        seconds: CPU time of the worker, and on Windows wall time: the backstop for work inside one instruction.
        wall_seconds: wall time until the worker is killed, generous because a loaded machine must not change a verdict.
        rows, bytes: of the answer.
        length: of one string, in bytes.
        memory_mb: SQLite's heap; the worker's address space is bounded at this plus what Python needs.
    """

    steps: int = 10_000_000
    seconds: float = 0.5
    wall_seconds: float = 5.0
    rows: int = 10_000
    bytes: int = 8_000_000
    length: int = 1_000_000
    memory_mb: int = 128


_BUILT_IN = frozenset(
    [
        "abs",
        "avg",
        "ceil",
        "ceiling",
        "char",
        "coalesce",
        "concat",
        "concat_ws",
        "count",
        "cume_dist",
        "degrees",
        "dense_rank",
        "exp",
        "first_value",
        "floor",
        "format",
        "glob",
        "group_concat",
        "hex",
        "ifnull",
        "iif",
        "if",
        "instr",
        "json",
        "json_array",
        "json_array_length",
        "json_each",
        "json_extract",
        "json_group_array",
        "json_group_object",
        "json_object",
        "json_quote",
        "json_tree",
        "json_type",
        "json_valid",
        "->",
        "->>",
        "lag",
        "last_value",
        "lead",
        "length",
        "like",
        "likelihood",
        "likely",
        "ln",
        "log",
        "log10",
        "log2",
        "lower",
        "ltrim",
        "max",
        "median",
        "min",
        "mod",
        "nth_value",
        "ntile",
        "nullif",
        "octet_length",
        "percent_rank",
        "pi",
        "pow",
        "power",
        "printf",
        "quote",
        "radians",
        "rank",
        "replace",
        "round",
        "row_number",
        "rtrim",
        "sign",
        "sqrt",
        "string_agg",
        "subsec",
        "substr",
        "substring",
        "sum",
        "total",
        "trim",
        "trunc",
        "typeof",
        "unhex",
        "unicode",
        "unlikely",
        "upper",
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cos",
        "cosh",
        "sin",
        "sinh",
        "tan",
        "tanh",
        "soundex",
        "timediff",
        "match",
    ]
)

_LIMITS = {
    "SQL_LENGTH": 100_000, "COLUMN": 500, "EXPR_DEPTH": 200, "COMPOUND_SELECT": 50, "VDBE_OP": 250_000, "FUNCTION_ARG": 100, "ATTACHED": 0,
    "LIKE_PATTERN_LENGTH": 10_000, "VARIABLE_NUMBER": 10, "TRIGGER_DEPTH": 1, "WORKER_THREADS": 0,
}  # fmt: skip


class _Connection:
    """An open file, its allow-lists and its counters."""

    def __init__(self, path: str, dialect: str, limits: Limits, backwards: bool) -> None:
        where = Path(path).absolute().as_uri() + "?mode=ro&immutable=1"
        self.db = sqlite3.connect(where, uri=True, isolation_level=None, cached_statements=8, check_same_thread=False)
        self.limits = limits
        self.reason = ""  # of the last refusal of the authorizer or failure of a function
        self.denied: Kind | None = None
        self.ticks = 0
        db = self.db
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")
        for pragma in ("temp_store=MEMORY", "query_only=ON", "trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
            db.execute(f"PRAGMA {pragma}")
        db.execute(f"PRAGMA hard_heap_limit={limits.memory_mb * 2**20}")
        db.execute(f"PRAGMA reverse_unordered_selects={'ON' if backwards else 'OFF'}")
        found = db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
        self.tables = {str(name).lower() for (name,) in found if not str(name).startswith("sqlite_")}
        columns: set[str] = set()
        for (name,) in found:
            try:
                quoted = str(name).replace('"', '""')
                columns |= {str(row[1]).lower() for row in db.execute(f'PRAGMA table_info("{quoted}")')}
            except sqlite3.Error:  # a view over what is gone, a virtual table of a missing module: not ours to judge
                continue
        self.columns = frozenset(columns)
        self.functions = _BUILT_IN | functions.register(db, dialect, self._failed)
        for name, value in _LIMITS.items():
            db.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), value)
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.length)
        db.enable_load_extension(False) if hasattr(db, "enable_load_extension") else None
        db.set_authorizer(self._authorize)
        db.set_progress_handler(self._tick, _PERIOD)

    def _failed(self, why: str) -> None:
        self.reason = why

    def _tick(self) -> int:
        self.ticks += 1
        return self.ticks * _PERIOD > self.limits.steps

    def _authorize(
        self, action: int, first: str | None, second: str | None, database: str | None, inner: str | None
    ) -> int:
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            name = (first or "").lower()
            if (
                name in self.tables
                or name in ("json_each", "json_tree")
                or not (name.startswith(("sqlite_", "pragma_", "dbstat")) or name in _HIDDEN)
            ):
                return sqlite3.SQLITE_OK
            self.denied, self.reason = "exec_error", f"{first} may not be read"
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_FUNCTION:
            if (second or "").lower() in self.functions:
                return sqlite3.SQLITE_OK
            self.denied, self.reason = "exec_error", f"{second}() is not allowed here"
            return sqlite3.SQLITE_DENY
        if (first or "").startswith("sqlite_") or action == sqlite3.SQLITE_PRAGMA:
            # A table of SQLite's own (pragma_table_info, dbstat) declares itself: the statement still only meant to read.
            self.denied, self.reason = "exec_error", "a table of SQLite's own may not be read"
            return sqlite3.SQLITE_DENY
        self.denied, self.reason = "write_attempt", f"not reading (SQLite's action {action}: {first})"
        return sqlite3.SQLITE_DENY

    def run(self, sql: str) -> Outcome:
        self.reason, self.denied, self.ticks = "", None, 0
        cursor = self.db.cursor()
        try:
            cursor.execute(sql)
            if cursor.description is None:
                return Outcome(error="parse_error", message="no rows can come of it")
            rows: list[tuple[Any, ...]] = []
            size = 0
            for row in cursor:
                rows.append(row)
                size += 8 * len(row) + sum(len(v) for v in row if isinstance(v, str | bytes))
                if len(rows) > self.limits.rows or size > self.limits.bytes:
                    return self._outcome(
                        "too_many_rows", f"more than {self.limits.rows} rows or {self.limits.bytes} bytes"
                    )
            return Outcome(
                columns=tuple(d[0] for d in cursor.description), rows=tuple(rows), steps=self.ticks * _PERIOD
            )
        except sqlite3.Warning:
            return self._outcome("multi_statement", "more than one statement")
        except (sqlite3.Error, OverflowError, ValueError) as error:
            return self._explain(error)
        except MemoryError:
            return self._outcome("exec_error", "out of memory")
        finally:
            cursor.close()

    def _outcome(self, kind: Kind, message: str) -> Outcome:
        return Outcome(error=kind, message=message[:300], steps=self.ticks * _PERIOD)

    def _explain(self, error: Exception) -> Outcome:
        text = str(error)
        low = text.lower()
        if self.denied is not None:
            return self._outcome(self.denied, self.reason)
        if "interrupted" in low or self.ticks * _PERIOD > self.limits.steps:
            return self._outcome("timeout", f"more than {self.limits.steps} steps")
        if "one statement" in low:
            return self._outcome("multi_statement", text)
        if "user-defined" in low and self.reason:
            return self._outcome("exec_error", self.reason)
        if low.startswith("no such") or "no tables specified" in low:
            return self._outcome("unknown_identifier", text)
        if any(
            sign in low
            for sign in (
                "syntax error",
                "incomplete input",
                "unrecognized token",
                "parser stack overflow",
                "embedded null",
                "null character",
            )
        ):
            return self._outcome("parse_error", text)
        return self._outcome("exec_error", text)


#: Tables that no schema declares but SQLite answers for.
_HIDDEN = frozenset({"bytecode", "tables_used", "completion", "generate_series", "fsdir", "zipfile"})


class Reader:
    """Runs statements; keeps the last few databases open."""

    def __init__(self, limits: Limits, keep: int = 64) -> None:
        self.limits = limits
        self.keep = keep
        self.open: OrderedDict[tuple[Any, ...], _Connection] = OrderedDict()
        self.servers: dict[str, Any] = {}

    def run(
        self, statement: str, path: str, dialect: str, *, quoted_values: bool = False, backwards: bool = False
    ) -> Outcome:
        """One statement on one file or server.

        Args:
            path: an SQLite file, or a `postgresql://` address.
            quoted_values: read "x" as a string where a value is due and no column has that name.
            backwards: let SQLite visit rows in reverse where no order is asked for: what changes then was never determined.
        """
        server = path.startswith(("postgresql://", "postgres://"))
        refusal = refuse(statement, dialect)
        if refusal is not None:
            return Outcome(error=refusal.kind, message=refusal.message)
        if server:
            return self._on_server(statement, path, dialect)
        connection = self._connect(path, dialect, backwards)
        if isinstance(connection, Outcome):
            return connection
        try:
            if dialect == "sqlite":
                sql = double_quoted_values(statement, connection.columns) if quoted_values else statement
            else:
                sql = translate(statement, dialect)
        except Untranslatable as error:
            return Outcome(error=error.kind, message=str(error))
        return connection.run(without_end(sql))

    def _connect(self, path: str, dialect: str, backwards: bool) -> _Connection | Outcome:
        try:
            facts = Path(path).stat()
        except OSError as error:
            return Outcome(error="exec_error", message=f"no database: {error}")
        key = (path, facts.st_mtime_ns, facts.st_size, dialect, backwards)
        if key in self.open:
            self.open.move_to_end(key)
            return self.open[key]
        try:
            connection = _Connection(path, dialect, self.limits, backwards)
        except sqlite3.Error as error:
            return Outcome(error="exec_error", message=f"cannot open {path}: {error}")
        self.open[key] = connection
        if len(self.open) > self.keep:
            self.open.popitem(last=False)[1].db.close()
        return connection

    def _on_server(self, statement: str, address: str, dialect: str) -> Outcome:
        from trimtab.sql.postgres import Server

        if address not in self.servers:
            self.servers[address] = Server(address, self.limits)
        outcome: Outcome = self.servers[address].run(statement, dialect)
        return outcome

    def close(self) -> None:
        for connection in self.open.values():
            connection.db.close()
        self.open.clear()
        for server in self.servers.values():
            server.close()
        self.servers.clear()
