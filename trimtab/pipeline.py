"""A stage from its config to its finished run folder, and stages in order."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trimtab import __version__
from trimtab.config import StageConfig, dump_resolved, load
from trimtab.config.stages import ONLINE
from trimtab.data.loader import PAIRED
from trimtab.errors import ConfigError, RunError, typed
from trimtab.rundir import RunFolder, changed_keys, check_checkpoint


def run_exp(
    args: Mapping[str, Any] | str | Path | None = None, *, overrides: Sequence[str] = (), resume: bool = False
) -> RunFolder:
    """Run one stage from a dict of keys or a YAML or JSON file; returns its run folder.

    Args:
        args: the keys, or the path of a file; None reads the command line, as scripts written for other trainers expect.
        overrides: `key=value` words that win over the file.
        resume: go on with an unfinished run of the same config.

    Raises:
        TrimtabError: anything that is the user's to mend.
    """
    if args is None:
        import sys

        if len(sys.argv) < 2:
            raise ConfigError(
                "no config given", remedy="run_exp({...}), run_exp('file.yaml'), or a file on the command line"
            )
        args, overrides = sys.argv[1], [*sys.argv[2:], *overrides]
    with typed():
        return _run(load(args, list(overrides)), resume)


def _run(config: StageConfig, resume: bool) -> RunFolder:
    if config.do_infer:
        if config.do_predict and config.output_dir:
            from trimtab.serve.predict import predict

            return predict(config)
        raise ConfigError(
            "nothing to do: the file asks neither for training nor for predictions",
            where=config.origin("do_train"),
            remedy="write do_train: true, or use trimtab chat, predict or export with this file",
        )
    return train(config, resume=resume)


def train(config: StageConfig, *, resume: bool = False) -> RunFolder:
    """Train the stage that the config describes; plots and predictions included when it asks for them."""
    # torch is imported here, not above: `trimtab config` and friends must not wait for it
    from trimtab.rewards.lookup import function_files
    from trimtab.train.assemble import assemble
    from trimtab.train.device import hardware
    from trimtab.train.loop import run, total_steps
    from trimtab.train.offline import OfflineTrainer
    from trimtab.train.online import OnlineTrainer, what_moves_the_optimum
    from trimtab.train.preference import PREFERENCE_STAGES, PreferenceTrainer
    from trimtab.train.progress import say

    for note in config.notes:
        say(note)
    assert config.output_dir is not None  # a file that trains has one: `config.load` sees to it
    wants_resume = resume or bool(config.resume_from_checkpoint)
    if config.resume_from_checkpoint not in (None, "auto"):
        check_checkpoint(config.resume_from_checkpoint, where=config.origin("resume_from_checkpoint"))
    models = [config.model_name_or_path, getattr(config, "ref_model", None), *getattr(config, "reward_model", ())]
    stacked = [
        p
        for name in ("adapter_name_or_path", "reward_model_adapters", "ref_model_adapters")
        for p in getattr(config, name, ())
    ]
    inputs = [p for p in (*models, *stacked) if p and Path(p).exists()]
    folder = RunFolder.claim(
        config.output_dir,
        dump_resolved(config),
        overwrite=config.overwrite_output_dir,
        resume=wants_resume,
        inputs=inputs,
        say=say,
    )
    with folder, folder.room("what this run was writing"):
        if folder.opened == "finished":
            say(f"{config.output_dir} holds the finished run of this config; nothing to do")
            return folder
        earlier = folder.manifest() if folder.opened == "resumed" else None
        session = assemble(config, earlier=earlier)
        reward_files = function_files(getattr(config, "reward_funcs", ()))
        for changed in _changed(earlier, reward_files):
            say(
                f"warning: {changed} is not the file that this run began with: rewards before and after this step are not of one kind"
            )
        for line in session.data.report.lines():
            say(line)
        online = config.stage in ONLINE
        offline: Any = PreferenceTrainer if config.stage in PREFERENCE_STAGES else OfflineTrainer
        trainer: Any = OnlineTrainer(session, folder) if online else offline(session)
        total = total_steps(config, trainer.steps_per_epoch)
        if total == 0:
            raise RunError(
                "a run of zero steps", where="num_train_epochs", why="no rows or no epochs", remedy="check the data set"
            )
        say(_start_line(config, session, trainer, total))
        say(trainer.algorithm.describe())
        if online and (moved := what_moves_the_optimum(config)):
            say(f"  and {'; '.join(moved)}")
        folder.begin()  # only now: what stood there before is not touched by a run that cannot start
        folder.update_manifest(
            stage=config.stage,
            seed=config.seed,
            versions=versions(),
            hardware=hardware(session.device),
            dtype=str(session.dtype).removeprefix("torch."),
            layout=session.layout,
            micro_batch_tokens=session.budget,
            **_planned(session.planned),
            base=session.base,
            base_fingerprint=session.fingerprint,
            data={"train": len(session.data.train), "eval": len(session.data.eval)},
            total_steps=total,
            reward_files=reward_files,
        )
        started = time.monotonic()
        run(session, trainer, folder)
        if config.plot_loss:
            from trimtab.report.plots import plot_run

            for path in plot_run(folder.path):
                say(f"plot: {path}")
        if config.do_predict and session.data.eval:
            from trimtab.serve.predict import predict_session

            predict_session(session, folder)
        folder.finish("finished")
        say(f"finished in {time.monotonic() - started:.0f} s: {folder.path}")
    return folder


def _changed(earlier: Mapping[str, Any] | None, files: Mapping[str, str]) -> list[str]:
    """Files of reward functions that have changed since the run that is resumed began."""
    before = (earlier or {}).get("reward_files") or {}
    return [path for path, hashed in before.items() if path in files and files[path] != hashed]


def _planned(plan: Any) -> dict[str, Any]:
    """What the manifest keeps of the plan, to be read beside `measured`."""
    return {
        "gradient_checkpointing": plan.checkpointing,
        "predicted": {
            "phase_memory_bytes": plan.phases,
            "update_memory_bytes": plan.updates,
            "standing_memory_bytes": plan.standing,
            "tokens_per_second": round(plan.tokens_per_second, 1),
            "seconds_per_step": {name: round(value, 3) for name, value in plan.seconds.items()},
            "flops_per_step": plan.flops,
        },
    }


def _start_line(config: Any, session: Any, trainer: Any, total: int) -> str:
    """What one step is, in numbers."""
    n = len(session.data.train)
    judged = {"listwise": "rankings", "pointwise": "scored answers"}.get(config.rm_loss if config.stage == "rm" else "")
    what = judged or "pairs" if config.stage in PAIRED else "prompts" if config.stage in ONLINE else "rows"
    line = f"{config.stage}: {'streamed' if session.data.stream else n} {what}, "
    if config.stage in ONLINE:
        k = trainer.algorithm.group_size
        prompts, minibatch = min(config.rollout_size, n), min(config.batch_size, n)  # a small set is one partial batch
        updates = trainer.algorithm.epochs * -(-prompts // minibatch)
        line += (
            f"{prompts} prompts x {k} = {prompts * k} completions a step, {updates} optimizer steps each "
            f"({minibatch * k} completions a minibatch), "
        )
    else:
        line += f"{config.batch_size} a step, "
    parameters = sum(
        p.numel() for optimizer in trainer.optimizers.values() for g in optimizer.param_groups for p in g["params"]
    )
    return line + (
        f"{trainer.steps_per_epoch} steps an epoch, {total} steps; {parameters / 1e6:.2f} M trained parameters, "
        f"{str(session.dtype).removeprefix('torch.')} on {session.device.type}, {session.budget} tokens a pass"
    )


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"trimtab": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---------------------------------------------------------------------------------------------------------------- demo

DEMO_STAGES = ("sft", "rm", "ppo")


def examples_folder() -> Path:
    """The text-to-SQL example: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        ConfigError: it is in neither place.
    """
    package = Path(__file__).parent
    for folder in (package.parent / "examples" / "text2sql", package / "_examples" / "text2sql"):
        if (folder / "demo").is_dir():
            return folder
    raise ConfigError(
        "the example data is not installed",
        where=str(package),
        remedy="install trimtab again, from its repository or wheel",
    )


def run_demo(output: Path, *, seed: int = 42, anew: bool = False) -> list[RunFolder]:
    """SFT, reward model and PPO on the example data, then a table of what each stage gained.

    A stage that is finished is skipped, one that was cut off is continued; `anew` runs all of them again.
    """
    from rich.console import Console

    from trimtab.report.plots import plot_run
    from trimtab.report.tables import stage_table

    console = Console(highlight=False)
    example = examples_folder()
    folders = []
    for number, stage in enumerate(DEMO_STAGES, 1):
        console.rule(f"{number} of {len(DEMO_STAGES)}: {stage}")
        words = [f"output_dir={output / stage}", f"dataset_dir={example / 'data'}", f"seed={seed}"]
        if stage != "sft":
            words.append(f"adapter_name_or_path={output / 'sft'}")
        if stage == "ppo":
            words.append(f"reward_model={output / 'rm'}")
        # what another version of the demo, or another seed, has left there is kept aside, and this stage runs
        config = load(example / "demo" / f"{stage}.yaml", [*words, "overwrite_output_dir=true"])
        there = RunFolder(output / stage)
        same = there.has_run() and not changed_keys(there.config(), dump_resolved(config))
        folders.append(train(config, resume=same and not anew))
    console.rule("what it gained, on held-out rows")
    console.print(stage_table([folder.path for folder in folders]))
    for folder in folders:
        for path in plot_run(folder.path):
            console.print(f"plot: {path}", markup=False, soft_wrap=True)
    chat = f"trimtab chat {example / 'demo' / 'chat.yaml'} adapter_name_or_path={output / 'ppo'}"
    console.print(f"talk to it: {chat}", markup=False, soft_wrap=True)
    return folders
