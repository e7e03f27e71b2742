"""Answers to a whole data set, in the order of its rows; with stage rm, scores of its answers.

| file | what it holds |
|---|---|
| `generated_predictions.jsonl` | a row per data row: prompt, predict, label; finish and row (`file:number`); the columns of a built set |
| the same, stage rm | chosen and rejected with tokens (and verdicts) of each, or ranked, or reward and score; row |
| `predict_results.json` | `predict_rows` (held out, trained on, or unknown); match rates, BLEU-4, ROUGE, every eval task |
| the same, stage rm | `predict_rows`, `predict_accuracy`, `predict_margin`; `predict_mse` where rows have scores |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from trimtab.config import StageConfig, dump_resolved
from trimtab.data.loader import StageData, load_data, row_answers
from trimtab.errors import ConfigError, ModelError, RunError
from trimtab.evals import EVALS
from trimtab.evals.predictions import DEFAULT_TASKS
from trimtab.models.budget import Budget
from trimtab.rewards import with_tail
from trimtab.rewards.model import score_rows_as
from trimtab.rundir import PREDICT_RESULTS, PREDICTIONS, RunFolder
from trimtab.serve.answer import Text, answer
from trimtab.serve.model import find_served, load_served
from trimtab.sql.cached import shared_judge
from trimtab.sql.rows import is_built, moved, row_of
from trimtab.train.assemble import REWARD, Session, load_text_side
from trimtab.train.memory import PeakMemory
from trimtab.train.offline import score_tasks
from trimtab.train.progress import bar, say
from trimtab.types import Example, Pair, Prompt, TokenRow

VERDICTS = ("chosen_verdict", "rejected_verdict")
"""Columns of pairs that `trimtab data prefer` has made."""
BLOCK = 256  # rows between two writes

Figures = dict[str, float]
Measured = Literal["held out", "trained on", "unknown"]
"""What a model knows of the rows that it is measured on."""
SPLIT = ("dataset", "max_samples", "val_size", "seed", "data_seed")
"""What decides which rows val_size holds out."""


def predict(config: StageConfig) -> RunFolder:
    """Answer (stage rm: score) the rows of eval_dataset, or the rows held out by val_size, or those of dataset.

    Nothing in output_dir is touched but the two files of predictions.

    Raises:
        ConfigError: no output_dir, or no data set.
        RunError: output_dir holds predictions already and overwrite_output_dir is not true.
        TrimtabError: data, model or adapters that cannot be used.
    """
    folder = _open(config)
    with folder:
        for note in config.notes:
            say(note)
        session, rows = serving_session(config, as_prompts=config.stage != "rm")
        (folder.path / PREDICT_RESULTS).unlink(missing_ok=True)  # of older predictions, which go now
        predict_session(session, folder, rows)
    return folder


def serving_session(
    config: StageConfig,
    *,
    as_prompts: bool,
    training: bool = False,
    check: Callable[[StageData[Any]], None] | None = None,
) -> tuple[Session, Measured]:
    """The model that a file serves, with what is to be measured as its held-out rows; and what it knows of them.

    Args:
        as_prompts: rows are read as prompts, which need no answer.
        training: the rows to train on are wanted, not those held out, and nothing is measured.
        check: is given the rows before the model is loaded.

    Raises:
        TrimtabError: data, model or adapters that cannot be used.
    """
    for task in config.eval_tasks:
        EVALS.row(task, where=config.origin("eval_tasks"))
    source = find_served(config)
    if not source.writes and config.stage != "rm":
        raise ModelError(
            "this is a reward model: it scores pairs of answers and writes none",
            where=config.origin("adapter_name_or_path"),
            remedy="write stage: rm, with a data set of preferences; or name the adapter of an sft or ppo run",
        )
    tokenizer, template = load_text_side(source.config)
    read = _training_rows if training else _rows
    data = read(source.config, tokenizer, template, as_prompts)  # before the model: most mistakes are here
    if check is not None:
        check(data)
    say(f"data: {len(data.train if training else data.eval)} rows, {len(data.report.dropped)} dropped")
    for line in data.report.lines()[1:]:
        say(line)
    rows = _measured(source.config, source.home)
    if rows != "held out" and not training:
        others = "judges others" if config.stage == "rm" else "does on others"
        names = ", ".join(source.config.eval_dataset or source.config.dataset)
        say(
            f"these are rows that it was trained on ({names}): no measure of how it {others}"
            if rows == "trained on"
            else f"no eval_dataset or val_size: these are the rows of dataset ({names}); if it was trained on them, "
            f"they are no measure of how it {others}"
        )
    served = load_served(source)
    shared_judge(config.sql_workers)  # the one that eval tasks ask
    session = Session(
        config=served.config,
        tokenizer=served.tokenizer,
        template=served.template,
        data=data,
        roles=served.roles,
        device=served.device,
        dtype=served.dtype,
        room=Budget(served.budget, say),
        memory=PeakMemory(served.device),
        layout="padded",
        base=served.base,
        fingerprint=served.fingerprint,
        record=served.record,
        tail=served.tail,
    )
    return session, rows


def predict_session(session: Session, folder: RunFolder, rows: Measured = "held out") -> Figures:
    """Predictions on the held-out rows of a session, written into `folder`; returns the figures of predict_results.json."""
    started = time.monotonic()
    session = _first_rows(session, session.config.eval_max_samples)
    count = len(session.data.eval if session.config.stage == "rm" else session.data.eval_prompts)
    if count == 0:
        say(f"no predictions: stage {session.config.stage} has no held-out prompts here")
        return {}
    with bar("predict", count) as advance:
        figures = (_score_answers if session.config.stage == "rm" else _answer_prompts)(session, folder, advance)
    seconds = time.monotonic() - started
    figures = {
        "predict_samples": count,
        **{f"predict_{name}": value for name, value in figures.items()},
        "predict_runtime": round(seconds, 2),
        "predict_samples_per_second": round(count / max(seconds, 1e-9), 3),
    }
    folder.write_results("predict", {"predict_rows": rows, **figures})
    say(f"{folder.path / PREDICTIONS}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def _first_rows(session: Session, most: int | None) -> Session:
    """The session with at most that many held-out rows: those that an evaluation takes."""
    data = session.data
    few = {name: getattr(data, name)[:most] for name in ("eval", "eval_examples", "eval_prompts")}
    return replace(session, data=replace(data, **few))


def _answer_prompts(session: Session, folder: RunFolder, advance: Callable[[int], None]) -> Figures:
    config, prompts = session.config, session.data.eval_prompts
    for prompt in prompts:
        if is_built(prompt.example.columns):
            row_of(prompt.example)  # a database that has gone is told now, not after the last answer
    max_length = config.max_length if config.max_new_tokens is None else None
    window = getattr(session.roles.model.config.get_text_config(), "max_position_embeddings", None)
    skip = config.skip_special_tokens
    plain = Text(decode=_decoder(session, skip=True), stop_ids=session.template.stop_ids)
    shown = plain if skip else Text(decode=_decoder(session, skip=False))
    generator = session.generator()
    texts: list[str] = []
    finished = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal finished
        for start in range(0, len(prompts), BLOCK):
            block = prompts[start : start + BLOCK]
            completions = answer(
                generator, block, config.chat_sampling, max_length=max_length, window=window, progress=advance
            )
            for prompt, completion in zip(block, completions, strict=True):
                texts.append(plain.whole(completion.token_ids))
                finished += completion.finished
                yield {
                    "prompt": shown.decode(prompt.token_ids),
                    "predict": shown.whole(completion.token_ids),
                    "label": _label(prompt) or "",
                    "finish": "length" if completion.finish == "length" else "stop",
                    "row": str(prompt.example.origin),
                    **databases(prompt.example, folder.path),
                }

    folder.write_predictions(rows())
    labelled = [i for i, prompt in enumerate(prompts) if _label(prompt) is not None]
    figures: Figures = {"finished_rate": finished / len(prompts)}
    if len(labelled) < len(prompts):
        say(f"{len(prompts) - len(labelled)} of {len(prompts)} rows have no answer to compare with")
        figures["labelled"] = len(labelled)
    if labelled:
        executed = ["execution_accuracy"] if all(is_built(prompts[i].example.columns) for i in labelled) else []
        tasks = dict.fromkeys((*DEFAULT_TASKS, *executed, *(EVALS.row(task).name for task in config.eval_tasks)))
        figures |= score_tasks(tasks, [texts[i] for i in labelled], [prompts[i] for i in labelled])
    return figures


def _score_answers(session: Session, folder: RunFolder, advance: Callable[[int], None]) -> Figures:
    """Scores of the held-out answers: of pairs, of rankings (best first), or of single ones with the row's own score."""
    leads: list[float] = []
    ends: list[tuple[float, float]] = []
    errors: list[float] = []

    def rows() -> Iterator[dict[str, Any]]:
        judged, examples = session.data.eval, session.data.eval_examples
        for start in range(0, len(judged), BLOCK):
            block = judged[start : start + BLOCK]
            groups = [[with_tail(answer, session.tail) for answer in row_answers(row)] for row in block]
            flat = [answer for group in groups for answer in group]
            sizes = [len(group) for group in groups]
            scores = iter(
                score_rows_as(session.roles, REWARD, flat, budget=session.room, layout=session.layout, unit=sizes)
            )
            for row, size, example in zip(block, sizes, examples[start : start + BLOCK], strict=True):
                own = [next(scores) for _ in range(size)]
                leads.extend(better - worse for better, worse in combinations(own, 2))
                ends.append((own[0], own[-1]))
                advance(1)
                if isinstance(row, TokenRow):
                    errors.append(own[0] - (example.score or 0.0))
                    yield {"reward": own[0], "score": example.score, "row": str(example.origin)}
                elif isinstance(row, Pair):
                    tokens = {"chosen_tokens": len(row.chosen.scored), "rejected_tokens": len(row.rejected.scored)}
                    kinds = {name: example.columns[name] for name in VERDICTS if name in example.columns}
                    yield {"chosen": own[0], "rejected": own[1], **tokens, **kinds, "row": str(example.origin)}
                else:
                    yield {"ranked": own, "row": str(example.origin)}

    folder.write_predictions(rows())
    if errors:
        return {
            "mse": sum(error**2 for error in errors) / len(errors),
            "abs_error": sum(map(abs, errors)) / len(errors),
            "reward": sum(reward for reward, _ in ends) / len(ends),
        }
    return {
        "accuracy": sum(lead > 0 for lead in leads) / len(leads),  # a tie is an error
        "margin": sum(leads) / len(leads),
        "reward_chosen": sum(best for best, _ in ends) / len(ends),
        "reward_rejected": sum(worst for _, worst in ends) / len(ends),
    }


