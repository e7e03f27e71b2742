"""`dataset_info.json`: names of data sets to where their rows are and what they look like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.data.files import READERS, Rows, read_rows, read_text
from trimtab.data.formats import FORMATS
from trimtab.data.formats.layout import COLUMNS, TAGS, Layout, UnusableCell, as_json
from trimtab.errors import DataError
from trimtab.registry import nearest
from trimtab.types import Origin

INFO = "dataset_info.json"
FLAGS = ("ranking", "formatting", "subset", "split", "folder", "num_samples", "columns", "tags", "sql_dialect")
SOURCES = ("file_name", "hf_hub_url", "ms_hub_url")
ELSEWHERE = ("om_hub_url", "script_url", "cloud_file_name")  # sources of theirs that we cannot read
MEDIA = ("images", "videos", "audios")
HARMLESS = ("file_sha1", "description", "license", "homepage")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One data set: its source (a path, or a hub id) and the layout of its rows.

    Attributes:
        where: the place that describes it, for errors.
        sql_dialect: what the answers are written in, where they are SQL; "" where nobody says.
        note: what the user should know about how it was found; "" for nothing.
        described: it has an entry, or a file whose first row speaks for it; False only where `find` looks for absent ones too.
    """

    name: str
    where: str
    layout: Layout
    formatting: str = "alpaca"
    path: Path | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    sql_dialect: str = ""
    note: str = ""
    described: bool = True


def find(names: Sequence[str], dataset_dir: str | Mapping[str, Any], *, absent: bool = False) -> list[DatasetSpec]:
    """The data sets called `names`.

    Args:
        dataset_dir: a folder with `dataset_info.json`; "ONLINE", then names are hub ids; or the entries themselves. A
            name without an entry may also be a data file in that folder, or the path of one.
        absent: sets whose file is gone are given too, without a path.

    Raises:
        DataError: no entry and no file of that name, or an entry that cannot be right.
    """
    if isinstance(dataset_dir, Mapping):
        return [_entry(name, dataset_dir, Path(), "dataset_dir", absent) for name in names]
    if dataset_dir == "ONLINE":
        return [
            DatasetSpec(name=name, where=f"dataset: {name}", layout=Layout(), hf_hub_url=name, ms_hub_url=name)
            for name in names
        ]
    folder = Path(dataset_dir)
    info = folder / INFO
    entries = load_info(info) if info.exists() else {}
    return [
        _entry(name, entries, folder, str(info), absent) if name in entries else _file(name, folder, entries, absent)
        for name in names
    ]


def load_info(info: Path) -> Mapping[str, Any]:
    """The entries of a dataset_info.json, by name.

    Raises:
        DataError: it is no JSON, or no object.
    """
    try:
        entries = json.loads(read_text(info))
    except json.JSONDecodeError as error:
        raise DataError(
            f"malformed JSON in {info.name}, line {error.lineno}, column {error.colno}: {error.msg}",
            where=f"{info}:{error.lineno}",
            why="without it no data set can be found",
            remedy="mend that line: often a missing comma or quote, or a comma after the last entry",
        ) from None
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise DataError(
            f"{info.name} is not an object of name: entry",
            where=str(info),
            why="each data set is found in it by its name",
            remedy='write {"NAME": {"file_name": "FILE"}}',
        )
    return entries


def _file(name: str, folder: Path, entries: Mapping[str, Any], absent: bool) -> DatasetSpec:
    """A data set without an entry: a file, its layout guessed from its first row."""
    suffixes = ["", *READERS]
    candidates = [base / f"{name}{suffix}" for base in (folder, Path()) for suffix in suffixes]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None and absent:
        return DatasetSpec(name=name, where=str(folder), layout=Layout(), described=False)
    if path is None:
        guess = nearest(name, entries)
        info = folder / INFO
        known = ", ".join(list(entries)[:20]) if entries else ""
        raise DataError(
            f"unknown data set {name!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where=str(info.resolve()),
            why=f"it names {known}" if known else "it names none" if info.exists() else "that file does not exist",
            remedy=f"add an entry for it there, put {name}.json beside it, or set dataset_dir to another folder",
        )
    formatting, layout = _guess(path)
    return DatasetSpec(
        name=name,
        where=str(path),
        path=path,
        formatting=formatting,
        layout=layout,
        note=f"{name} has no entry in {INFO}; {path} is read as {formatting}" + (", ranking" if layout.ranking else ""),
    )


def _guess(path: Path) -> tuple[str, Layout]:
    return guess(next((value for _, value in islice(read_rows(path), 1)), None))


