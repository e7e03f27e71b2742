"""Rows to data files: json, jsonl, csv, tsv, parquet, by the file's ending; whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.errors import DataError

WRITERS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")

Row = Mapping[str, Any]


def check_target(path: Path, *sources: Path, kinds: Sequence[str] = WRITERS) -> None:
    """A file can be written there.

    Args:
        sources: what the command reads.
        kinds: endings of the files that it writes.

    Raises:
        DataError: a kind of file that is not written, or a file that exists.
    """
    if path.exists():
        read = path.resolve() in [source.resolve() for source in sources]
        raise DataError(
            f"{path} exists already",
            where=str(path.resolve()),
            why="it is a folder"
            if path.is_dir()
            else "it is a source of this command"
            if read
            else "nothing is overwritten",
            remedy="choose another name with --output, or move it away",
        )
    if path.suffix.lower() not in kinds:
        raise DataError(
            f"cannot write {path.name}: unknown kind of file {path.suffix!r}",
            where=str(path),
            remedy=f"let the name end in {' or '.join(kinds)}",
        )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows; lists and objects are JSON text in csv and tsv."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        _whole(path, lambda temporary: _parquet(temporary, rows))
    else:
        write_text(
            path, _csv(rows, "," if suffix == ".csv" else "\t") if suffix in (".csv", ".tsv") else _json(rows, suffix)
        )


def write_text(path: Path, text: str) -> None:
    """Write a text."""
    _whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside the target and move it there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} could not be written: {error.strerror or error}",
            where=str(path.resolve()),
            remedy="check the folder, its rights and the free space",
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _json(rows: Sequence[Row], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return json.dumps(list(rows), ensure_ascii=False, indent=2) + "\n"


def columns(rows: Sequence[Row]) -> list[str]:
    """Every column of any row, in the order of first sight."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _csv(rows: Sequence[Row], delimiter: str) -> str:
    names = columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([[_cell(row.get(name)) for name in names] for row in rows])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    names = columns(rows)
    try:
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    except pyarrow.ArrowException as error:
        raise DataError(
            f"these rows do not fit into parquet: {error}",
            where=str(path),
            why="a column of parquet has one type",
            remedy="write jsonl instead",
        ) from None
    pyarrow.parquet.write_table(table, path)
