"""From a stage's config to its rows: sets are read, mixed, cut to `max_samples`, encoded, split, and counted on the
way.

Nothing disappears without being counted: `StageData.report` adds up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from trimtab.config.stages import ONLINE
from trimtab.data import encode, info, order, packing, stream, tokenized
from trimtab.data.dropped import Dropped
from trimtab.data.formats import FORMATS
from trimtab.data.order import batches, epoch_order
from trimtab.data.stage import Report, SetReport, StageData
from trimtab.data.templates import Template
from trimtab.data.tokenizer import Tokenizer
from trimtab.data.workers import mapped
from trimtab.errors import DataError
from trimtab.types import Example, Pair, Prompt, Ranking, TokenRow

RowT = TypeVar("RowT", TokenRow, Pair, Ranking, Prompt)
Config = Any  # any object with the attributes that users know as keys; see trimtab/config

PAIRED = ("rm", "dpo", "orpo", "simpo")
"""Stages whose rows are pairs of answers."""

LONG = 2000  # rows from which encoding may take more than a moment

__all__ = ["Report", "SetReport", "StageData", "batches", "epoch_order", "load_data"]


@dataclass(slots=True)
class _Tally:
    """What is counted while rows pass."""

    sets: list[SetReport] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    examples: int = 0
    cut: int = 0
    lost: int = 0


def load_data(config: Config, tokenizer: Tokenizer, template: Template) -> StageData[Any]:
    """The rows of a stage; those that `tokenized_path` holds, where it does, and else it is given them.

    Args and Raises are those of `read_data`, and

    Raises:
        DataError: the folder at `tokenized_path` was made from other data or settings.
    """
    if getattr(config, "streaming", False) and config.stage in ("pt", "sft"):
        return _stream(config, tokenizer, template)
    folder = getattr(config, "tokenized_path", None)
    if folder is None:
        return _with_sql(read_data(config, tokenizer, template), config)
    made_of = tokenized.record(config, tokenizer, template)
    found = tokenized.load(Path(folder), made_of)
    if found is None:
        found = read_data(config, tokenizer, template)
        tokenized.save(Path(folder), found, made_of)
    found = replace(found, eval_prompts=_prompts(found.eval, found.eval_examples, config, tokenizer, template))
    return _with_sql(found, config)


def _with_sql(data: StageData[Any], config: Config) -> StageData[Any]:
    """The rows with the database of `sql_database` in place of their own, and with `sql_dialect` where they name none."""
    address, dialect = getattr(config, "sql_database", None), getattr(config, "sql_dialect", None)
    if address is None and dialect is None:
        return data
    given: dict[str, Any] = {}
    if address is not None:
        given["database"] = address if "://" in address else str(Path(address).expanduser().absolute())
    done: dict[int, Example] = {}

    def completed(example: Example) -> Example:
        if id(example) not in done:
            own = {} if dialect is None or example.columns.get("dialect") else {"dialect": dialect}
            done[id(example)] = replace(example, columns={**example.columns, **given, **own})
        return done[id(example)]

    def row(one: Any) -> Any:
        return replace(one, example=completed(one.example)) if hasattr(one, "example") else one

    return replace(
        data,
        train=[row(one) for one in data.train],
        eval=[row(one) for one in data.eval],
        train_examples=[completed(example) for example in data.train_examples],
        eval_examples=[completed(example) for example in data.eval_examples],
        eval_prompts=[row(one) for one in data.eval_prompts],
    )


def without(data: StageData[Any], unfit: Mapping[int, Dropped]) -> StageData[Any]:
    """The data without the rows of these examples, by `id`; they are counted among the dropped ones.

    Raises:
        DataError: no row is left to train on.
    """
    kept = [
        [id(example) not in unfit for example in examples] for examples in (data.train_examples, data.eval_examples)
    ]
    if data.train and not any(kept[0]):
        first = next(iter(unfit.values()))
        raise DataError(
            f"no rows left to train on: {len(data.train)} read, none of them with an answer that can be judged",
            where=str(first.origin),
            why=f"{first.reason}: {first.detail}",
            remedy="`trimtab sql build FILE` makes databases on which the rows' queries have an answer, and says which have none",
        )

    def some(rows: Sequence[Any], keep: Sequence[bool]) -> list[Any]:
        return [row for row, kept in zip(rows, keep, strict=True) if kept]

    report = replace(
        data.report,
        dropped=(*data.report.dropped, *unfit.values()),
        train=sum(kept[0]),
        eval=sum(kept[1]),
        lengths=tuple(some(data.report.lengths, [*kept[0], *kept[1]])),
        scored=tuple(some(data.report.scored, [*kept[0], *kept[1]])),
    )
    return replace(
        data,
        train=some(data.train, kept[0]),
        eval=some(data.eval, kept[1]),
        train_examples=some(data.train_examples, kept[0]),
        eval_examples=some(data.eval_examples, kept[1]),
        eval_prompts=[prompt for prompt in data.eval_prompts if id(prompt.example) not in unfit],
        report=report,
    )


def _stream(config: Config, tokenizer: Tokenizer, template: Template) -> StageData[Any]:
    """Training rows as a stream; the held-out ones, which are few, in memory: sets of their own, or the first rows."""
    tally = _Tally()
    seed = config.seed if config.data_seed is None else config.data_seed
    specs = info.find(_names(config.dataset), config.dataset_dir)
    held_examples: list[Example] = []
    skip = int(config.val_size)
    if config.eval_dataset:
        apart = _sets(config, _names(config.eval_dataset), seed, tally)
        held_examples = [example for some in apart.values() for example in some]
    else:
        first = (stream.read(*item) for item in islice(stream.items_of(specs, config.max_samples), skip))
        for found in first:
            if isinstance(found, Dropped):
                tally.dropped.append(found)
            else:
                held_examples.append(found)
    held, held_examples = _encode(held_examples, config, tokenizer, template, tally)
    if (config.eval_dataset or skip) and not held:
        raise _nothing_left("eval_dataset" if config.eval_dataset else "val_size", config, tally)
    rows = stream.RowStream(
        specs,
        lambda example: encode_row(example, config, tokenizer, template),
        seed=seed,
        buffer_size=1 if config.disable_shuffling else config.buffer_size,
        max_samples=config.max_samples,
        skip=skip,
    )
    whole = [
        str(spec.path)
        for spec in specs
        if spec.path is not None and spec.path.suffix.lower() in (".json", ".csv", ".tsv")
    ]
    tally.notes.append(
        f"streaming: {', '.join(spec.name for spec in specs)}: from the start again when the files end, in another order"
    )
    if whole:
        tally.notes.append(f"{', '.join(whole)}: json and csv files are read as a whole; jsonl and parquet are not")
    return StageData(
        stage=config.stage,
        train=[],
        eval=held,
        train_examples=[],
        eval_examples=held_examples,
        eval_prompts=_prompts(held, held_examples, config, tokenizer, template),
        report=replace(_report(tally, [], held, [], held_examples), streaming=True),
        stream=rows,
    )


def read_data(config: Config, tokenizer: Tokenizer, template: Template) -> StageData[Any]:
    """The rows of a stage, read and encoded.

    Args:
        config: read are stage, dataset, eval_dataset, dataset_dir, cutoff_len, max_samples, val_size, mix_strategy,
            interleave_probs, seed, data_seed, cache_dir, hf_hub_token, ms_hub_token; train_on_prompt and mask_history for sft,
            packing and neat_packing for pt and sft, preprocessing_num_workers.

    Raises:
        DataError: a set that cannot be found or read, or no rows left, with the arithmetic.
    """
    tally = _Tally()
    seed = config.seed if config.data_seed is None else config.data_seed
    examples = mix(_sets(config, _names(config.dataset), seed, tally), config, seed)
    train, train_examples = _encode(examples, config, tokenizer, template, tally)
    if config.dataset and not train:
        raise _nothing_left("dataset", config, tally)

    held: list[Any] = []
    held_examples: list[Example] = []
    if config.eval_dataset:
        if config.val_size:
            raise DataError(
                f"val_size is {config.val_size} and eval_dataset is {', '.join(_names(config.eval_dataset))}",
                why="rows are held out either from the training sets or as sets of their own",
                remedy="leave one of the two out",
            )
        apart = _sets(config, _names(config.eval_dataset), seed, tally)
        found = [example for some in apart.values() for example in some]
        held, held_examples = _encode(found, config, tokenizer, template, tally)
        if not held:
            raise _nothing_left("eval_dataset", config, tally)
    elif config.val_size and train:
        kept, out = order.split_off(len(train), config.val_size, seed)
        if not kept or not out:
            raise DataError(
                f"val_size {config.val_size} leaves {len(kept)} rows to train on and holds out {len(out)}",
                where=_where(config, "val_size"),
                why="both parts need at least one row",
                remedy="choose another val_size or more data",
            )
        held, held_examples = [train[i] for i in out], [train_examples[i] for i in out]
        train, train_examples = [train[i] for i in kept], [train_examples[i] for i in kept]
    train, train_examples, packs = _pack(train, train_examples, config, tally)
    if config.stage in ONLINE:  # a prompt's number keys its draw: it is its place in its list
        train, held = _renumber(train), _renumber(held)

    return StageData(
        stage=config.stage,
        train=train,
        eval=held,
        train_examples=train_examples,
        eval_examples=held_examples,
        eval_prompts=_prompts(held, held_examples, config, tokenizer, template),
        report=_report(tally, train, held, train_examples, held_examples),
        packs=packs,
    )


def _names(value: str | Sequence[str] | None) -> list[str]:
    if isinstance(value, str):
        value = value.split(",")
    return [name.strip() for name in value or () if name.strip()]


def _where(config: Config, key: str) -> str:
    origin = getattr(config, "origin", None)
    return str(origin(key)) if callable(origin) else key


# ------------------------------------------------------------------------------------------------------------ examples


def _sets(config: Config, names: list[str], seed: int, tally: _Tally) -> dict[str, list[Example]]:
    if not names:
        return {}
    found: dict[str, list[Example]] = {}
    for spec in info.find(names, config.dataset_dir):
        count = sum(name == spec.name or name.startswith(f"{spec.name} (") for name in found)
        # a set that is named twice counts twice
        found[f"{spec.name} ({count + 1})" if count else spec.name] = _examples(spec, config, seed, tally)
    return found


def _examples(spec: info.DatasetSpec, config: Config, seed: int, tally: _Tally) -> list[Example]:
    """The examples of one set, after num_samples and max_samples; what cannot be read goes to the tally."""
    pointwise = config.stage == "rm" and getattr(config, "rm_loss", "pairwise") == "pointwise"
    if pointwise and (spec.layout.ranking or "score" not in spec.layout.columns):
        raise DataError(
            f"data set {spec.name!r} cannot train a reward model by regression: "
            + ("its rows are preferences" if spec.layout.ranking else "no column holds its scores"),
            where=spec.where,
            why="rm_loss: pointwise learns from single answers, each with a score",
            remedy="rm_loss: pairwise" if spec.layout.ranking else 'add "columns": {"score": "NAME"} to its entry',
        )
    if config.stage in PAIRED and not spec.layout.ranking and not pointwise:
        what = "train a reward model" if config.stage == "rm" else f"serve stage {config.stage}"
        raise DataError(
            f"data set {spec.name!r} cannot {what}: it is not a set of preferences",
            where=spec.where,
            why='the stage learns from chosen and rejected answers, and the entry does not say "ranking": true',
            remedy='if its rows have both, add "ranking": true to its entry; else name another set',
        )
    if config.stage == "kto" and spec.layout.ranking:
        raise DataError(
            f"data set {spec.name!r} cannot serve stage kto: its rows are pairs",
            where=spec.where,
            why="the stage learns from single answers, each with a label (kto_tag) that says if it was wanted",
            remedy="use stage dpo, or a set with a kto_tag column",
        )
    if "margin" in spec.layout.columns and ("ranked" in spec.layout.columns or config.stage != "rm"):
        tally.notes.append(f"{spec.name}: margin is read for pairs of stage rm only")
    if spec.note:
        tally.notes.append(spec.note)
    read = FORMATS.load(spec.formatting)
    found: Iterable[tuple[Any, Any]] = info.rows(
        spec, cache_dir=config.cache_dir, hf_token=config.hf_hub_token, ms_token=config.ms_hub_token
    )
    if spec.num_samples is not None:
        listed = list(found)
        found = [listed[index] for index in order.sample(len(listed), spec.num_samples, seed)]
    if config.max_samples is not None:
        found = islice(found, config.max_samples)
    examples: list[Example] = []
    count = 0
    columns: dict[str, None] = {}
    for origin, row in found:
        count += 1
        if not isinstance(row, Mapping):
            tally.dropped.append(Dropped(origin=origin, reason="not an object", detail=str(row)[:60]))
            continue
        columns.update(dict.fromkeys(row))
        example = read(row, spec.layout, origin)
        if isinstance(example, Dropped):
            tally.dropped.append(example)
        else:
            examples.append(example)
    unread = tuple(
        name for name in ("history", "system", "tools") if name in columns and name not in spec.layout.columns
    )
    if unread:
        tally.notes.append(f"{spec.name}: columns {', '.join(unread)} are not read, as its entry does not name them")
    source = str(spec.path) if spec.path is not None else str(spec.hf_hub_url or spec.ms_hub_url)
    tally.sets.append(
        SetReport(name=spec.name, source=source, read=count, examples=len(examples), unread_columns=unread)
    )
    return examples


def mix(sets: Mapping[str, list[Example]], config: Config, seed: int) -> list[Example]:
    """The examples of several sets as one list, by `mix_strategy`."""
    lists = list(sets.values())
    if config.mix_strategy == "concat" or len(lists) < 2:
        return [example for examples in lists for example in examples]
    probs = config.interleave_probs or None
    if probs is not None and len(probs) != len(lists):
        raise DataError(
            f"interleave_probs has {len(probs)} numbers for {len(lists)} data sets",
            where=_where(config, "interleave_probs"),
            remedy="give one for each set, in the order of `dataset`",
        )
    empty = [name for name, examples in sets.items() if not examples]
    if empty:
        raise DataError(
            f"data set {empty[0]!r} has no usable rows",
            why=f"mix_strategy {config.mix_strategy} takes rows from every set",
            remedy=f"`trimtab data` shows why its rows are dropped; or leave {empty[0]} out",
        )
    places = order.interleave([len(examples) for examples in lists], config.mix_strategy, probs, seed)
    return [lists[which][row] for which, row in places]


# ---------------------------------------------------------------------------------------------------------------- rows


def _encode(
    examples: list[Example], config: Config, tokenizer: Tokenizer, template: Template, tally: _Tally
) -> tuple[list[Any], list[Example]]:
    tally.examples += len(examples)
    rows: list[Any] = []
    kept: list[Example] = []
    workers = getattr(config, "preprocessing_num_workers", None) or 1
    encoded: Iterable[list[Any] | Dropped]
    if workers > 1 and len(examples) >= LONG:
        settings = Settings(
            stage=config.stage,
            cutoff_len=config.cutoff_len,
            mask_history=config.mask_history,
            train_on_prompt=config.train_on_prompt,
            rm_loss=getattr(config, "rm_loss", "pairwise"),
        )
        encoded = mapped(encode_row, examples, (settings, tokenizer, template), workers)
    else:
        encoded = (encode_row(example, config, tokenizer, template) for example in examples)
    for example, found in zip(_progress(examples), encoded, strict=True):
        if isinstance(found, Dropped):
            tally.dropped.append(found)
            continue
        for row, lost in found:
            rows.append(row)
            kept.append(example)
            tally.cut += lost > 0
            tally.lost += lost
    return rows, kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The part of a config that decides how a row is encoded."""

    stage: str
    cutoff_len: int
    mask_history: bool
    train_on_prompt: bool
    rm_loss: str = "pairwise"


