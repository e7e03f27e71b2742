"""A reward for the example's prompts: the answer's query is run, and its rows are compared with those of the right query.

    reward_funcs: examples/text2sql/rewards.py:execution

The databases are made here from `schemas.py`, three instances of each, filled from a fixed seed, in a temporary folder that goes when
Python ends. A wrong query is wrong on one of them at least, or nearly always: three draws of other rows rarely agree by accident.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

from schemas import SCHEMAS, Column, Schema

from trimtab.rewards.sql import GRADES, sql_execution, sql_graded

__all__ = ["GRADES", "execution", "graded"]
INSTANCES, ROWS, EMPTY = 3, 24, 0.1  # EMPTY: share of empty cells, for questions about what is missing


def execution(completion: str, output: str, schema: str) -> float:
    """1.0 if the answer gives the rows of the right query on every instance, else 0.0."""
    return sql_execution(completion, output, databases(schema))


def graded(completion: str, output: str, schema: str) -> float:
    """The same, with part of it for what reads, runs, or has the right columns."""
    return sql_graded(completion, output, databases(schema))


@functools.cache
def databases(schema: str) -> tuple[str, ...]:
    """SQLite files of a schema, by its name in the rows."""
    found = next(one for one in SCHEMAS if one.name == schema)
    return tuple(_make(found, number) for number in range(INSTANCES))


@functools.cache
def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="trimtab-text2sql-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _make(schema: Schema, number: int) -> str:
    path = _folder() / f"{schema.name}-{number}.sqlite"
    rng = random.Random(f"{schema.name} {number}")
    database = sqlite3.connect(path)
    for table in schema.tables:
        database.execute(table.ddl)
        marks = ", ".join("?" * len(table.columns))
        database.executemany(
            f"INSERT INTO {table.name} VALUES ({marks})",
            [[_cell(column, row, rng) for column in table.columns] for row in range(1, ROWS + 1)],
        )
    database.commit()
    database.close()
    return str(path)


def _cell(column: Column, row: int, rng: random.Random) -> str | int | None:
    if column.kind == "id":
        return row
    if rng.random() < EMPTY and column.kind not in ("name", "ref"):
        return None
    if column.kind == "ref":
        return rng.randint(1, ROWS)
    value = rng.choice(column.literals(held_out=rng.random() < 0.5))
    return int(value) if column.kind == "num" else value
