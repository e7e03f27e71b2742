"""Lengths of a stage's rows from a look at the first of them: enough for a plan, and the mistakes that a run would meet first.

Texts are counted with the model's own tokenizer.json where there is one. What the chat template adds is taken as `FRAME` tokens a
message, which is right within a few tokens for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from trimtab.data import info
from trimtab.data.dropped import Dropped
from trimtab.data.formats import FORMATS
from trimtab.errors import DataError, ModelError
from trimtab.plan.job import PAIRS, Lengths, alike
from trimtab.types import Example, Message

LOOKED_AT = 200
"""Rows of each set that are read as a run would read them."""

FRAME = 5
"""Tokens that a template puts around a message."""

_FRAME = (-1,) * FRAME

_BYTES_A_TOKEN = 3.5

Encoder = Callable[[str], Sequence[int]]


def encoder(folder: Path | None) -> Encoder:
    """The tokens of a text, by the tokenizer of a model folder; where there is none to read, about as many of its bytes.

    Raises:
        ModelError: a tokenizer.json that is broken.
    """
    file = folder / "tokenizer.json" if folder is not None else None
    if file is None or not file.is_file():
        return _bytes_apart
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception, whatever is wrong
        raise ModelError(
            "the tokenizer.json of this model is broken",
            where=str(file),
            why=str(error),
            remedy="copy or download it again",
        ) from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _bytes_apart(text: str) -> list[int]:
    data = text.encode()
    return [data[int(i * _BYTES_A_TOKEN)] for i in range(round(len(data) / _BYTES_A_TOKEN))]


def look(config: Any, encode: Encoder) -> Lengths | None:
    """Lengths of the training set, whose first rows, and those of the evaluation set, are read; None where it is on a hub.

    Raises:
        DataError: a set that cannot be found or read, or whose first rows are all unusable.
    """
    specs = info.find(list(config.dataset), config.dataset_dir)
    total, examples = 0, []
    for spec in specs:
        if spec.path is None:
            return None
        _serves(spec, config.stage)
        found, number = _first(spec, config.max_samples)
        examples += found
        total += number
    for spec in info.find(list(config.eval_dataset), config.dataset_dir):
        if spec.path is not None:
            _serves(spec, config.stage)
            _first(spec, config.max_samples)
    if not examples:
        raise DataError("no training rows", where="dataset", remedy="name a data set with rows")
    held = config.val_size if config.val_size >= 1 else total * config.val_size
    names = ", ".join(spec.name for spec in specs)
    return _lengths(config, examples, max(1, round(total - held)), encode, f"the first rows of {names}")


def _serves(spec: info.DatasetSpec, stage: str) -> None:
    if stage in PAIRS and not spec.layout.ranking:
        raise DataError(
            f"data set {spec.name!r} cannot serve stage {stage}: it is not a set of preferences",
            where=spec.where,
            why='the stage learns from chosen and rejected answers, and the entry does not say "ranking": true',
            remedy='if its rows have both, add "ranking": true to its entry; else name another set',
        )


def _first(spec: info.DatasetSpec, limit: int | None) -> tuple[list[Example], int]:
    """The first usable examples of a set, and how many rows it has (at most `limit`)."""
    read = FORMATS.load(spec.formatting)
    rows = iter(info.rows(spec))
    examples: list[Example] = []
    reason: Dropped | None = None
    seen = 0
    for origin, row in islice(rows, LOOKED_AT):
        seen += 1
        made = (
            read(row, spec.layout, origin) if isinstance(row, dict) else Dropped(origin=origin, reason="not an object")
        )
        if isinstance(made, Dropped):
            reason = reason or made
        else:
            examples.append(made)
    if not examples:
        raise DataError(
            f"none of the first {seen} rows of data set {spec.name!r} can be used",
            where=str(reason.origin) if reason else spec.where,
            why=f"{reason.reason}{': ' + reason.detail if reason.detail else ''}" if reason else "the set is empty",
            remedy="`trimtab data FILE` shows what each row becomes; the entry's columns may have other names",
        )
    total = seen + sum(1 for _ in rows)
    return examples, min(total, limit, spec.num_samples or total) if limit else min(total, spec.num_samples or total)


def _lengths(config: Any, examples: list[Example], rows: int, encode: Encoder, source: str) -> Lengths:
    limit = int(config.cutoff_len)

    def tokens(messages: Iterable[Message | None]) -> list[int]:
        return [i for message in messages if message is not None for i in (*_FRAME, *encode(message.content))]

    if config.stage == "pt":
        sizes = [len(encode(example.text or "".join(m.content for m in example.prompt))) for example in examples]
        cut = [min(size, limit) for size in sizes]
        return Lengths(rows=rows, prompt=0.0, answer=mean(cut), longest=max(cut), source=source)
    ids = [tokens(example.prompt)[:limit] for example in examples]
    prompts = [len(own) for own in ids]
    answers = [
        [len(tokens([message])) for message in (e.response, e.chosen, e.rejected) if message is not None]
        for e in examples
    ]
    written = [mean(own) for own in answers if own]
    if hasattr(config, "rollout_size"):
        # what the policy will write is not known; the data's answers, where it has some, are the best guess
        likely = min(mean(written), config.answer_limit) if written else config.answer_limit
        longest = max(prompts)
    else:
        likely = mean(written) if written else 0.0
        longest = max(min(p + max(own, default=0), limit) for p, own in zip(prompts, answers, strict=True))
    begun = alike(ids, config.batch_size)
    return Lengths(rows=rows, prompt=mean(prompts), answer=likely, longest=longest, alike=begun, source=source)