def databases(example: Example, folder: Path) -> dict[str, Any]:
    """What a row of predictions in `folder` keeps of a built row, so that it can be judged by execution on its own."""
    return moved(example.columns, Path(example.origin.file).parent, folder)


def _decoder(session: Session, *, skip: bool) -> Callable[[Any], str]:
    return lambda ids: str(session.tokenizer.decode(list(ids), skip_special_tokens=skip))


def _label(prompt: Prompt) -> str | None:
    """The answer to compare with, if the row has one."""
    message = prompt.example.response or prompt.example.chosen
    return None if message is None else message.content


def _open(config: StageConfig) -> RunFolder:
    """output_dir, made and locked."""
    if config.output_dir is None:
        raise ConfigError(
            "predictions need an output_dir",
            where="output_dir",
            why=f"{PREDICTIONS} is written there",
            remedy="name a folder: output_dir: FOLDER",
        )
    folder = RunFolder(config.output_dir)
    there = [name for name in (PREDICTIONS, PREDICT_RESULTS) if (folder.path / name).exists()]
    if there and not config.overwrite_output_dir:
        raise RunError(
            f"{folder.path} holds predictions already",
            where=config.origin("output_dir"),
            why=f"{there[0]} would be overwritten",
            remedy="choose another output_dir, or write overwrite_output_dir: true (nothing else there is touched)",
        )
    try:
        Path(folder.path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the folder {folder.path.absolute()}",
            where="output_dir",
            why=str(error),
            remedy="choose another",
        ) from error
    folder.lock(say=say)
    return folder


