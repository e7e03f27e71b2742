"""A data file given on the command line: its layout, and its rows with what is broken told apart from what is not."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.data import info
from trimtab.data.dropped import Dropped
from trimtab.data.files import READERS, read_lines, read_rows, read_text
from trimtab.data.formats import FORMATS
from trimtab.data.formats.layout import COLUMNS, Layout
from trimtab.errors import DataError
from trimtab.registry import nearest
from trimtab.types import Example, Origin


def find(
    name: str, *, dataset_dir: str, formatting: str | None, ranking: bool | None, columns: Sequence[str]
) -> info.DatasetSpec:
    """The data set of a path, or of a name in `dataset_info.json`; what is given here wins over its entry.

    Args:
        columns: `meaning=name` words, as prompt=问题.

    Raises:
        DataError: nothing of that name, or a meaning or format that is not known.
    """
    spec = (
        _file(Path(name))
        if Path(name).exists() or Path(name).suffix.lower() in READERS
        else info.find([name], dataset_dir)[0]
    )
    if formatting is not None and formatting not in FORMATS:
        raise DataError(
            f"unknown formatting {formatting!r}",
            where="--format",
            remedy=f"choose one of: {', '.join(FORMATS.names())}",
        )
    named = dict(spec.layout.columns)
    for word in columns:
        meaning, _, column = word.partition("=")
        if meaning not in COLUMNS or not column:
            guess = nearest(meaning, COLUMNS)
            raise DataError(
                f"--column {word!r} cannot be read"
                + (f"; did you mean {guess}=...?" if guess and guess != meaning else ""),
                where="--column",
                why=f"it is MEANING=NAME, and a meaning is one of {', '.join(COLUMNS)}",
                remedy="for instance --column prompt=问题 --column response=答案",
            )
        named[meaning] = column
    layout = replace(spec.layout, columns=named, ranking=spec.layout.ranking if ranking is None else ranking)
    if ranking is None and ({"chosen", "rejected"} <= set(named) or "ranked" in named):
        layout = replace(layout, ranking=True)
    return replace(spec, formatting=formatting or spec.formatting, layout=layout)


def beside(file: Path) -> info.DatasetSpec:
    """A data file, read as its entry in the `dataset_info.json` beside it says; as `find` guesses where it has none.

    Raises:
        DataError: there is no such file, or that `dataset_info.json` cannot be read.
    """
    folder = file.parent
    if file.exists() and (folder / info.INFO).is_file():
        for name, entry in info.load_info(folder / info.INFO).items():
            if isinstance(entry, dict) and (folder / str(entry.get("file_name", ""))).resolve() == file.resolve():
                return info.find([name], str(folder))[0]
    return find(str(file), dataset_dir=str(folder), formatting=None, ranking=None, columns=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A line that cannot be read, and why."""

    why: Dropped
    text: str


def _file(path: Path) -> info.DatasetSpec:
    """A file or folder, its layout guessed from its first row that can be read.

    Raises:
        DataError: nothing exists there.
    """
    if not path.exists():
        raise DataError(
            f"data file not found: {path}",
            where=str(path.resolve()),
            why="nothing exists at that path",
            remedy="relative paths start at the working directory",
        )
    spec = info.DatasetSpec(name=path.stem, where=str(path), layout=Layout(), path=path)
    formatting, layout = info.guess(next((value for _, value in rows(spec) if isinstance(value, Mapping)), None))
    return replace(spec, formatting=formatting, layout=layout)


def files(spec: info.DatasetSpec) -> list[Path]:
    """The files of a data set.

    Raises:
        DataError: it is on a hub.
    """
    if spec.path is None:
        raise DataError(
            f"data set {spec.name!r} is not a file", where=spec.where, remedy="download its files and name one of them"
        )
    if spec.path.is_dir():
        return sorted(entry for entry in spec.path.iterdir() if entry.suffix.lower() in READERS)
    return [spec.path]


def rows(spec: info.DatasetSpec) -> Iterator[tuple[Origin, Any]]:
    """Every row as it stands; a line that cannot be read is a `Broken` in its place."""
    for path in files(spec):
        if path.suffix.lower() == ".jsonl":
            yield from _lines(path)
        elif path.suffix.lower() in (".csv", ".tsv"):
            yield from _cells(path)
        else:
            yield from read_rows(path)


def example(value: Any, origin: Origin, spec: info.DatasetSpec) -> Example | Dropped:
    """A row as an example, or why not."""
    if isinstance(value, Broken):
        return value.why
    if not isinstance(value, Mapping):
        return Dropped(origin=origin, reason="not an object", detail=str(value)[:60])
    found: Example | Dropped = FORMATS.load(spec.formatting)(value, spec.layout, origin)
    return found


def _lines(path: Path) -> Iterator[tuple[Origin, Any]]:
    number = 0
    for line_number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        number += 1
        origin = Origin(file=str(path), row=number)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
            detail = f"line {line_number}: {why}: {line[:60]}"
            value = Broken(why=Dropped(origin=origin, reason="malformed JSON", detail=detail), text=line)
        yield origin, value


def _cells(path: Path) -> Iterator[tuple[Origin, Any]]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    header = next(reader, [])
    number = 0
    for cells in reader:
        if not cells:
            continue
        number += 1
        origin = Origin(file=str(path), row=number)
        if len(cells) == len(header):
            yield origin, dict(zip(header, cells, strict=True))
        else:
            detail = f"line {reader.line_num}: {len(cells)} cells for {len(header)} columns: {cells[0][:40]}"
            why = Dropped(origin=origin, reason="malformed CSV", detail=detail)
            yield origin, Broken(why=why, text=delimiter.join(cells))