def encode_row(
    example: Example, config: Config, tokenizer: Tokenizer, template: Template
) -> list[tuple[TokenRow | Pair | Ranking | Prompt, int]] | Dropped:
    """The row of one example (several of a long text) and how many tokens each lost; or why there is none."""
    if config.stage == "pt":
        parts = encode.encode_text(example, tokenizer, cutoff_len=config.cutoff_len)
        if not parts:  # pieces of one token predict nothing
            reason = encode.NOTHING_LEFT if config.cutoff_len < 2 else "a text of one token"
            return Dropped(origin=example.origin, reason=reason)
        return [(part, 0) for part in parts]
    fitted: tuple[TokenRow | Pair | Ranking, int] | Dropped
    if config.stage == "sft":
        fitted = encode.fit_sft(
            example,
            template,
            tokenizer,
            cutoff_len=config.cutoff_len,
            mask_history=config.mask_history,
            train_on_prompt=config.train_on_prompt,
        )
        return fitted if isinstance(fitted, Dropped) else [fitted]
    if config.stage == "kto":
        labelled = encode.fit_labelled(example, template, tokenizer, cutoff_len=config.cutoff_len)
        return labelled if isinstance(labelled, Dropped) else [labelled]
    rm_loss = getattr(config, "rm_loss", "pairwise") if config.stage == "rm" else ""
    if rm_loss == "pointwise":
        fitted = encode.fit_scored(example, template, tokenizer, cutoff_len=config.cutoff_len)
        return fitted if isinstance(fitted, Dropped) else [fitted]
    if rm_loss == "listwise" or (rm_loss and example.ranked):
        fitted = encode.fit_ranking(example, template, tokenizer, cutoff_len=config.cutoff_len)
        return fitted if isinstance(fitted, Dropped) else [fitted]
    if config.stage in PAIRED:
        fitted = encode.fit_pair(example, template, tokenizer, cutoff_len=config.cutoff_len)
        return fitted if isinstance(fitted, Dropped) else [fitted]
    prompt = encode.encode_prompt(example, template, tokenizer, index=0, cutoff_len=config.cutoff_len)
    if isinstance(prompt, Dropped):
        return prompt
    whole = encode.join(encode.chunks(encode.encode_source(example, template, tokenizer))) if prompt.cut else ()
    return [(prompt, max(0, len(whole) - len(prompt.token_ids)))]