def guess(row: Any) -> tuple[str, Layout]:
    """Format and layout that the columns of a row speak for."""
    columns = set(row) if isinstance(row, Mapping) else set()
    layout = Layout(ranking={"chosen", "rejected"} <= columns)
    if not layout.ranking and isinstance(row, Mapping) and _is_list(row.get("ranked")):
        layout = Layout(ranking=True, columns={"ranked": "ranked"})
    if "messages" in columns:
        return "openai", layout
    if "conversations" in columns:
        return "sharegpt", layout
    if "text" in columns and "instruction" not in columns:
        return "text", layout
    return "alpaca", layout


def _is_list(cell: Any) -> bool:
    """A list of answers, or its JSON in a table; a yes or no under the same name is not one."""
    try:
        return isinstance(as_json(cell, "ranked"), list)
    except UnusableCell:
        return False


def _entry(name: str, entries: Mapping[str, Any], folder: Path, source: str, absent: bool) -> DatasetSpec:
    where = f"{source}: {name}"
    entry = entries.get(name)
    if name in entries and not isinstance(entry, Mapping):
        raise DataError(
            f"the entry of data set {name!r} is not an object",
            where=where,
            why=f"it is {entry!r}"[:200],
            remedy='write {"file_name": "FILE"}, and what else the set needs',
        )
    if not isinstance(entry, Mapping):
        guess = nearest(name, entries)
        raise DataError(
            f"unknown data set {name!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where=where,
            why=f"the entries are {', '.join(map(str, entries)) or 'none'}",
            remedy="name one of them, or add an entry",
        )
    for key in (*SOURCES, "formatting", "subset", "split", "folder", "sql_dialect"):
        if entry.get(key) is not None and (not isinstance(entry[key], str) or "\0" in entry[key]):
            raise DataError(
                f"{key} is {entry[key]!r}, it must be text",
                where=f"{where}: {key}",
                remedy="give one name in quotes; for several files name the folder that holds them",
            )
    ignored = _check_keys(entry, (*SOURCES, *FLAGS), f"{where}", also=(*ELSEWHERE, *HARMLESS))
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    _check_keys(columns, COLUMNS, f"{where}: columns", also=MEDIA, strict=True)
    _check_keys(tags, TAGS, f"{where}: tags", strict=True)
    for part, values in (("columns", columns), ("tags", tags)):
        for key, value in values.items():
            if value is not None and not isinstance(value, str) and key not in MEDIA:
                raise DataError(
                    f"{part}: {key} is {value!r}, it must be the name of one column"
                    if part == "columns"
                    else f"{part}: {key} is {value!r}, it must be text",
                    where=f"{where}: {part}: {key}",
                    remedy="write the name as it stands in the rows, in quotes",
                )
    if not isinstance(entry.get("ranking"), bool | None):
        raise DataError(
            f"ranking is {entry['ranking']!r}, it must be true or false",
            where=f"{where}: ranking",
            remedy="write true if the rows hold chosen and rejected answers",
        )
    media = [key for key in MEDIA if columns.get(key)]
    if media:
        raise DataError(
            f"data set {name!r} has {media[0]}",
            where=f"{where}: columns: {media[0]}",
            why="trimtab trains on text only",
            remedy="leave that column out of `columns` if the text alone is of use",
        )
    given = {key: entry.get(key) for key in SOURCES if entry.get(key)}
    if not given:
        other = next((key for key in ELSEWHERE if entry.get(key)), None)
        raise DataError(
            f"data set {name!r} has no source" + (f" that can be read: {other}" if other else ""),
            where=where,
            remedy=f"give it one of {', '.join(SOURCES)}",
        )
    path = folder / str(given["file_name"]) if "file_name" in given else None
    if path is not None and not path.exists() and len(given) == 1 and not absent:
        raise DataError(
            f"data set {name!r}: {path} does not exist",
            where=where,
            why=f"tried {path.resolve()}",
            remedy="file_name is looked up in dataset_dir; correct one of the two",
        )
    formatting = entry.get("formatting") or ("text" if path is not None and path.suffix == ".txt" else "alpaca")
    if formatting not in FORMATS:
        guess = nearest(str(formatting), FORMATS.names())
        raise DataError(
            f"unknown formatting {formatting!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where=f"{where}: formatting",
            remedy=f"choose one of: {', '.join(FORMATS.names())}",
        )
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise DataError(
            f"num_samples is {samples!r}, it must be a number of rows",
            where=f"{where}: num_samples",
            remedy="write a whole number from 1 on, or leave it out to take every row",
        )
    return DatasetSpec(
        name=name,
        where=where,
        layout=Layout(
            ranking=bool(entry.get("ranking", False)),
            columns={key: value for key, value in columns.items() if value},
            tags={key: value for key, value in tags.items() if value},
        ),
        formatting=formatting,
        path=path if path is not None and path.exists() else None,
        hf_hub_url=given.get("hf_hub_url"),
        ms_hub_url=given.get("ms_hub_url"),
        subset=entry.get("subset"),
        split=entry.get("split") or "train",
        folder=entry.get("folder"),
        num_samples=samples,
        sql_dialect=entry.get("sql_dialect") or "",
        note=f"{name}: {', '.join(ignored)} in {source} means nothing here" if ignored else "",
    )


