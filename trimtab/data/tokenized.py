"""`tokenized_path`: the encoded rows of a stage in a folder, so that a large set is encoded once.

    tokenized.json   what the rows were made of (settings, template, tokenizer, each data set's entry and files), the report
    rows.parquet     the rows: token ids, scored places, and the example of each as JSON

A folder that was made of anything else is refused, never used in silence. The data files may be gone (the folder can be
carried to another machine); where they are there, they must have the same contents, wherever they lie now.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.data import info
from trimtab.data.dropped import Dropped
from trimtab.data.files import READERS
from trimtab.data.stage import Report, SetReport, StageData
from trimtab.data.templates import Template
from trimtab.data.templates.jinja import JinjaTemplate
from trimtab.data.tokenizer import Tokenizer
from trimtab.errors import DataError
from trimtab.types import Example, Message, Origin, Pair, Prompt, Ranking, TokenRow

INFO, ROWS, VERSION = "tokenized.json", "rows.parquet", 3
KEYS = (
    "stage", "dataset", "eval_dataset", "cutoff_len", "max_samples", "val_size", "mix_strategy", "interleave_probs", "seed",
    "data_seed", "train_on_prompt", "mask_history", "packing", "neat_packing", "split_special_tokens", "rm_loss",
)  # fmt: skip
HASHED = ("chat template", "tokenizer", "text of the template")  # their values say nothing to a reader
PROBE = "Which towns? 哪些城市？  SELECT count(*)\n\tFROM t;"


def record(config: Any, tokenizer: Tokenizer, template: Template) -> dict[str, Any]:
    """What rows of this config are made of; what is most telling stands first, for a refusal names the first that differs."""
    settings = {key: getattr(config, key, None) for key in KEYS}
    own = isinstance(template, JinjaTemplate)
    dialogue = [Message(role="system", content="s"), Message(role="user", content=PROBE)]
    thoughts = [template.answer_text(text) for text in ("a", "<think>\nb\n</think>\n\na")]
    ids = [
        tokenizer.encode(PROBE, add_special_tokens=False),
        template.encode_prompt(tokenizer, dialogue),
        template.encode_prompt(tokenizer, dialogue[1:]),
        template.encode_answer(tokenizer, PROBE, newline=True),
    ]
    made = {
        "version": VERSION,
        **settings,
        "template": template.name,
        "default_system": template.default_system,
        "enable_thinking": template.enable_thinking if own or template.thinks else None,
        "tool_format": template.tools.name,
        # only this kind of template reads it; what it does between turns no single rendering shows
        "chat template": _hash(str(tokenizer.chat_template)) if own else None,
        "tokenizer": _hash(_contents(tokenizer)),
        "text of the template": _hash(json.dumps([ids, thoughts, template.stop_ids])),
        "sets": _sets(config),
    }
    return dict(json.loads(json.dumps(made)))


def save(folder: Path, data: StageData[Any], made_of: Mapping[str, Any]) -> None:
    """Write the folder, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    both = [("train", *pair) for pair in zip(data.train, data.train_examples, strict=True)]
    both += [("eval", *pair) for pair in zip(data.eval, data.eval_examples, strict=True)]
    table = pyarrow.Table.from_pylist([{"part": part, **_row(row), "example": _example(e)} for part, row, e in both])
    contents = {"made_of": dict(made_of), "packs": data.packs, "report": asdict(data.report)}
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        pyarrow.parquet.write_table(table, temporary / ROWS, compression="zstd")
        (temporary / INFO).write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
        temporary.replace(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(
            f"the tokenized rows could not be saved: {error.strerror or error}",
            where=f"tokenized_path: {folder.resolve()}",
            remedy="check the folder (it must not exist, or be empty), its rights and the free space",
        ) from None


def load(folder: Path, made_of: Mapping[str, Any]) -> StageData[Any] | None:
    """The rows of the folder, without `eval_prompts`; None when it is not there yet.

    Raises:
        DataError: it was made of something else, or is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        contents = json.loads((folder / INFO).read_text(encoding="utf-8"))
        made = contents["made_of"]
        listed = pyarrow.parquet.read_table(folder / ROWS).to_pylist()
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{folder} does not hold tokenized rows of trimtab",
            where=f"tokenized_path: {folder.resolve()}",
            why=str(error).split("\n")[0],
            remedy="name a new folder, and it will be made",
        ) from None
    for key in dict.fromkeys((*made_of, *made)):
        if key != "sets" and made.get(key) != made_of.get(key):
            shown = "" if key in HASHED else f": {made.get(key)!r} there, {made_of.get(key)!r} here"
            raise _other(folder, f"{key} differs{shown}")
    for name, now in made_of["sets"].items():
        _check_set(folder, name, made["sets"][name], now)
    rows = {part: [one for one in listed if one["part"] == part] for part in ("train", "eval")}
    examples = {part: [_read_example(one["example"]) for one in rows[part]] for part in rows}
    packs: list[list[int]] | None = contents["packs"]
    return StageData(
        stage=made["stage"],
        train=[_read_row(one, e) for one, e in zip(rows["train"], examples["train"], strict=True)],
        eval=[_read_row(one, e) for one, e in zip(rows["eval"], examples["eval"], strict=True)],
        train_examples=examples["train"],
        eval_examples=examples["eval"],
        eval_prompts=[],
        report=_read_report(contents["report"], f"tokenized rows of {folder}"),
        packs=packs,
    )


def _other(folder: Path, why: str) -> DataError:
    return DataError(
        f"the rows in {folder} were made of something else",
        where=f"tokenized_path: {folder.resolve()}",
        why=why,
        remedy="name another folder, and it will be made; or take back the change",
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(tokenizer: Tokenizer) -> str:
    """Everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one in Python: its words and their ids
        made: Any = sorted(getattr(tokenizer, "get_vocab", dict)().items())
    else:
        made = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # set anew by each call
            made.pop(passing, None)
    return json.dumps([made, len(tokenizer), tokenizer.bos_token, tokenizer.eos_token])


def _sets(config: Any) -> dict[str, dict[str, Any]]:
    """Each data set: what its entry says, and the kind and hash of its files; `files` is None where there are none here."""
    names = list(dict.fromkeys((*config.dataset, *config.eval_dataset)))
    found: dict[str, dict[str, Any]] = {}
    for spec in info.find(names, config.dataset_dir, absent=True) if names else ():
        entry = {key: value for key, value in asdict(spec).items() if key not in ("name", "where", "note", "path")}
        files: list[tuple[str, str]] | None = None
        if spec.path is not None:
            inside = [spec.path] if spec.path.is_file() else sorted(spec.path.iterdir())
            files = [_file(path) for path in inside if path == spec.path or path.suffix.lower() in READERS]
        found[spec.name] = {"path": str(spec.path), **entry.pop("layout"), **entry, "files": files}
    return found


def _file(path: Path) -> tuple[str, str]:
    with path.open("rb") as file:
        return path.suffix.lower(), hashlib.file_digest(file, "sha256").hexdigest()


def _check_set(folder: Path, name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A data set is as it was when the rows were made, or gone.

    Raises:
        DataError: its entry or its files differ.
    """
    if now["files"] is None and not (now["described"] or now["hf_hub_url"]):
        return
    for key in (key for key in now if key not in ("path", "files", "described")):
        if then.get(key) != now[key]:
            raise _other(folder, f"{key} of data set {name!r} differs: {then.get(key)!r} there, {now[key]!r} here")
    if now["files"] is not None and then["files"] != now["files"]:
        raise _other(folder, f"{now['path']} has changed since, or is not the file that data set {name!r} was then")


# ---------------------------------------------------------------------------------------------------------------- rows


def _row(row: TokenRow | Pair | Ranking | Prompt) -> dict[str, Any]:
    if isinstance(row, Pair):
        return {
            "ids": row.chosen.token_ids,
            "scored": row.chosen.scored,
            "rejected_ids": row.rejected.token_ids,
            "rejected_scored": row.rejected.scored,
            "margin": row.margin,
        }
    if isinstance(row, Ranking):
        return {
            "ids": row.answers[0].token_ids,
            "scored": row.answers[0].scored,
            "others": [{"ids": one.token_ids, "scored": one.scored} for one in row.answers[1:]],
        }
    if isinstance(row, Prompt):
        return {"ids": row.token_ids, "index": row.index, "cut": row.cut}
    return {"ids": row.token_ids, "scored": row.scored}


def _read_row(one: Mapping[str, Any], example: Example) -> TokenRow | Pair | Ranking | Prompt:
    ids = tuple(one["ids"])
    if "index" in one:
        return Prompt(index=one["index"], token_ids=ids, example=example, cut=one["cut"])
    row = TokenRow(token_ids=ids, scored=tuple(one["scored"]))
    if one.get("others"):
        others = (TokenRow(token_ids=tuple(o["ids"]), scored=tuple(o["scored"])) for o in one["others"])
        return Ranking(answers=(row, *others), example=example)
    if one.get("rejected_ids") is None:
        return row
    rejected = TokenRow(token_ids=tuple(one["rejected_ids"]), scored=tuple(one["rejected_scored"]))
    return Pair(chosen=row, rejected=rejected, example=example, margin=one["margin"])


def _example(example: Example) -> str:
    return json.dumps(asdict(example), ensure_ascii=False, default=str)  # a date of a parquet column becomes text


def _read_example(text: str) -> Example:
    found = json.loads(text)

    def message(value: Any) -> Message | None:
        return None if value is None else Message(**value)

    return Example(
        **{
            **found,
            "origin": Origin(**found["origin"]),
            **{name: tuple(Message(**value) for value in found[name]) for name in ("prompt", "ranked")},
            **{name: message(found[name]) for name in ("response", "chosen", "rejected")},
        }
    )


def _read_report(found: Mapping[str, Any], note: str) -> Report:
    def tuples(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values)

    return Report(
        **{
            **found,
            "sets": tuple(
                SetReport(**{**one, "unread_columns": tuple(one["unread_columns"])}) for one in found["sets"]
            ),
            "dropped": tuple(Dropped(**{**one, "origin": Origin(**one["origin"])}) for one in found["dropped"]),
            "lengths": tuples(found["lengths"]),
            "scored": tuples(found["scored"]),
            "notes": (*found["notes"], note),
        }
    )
