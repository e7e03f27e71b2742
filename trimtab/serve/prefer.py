"""`trimtab data prefer`: preference data from execution. A model answers each prompt several times; verdicts say which answer is better.

    equal  >  executes (runs, with the right number of columns)  >  everything else

A pair joins answers of two of these ranks, never of one: what execution cannot tell apart is not told apart. The rejected answer of a
pair is the nearest miss there is (`verdicts.KINDS` in order: rows that differ before a query that does not parse), and each is
rejected once. Rows that cannot be judged give no pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.config import StageConfig
from trimtab.data.convert import DEFAULTS, NAMED, alpaca_row
from trimtab.data.dropped import Dropped
from trimtab.data.files import read_text
from trimtab.data.info import INFO
from trimtab.data.loader import StageData
from trimtab.data.write import check_target, write_rows, write_text
from trimtab.errors import ConfigError, DataError
from trimtab.evals import reference
from trimtab.evals.execution_accuracy import why_not
from trimtab.serve.execution import answers_of, check_built
from trimtab.serve.predict import VERDICTS, serving_session
from trimtab.sql.cached import same_statement, shared_judge
from trimtab.sql.rows import moved, row_of
from trimtab.sql.statement import find_statement
from trimtab.sql.verdicts import KINDS, Kind, Verdict
from trimtab.train.progress import say
from trimtab.types import Example, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What became of the prompts.

    Attributes:
        prompts, unjudged: rows that were read, and those of them that cannot be judged.
        paired: prompts with at least one pair.
        pairs: how many of each (verdict of the chosen, verdict of the rejected).
        verdicts: of all sampled answers.
    """

    prompts: int
    unjudged: int
    paired: int
    pairs: Mapping[tuple[Kind, Kind], int]
    verdicts: Mapping[Kind, int]

    def lines(self) -> list[str]:
        """For a reader."""
        total = sum(self.pairs.values())
        answers = sum(self.verdicts.values())
        lines = [
            f"{self.prompts} prompts: {self.unjudged} cannot be judged, {self.paired} give {total} pairs, "
            f"{self.prompts - self.unjudged - self.paired} give none"
        ]
        shares = [f"{kind} {100 * self.verdicts[kind] / answers:.1f} %" for kind in KINDS if self.verdicts.get(kind)]
        lines += [f"  {answers} answers: {', '.join(shares)}"] if answers else []
        most = sorted(self.pairs.items(), key=lambda item: -item[1])
        return lines + [f"  {better} over {worse}: {count}" for (better, worse), count in most]


def rank(kind: Kind) -> int:
    """2 equal, 1 executes with the right shape, 0 the rest."""
    return 2 if kind == "equal" else int(Verdict(kind=kind).right_shape)


def best_pairs(kinds: Sequence[Kind], most: int) -> list[tuple[int, int]]:
    """At most so many pairs (better, worse) of answers with these verdicts, by their places.

    Right answers first, then near misses first; each answer is rejected once, and of equally good ones the least used is chosen.
    """
    found: list[tuple[int, int]] = []
    used: Counter[int] = Counter()
    left = set(range(len(kinds)))  # not rejected yet
    while len(found) < most:
        candidates = [
            (-rank(kinds[i]), -KINDS.index(kinds[j]), used[i], i, j)
            for i in range(len(kinds))
            for j in left
            if rank(kinds[i]) > rank(kinds[j])
        ]
        if not candidates:
            break
        *_, better, worse = min(candidates)
        found.append((better, worse))
        used[better] += 1
        left.remove(worse)
    return found


