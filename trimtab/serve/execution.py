"""Execution accuracy of a model or of a file of predictions, for `trimtab eval`: answers are found or made, then judged.

| given | answers |
|---|---|
| a file of predictions (`.jsonl`) | its own, on the databases that it names or on those of `--data` |
| a run folder with predictions | those; with `key=value` words or `--samples` as a config (not of stage rm) |
| a run folder, a config | greedy answers to its held-out rows (as `trimtab predict` takes them), and sampled ones with `--samples` |

Made answers are written beside the figures (`execution_answers.jsonl`), so that they can be judged again without the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.config import StageConfig, load
from trimtab.data import info, source
from trimtab.data.dropped import Dropped
from trimtab.data.files import READERS
from trimtab.data.stage import StageData
from trimtab.data.write import check_target, write_rows, write_text
from trimtab.errors import ConfigError, DataError, RunError
from trimtab.evals import EVALS
from trimtab.evals.execution import JudgedRow, judge_rows
from trimtab.evals.predictions import SAMPLES, labelled
from trimtab.report.execution import compare, figures
from trimtab.rundir import PREDICTIONS, RunFolder, write_json
from trimtab.serve.answer import answer
from trimtab.serve.predict import databases, serving_session
from trimtab.sql.rows import DATABASE, UNVERIFIED, is_built, moved, row_of
from trimtab.train.assemble import Session
from trimtab.train.online import with_filters
from trimtab.train.progress import bar, say
from trimtab.types import Example, Prompt

ANSWERS, FIGURES = "execution_answers.jsonl", "execution_results.json"
TASK = "execution_accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be judged.

    Attributes:
        data: a built set whose rows a file of predictions is about; "" for those that the file names.
        samples: sampled answers to each row beside the greedy one.
        seed: of the samples and of the intervals.
    """

    data: str = ""
    dataset_dir: str = "data"
    samples: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The judged rows of a system, its name, and the folder where its figures go (None where they are only shown)."""

    name: str
    rows: list[JudgedRow]
    folder: Path | None = None


def judged(target: Path, words: Sequence[str], asked: Asked) -> Found:
    """The answers of a file, a run folder or a config, judged.

    Raises:
        RunError: a folder without predictions and without a run.
        ConfigError: words or options that are for another kind of target, a reward model.
        TrimtabError: whatever stops the answering; rows without databases.
    """
    if target.is_dir():
        there = predicted(target, words, asked)
        if there is not None:
            return _of_file(there, asked, name=str(target))
        return of_model(run_config(target, words), asked, folder=target)
    if target.suffix == ".jsonl":
        if words or asked.samples:
            raise ConfigError(
                f"a file of predictions takes no {'keys: ' + ' '.join(words) if words else '--samples'}",
                where="command line",
                why="nothing is loaded or generated",
                remedy="leave them out, or name the config or run folder that made it",
            )
        return _of_file(target, asked, name=str(target))
    config = _writing(load(target, list(words)))
    return of_model(config, asked, folder=Path(config.output_dir) if config.output_dir else None)


def predicted(folder: Path, words: Sequence[str], asked: Asked) -> Path | None:
    """The predictions of a run folder; None where it has none, or where others are to be made."""
    there = folder / PREDICTIONS
    return there if there.is_file() and not words and not asked.samples else None


def run_config(folder: Path, words: Sequence[str]) -> StageConfig:
    """The config of a run as a file for inference of what it trained.

    Raises:
        RunError: no run has been there.
        ConfigError: a reward model's, or words that do not fit.
    """
    run = RunFolder(folder)
    if not run.has_run():
        raise RunError(
            f"{folder} holds neither predictions nor a run",
            where=str(folder),
            why=f"there is no {PREDICTIONS}, and no run has left its config",
            remedy="name the output_dir of a run, or a file of predictions",
        )
    return _writing(load(_as_served(run), list(words)))


def _writing(config: StageConfig) -> StageConfig:
    if config.stage == "rm":
        raise ConfigError(
            "a reward model writes no answers that could be judged",
            where=config.origin("stage"),
            why="it was trained for its value head, and text from it would mean nothing",
            remedy="`trimtab rm report` shows how it scores pairs; or name the run of a model that writes",
        )
    return config


def _as_served(run: RunFolder) -> dict[str, Any]:
    """The config of a run as a file for inference of what it trained: as `serve/scores.py` reads a reward model's."""
    resolved = {name: value for name, value in run.config().items() if value is not None}
    keys = {**resolved, "do_train": False, "adapter_name_or_path": str(run.path), "output_dir": str(run.path)}
    if resolved.get("finetuning_type", "lora") != "lora":
        keys |= {"model_name_or_path": str(run.path), "adapter_name_or_path": [], "finetuning_type": "lora"}
    return keys


