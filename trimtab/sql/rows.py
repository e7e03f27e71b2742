"""A data row's databases, as `trimtab sql build` writes them into its columns.

| column | what it holds |
|---|---|
| `database` | SQLite files of one schema, relative to the folder of the data file, or `postgresql://` addresses; one or a list |
| `dialect` | what the row's query is written in: sqlite, postgres, mysql, oracle, tsql; sqlite where it is missing |
| `unverified` | why no answer to this row can be judged; null where one can |
| `mutants_killed`, `mutants_total` | how many wrong versions of the row's query its databases tell from it: what `equal` is worth |

`quoted_values: true` reads "x" as a string where a value is due (old SQLite data such as Spider).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, DataError
from trimtab.sql.dialects import DIALECTS
from trimtab.sql.judge import Database
from trimtab.types import Example

DATABASE, DIALECT, UNVERIFIED, KILLED, TOTAL = "database", "dialect", "unverified", "mutants_killed", "mutants_total"
QUOTED = "quoted_values"
COLUMNS = (DATABASE, DIALECT, QUOTED, UNVERIFIED, KILLED, TOTAL)
"""Every column of a built row that is read here."""
BUILD = "`trimtab sql build FILE` writes a data set whose rows have databases"


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlRow:
    """Where the row's query is run, and what can be concluded from it.

    Attributes:
        unverified: why no answer can be judged; None where one can.
        killed, total: wrong versions of the row's query that its databases tell from it, of how many; 0 of 0 where nobody counted.
    """

    database: Database
    unverified: str | None = None
    killed: int = 0
    total: int = 0

    @property
    def weight(self) -> float:
        """What the verdict "equal" is worth: the share of wrong versions that are told apart; 1 where nobody counted."""
        return self.killed / self.total if self.total else 1.0


def sql_row(columns: Mapping[str, Any], folder: str | Path, *, where: str) -> SqlRow:
    """The databases of a row.

    Args:
        columns: the row's columns as read.
        folder: that of the file that the row was read from.
        where: the row, for errors.

    Raises:
        ConfigError: a server, and nothing to speak to it with.
        DataError: no `database`, a file that is not there, or a cell of another kind.
    """
    unverified = columns.get(UNVERIFIED)
    paths = _paths(columns.get(DATABASE), where)
    if not paths and not unverified:
        raise DataError(
            f"this row has no {DATABASE!r} to run its query on",
            where=where,
            why=f"its columns are {', '.join(map(str, columns)) or 'none'}",
            remedy=f"{BUILD}; or write sql_database: postgresql://... for all rows",
        )
    found = tuple(path if "://" in path else str(_file(path, Path(folder))) for path in paths)
    gone = next((path for path in found if "://" not in path and not Path(path).is_file()), None)
    if gone is not None and not unverified:
        raise DataError(
            f"no database file {gone!r}",
            where=where,
            why=f"column {DATABASE!r}: relative paths start at the folder of the data file, {Path(folder).absolute()}",
            remedy=f"run `trimtab sql build` again, which makes the files, or move them there; {BUILD}",
        )
    if not unverified:
        check_driver(found, where=where)
    dialect = columns.get(DIALECT) or "sqlite"
    if dialect not in DIALECTS:
        raise DataError(
            f"unknown {DIALECT} {dialect!r}",
            where=where,
            why="the row's query is written in it, and so are the answers",
            remedy=f"choose one of: {', '.join(DIALECTS)}",
        )
    killed, total = (_count(columns.get(name), name, where) for name in (KILLED, TOTAL))
    return SqlRow(
        database=Database(
            paths=found, dialect=dialect, quoted_values=str(columns.get(QUOTED) or "").lower() in ("true", "1")
        ),
        unverified=str(unverified) if unverified else None,
        killed=killed,
        total=total,
    )


def check_driver(paths: Sequence[str], *, where: str) -> None:
    """What speaks to a server is installed, if one of these is a server.

    Raises:
        ConfigError: it is not. (In a worker process, where it is used, nobody would see that.)
    """
    server = next((path for path in paths if "://" in path), None)
    if server is not None and find_spec("psycopg") is None:
        raise ConfigError(
            "a PostgreSQL server needs psycopg, which is not installed",
            where=where,
            why=f"queries are to be run on {server.partition('://')[0]}://...",
            remedy="pip install 'trimtab[postgres]'",
        )


def _paths(cell: Any, where: str) -> tuple[str, ...]:
    if isinstance(cell, str) and cell.lstrip().startswith("["):  # a list in a table's cell
        try:
            cell = json.loads(cell)
        except ValueError:
            cell = (cell,)
    listed = (cell,) if isinstance(cell, str) else tuple(cell) if isinstance(cell, list | tuple) else ()
    wrong = cell is not None and not isinstance(cell, str | list | tuple)
    if wrong or not all(isinstance(path, str) for path in listed):
        raise DataError(
            f"{DATABASE!r} is no path and no list of paths",
            where=where,
            why=f"it is {cell!r:.80}",
            remedy=BUILD,
        )
    return tuple(path for path in listed if path)


def _file(path: str, folder: Path) -> Path:
    """The one spelling of a file, absolute whatever the working directory becomes."""
    return (folder / Path(path).expanduser()).resolve()


def _count(cell: Any, name: str, where: str) -> int:
    if cell is None or cell == "":
        return 0
    try:
        if int(cell) >= 0:
            return int(cell)
    except (TypeError, ValueError):
        pass
    raise DataError(f"{name!r} is no count", where=where, why=f"it is {cell!r:.60}", remedy=BUILD)


def is_built(columns: Mapping[str, Any]) -> bool:
    """Has `trimtab sql build` written this row? A column `database` alone may mean anything."""
    return UNVERIFIED in columns and (DATABASE in columns or bool(columns[UNVERIFIED]))


def row_of(example: Example) -> SqlRow:
    """The databases of an example's row.

    Raises:
        DataError: as `sql_row`.
    """
    return sql_row(example.columns, Path(example.origin.file).parent, where=str(example.origin))


def moved(columns: Mapping[str, Any], home: str | Path, target: str | Path) -> dict[str, Any]:
    """The columns of `COLUMNS` that a row has, as a file in another folder has to write them; none of a row without databases.

    Args:
        home: the folder of the file that the row was read from.
        target: that of the file it is written to.
    """
    found = {name: columns[name] for name in COLUMNS if name in columns}
    if DATABASE not in found:
        return {}
    paths = _paths(found[DATABASE], "")
    files = [path if "://" in path else _file(path, Path(home)) for path in paths]
    if not is_built(columns) and not all(file.is_file() for file in files if isinstance(file, Path)):
        return {}  # the column means something else
    found[DATABASE] = [file if isinstance(file, str) else _between(file, Path(target)) for file in files]
    return found


def _between(path: Path, folder: Path) -> str:
    """`path` from `folder`; as it is where no relative path leads there (another drive)."""
    try:
        return Path(os.path.relpath(path, folder.resolve())).as_posix()
    except ValueError:
        return str(path)