def prefer(config: StageConfig, output: Path, *, samples: int = 8, most: int = 4, seed: int = 0) -> Made:
    """Write a ranking data set from the answers of the model that a file serves, and its entry in the folder's dataset_info.json.

    Args:
        config: its `dataset` gives the prompts (without the rows that val_size holds out), else its `eval_dataset`.
        samples: answers to each prompt, at the file's temperature, else 1.
        most: pairs of a prompt.
        seed: of the answers.

    Raises:
        ConfigError: a reward model's file.
        DataError: rows without databases, no pair at all, or a file or an entry in the way.
        TrimtabError: data, model or adapters that cannot be used.
    """
    check_target(output)
    if config.stage == "rm":
        raise ConfigError(
            "preference data comes from a model that writes, and this file is of stage rm",
            where=config.origin("stage"),
            remedy="name the file of the SFT model; the reward model is trained on what it gives",
        )
    entries = _entries(output.parent / INFO)
    if output.stem in entries:
        raise DataError(
            f"there is a data set called {output.stem!r} already",
            where=f"{output.parent / INFO}: {output.stem}",
            why="the new set would take the place of its entry, and nothing is overwritten",
            remedy="choose another name with --output",
        )
    for note in config.notes:
        say(note)
    session, _ = serving_session(config, as_prompts=True, training=True, check=_check)
    prompts = session.data.train
    examples = [prompt.example for prompt in prompts]
    judged = [i for i, example in enumerate(examples) if why_not(example, row_of(example)) is None]
    _, drawn = answers_of(session, [prompts[i] for i in judged], samples=samples, seed=seed, greedy=False)
    rows: list[dict[str, Any]] = []
    paired, pairs, verdicts = 0, Counter[tuple[Kind, Kind]](), Counter[Kind]()
    for i, texts in zip(judged, drawn, strict=True):
        database = row_of(examples[i]).database
        found = shared_judge().verdicts([(text, reference(examples[i]), database) for text in texts])
        verdicts.update(verdict.kind for verdict, _ in found)
        different = _different(texts, database.dialect)
        kinds = [found[place][0].kind for place in different]
        chosen = best_pairs(kinds, most)
        paired += bool(chosen)
        for better, worse in chosen:
            pairs[kinds[better], kinds[worse]] += 1
            answers = texts[different[better]], texts[different[worse]]
            rows.append(_row(examples[i], answers, (kinds[better], kinds[worse]), output.parent))
    made = Made(
        prompts=len(prompts), unjudged=len(prompts) - len(judged), paired=paired, pairs=pairs, verdicts=verdicts
    )
    if not rows:
        raise DataError(
            f"not one pair from {len(prompts)} prompts x {samples} answers",
            where=str(config.origin("dataset")),
            why="; ".join(line.strip() for line in made.lines())
            + "; a pair needs two answers of different rank to one prompt",
            remedy="more --samples, a higher temperature, or a model that is right now and then (train it longer)",
        )
    write_rows(output, rows)
    named = {
        meaning: name
        for meaning, name in (DEFAULTS["alpaca"] | {n: n for n in NAMED}).items()
        if any(name in row for row in rows)
    }
    entry = {"file_name": output.name, "ranking": True, "columns": named}
    write_text(output.parent / INFO, json.dumps({**entries, output.stem: entry}, ensure_ascii=False, indent=2) + "\n")
    return made


def _check(data: StageData[Any]) -> None:
    check_built(data.train)


def _different(texts: Sequence[str], dialect: str) -> list[int]:
    """The places of answers whose SQL no earlier one has."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        statement = find_statement(text)
        first.setdefault(text.strip() if statement is None else same_statement(statement, dialect), place)
    return list(first.values())


def _row(example: Example, answers: tuple[str, str], kinds: tuple[Kind, Kind], folder: Path) -> dict[str, Any]:
    """A row of the new set: the prompt, both answers with their verdicts, and what else the row holds."""
    better, worse = (Message(role="assistant", content=text) for text in answers)
    pair = replace(example, response=None, chosen=better, rejected=worse)
    row = alpaca_row(pair)
    if isinstance(row, Dropped):
        raise DataError(
            f"this prompt cannot be written as a row of preferences: {row.reason}",
            where=str(example.origin),
            why=row.detail,
            remedy="leave such rows out of the data set",
        )
    own = example.columns
    if "\n".join(str(own[n]) for n in ("instruction", "input") if own.get(n)) == row["instruction"]:
        row |= {"instruction": own["instruction"], "input": own.get("input") or ""}
    read = {*DEFAULTS["alpaca"].values(), *NAMED, "messages", "conversations", *row}
    kept = {name: value for name, value in own.items() if name not in read}
    kept |= moved(own, Path(example.origin.file).parent, folder)
    return {**row, "gold": reference(example), **dict(zip(VERDICTS, kinds, strict=True)), **kept}


def _entries(info: Path) -> dict[str, Any]:
    """The entries that are there."""
    if not info.exists():
        return {}
    try:
        found = json.loads(read_text(info))
        if isinstance(found, dict):
            return found
        why = f"it holds a {type(found).__name__}"
    except ValueError as error:
        why = str(error)
    raise DataError(
        f"{info} cannot be added to", where=str(info), why=why, remedy="mend it, or choose another folder for --output"
    )
