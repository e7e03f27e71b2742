"""A data set as `trimtab sql build` writes it: rows with databases, by hand."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

DDL = "CREATE TABLE t (name TEXT, n INTEGER); CREATE TABLE u (name TEXT, city TEXT)"
TABLES = (
    ([("a", 1), ("b", 2), ("c", 2)], [("a", "X"), ("b", "Y")]),
    ([("a", 3), ("b", 2), ("c", 1)], [("a", "Y"), ("c", "X")]),
)
"""Two instances: on the first alone, n > 1 and n = 2 are the same."""
GOLDS = (
    "SELECT name FROM t WHERE n > 1",
    "SELECT count(*) FROM t WHERE n > 1",
    "SELECT name FROM t ORDER BY n, name",
    "SELECT t.name FROM t JOIN u ON t.name = u.name WHERE u.city = 'X'",
    "SELECT n, count(*) FROM t GROUP BY n",
    "SELECT name FROM t WHERE n = (SELECT max(n) FROM t)",
    "SELECT name FROM t UNION SELECT city FROM u",
    "SELECT name FROM t WHERE n > 99",  # no rows anywhere
)


def instances(folder: Path) -> list[str]:
    """The files, by their paths from `folder`."""
    (folder / "databases").mkdir(parents=True, exist_ok=True)
    for number, (t, u) in enumerate(TABLES):
        path = folder / "databases" / f"shop-{number}.sqlite"
        if path.exists():
            continue
        with closing(sqlite3.connect(path)) as database:
            database.executescript(DDL)
            database.executemany("INSERT INTO t VALUES (?, ?)", t)
            database.executemany("INSERT INTO u VALUES (?, ?)", u)
            database.commit()
    return [f"databases/shop-{number}.sqlite" for number in range(len(TABLES))]


def built(folder: Path, *, name: str = "shop", golds: tuple[str, ...] = GOLDS, **more: Any) -> Path:
    """`NAME.json` with its `dataset_info.json` and databases; the last of GOLDS is `unverified`."""
    paths = instances(folder)
    rows = [
        {
            "instruction": f"question {number}",
            "input": "",
            "output": gold,
            "topic": "shop",
            "database": paths,
            "dialect": "sqlite",
            "unverified": "the query gives no rows" if "99" in gold else None,
            "mutants_killed": number,
            "mutants_total": 4,
            **more,
        }
        for number, gold in enumerate(golds, 1)
    ]
    (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    entries = folder / "dataset_info.json"
    known = json.loads(entries.read_text(encoding="utf-8")) if entries.exists() else {}
    entries.write_text(json.dumps({**known, name: {"file_name": f"{name}.json"}}), encoding="utf-8")
    return folder / f"{name}.json"