def _pack(
    rows: list[Any], examples: list[Example], config: Config, tally: _Tally
) -> tuple[list[Any], list[Example], list[list[int]] | None]:
    """Rows, their examples and, with neat_packing, the row numbers of each pack (`packing.py`)."""
    neat, plain = getattr(config, "neat_packing", False), getattr(config, "packing", None)
    if config.stage not in ("pt", "sft") or not rows or not (neat or plain):
        return rows, examples, None
    room = config.cutoff_len
    if neat:
        groups = packing.packs([len(row.token_ids) for row in rows], room)
        tally.notes.append(
            f"neat_packing: {len(rows)} rows in {len(groups)} packs of at most {room} tokens, which are what a batch counts; "
            "no row sees another"
        )
        return rows, examples, groups
    if config.stage == "pt":
        pieces, owners = packing.recut(rows, room)
        documents = len({id(example) for example in examples})  # a long one has several rows already
        tally.notes.append(f"packing: {documents} texts as one, in {len(pieces)} pieces of at most {room} tokens")
        return pieces, [examples[owner] for owner in owners], None
    groups = packing.packs([len(row.token_ids) for row in rows], room)
    tally.notes.append(
        f"packing: {len(rows)} rows joined into {len(groups)} of at most {room} tokens; joined rows see the ones before them "
        "(neat_packing keeps them apart)"
    )
    return [packing.joined([rows[i] for i in group]) for group in groups], [examples[g[0]] for g in groups], None