def _of_file(path: Path, asked: Asked, *, name: str) -> Found:
    texts, examples, without = labelled(path, built_rows(asked.data, asked.dataset_dir) if asked.data else ())
    if without:
        say(f"{without} of {without + len(texts)} rows have no answer to compare with")
    return of_answers(path, texts, examples, name=name)


def of_answers(path: Path, texts: Sequence[str], examples: Sequence[Example], *, name: str = "") -> Found:
    """The answers of a file that has been read, judged."""
    return Found(name=name or str(path), rows=judge_rows(texts, examples, _samples(path, examples)))


def _samples(path: Path, examples: Sequence[Example]) -> list[list[str]]:
    """The sampled answers that the rows hold; empty where none does."""
    found = [example.columns.get(SAMPLES) or [] for example in examples]
    if not any(found):
        return []
    if len({len(texts) if isinstance(texts, list) else -1 for texts in found}) > 1 or not all(
        isinstance(text, str) for texts in found for text in texts
    ):
        raise DataError(
            "the rows do not have the same number of sampled answers",
            where=str(path),
            why=f"pass@k is a mean over rows with as many answers each, and {SAMPLES!r} is a list of texts",
            remedy=f"write as many texts into {SAMPLES!r} of each row, or into none",
        )
    return found


def built_rows(name: str, dataset_dir: str) -> list[Example]:
    """The rows of a built set: a file, or a name in dataset_info.json.

    Raises:
        DataError: no such set, or no row of it has a database.
    """
    path = Path(name)
    if path.is_file() or path.suffix.lower() in READERS:
        spec = source.beside(path)
    else:
        spec = source.find(name, dataset_dir=dataset_dir, formatting=None, ranking=None, columns=())
    read = (source.example(value, origin, spec) for origin, value in source.rows(spec))
    found = [one for one in read if not isinstance(one, Dropped)]
    if not any(has_database(example) for example in found):
        raise DataError(
            f"no row of {name} has a database",
            where=str(spec.path),
            why=f"the columns of its first are {', '.join(map(str, found[0].columns)) if found else 'none'}",
            remedy="`trimtab sql build FILE` writes a data set whose rows have databases",
        )
    return found


def has_database(example: Example) -> bool:
    """May this row be judged, or does it say why not? Asked where somebody wants it judged."""
    return bool(example.columns.get(DATABASE) or example.columns.get(UNVERIFIED))


def file_has_databases(path: Path, asked: Asked) -> bool:
    """Can every row of a file of predictions be judged by execution?"""
    return bool(asked.data) or all(_has_its_databases(example) for example in labelled(path)[1])


def run_has_databases(config: StageConfig) -> bool:
    """Have the held-out rows of a file databases? The first of each set says so, before anything is loaded."""
    if config.sql_database:
        return True
    firsts: list[Example | None] = []
    for spec in info.find(config.eval_dataset or config.dataset, config.dataset_dir):
        if spec.path is None:  # on a hub: it is read with the others
            return False
        read = (source.example(value, origin, spec) for origin, value in info.rows(spec))
        firsts.append(next((one for one in read if not isinstance(one, Dropped)), None))
    return bool(firsts) and all(one is not None and _has_its_databases(one) for one in firsts)


def _has_its_databases(example: Example) -> bool:
    """A builder has written the row, or its databases are there: a column of that name may mean anything else."""
    columns, home = example.columns, Path(example.origin.file).parent
    return is_built(columns) or (isinstance(columns.get(DATABASE), str | list) and bool(moved(columns, home, home)))


def of_model(config: StageConfig, asked: Asked, *, folder: Path | None) -> Found:
    """Greedy and sampled answers of the model that a file serves, judged, and written into `folder`.

    Raises:
        DataError: held-out rows without databases, before the model is loaded.
        TrimtabError: data, model or adapters that cannot be used.
    """
    for task in config.eval_tasks:
        EVALS.row(task, where=config.origin("eval_tasks"))
    for note in config.notes:
        say(note)
    session, _ = serving_session(config, as_prompts=True, check=_check)
    return of_session(session, asked, folder=folder, name=str(folder or config.model_name_or_path))