def _measured(config: StageConfig, home: Path) -> Measured:
    """Whether the model of the folder `home` has seen the rows that are measured: its run says on which data sets it was trained."""
    split = bool(config.val_size) and not config.eval_dataset
    folder = next(
        (one for one in (home, home.parent) if RunFolder(one).has_run()), None
    )  # a checkpoint is inside its run
    run = {} if folder is None else RunFolder(folder).config()
    # a name means a set in a folder; entries in the file itself (a mapping) are compared as they are
    there, now = (
        Path(place).resolve() if isinstance(place, str) else place
        for place in (run.get("dataset_dir"), config.dataset_dir)
    )
    if there == now and set(config.eval_dataset or config.dataset) & set(run.get("dataset") or ()):
        here = dump_resolved(config)
        return "held out" if split and all(here.get(key) == run.get(key) for key in SPLIT) else "trained on"
    return "held out" if split or config.eval_dataset else "unknown"


def _rows(config: StageConfig, tokenizer: Any, template: Any, as_prompts: bool) -> StageData[Any]:
    """The data with what is to be measured as its held-out rows.

    Prompts are read as for an online stage, where a row needs no answer; but rows that val_size holds out of a training set are
    split off exactly as in training.
    """
    if not (config.eval_dataset or config.dataset):
        raise ConfigError(
            "there is nothing to predict or evaluate",
            where="eval_dataset",
            why="neither eval_dataset nor dataset names a data set",
            remedy="add eval_dataset: NAME (as in dataset_info.json)",
        )
    split = bool(config.val_size) and not config.eval_dataset
    update: dict[str, Any] = {"tokenized_path": None, "packing": None, "neat_packing": False, "streaming": False}
    if as_prompts and not split:
        update["stage"] = "ppo"
    if not split:
        update |= {"eval_dataset": config.eval_dataset or config.dataset, "dataset": ()}
    return load_data(config.model_copy(update=update), tokenizer, template)


def _training_rows(config: StageConfig, tokenizer: Any, template: Any, as_prompts: bool) -> StageData[Any]:
    """The prompts of `dataset`, without what val_size holds out of it; where it names none, those of eval_dataset."""
    if not (config.eval_dataset or config.dataset):
        raise ConfigError(
            "there are no prompts to answer",
            where="dataset",
            why="neither dataset nor eval_dataset names a data set",
            remedy="add dataset: NAME (as in dataset_info.json)",
        )
    update: dict[str, Any] = {"tokenized_path": None, "packing": None, "neat_packing": False, "streaming": False}
    update |= {"stage": "ppo", "dataset": config.dataset or config.eval_dataset, "eval_dataset": ()}
    return load_data(config.model_copy(update=update), tokenizer, template)