def _prompts(
    rows: list[Any], examples: list[Example], config: Config, tokenizer: Tokenizer, template: Template
) -> list[Prompt]:
    """The held-out prompts; the rows themselves in online stages, none in pt."""
    if config.stage in ONLINE:
        return rows
    if config.stage == "pt":
        return []
    found = [
        encode.encode_prompt(example, template, tokenizer, index=index, cutoff_len=config.cutoff_len)
        for index, example in enumerate(examples)
    ]
    return [prompt for prompt in found if isinstance(prompt, Prompt)]


def _renumber(prompts: list[Prompt]) -> list[Prompt]:
    return [
        Prompt(index=index, token_ids=prompt.token_ids, example=prompt.example, cut=prompt.cut)
        for index, prompt in enumerate(prompts)
    ]


def _progress(examples: list[Example]) -> Iterator[Example]:
    """The same examples, with a bar while there are many and somebody is looking."""
    if len(examples) < LONG:
        yield from examples
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(examples, description="encoding", console=console, transient=True, disable=not console.is_terminal)


# -------------------------------------------------------------------------------------------------------------- report


def row_answers(row: TokenRow | Pair | Ranking) -> tuple[TokenRow, ...]:
    """The answers of a row that a reward model learns from, the better ones first."""
    return row.answers if isinstance(row, Pair | Ranking) else (row,)


