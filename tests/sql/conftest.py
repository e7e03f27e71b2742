"""A small database that every test of the judge reads, and workers that are started once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from trimtab.sql.judge import Database, Judge
from trimtab.sql.sandbox import Sandbox

SCRIPT = """
CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, x REAL, n INTEGER, d DATE, ts TIMESTAMP, s TEXT, 城市 TEXT);
INSERT INTO t VALUES
  (1, 'Ann', 1.5, 3, '2025-01-31', '2025-01-31 10:30:00', '5', '北京'),
  (2, 'bob', 2.5, 3, '2025-02-28', '2025-02-28', '7', '上海'),
  (3, 'Bob', -0.5, 1, '2024-02-29', '2024-02-29 23:59:59', '12', '北京'),
  (4, NULL, NULL, 5, '2023-12-31', NULL, NULL, NULL);
CREATE TABLE u (id INTEGER, t_id INTEGER, y INTEGER, label TEXT);
INSERT INTO u VALUES (1, 1, 10, 'p'), (2, 1, 20, 'q'), (3, 2, 20, 'p'), (3, 2, 20, 'p'), (4, NULL, 5, 'r');
CREATE TABLE 委托备案信息 (编号 INTEGER, 备案有效期 TEXT);
INSERT INTO 委托备案信息 VALUES (1, '2025-06-14'), (2, '2025-07-01'), (3, '2026-01-01'), (4, NULL);
CREATE TABLE empty (a INTEGER, b TEXT);
"""


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database file."""
    file = tmp_path_factory.mktemp("sql") / "small.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(SCRIPT)
    return file


@pytest.fixture(scope="session")
def database(path: Path) -> Database:
    return Database(paths=(str(path),))


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as pool:
        yield pool


@pytest.fixture(scope="session")
def judge() -> Iterator[Judge]:
    with Judge() as one:
        yield one
