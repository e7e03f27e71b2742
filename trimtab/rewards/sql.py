"""Ready-made rewards for text to SQL: the answer's query against the row's own (`gold`), by execution or by spelling.

    sql_execution    1 where both give the same rows on every instance of the database, else 0
    sql_graded       the same, with part of it for what is nearly right (`GRADES`)
    sql_match        1 where they are the same query up to spelling (`trimtab.sql.canonical`); needs no database

The first two read the row's columns `database` (an SQLite file, a `postgresql://` address, or a list of several instances of one
schema) and, if there is one, `dialect` (sqlite, postgres, mysql, oracle, tsql). Where execution concludes nothing (gold fails, is not
determined, or both answers are empty) the spelling decides. Queries run in the sandbox of `trimtab.sql`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.sql.canonical import canonical_sql
from trimtab.sql.judge import Database, judge
from trimtab.sql.verdicts import Kind

GRADES: dict[Kind, float] = {
    "format_error": 0.0,
    "multi_statement": 0.0,
    "write_attempt": 0.0,
    "parse_error": 0.0,
    "unknown_identifier": 0.1,
    "exec_error": 0.1,
    "timeout": 0.1,
    "too_many_rows": 0.1,
    "wrong_columns": 0.2,
    "wrong_rows": 0.3,
    "wrong_order": 0.6,
    "wrong_multiplicity": 0.6,
    "equal": 1.0,
}
"""What each verdict is worth to `sql_graded`: ever more for a query that reads, that runs, that has the right columns, the right rows."""


def sql_execution(completion: str, gold: str | None, database: str | Sequence[str], dialect: str = "sqlite") -> float:
    """1.0 if the answer's query is right by execution, else 0.0."""
    return float(_verdict(completion, gold, database, dialect) == "equal")


def sql_graded(completion: str, gold: str | None, database: str | Sequence[str], dialect: str = "sqlite") -> float:
    """The worth of the verdict on the answer's query."""
    return GRADES[_verdict(completion, gold, database, dialect)]


def sql_match(completion: str, gold: str | None) -> float:
    """1.0 if the answer's query is the row's own up to spelling, else 0.0."""
    return float(_same(completion, _needed(gold)))


def _verdict(completion: str, gold: str | None, database: str | Sequence[str], dialect: str) -> Kind:
    paths = (database,) if isinstance(database, str) else tuple(map(str, database))
    for path in paths:
        if "://" not in path and not Path(path).expanduser().is_file():
            raise FileNotFoundError(f"no database file {str(Path(path).expanduser().absolute())!r} (column `database`)")
    expanded = tuple(path if "://" in path else str(Path(path).expanduser()) for path in paths)
    wanted = _needed(gold)
    found = judge(completion, wanted, Database(paths=expanded, dialect=dialect or "sqlite")).kind
    if found == "unverified":
        return "equal" if _same(completion, wanted) else "wrong_rows"
    return found


def _needed(gold: str | None) -> str:
    if gold is None:
        raise ValueError(
            "this row has no answer of its own to compare with (column `output`, or the entry's `response`)"
        )
    return gold


def _same(completion: str, gold: str) -> bool:
    wanted = canonical_sql(gold)
    return canonical_sql(completion) == wanted if wanted is not None else completion.split() == gold.split()
