"""What `trimtab data clean`, `convert` and `split` do with files: where results go, and what is printed about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.data import encode, source, sql_text, templates
from trimtab.data.clean import FAULTS, Cleaned, answers
from trimtab.data.clean import clean as cleaned
from trimtab.data.convert import TARGETS
from trimtab.data.convert import convert as converted
from trimtab.data.info import DatasetSpec
from trimtab.data.split import split as parted
from trimtab.data.tokenizer import load_tokenizer
from trimtab.data.write import WRITERS, check_target, write_rows, write_text
from trimtab.errors import DataError
from trimtab.registry import nearest
from trimtab.types import Example

SHOWN = 3


def clean(
    name: str,
    *,
    output: Path | None,
    held_out: str | None,
    model: str | None,
    template: str | None,
    cutoff_len: int,
    sql: bool | None,
    dialect: str | None,
    threshold: float,
    conflicts: bool,
    dataset_dir: str,
    formatting: str | None,
    columns: Sequence[str],
    ranking: bool | None,
) -> Cleaned:
    """Write NAME.clean, NAME.removed.jsonl and NAME.report.json; print the counts.

    Raises:
        DataError: nothing to read, no rows, or a file in the way.
    """
    given: dict[str, Any] = {
        "dataset_dir": dataset_dir,
        "formatting": formatting,
        "ranking": ranking,
        "columns": columns,
    }
    spec = source.find(name, **given)
    if dialect is not None:
        _check_dialect(dialect)
    sources = source.files(spec)
    if not sources:
        raise DataError(
            f"no data files in {spec.path}",
            where=str(spec.path),
            remedy="name a folder with .json, .jsonl, .csv, .parquet or .txt files, or one file",
        )
    suffix = sources[0].suffix.lower() if sources[0].suffix.lower() in WRITERS else ".jsonl"
    base = spec.path if spec.path is not None and spec.path.is_dir() else sources[0].with_suffix("")
    assert base is not None
    target = output or base.with_name(f"{base.name}.clean{suffix}")
    stem = target.name.removesuffix(target.suffix).removesuffix(".clean")
    removed, report = (target.with_name(f"{stem}.{end}") for end in ("removed.jsonl", "report.json"))
    for path in (target, removed, report):
        check_target(path, *sources)
    tokens = None if model is None else _counter(model, template)
    held = None if held_out is None else source.find(held_out, **given)
    found = cleaned(
        spec,
        held_out=held,
        threshold=threshold,
        sql=sql,
        dialect=dialect,
        conflicts=conflicts,
        tokens=tokens,
        cutoff_len=cutoff_len,
    )
    if not found.kept and not found.removed:
        raise _no_rows(spec)
    write_rows(target, [value for _, value in found.kept])
    lines = []
    for origin, value in found.removed:
        reason = found.reason(origin)
        raw = value.text if isinstance(value, source.Broken) else value
        lines.append(
            {"file": origin.file, "row": origin.row, "fault": reason.kind, "detail": reason.detail, "data": raw}
        )
    write_rows(removed, lines)
    write_text(report, json.dumps(found.report(), ensure_ascii=False, indent=2) + "\n")
    _say(
        f"{len(found.kept) + len(found.removed)} rows read, {len(found.removed)} removed, {len(found.kept)} kept: {target}"
    )
    for kind in FAULTS:
        faults = [fault for fault in found.faults if fault.kind == kind]
        if faults:
            shown = "; ".join(
                f"{f.origin}" + (f" (as row {f.other.row})" if f.other else "") + (f" {f.detail}" if f.detail else "")
                for f in faults[:SHOWN]
            )
            _say(f"  {kind}: {len(faults)}: {shown}" + (" ..." if len(faults) > SHOWN else ""))
    for line in found.skipped:
        _say(f"  not checked: {line}")
    _say(f"  every fault with its row: {report}; what was removed: {removed}")
    return found


def convert(
    name: str,
    *,
    to: str,
    output: Path,
    dataset_dir: str,
    formatting: str | None,
    columns: Sequence[str],
    ranking: bool | None,
) -> None:
    """Write a file in another format; print what could not be written, and the entry that reads the new file.

    Raises:
        DataError: no such format, nothing to write, or a file in the way.
    """
    if to not in TARGETS:
        guess = nearest(to, TARGETS)
        raise DataError(
            f"unknown format {to!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where="--to",
            remedy=f"choose one of: {', '.join(TARGETS)}",
        )
    spec = source.find(name, dataset_dir=dataset_dir, formatting=formatting, ranking=ranking, columns=columns)
    check_target(output, *source.files(spec))
    found = converted(spec, to)
    if not found.rows and not found.dropped:
        raise _no_rows(spec)
    if not found.rows:
        raise DataError(
            f"no row of {name} can be written as {to}: {found.dropped[0]}",
            where=str(spec.path),
            remedy="`trimtab data FILE` shows what each row becomes; columns that have other names are told with --column MEANING=NAME",
        )
    write_rows(output, found.rows)
    _say(f"{len(found.rows)} rows written as {to}: {output}")
    for dropped in found.dropped[:SHOWN]:
        _say(f"  not written: {dropped}")
    if len(found.dropped) > SHOWN:
        _say(f"  not written: {len(found.dropped)} in all")
    entry = {output.stem: {"file_name": output.name, **found.entry}}
    _say(f"entry for dataset_info.json: {json.dumps(entry, ensure_ascii=False)}")


def split(
    name: str,
    *,
    val: float,
    test: float,
    by: str,
    seed: int,
    output: Path | None,
    dataset_dir: str,
    formatting: str | None,
    columns: Sequence[str],
    ranking: bool | None,
) -> None:
    """Write NAME_train, NAME_val and NAME_test; print their sizes.

    Raises:
        DataError: nothing to split, a part without rows, or a file in the way.
    """
    spec = source.find(name, dataset_dir=dataset_dir, formatting=formatting, ranking=ranking, columns=columns)
    sizes = {part: size for part, size in (("val", val), ("test", test)) if size > 0}
    if not sizes:
        raise DataError(
            "nothing to hold out: --val and --test are 0", where="--val", remedy="--val 0.1 holds out a tenth"
        )
    first = source.files(spec)[0]
    suffix = first.suffix.lower() if first.suffix.lower() in WRITERS else ".jsonl"
    stem = spec.path.stem if spec.path is not None else name
    folder = output or first.parent
    targets = {part: folder / f"{stem}_{part}{suffix}" for part in ("train", *sizes)}
    for path in targets.values():
        check_target(path, *source.files(spec))
    found = parted(spec, sizes=sizes, by=by, seed=seed)
    for part, path in targets.items():
        write_rows(path, [value for _, value in found.rows[part]])
        _say(f"{part}: {len(found.rows[part])} rows: {path}")
    _say(f"{found.groups} groups by {by}, none of them in two parts")
    if found.unreadable:
        _say(f"left out, as they cannot be read: {len(found.unreadable)}, the first {found.unreadable[0]}")


def _counter(model: str, template: str | None) -> Callable[[Example], int]:
    """Tokens of a row as it would be trained: its longest answer after its prompt."""
    tokenizer = load_tokenizer(model)
    chosen = templates.get(template, tokenizer, where="--template")

    def count(example: Example) -> int:
        if example.text is not None:
            return len(tokenizer.encode(example.text, add_special_tokens=False)) + 1
        try:
            pieces = encode.encode_source(example, chosen, tokenizer)
            longest = max(
                (len(chosen.encode_answer(tokenizer, a.content, newline=True, role=a.role)) for a in answers(example)),
                default=0,
            )
        except DataError:  # tools that cannot be read: not a matter of length
            return 0
        return sum(len(piece.token_ids) for piece in pieces) + longest

    return count


def _no_rows(spec: DatasetSpec) -> DataError:
    return DataError(
        f"{spec.name} is empty: it holds no rows",
        where=str(spec.path),
        remedy="name another file, or write this one again",
    )


def _check_dialect(dialect: str) -> None:
    try:
        sql_text.check_dialect(dialect)
    except ValueError as error:
        raise DataError(
            f"unknown SQL dialect {dialect!r}",
            where="--dialect",
            why=str(error),
            remedy="for instance mysql, sqlite, postgres",
        ) from None


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(text, markup=False, soft_wrap=True)
