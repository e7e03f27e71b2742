"""A file of predictions: its rows, and what the eval tasks say of them.

`generated_predictions.jsonl` of trimtab and of LLaMA-Factory has one JSON object a line with `prompt`, `predict` and `label`; that of a
reward model has the two scores `chosen` and `rejected`, and is `report/rewards.py`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.data.files import read_text
from trimtab.errors import DataError
from trimtab.evals import EVALS
from trimtab.types import Example, Message, Origin

SAMPLES = "samples"
"""Further answers to a row, beside `predict`: a list of texts."""
DEFAULT_TASKS = ("exact_match", "normalised_match", "bleu-4", "rouge-1", "rouge-2", "rouge-l")


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its line.

    Raises:
        DataError: the file cannot be read or is no UTF-8, a line is no JSON object, or there is none.
    """
    path = Path(path)
    try:
        lines = read_text(path).split("\n")  # str.splitlines would also cut inside texts that hold U+2028 and its like
    except OSError as error:
        raise DataError(
            f"cannot read the predictions {path.absolute()}",
            where=str(path),
            why=str(error),
            remedy="name a generated_predictions.jsonl, as trimtab predict writes it",
        ) from error
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                "a line of the predictions is not JSON",
                where=f"{path}:{number}",
                why=str(error),
                remedy="one JSON object a line; a run that was cut off may have left half of the last one",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                "a line of the predictions is no JSON object",
                where=f"{path}:{number}",
                why=f"it is a {type(row).__name__}",
                remedy='write {"prompt": ..., "predict": ..., "label": ...} on each line',
            )
        count += 1
        yield number, row
    if not count:
        raise DataError(
            "the file of predictions is empty",
            where=str(path),
            why="there is nothing to evaluate",
            remedy="run trimtab predict first",
        )


def labelled(path: str | Path, rows: Sequence[Example] = ()) -> tuple[list[str], list[Example], int]:
    """Predictions and reference answers of a file, and how many rows have no reference.

    Args:
        rows: the data that was predicted, to be taken for the rows in place of what the file says: by the number in its `row`, else
            in order; a label must be the row's own answer, and where nothing but the order says which row is meant, none may be missing.

    Raises:
        DataError: a row without `predict`, or with values that are no text; not one row with a `label`; a row that is not in `rows`;
            not as many as there are rows where their order alone places them.
    """
    texts, examples, without, bare = [], [], 0, 0
    numbered = {example.origin.row: example for example in rows}
    for place, (number, row) in enumerate(read_rows(path)):
        where = f"{path}:{number}"
        if "predict" not in row:
            scores = " (these are the scores of a reward model: trimtab rm report)" if "chosen" in row else ""
            raise DataError(
                f"a prediction without 'predict'{scores}",
                where=where,
                why=f"it has: {', '.join(row) or 'nothing'}",
                remedy='write {"prompt": ..., "predict": ..., "label": ...} on each line',
            )
        label = "" if row.get("label") is None else row["label"]
        for name, value in (("predict", row["predict"]), ("label", label)):
            if not isinstance(value, str):
                raise DataError(
                    f"{name!r} is no text",
                    where=where,
                    why=f"it is a {type(value).__name__}",
                    remedy="write the answer as a JSON string",
                )
        if not label and not rows:
            without += 1
            continue
        origin = Origin(file=str(path), row=number)
        texts.append(row["predict"])
        if rows:
            told = str(row.get("row", "")).rpartition(":")[2]
            found = numbered.get(int(told) if told.isdecimal() else place + 1)
            gold = (found.response or found.chosen) if found is not None else None
            bare += not told.isdecimal() and not label
            if found is None or gold is None or (label and gold.content != label):
                raise DataError(
                    "this prediction is not about a row of --data",
                    where=where,
                    why="there is no such row"
                    if found is None
                    else f"its label is {label[:60]!r}, and {found.origin} has {gold.content[:60] if gold else None!r}",
                    remedy="name the set that was predicted; its rows stand in the order of the predictions",
                )
            drawn = {SAMPLES: row[SAMPLES]} if SAMPLES in row else {}
            examples.append(replace(found, columns={**found.columns, **drawn}))
            continue
        examples.append(Example(origin=origin, response=Message(role="assistant", content=label), columns=row))
    if bare and len(texts) != max(numbered):
        raise DataError(
            f"{len(texts)} predictions on {max(numbered)} rows",
            where=str(path),
            why="neither 'label' nor 'row' says which row a prediction is about, so it is its place that counts",
            remedy='write one line for each row of --data, in its order, or its number as "row" on each line',
        )
    if not texts:
        raise DataError(
            "no prediction has a reference answer",
            where=str(path),
            why=f"'label' is missing or empty in all of its {without} rows",
            remedy="predict on a data set whose rows have answers",
        )
    return texts, examples, without


def evaluate(
    texts: list[str], examples: list[Example], tasks: Sequence[str], *, where: str = ""
) -> dict[str, Sequence[float | None]]:
    """Each task's score of each answer; None where a row cannot be judged.

    Raises:
        ConfigError: no such task.
    """
    for task in tasks:
        EVALS.row(task, where=where)
    return {task: EVALS.load(task)(texts, examples) for task in tasks}


def summary(scores: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error (0 of a single answer)."""
    n = len(scores)
    mean = math.fsum(scores) / n
    if n < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (n - 1) / n)
