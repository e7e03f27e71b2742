"""Data files to rows: json, jsonl, csv, tsv, parquet, arrow, txt, and folders of them.

Every row comes with its file and its number there, counted from 1 (for csv the header does not count). A file that
cannot be read is an error with file and line: unlike an odd row, it says that something is wrong with the whole of
it. Texts are UTF-8 with or without a byte-order mark (UTF-16 with one), with any line ending.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.types import Origin

Rows = Iterator[tuple[Origin, Any]]


def read_rows(path: Path) -> Rows:
    """Every row of a file, or of all data files of a folder in the order of their names.

    Yields:
        `(origin, value)`; value is a dict unless a json file holds something else in that place.

    Raises:
        DataError: nothing there, an unknown kind of file, or a malformed one.
    """
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in READERS)
        if not files:
            raise DataError(
                f"no data files in {path}",
                where=str(path.resolve()),
                why=f"a folder is read as the files in it that end in {', '.join(READERS)}",
                remedy="put the files directly in the folder (sub-folders are not searched), or name one file",
            )
        for file in files:
            yield from read_rows(file)
        return
    if not path.exists():
        raise DataError(
            f"data file not found: {path}",
            where=str(path.resolve()),
            why="nothing exists at that path",
            remedy="check file_name in dataset_info.json and dataset_dir; relative ones start at the working directory",
        )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"cannot read {path.name}: unknown kind of file {path.suffix!r}",
            where=str(path),
            remedy=f"use one of {', '.join(READERS)}",
        )
    yield from reader(path)


def read_text(path: Path) -> str:
    """The text of a file without byte-order mark, every line ending turned into a newline."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path.name} is not UTF-8 text: byte 0x{data[error.start]:02x} at line {line}",
            where=f"{path}:{line}",
            why="the file was probably saved in a local encoding such as GBK",
            remedy="save it again as UTF-8",
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file as `read_text` has them, one at a time: a large file is never in memory as a whole."""
    with path.open("rb") as raw:
        encoding = "utf-16" if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        with path.open(encoding=encoding, newline=None) as file:
            for line in file:
                yield line.rstrip("\n")
    except UnicodeDecodeError:
        read_text(path)  # says where
        raise


def _json(path: Path) -> Rows:
    text = read_text(path)
    if not text.strip():
        raise DataError(
            f"{path.name} is empty",
            where=str(path),
            why=f"it has {path.stat().st_size} bytes, and not one value among them",
            remedy="write the file again, or name another; a set without rows is []",
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # Many a .json file holds one object per line; it is told by text that goes on after a whole first value.
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(path)
            return
        raise _malformed(path, error, error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_value(path, str(path), error) from None
    # A list of rows; else a file of one row.
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield Origin(file=str(path), row=number), row


def _json_lines(path: Path) -> Rows:
    number = 0
    # Split at newlines only: str.splitlines would also cut inside strings that hold U+2028 and its like.
    for line_number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        number += 1
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _malformed(path, error, line_number) from None
        except (ValueError, RecursionError) as error:
            raise _unreadable_value(path, f"{path}:{line_number}", error) from None
        yield Origin(file=str(path), row=number), row


def _unreadable_value(path: Path, where: str, error: Exception) -> DataError:
    return DataError(
        f"a value in {path.name} cannot be read",
        where=where,
        why="lists within lists without end" if isinstance(error, RecursionError) else str(error),
        remedy="write rows of plain texts and numbers",
    )


def _malformed(path: Path, error: json.JSONDecodeError, line: int) -> DataError:
    return DataError(
        f"malformed JSON in {path.name}, line {line}, column {error.colno}: {error.msg}",
        where=f"{path}:{line}",
        why="the text from there on cannot be read as JSON",
        remedy="mend that line: often a missing comma or quote, a comma after the last item, or a file cut short",
    )


def _csv(path: Path, delimiter: str = ",") -> Rows:
    csv.field_size_limit(2**31 - 1)  # prompts with a schema outgrow the default of 128 kB
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next(reader, None)
        if header is None:
            return
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f"two columns of {path.name} are called {twice!r}",
                where=f"{path}:1",
                why="only one of them could be read",
                remedy="rename one of them in the first line",
            )
        for cells in reader:
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                raise DataError(
                    f"{path.name}, line {reader.line_num}: {len(cells)} cells, but {len(header)} columns in the header",
                    where=f"{path}:{reader.line_num}",
                    why="the cells of this row cannot be matched to columns",
                    remedy='put cells that hold a comma, a quote or a newline in "double quotes"',
                )
            yield Origin(file=str(path), row=number), dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"malformed CSV in {path.name}, line {reader.line_num}: {error}",
            where=f"{path}:{reader.line_num}",
            remedy='put cells that hold a comma, quote or newline in "double quotes", and double every quote inside',
        ) from None


def _tsv(path: Path) -> Rows:
    yield from _csv(path, delimiter="\t")


def _txt(path: Path) -> Rows:
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Origin(file=str(path), row=number), {"text": line}


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(file=str(path), row=number), row
    except pyarrow.ArrowException as error:
        raise _damaged(path, "parquet", error) from None


def _arrow(path: Path) -> Rows:
    import pyarrow

    number = 0
    try:
        with pyarrow.OSFile(str(path)) as source:
            # Arrow files come in two shapes: with an index at the end, or as a stream (what `datasets` caches).
            magic = source.read(6)
            source.seek(0)
            opener = pyarrow.ipc.open_file if magic == b"ARROW1" else pyarrow.ipc.open_stream
            for row in opener(source).read_all().to_pylist():
                number += 1
                yield Origin(file=str(path), row=number), row
    except pyarrow.ArrowException as error:
        raise _damaged(path, "arrow", error) from None


def _damaged(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(
        f"cannot read {path.name} as {kind}",
        where=str(path),
        why=str(error).split("\n")[0],
        remedy="copy or write the file again; it is cut short, damaged, or of another kind than its name says",
    )


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _txt,
}
