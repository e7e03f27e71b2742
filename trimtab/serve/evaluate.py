"""`trimtab eval`: a model on held-out rows, or a file of predictions against its reference answers. Nothing is trained.

| given | measured |
|---|---|
| a config, stage sft or pt | loss and perplexity of the rows' answers, and the file's `eval_tasks` on greedy answers |
| a config, stage rm | accuracy, margin, calibration of its scores on pairs |
| `generated_predictions.jsonl` | every text metric, or the tasks that are named, with the standard error of each mean |

The rows of a config are those of eval_dataset, else those that val_size holds out, else those of dataset; with an output_dir,
`eval_results.json` is written there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.config import StageConfig
from trimtab.data.write import check_target, write_text
from trimtab.errors import ConfigError
from trimtab.evals import EVALS, predictions
from trimtab.rundir import RunFolder
from trimtab.serve.predict import serving_session
from trimtab.train.offline import OfflineTrainer
from trimtab.train.progress import say

MEASURED = ("pt", "sft", "rm")


def evaluate(config: StageConfig) -> dict[str, float]:
    """The figures of the held-out rows, under the names of eval_results.json.

    Raises:
        ConfigError: a stage whose figures need more than a model and its rows.
        TrimtabError: data, model or adapters that cannot be used.
    """
    if config.stage not in MEASURED:
        raise ConfigError(
            f"trimtab eval does not measure stage {config.stage}",
            where=config.origin("stage"),
            why="its figures compare with a reference or a reward, which stand beside a run and not in a file for inference",
            remedy="set do_eval: true in the run itself; or stage=sft for the loss and tasks of this model, stage=rm for a reward model",
        )
    for task in config.eval_tasks:
        EVALS.row(task, where=config.origin("eval_tasks"))
    for note in config.notes:
        say(note)
    session, _ = serving_session(config, as_prompts=False)
    found = {f"eval_{name}": value for name, value in OfflineTrainer(session, trains=False).evaluate(0).items()}
    found["eval_samples"] = len(session.data.eval[: config.eval_max_samples])
    if config.output_dir:
        folder = RunFolder(config.output_dir)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_results("eval", found)
    return found


def evaluate_predictions(path: Path, tasks: Sequence[str] = (), *, output: Path | None = None) -> list[dict[str, Any]]:
    """Task, mean, standard error and count of a file of predictions; also written to `output` as JSON.

    Raises:
        DataError: a file that holds no predictions with reference answers; an `output` that exists or is no .json.
        ConfigError: no such task.
    """
    if output is not None:
        check_target(output, path, kinds=(".json",))  # now: the metrics take their time
    texts, examples, without = predictions.labelled(path)
    if without:
        say(f"{without} of {without + len(texts)} rows have no answer to compare with")
    chosen = list(dict.fromkeys(EVALS.row(task, where="--task").name for task in tasks or predictions.DEFAULT_TASKS))
    rows: list[dict[str, Any]] = []
    for task, given in predictions.evaluate(texts, examples, chosen).items():
        scores = [score for score in given if score is not None]
        mean, error = predictions.summary(scores) if scores else (math.nan, math.nan)
        row = {"task": task, "mean": mean, "standard_error": error, "count": len(scores)}
        rows.append(row | ({"unverified": len(given) - len(scores)} if len(scores) < len(given) else {}))
    if output is not None:
        write_text(output, json.dumps({row["task"]: row for row in rows}, ensure_ascii=False, indent=2) + "\n")
    return rows
