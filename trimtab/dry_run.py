"""`trimtab train --dry-run` and `trimtab plan`: everything that can be known of a run without torch and without weights."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.config import StageConfig
from trimtab.data import info, source
from trimtab.data.dropped import Dropped
from trimtab.errors import AdapterError, ConfigError, DataError, ModelError
from trimtab.evals import EVALS
from trimtab.models.folder import check_writers, local_model, read_adapter
from trimtab.plan import Estimate, Job, Lengths, Machine, Shape, job_of, machine, settle, shape_of
from trimtab.plan.job import worst_case
from trimtab.plan.sample import encoder, look
from trimtab.plan.shapes import TABLE, known
from trimtab.plan.show import lines, memory_table, time_line, time_table
from trimtab.registry import nearest
from trimtab.rundir import check_checkpoint
from trimtab.sql.rows import check_driver, row_of

HEADS = ("value_head.safetensors", "value_head.bin")


def dry_run(config: StageConfig) -> tuple[Job, Shape, Machine, Estimate] | None:
    """Check all that a run would meet before its first step, and print what it would be.

    Returns:
        the plan; None where the model would have to be fetched first.

    Raises:
        TrimtabError: what the run would end with: paths, data sets, first rows, model folder, adapters.
    """
    _trains(config)
    folder = local_model(config)  # type: ignore[arg-type] # a config without a model is refused on reading
    _check_files(config)
    _check_databases(config)
    for task in config.eval_tasks:
        EVALS.row(task, where=config.origin("eval_tasks"))
    lengths = look(config, encoder(folder)) or worst_case(config)
    _print(config.notes)
    if folder is None:
        _print([f"{config.model_name_or_path} is not on this machine yet: it would be fetched, and is not planned for"])
        return None
    found = _plan(config, shape_of(folder), lengths, machine(measure=False))
    _show(*found, time=False)
    steps = found[0].steps()
    _print([f"{steps} steps; nothing was trained; the run would go to {config.output_dir}"])
    return found


def plan(
    config: StageConfig, *, device: str | None = None, rows: int | None = None, prompt: float | None = None
) -> tuple[Job, Shape, Machine, Estimate]:
    """Print the plan of a training file, with whatever of its data and model is here.

    Args:
        device: a machine that is not this one (`trimtab.plan.machine`).
        rows, prompt: rows of the training set and tokens of a row (of a prompt, in online stages), where it is not here.

    Raises:
        TrimtabError: no training file, an unknown device, or a model that is neither here nor well known.
    """
    _trains(config)
    shape, folder = _shape(config)
    lengths: Lengths | None = None
    missing = ""
    if rows is None and prompt is None:
        try:
            lengths = look(config, encoder(folder))
        except DataError as error:
            missing = f"the data set was not read ({error.what}); --rows and --prompt-tokens say what it holds"
    found = _plan(config, shape, lengths or worst_case(config, rows, prompt), machine(device))
    _print([missing] if missing else [])
    _show(*found)
    return found


def _plan(config: StageConfig, shape: Shape, lengths: Lengths, where: Machine) -> tuple[Job, Shape, Machine, Estimate]:
    job = job_of(config, lengths, bfloat16=where.bfloat16)
    found = settle(job, shape, where, checkpointing=config.gradient_checkpointing, budget=config.micro_batch_tokens)
    return job, shape, where, found


def _trains(config: StageConfig) -> None:
    if config.do_infer:
        raise ConfigError(
            "this file does not train",
            where=config.origin("do_train"),
            remedy="write do_train: true; trimtab config shows the values of any file",
        )


def _check_files(config: StageConfig) -> None:
    """Adapters, reward model, checkpoint, files of reward functions: there, and of the kind that is computed."""
    if config.resume_from_checkpoint not in (None, "auto"):
        check_checkpoint(str(config.resume_from_checkpoint), where=config.origin("resume_from_checkpoint"))
    named = ("adapter_name_or_path", "reward_model_adapters", "ref_model_adapters")
    for path in [p for name in named for p in getattr(config, name, ())]:
        read_adapter(Path(path))
    check_writers(config)
    rewards = getattr(config, "reward_model", ()) if getattr(config, "reward_model_type", "") == "lora" else ()
    for reward in rewards:
        folder = Path(reward).expanduser()
        read_adapter(folder)
        if not any((folder / name).is_file() for name in HEADS):
            raise AdapterError(
                f"no value head in {reward!r}",
                where=config.origin("reward_model"),
                why="a reward model is an adapter with a value head beside it; this folder holds only an adapter",
                remedy="give the output_dir of a run with stage: rm",
            )
    for entry in getattr(config, "reward_funcs", ()):
        file = str(entry).rpartition(":")[0] if not callable(entry) else ""
        if file.endswith(".py") and not Path(file).expanduser().is_file():
            raise ConfigError(
                f"there is no file {file!r}",
                where=config.origin("reward_funcs"),
                why=f"{Path(file).expanduser().absolute()} does not exist",
                remedy="correct the path (relative paths start at the working directory)",
            )


def _check_databases(config: StageConfig) -> None:
    """Answers that are rewarded by execution: the first row of each set has the files of its databases; a server can be spoken to."""
    if getattr(config, "reward_model_type", "") != "sql":
        return
    if config.sql_database:
        check_driver((config.sql_database,), where=config.origin("sql_database"))
        return
    for spec in info.find(config.dataset, config.dataset_dir):
        if spec.path is None:  # on a hub
            continue
        for origin, value in islice(info.rows(spec), 1):
            found = source.example(value, origin, spec)
            if not isinstance(found, Dropped):
                row_of(found)


def _shape(config: StageConfig) -> tuple[Shape, Path | None]:
    name = str(config.model_name_or_path)
    well_known = known(name)
    try:
        folder = local_model(config)  # type: ignore[arg-type]
    except ModelError:
        # a plan for a machine that is not this one: the folder is there, not here
        if well_known is None or Path(name).expanduser().exists():
            raise
        folder = None
    if folder is not None:
        return shape_of(folder), folder
    if well_known is None:
        guess = nearest(name.lower(), TABLE)
        raise ModelError(
            f"the model {name!r} is not on this machine, and its sizes are not known",
            where=config.origin("model_name_or_path"),
            remedy=f"name its folder, or one of: {', '.join(TABLE)}" + (f" (did you mean {guess!r}?)" if guess else ""),
        )
    return well_known, None


def _show(job: Job, shape: Shape, where: Machine, found: Estimate, *, time: bool = True) -> None:
    _print(lines(job, shape, where, found))
    _console().print(memory_table(job, found))
    if time:
        _console().print(time_table(job, found))
        _print([time_line(job, found)])


def _print(texts: Any) -> None:
    for text in texts:
        _console().print(text, markup=False, soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)