def _check(data: StageData[Any]) -> None:
    check_built(data.eval_prompts)


def check_built(prompts: Sequence[Prompt]) -> None:
    """Every prompt's row has databases, and they are there.

    Raises:
        ConfigError, DataError: one has none, or as `row_of`.
    """
    bare = next((prompt.example for prompt in prompts if not has_database(prompt.example)), None)
    if bare is not None:
        raise DataError(
            "judging by execution needs a database for every row",
            where=str(bare.origin),
            why=f"the row's columns are {', '.join(map(str, bare.columns)) or 'none'}",
            remedy="evaluate on a data set that `trimtab sql build` has written, or write sql_database: ADDRESS",
        )
    for prompt in prompts:
        row_of(prompt.example)


def of_session(session: Session, asked: Asked, *, folder: Path | None, name: str) -> Found:
    """The same of a model that is loaded."""
    prompts = session.data.eval_prompts[: session.config.eval_max_samples]
    greedy, samples = answers_of(session, prompts, samples=asked.samples, seed=asked.seed)
    examples = [prompt.example for prompt in prompts]
    found = judge_rows(greedy, examples, samples)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {
                "prompt": prompt.example.prompt[-1].content,
                "predict": text,
                "label": row.gold,
                **({SAMPLES: samples[i]} if samples else {}),
                "verdict": row.kind,
                "row": row.where,
                **databases(prompt.example, folder),
            }
            for i, (prompt, text, row) in enumerate(zip(prompts, greedy, found, strict=True))
        ]
        write_rows(folder / ANSWERS, lines)
    return Found(name=name, rows=found, folder=folder)


def answers_of(
    session: Session, prompts: Sequence[Prompt], *, samples: int, seed: int, greedy: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Greedy answers to prompts, and so many sampled ones to each: at the file's temperature (else 1), with the filters it writes."""
    config = session.config
    base = replace(with_filters(config.chat_sampling, config), temperature=0.0)
    heat = 1.0 if config.temperature in (None, 0.0) else config.temperature
    window = getattr(session.roles.model.config.get_text_config(), "max_position_embeddings", None)
    limit = config.max_length if config.max_new_tokens is None else None
    generator = session.generator()
    with bar("answer", len(prompts) * (samples + greedy)) as advance:

        def ask(sampling: Any, k: int) -> list[str]:
            found = answer(generator, prompts, sampling, k=k, max_length=limit, window=window, progress=advance)
            return [session.text(completion) for completion in found]

        first = ask(replace(base, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0), 1) if greedy else []
        drawn = ask(replace(base, temperature=heat, seed=seed), samples) if samples else []
    return first, [drawn[i * samples : (i + 1) * samples] for i in range(len(prompts))] if samples else []


def report(found: Found, *, seed: int, output: Path | None = None) -> dict[str, Any]:
    """The figures of a system, also written into its folder and to `output`."""
    told = {"name": found.name, **figures(found.rows, seed=seed)}
    if found.folder is not None:
        write_json(found.folder / FIGURES, told)
    if output is not None:
        write_text(output, json.dumps(told, ensure_ascii=False, indent=2) + "\n")
    return told


def paired(
    first: Path, second: Path, words: Sequence[str], asked: Asked, *, output: Path | None = None
) -> tuple[dict[str, Any], tuple[Found, Found]]:
    """Two systems on the same rows: the comparison, also written to `output`, and both.

    Raises:
        DataError: a target is not there, the rows differ, or `output` exists.
        TrimtabError: as `judged`.
    """
    if output is not None:
        check_target(output, kinds=(".json",))
    for target in (first, second):  # before the first one has loaded a model
        if not target.exists():
            raise DataError(
                f"there is nothing to compare at {target}",
                where=str(target.absolute()),
                why="what follows the first target is the second one, or KEY=VALUE",
                remedy="name a file of predictions, a run folder or a config; or write KEY=VALUE",
            )
    files = [target.suffix == ".jsonl" for target in (first, second)]
    # words are for the target that loads something; where none does, files of predictions say that they take none
    one, other = (
        judged(target, () if file and not all(files) else words, asked)
        for target, file in zip((first, second), files, strict=True)
    )
    told = {"names": [one.name, other.name], **compare(one.rows, other.rows, seed=asked.seed)}
    if output is not None:
        write_text(output, json.dumps(told, ensure_ascii=False, indent=2) + "\n")
    return told, (one, other)
