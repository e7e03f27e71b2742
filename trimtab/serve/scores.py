"""Where the scores of a reward model on pairs stand; made first when they are not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.config import load
from trimtab.errors import ConfigError, RunError
from trimtab.rundir import PREDICTIONS, RunFolder
from trimtab.serve.predict import predict
from trimtab.train.progress import say


def scores_of(source: Path, overrides: Sequence[str] = ()) -> Path:
    """The file of scores that a user means.

    Args:
        source: such a file itself; a run folder of stage rm; a YAML or JSON config of stage rm.
        overrides: `key=value` words for a config, or for the config of a run that has to be scored.

    Raises:
        RunError: a folder without a run of stage rm.
        ConfigError: a config of another stage.
        TrimtabError: whatever stops the scoring.
    """
    if source.suffix == ".jsonl":
        if overrides:
            raise ConfigError(
                f"a file of scores takes no keys: {' '.join(overrides)}",
                where="command line",
                why="nothing is loaded or scored",
                remedy="leave them out, or name the run folder to have it scored again with other keys",
            )
        return source
    if not source.is_dir():
        config = load(source, list(overrides))
        if config.stage != "rm":
            raise ConfigError(
                f"trimtab rm report is for reward models, and this file is of stage {config.stage}",
                where=config.origin("stage"),
                remedy="write stage: rm",
            )
        return predict(config).path / PREDICTIONS
    there = source / PREDICTIONS
    if there.is_file() and not overrides:
        return there
    run = RunFolder(source)
    resolved = run.config() if run.has_run() else {}
    if resolved.get("stage") != "rm":
        raise RunError(
            f"{source} holds neither scores nor a run of stage rm",
            where=str(source),
            why=f"there is no {PREDICTIONS}" + (f", and the run is of stage {resolved['stage']}" if resolved else ""),
            remedy="name the run folder of a reward model, or a file of scores",
        )
    # what it was trained with, as a file for inference: its eval_dataset, or the rows that its val_size held out, or all it has
    keys = {
        **{name: value for name, value in resolved.items() if value is not None},
        "do_train": False,
        "do_predict": True,
        "adapter_name_or_path": str(source),
        "output_dir": str(source),
        "overwrite_output_dir": True,
    }
    if resolved.get("finetuning_type", "lora") != "lora":
        keys |= {"model_name_or_path": str(source), "adapter_name_or_path": [], "finetuning_type": "lora"}
    config = load(keys, list(overrides))
    apart = config.eval_dataset or config.val_size
    say(f"{source} has no scores yet" + (": scoring its held-out pairs" if apart else ", and has held out no pairs"))
    return predict(config).path / PREDICTIONS