def _check_keys(
    given: Mapping[str, Any], known: Sequence[str], where: str, *, also: Sequence[str] = (), strict: bool = False
) -> list[str]:
    """Keys that mean nothing, to be mentioned; a misspelt one (any unknown one, if strict) is an error."""
    if not isinstance(given, Mapping):
        raise DataError(
            f"{where.rpartition(': ')[2]} is not an object",
            where=where,
            remedy='write {"OUR NAME": "NAME IN THE ROWS"}',
        )
    odd = [str(key) for key in given if key not in known and key not in also]
    for key in odd:
        guess = nearest(key, known)
        if guess or strict:
            raise DataError(
                f"unknown key {key!r}" + (f"; did you mean {guess!r}?" if guess else ""),
                where=f"{where}: {key}",
                remedy=f"the keys are {', '.join(known)}",
            )
    return odd


def rows(
    spec: DatasetSpec, *, cache_dir: str | None = None, hf_token: str | None = None, ms_token: str | None = None
) -> Rows:
    """Every row of a data set as read, with its origin.

    A local file goes before a hub; of two hubs, ModelScope if `USE_MODELSCOPE_HUB=1` or when it is the only one.

    Raises:
        DataError: the source cannot be read, or a hub cannot be reached.
    """
    if spec.path is not None:
        return read_rows(spec.path)
    modelscope = os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true")
    if spec.ms_hub_url and (modelscope or not spec.hf_hub_url):
        return _from_modelscope(spec, spec.ms_hub_url, cache_dir, ms_token)
    return _from_hub(spec, spec.hf_hub_url or "", cache_dir, hf_token)


def _from_hub(spec: DatasetSpec, hub_id: str, cache_dir: str | None, token: str | None) -> Rows:
    try:
        import datasets
    except ImportError:
        raise _not_installed(spec, hub_id, "datasets") from None
    try:
        loaded = datasets.load_dataset(
            path=hub_id, name=spec.subset, data_dir=spec.folder, split=spec.split, cache_dir=cache_dir, token=token
        )
    except Exception as error:  # network, authorisation, a missing set or subset: each client raises its own kinds
        raise _unreachable(spec, hub_id, error) from error
    return _numbered(loaded, hub_id)


def _from_modelscope(spec: DatasetSpec, hub_id: str, cache_dir: str | None, token: str | None) -> Rows:
    try:
        from modelscope import MsDataset
    except ImportError:
        raise _not_installed(spec, hub_id, "modelscope") from None
    try:
        loaded = MsDataset.load(
            dataset_name=hub_id,
            subset_name=spec.subset,
            data_dir=spec.folder,
            split=spec.split,
            cache_dir=cache_dir,
            token=token,
            use_streaming=False,
        )
    except Exception as error:  # as above
        raise _unreachable(spec, hub_id, error) from error
    return _numbered(loaded, hub_id)


def _numbered(loaded: Any, hub_id: str) -> Iterator[tuple[Origin, Any]]:
    for number, row in enumerate(loaded, 1):
        yield Origin(file=hub_id, row=number), dict(row)


def _not_installed(spec: DatasetSpec, hub_id: str, package: str) -> DataError:
    return DataError(
        f"data set {spec.name!r} is on a hub ({hub_id}), which needs the package {package}",
        where=spec.where,
        why=f"{package} is not installed",
        remedy=f"pip install {package}; or download the files and give them as file_name",
    )


def _unreachable(spec: DatasetSpec, hub_id: str, error: Exception) -> DataError:
    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    return DataError(
        f"data set {spec.name!r} could not be loaded from the hub: {hub_id}",
        where=spec.where,
        why=f"{type(error).__name__}: {first[:300]}",
        remedy="check the name, the split, the network and the token; offline, download the files and give file_name",
    )
