"""`trimtab eval`: a model on held-out rows, or a file of predictions against its reference answers. Nothing is trained.

| given | measured |
|---|---|
| a config, stage sft or pt | loss and perplexity of the rows' answers, and the file's `eval_tasks` on greedy answers |
| a config, stage rm | accuracy, margin, calibration of its scores on pairs |
| `generated_predictions.jsonl` | every text metric, or the tasks that are named, with the standard error of each mean |
| any of these but rm, on rows with databases | execution accuracy with all that belongs to it (`serve/execution.py`) |
| a run folder | execution accuracy where its rows have databases; else as its predictions, or without any as its config (not rm) |

The rows of a config are those of eval_dataset, else those that val_size holds out, else those of dataset; with an output_dir,
`eval_results.json` is written there, but never over that of a run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.config import StageConfig
from trimtab.data.stage import StageData
from trimtab.data.write import check_target, write_text
from trimtab.errors import ConfigError
from trimtab.evals import EVALS, predictions
from trimtab.rundir import RunFolder
from trimtab.serve import execution
from trimtab.serve.predict import serving_session
from trimtab.sql.rows import is_built
from trimtab.train.offline import OfflineTrainer
from trimtab.train.progress import say

MEASURED = ("pt", "sft", "rm")


def evaluate(config: StageConfig) -> dict[str, float]:
    """The figures of the held-out rows, under the names of eval_results.json.

    Raises:
        ConfigError: a stage whose figures need more than a model and its rows.
        TrimtabError: data, model or adapters that cannot be used.
    """
    return measure(config, execution.Asked())[0]


def measure(config: StageConfig, asked: execution.Asked) -> tuple[dict[str, float], execution.Found | None]:
    """The figures of the held-out rows; and where those have databases (not in stage rm), their answers judged.

    Raises:
        ConfigError: a stage whose figures need more than a model and its rows, on rows without databases.
        TrimtabError: data, model or adapters that cannot be used.
    """

    tasks = tuple(EVALS.row(task, where=config.origin("eval_tasks")).name for task in config.eval_tasks)

    def check(data: StageData[Any]) -> None:
        if config.stage not in MEASURED and not judgeable(data):
            raise ConfigError(
                f"trimtab eval does not measure stage {config.stage} on rows without databases",
                where=config.origin("stage"),
                why="its figures compare with a reference or a reward, which stand beside a run and not in a file for inference",
                remedy="set do_eval: true in the run itself; or stage=sft for the loss and tasks of this model, stage=rm for a reward "
                "model; or evaluate on a set that `trimtab sql build` has written",
            )
        if asked.samples and (config.stage == "rm" or not judgeable(data)):
            raise ConfigError(
                "--samples needs a model that writes, and rows with databases",
                where="command line",
                why="sampled answers are judged by running them",
                remedy="evaluate on a data set that `trimtab sql build` has written, or write sql_database=ADDRESS",
            )
        if config.stage != "rm" and judgeable(data):
            execution.check_built(data.eval_prompts)

    def judgeable(data: StageData[Any]) -> bool:
        """Rows that a builder has written; where execution is asked for, any that have a database."""
        examples = [prompt.example for prompt in data.eval_prompts]
        wanted = bool(asked.samples) or execution.TASK in tasks or config.stage not in MEASURED
        return bool(examples) and all(is_built(e.columns) or (wanted and execution.has_database(e)) for e in examples)

    for note in config.notes:
        say(note)
    session, _ = serving_session(config, as_prompts=config.stage not in MEASURED, check=check)
    built = config.stage != "rm" and judgeable(session.data)
    found: dict[str, float] = {}
    if config.stage in MEASURED:
        others = tuple(task for task in tasks if not (built and task == execution.TASK))  # judged below, once
        session.config = session.config.model_copy(update={"eval_tasks": others})
        found |= {f"eval_{name}": value for name, value in OfflineTrainer(session, trains=False).evaluate(0).items()}
    found["eval_samples"] = len(session.data.eval[: config.eval_max_samples])
    judged = None
    if built:
        home = Path(config.output_dir) if config.output_dir else None
        judged = execution.of_session(session, asked, folder=home, name=str(home or config.model_name_or_path))
        right = [row.right for row in judged.rows if row.verifiable]
        if right:
            found[f"eval_{execution.TASK}"] = sum(right) / len(right)
        if len(right) < len(judged.rows):
            found[f"eval_{execution.TASK}_unverified"] = len(judged.rows) - len(right)
    if config.output_dir:
        folder = RunFolder(config.output_dir)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_results("eval", found)
    return found, judged


def measure_run(
    folder: Path, words: Sequence[str], asked: execution.Asked
) -> tuple[dict[str, float], execution.Found | None]:
    """The same of a run, as its config says; where its rows have databases, by execution alone.

    Raises:
        RunError: no run has been there.
        ConfigError: a reward model's run; a stage that is measured on rows with databases alone.
        TrimtabError: data, model or adapters that cannot be used.
    """
    config = execution.run_config(folder, words)
    if execution.run_has_databases(config):
        return {}, execution.of_model(config, asked, folder=folder)
    if Path(config.output_dir or "") == folder:  # what the run found while it trained stays as it is
        config = config.model_copy(update={"output_dir": None})
    return measure(config, asked)


def evaluate_predictions(
    path: Path, tasks: Sequence[str] = (), *, output: Path | None = None, asked: execution.Asked | None = None
) -> tuple[list[dict[str, Any]], execution.Found | None]:
    """Task, mean, standard error and count of a file of predictions; and the rows judged by execution, where they have databases and
    no other tasks are asked for. Also written to `output` as JSON.

    Raises:
        DataError: a file that holds no predictions with reference answers, or that is about other rows than `asked.data`; an `output`
            that exists or is no .json.
        ConfigError: no such task.
    """
    asked = asked or execution.Asked()
    if output is not None:
        check_target(output, path, kinds=(".json",))  # now: the metrics take their time
    texts, examples, without = predictions.labelled(
        path, execution.built_rows(asked.data, asked.dataset_dir) if asked.data else ()
    )
    if without:
        say(f"{without} of {without + len(texts)} rows have no answer to compare with")
    chosen = list(dict.fromkeys(EVALS.row(task, where="--task").name for task in tasks or predictions.DEFAULT_TASKS))
    rows: list[dict[str, Any]] = []
    for task, given in predictions.evaluate(texts, examples, chosen).items():
        scores = [score for score in given if score is not None]
        mean, error = predictions.summary(scores) if scores else (math.nan, math.nan)
        row = {"task": task, "mean": mean, "standard_error": error, "count": len(scores)}
        rows.append(row | ({"unverified": len(given) - len(scores)} if len(scores) < len(given) else {}))
    judged = None
    wanted = bool(asked.data) or execution.TASK in chosen
    if (not tasks or execution.TASK in chosen) and all(
        is_built(e.columns) or (wanted and execution.has_database(e)) for e in examples
    ):
        judged = execution.of_answers(path, texts, examples)
    if output is not None:
        told: dict[str, Any] = {row["task"]: _without_nan(row) for row in rows}
        if judged is not None:
            told["execution"] = execution.report(judged, seed=asked.seed)
        write_text(output, json.dumps(told, ensure_ascii=False, indent=2) + "\n")
    return rows, judged


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null where there is no mean."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