def row_ids(row: TokenRow | Pair | Ranking | Prompt) -> tuple[int, ...]:
    """What a row holds, as one key: its tokens (of all its answers, a -1 between two)."""
    if isinstance(row, Pair | Ranking):
        first, *more = row.answers
        return (*first.token_ids, *(token for answer in more for token in (-1, *answer.token_ids)))
    return row.token_ids


def row_length(row: TokenRow | Pair | Ranking | Prompt) -> int:
    """Tokens of a row; of the longest answer's, where there are several."""
    if isinstance(row, Pair | Ranking):
        return max(len(answer.token_ids) for answer in row.answers)
    return len(row.token_ids)


def row_scored(row: TokenRow | Pair | Ranking | Prompt) -> int:
    """Tokens that are learnt or scored, in all answers; of a prompt none yet."""
    if isinstance(row, Pair | Ranking):
        return sum(len(answer.scored) for answer in row.answers)
    return len(row.scored) if isinstance(row, TokenRow) else 0


def _report(
    tally: _Tally, train: list[Any], held: list[Any], train_examples: list[Example], held_examples: list[Example]
) -> Report:
    rows = [*train, *held]
    trained = {example.prompt for example in train_examples if example.prompt}
    return Report(
        sets=tuple(tally.sets),
        dropped=tuple(tally.dropped),
        examples=tally.examples,
        train=len(train),
        eval=len(held),
        cut=tally.cut,
        lost=tally.lost,
        lengths=tuple(row_length(row) for row in rows),
        scored=tuple(row_scored(row) for row in rows),
        duplicates=len(rows) - len({row_ids(row) for row in rows}),
        overlap=sum(example.prompt in trained for example in held_examples),
        notes=tuple(tally.notes),
    )


def _nothing_left(key: str, config: Config, tally: _Tally) -> DataError:
    read = sum(s.read for s in tally.sets)
    counted = Counter(row.reason for row in tally.dropped)
    reasons = "; ".join(
        f"{count} {reason} (first: {next(row for row in tally.dropped if row.reason == reason)})"
        for reason, count in counted.most_common()
    )
    remedy = "`trimtab data FILE` shows the rows; often `columns` or `formatting` in dataset_info.json is not theirs"
    if counted and set(counted) <= encode.NO_ROOM:
        remedy = f"raise cutoff_len, which is {config.cutoff_len}: no row has room within it for anything to learn"
    return DataError(
        f"no rows left: {read} read - {len(tally.dropped)} dropped = {read - len(tally.dropped)}",
        where=_where(config, key),
        why=reasons or "the files are empty",
        remedy=remedy,
    )
