"""The order of events of a run, the same for every stage: step, log, evaluate, save; best model, early stop, resume, end.

What a step *is* belongs to a `Trainer` (`offline.py`: one optimizer step on a data set; `online.py`: one rollout batch with its
updates). At step N the rows of `metrics.jsonl` are written first, then the evaluation, then `checkpoint-N`: a checkpoint implies
everything before it, so a resume cuts the records back to its step and goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from trimtab import diagnose
from trimtab.config import dump_resolved
from trimtab.errors import ConfigError, DataError, NumericsError, RewardError
from trimtab.models import lora
from trimtab.models.heads import HeadRecord, save_head
from trimtab.models.packaged import quiet_unless_watched
from trimtab.models.roles import Roles
from trimtab.rundir import FAILED_STEP, RunFolder, write_json
from trimtab.train.assemble import BASE_RECORD, Session
from trimtab.train.memory import PeakMemory
from trimtab.train.optim import schedule, set_learning_rate
from trimtab.train.progress import bar, say
from trimtab.train.state import load_state, save_state

Figures = dict[str, float]


class Trainer(Protocol):
    """What the loop asks of a stage.

    Attributes:
        steps_per_epoch: steps that use all the data once.
        optimizers: by role; learning_rates: the peak rate of each.
        best_metric: the evaluation figure that ranks checkpoints unless the file names one; True if greater is better.
        current: the data rows of the step in progress (`row` is file:number), for the file that a NaN leaves.
    """

    steps_per_epoch: int
    optimizers: dict[str, torch.optim.Optimizer]
    learning_rates: dict[str, float]
    best_metric: tuple[str, bool]
    current: list[dict[str, Any]]

    def step(self, number: int) -> Figures:
        """Do step `number` (from 0); its figures, "tokens" among them."""
        ...

    def evaluate(self, step: int) -> Figures:
        """Figures of the held-out rows after `step` steps, without the prefix eval/; empty when there are none."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON values that later steps depend on."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        ...

    def finish(self) -> bool:
        """After the last step, before the last evaluation; True if it changed the model."""
        ...


def total_steps(config: Any, steps_per_epoch: int) -> int:
    """Steps of the whole run."""
    if config.max_steps > 0:
        return int(config.max_steps)
    return math.ceil(float(config.num_train_epochs) * steps_per_epoch)


def run(session: Session, trainer: Trainer, folder: RunFolder) -> Figures:
    """Train from wherever the folder stands to the end; returns the figures of the last evaluation."""
    config = session.config
    total = total_steps(config, trainer.steps_per_epoch)
    if session.roles.masters is not None:
        for optimizer in trainer.optimizers.values():
            optimizer.register_step_post_hook(session.roles.masters.publish)
    clock = _Clock()
    progress = _Progress(session, trainer, folder, total, clock)
    start = progress.resume()
    with session.memory.watch() as memory:
        if start == 0 and config.eval_on_start:
            progress.evaluate(0)
        if start and progress.due("eval", start) and progress.evaluated_at != start:
            progress.evaluate(start)  # the reward failed in it, the last time
        with bar(config.stage, total, start) as advance:
            for number in range(start, total):
                if progress.patience_is_over():
                    say(f"stopped at step {number}: no better evaluation in the last {config.early_stopping_steps}")
                    break
                if progress.time_is_up():
                    say(f"stopped at step {number}: its steps have taken max_minutes: {config.max_minutes:g}")
                    break
                warmup = config.warmup(total)
                factor = schedule(
                    config.lr_scheduler_type,
                    number,
                    total,
                    warmup,
                    settings=config.lr_scheduler_kwargs,
                    learning_rate=config.learning_rate,
                )
                for role, optimizer in trainer.optimizers.items():
                    set_learning_rate(optimizer, trainer.learning_rates[role] * factor)
                torch.manual_seed(config.seed * 1_000_003 + number)  # dropout; nothing else reads torch's generator
                try:
                    with memory.phase("update"), progress.stepping():
                        figures = trainer.step(number)
                except RewardError:
                    progress.keep(number)
                    raise
                except NumericsError as error:
                    raise _with_rows(error, folder, number + 1, trainer.current) from error
                progress.log(number + 1, figures | {"lr": config.learning_rate * factor})
                advance(1, _short(figures))
                if progress.due("eval", number + 1):
                    try:
                        progress.evaluate(number + 1)
                    except (RewardError, DataError):  # DataError: a database that is gone
                        progress.keep(number + 1)
                        raise
                if progress.due("save", number + 1) and number + 1 < total:
                    progress.save(number + 1)
        progress.end(memory)
    return progress.last_eval


def _with_rows(
    error: NumericsError, folder: RunFolder, step: int, current: Sequence[Mapping[str, Any]]
) -> NumericsError:
    """The same error, with the rows of the step written into the run folder."""
    guilty = set(error.rows)
    rows = [{**row, "not_finite": row.get("row") in guilty if guilty else None} for row in current]
    file = folder.path / FAILED_STEP
    with suppress(OSError):  # a full disk is not the error to show
        write_json(file, {"step": step, "error": error.what, "rows": rows})
    return NumericsError(
        f"step {step}: {error.what}",
        where=error.where or str(file),
        why=error.why,
        remedy=f"{error.remedy}; the {len(rows)} rows of this step are in {file}",
        rows=error.rows,
    )


def _beside(session: Session, measured: Mapping[str, Any]) -> str:
    """The peak of memory that was planned, and the one that was seen."""
    found: Mapping[str, int] = measured["phase_memory_bytes"]
    phase = max(found, key=lambda name: found[name])
    assert session.planned is not None
    return (
        f"memory beyond the program itself: {found[phase] / 2**30:.2f} GiB at most, in phase {phase} "
        f"(planned {session.planned.peak / 2**30:.2f})"
    )


class _Clock:
    """Training seconds, those of earlier parts of a resumed run included."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started


def _short(figures: Figures) -> str:
    shown = ("loss", "reward/mean", "kl/k1_sequence", "accuracy")
    return "  ".join(f"{name.split('/')[0]} {figures[name]:.3g}" for name in shown if name in figures)


class _Progress:
    """The run's records: what has been logged, evaluated and saved so far."""

    def __init__(self, session: Session, trainer: Trainer, folder: RunFolder, total: int, clock: _Clock) -> None:
        self.session, self.trainer, self.folder, self.total, self.clock = session, trainer, folder, total, clock
        self.config = session.config
        self.step = 0
        self.in_steps = 0.0
        self.tokens = 0
        self.completions = 0
        self.last_eval: Figures = {}
        self.evaluated_at = -1
        self.saved_at = -1
        self.best: float | None = None
        self.best_step: int | None = None
        self.evaluations_since_best = 0
        self.losses: list[float] = []
        self.rows: list[dict[str, Any]] = []

    # ---------------------------------------------------------------------------------------------------------- events

    def due(self, event: str, step: int) -> bool:
        """Is this event due after `step` steps? Checkpoints of a best model come with the evaluation that found it."""
        strategy = getattr(self.config, f"{event}_strategy")
        if strategy == "epoch":
            return step % self.trainer.steps_per_epoch == 0
        interval = self.config.interval(event, self.total)
        return interval is not None and step % interval == 0

    def log(self, step: int, figures: Figures) -> None:
        """Write the row of a step; also the trainer's log when due, and any finding worth a warning."""
        self.step = step
        self.tokens += int(figures.pop("tokens", 0))
        self.completions += int(figures.pop("completions", 0))
        self.losses.append(figures.get("loss", float("nan")))
        row = self._row(step, "train", figures)
        self.folder.append_metrics(row)
        self.rows.append(row)
        if self.due("logging", step) or step == self.total:
            # the mean since the last line, as users know it
            loss = sum(self.losses) / len(self.losses)
            self.losses.clear()
            self.folder.append_log(
                step,
                self.total,
                seconds=self.clock.seconds(),
                loss=loss,
                reward=figures.get("reward/mean"),
                accuracy=figures.get("accuracy"),
                lr=figures["lr"],
                epoch=row["epoch"],
            )

    def evaluate(self, step: int, *, rank: bool = True) -> None:
        """Evaluate, write the row, keep the best if these weights are a candidate."""
        with self.session.memory.phase("eval"):
            figures = self.trainer.evaluate(step)
        self.evaluated_at = step
        if not figures:
            return
        self.last_eval = figures
        named = {f"eval/{name}": value for name, value in figures.items()}
        row = self._row(step, "eval", named)
        self.folder.append_metrics(row)
        self.rows.append(row)
        if "loss" in figures or "accuracy" in figures:
            self.folder.append_log(
                step,
                self.total,
                seconds=self.clock.seconds(),
                eval_loss=figures.get("loss"),
                accuracy=figures.get("accuracy"),
                epoch=row["epoch"],
            )
        say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in named.items()))
        if rank:
            self._rank(step, figures)

    def _rank(self, step: int, figures: Figures) -> None:
        name, greater = self.trainer.best_metric
        if self.config.metric_for_best_model:
            name = self.config.metric_for_best_model.removeprefix("eval_").removeprefix("eval/")
            greater = not any(word in name for word in ("loss", "nll", "perplexity", "error"))
            if name not in figures:
                raise ConfigError(
                    f"no evaluation gives a metric {self.config.metric_for_best_model!r}",
                    where=self.config.origin("metric_for_best_model"),
                    why="checkpoints could not be ranked, and no best one be found",
                    remedy=f"name one of: {', '.join(figures)}",
                )
        if self.config.greater_is_better is not None:
            greater = self.config.greater_is_better
        if name not in figures or step == 0:
            return
        value = figures[name]
        if self.best is None or (value > self.best if greater else value < self.best):
            self.best, self.best_step, self.evaluations_since_best = value, step, 0
            if self.config.load_best_model_at_end:
                self.save(step)
        else:
            self.evaluations_since_best += 1

    def patience_is_over(self) -> bool:
        patience = self.config.early_stopping_steps
        return patience is not None and self.evaluations_since_best >= patience

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Adds to the seconds spent in steps, which max_minutes is about: set-up, evaluations and saves are not training."""
        started = time.monotonic()
        yield
        self.in_steps += time.monotonic() - started

    def time_is_up(self) -> bool:
        return self.config.max_minutes is not None and self.in_steps >= 60 * self.config.max_minutes

    def _row(self, step: int, kind: str, figures: Figures) -> dict[str, Any]:
        return {
            "step": step,
            "kind": kind,
            "stage": self.config.stage,
            "epoch": round(step / self.trainer.steps_per_epoch, 4),
            "tokens": self.tokens,
            "completions": self.completions,
            "seconds": round(self.clock.seconds(), 3),
            **figures,
        }

    # ----------------------------------------------------------------------------------------------- saving, resuming

    def save(self, step: int) -> None:
        """Write `checkpoint-N`, whole or not at all; once, where the best model and the interval both ask for it."""
        if self.saved_at == step:
            return
        best = self.folder.checkpoint_path(self.best_step) if self.best_step is not None else None
        with self.session.memory.phase("save"), self.folder.write_checkpoint(step) as path:
            save_model(self.session, path)
            self._write_state(path)
            if not self.config.save_only_model:
                save_state(path, _weights(self.session.roles), self.trainer.optimizers, self._values(step))
        self.saved_at = step
        self.folder.prune(self.config.save_total_limit, keep=best)

    def keep(self, step: int) -> None:
        """A reward failed in the step after `step`, or in its evaluation, where nothing changes: all that was computed is kept."""
        if step and self.saved_at != step and not self.config.save_only_model:
            self.save(step)
            say(f"saved checkpoint-{step}: --resume goes on from there")

    def _values(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": self.tokens,
            "completions": self.completions,
            "seconds": self.clock.seconds(),
            "in_steps": self.in_steps,
            "evaluated_at": self.evaluated_at,
            "best": self.best,
            "best_step": self.best_step,
            "evaluations_since_best": self.evaluations_since_best,
            "losses": self.losses,
            "rows": self.folder.row_counts(),
            "budget": self.session.budget,
            "trainer": self.trainer.state(),
        }

    def resume(self) -> int:
        """The step to go on from: 0, or that of the checkpoint which the folder (or the file) names."""
        named = self.config.resume_from_checkpoint
        path = Path(named) if named and named != "auto" else None
        if path is None and self.folder.opened != "resumed":
            return 0
        path = path or self.folder.latest_checkpoint()
        if path is None:
            say("no whole checkpoint: starting from the first step")
            self.folder.truncate_after(-1)
            return 0
        state = _restore(self.session.roles, path, self.trainer.optimizers)
        step = int(state["step"])
        self.step, self.tokens, self.completions = step, state["tokens"], state["completions"]
        self.saved_at = step if path == self.folder.checkpoint_path(step) else -1
        self.clock.before, self.in_steps = state["seconds"], state.get("in_steps", 0.0)
        self.best, self.best_step = state["best"], state["best_step"]
        self.evaluations_since_best, self.losses = state["evaluations_since_best"], list(state["losses"])
        self.session.budget = min(self.session.budget, state.get("budget", self.session.budget))
        self.trainer.restore(state["trainer"])
        same = path.resolve().parent == self.folder.path.resolve()
        evaluated = state["evaluated_at"] == step
        self.folder.truncate_after(step, evaluated=evaluated, counts=state.get("rows") if same else None)
        self.rows = self.folder.metrics()
        self.evaluated_at = state["evaluated_at"]
        evals = [row for row in self.rows if row["kind"] == "eval"]
        if evals:
            self.last_eval = {k.removeprefix("eval/"): v for k, v in evals[-1].items() if k.startswith("eval/")}
        say(f"resumed from {path.name}: step {step} of {self.total}")
        return step

    def end(self, memory: PeakMemory) -> None:
        """Last checkpoint, best model back, last evaluation, final files."""
        config, session = self.config, self.session
        # before the best model is loaded: checkpoint-N holds the weights of step N
        if config.save_strategy != "no" and self.saved_at != self.step:
            self.save(self.step)
        loaded = False
        best = self.folder.checkpoint_path(self.best_step) if self.best_step is not None else None
        if config.load_best_model_at_end and best is not None and self.best_step != self.step and best.exists():
            _restore(session.roles, best, self.trainer.optimizers)
            say(
                f"loaded the best model: {best.name}, {config.metric_for_best_model or self.trainer.best_metric[0]} {self.best:.4g}"
            )
            loaded = True
        changed = self.trainer.finish() or loaded
        if (
            session.data.eval
            and (changed or self.evaluated_at != self.step)
            and (config.do_eval or config.eval_strategy != "no")
        ):
            self.evaluate(self.step, rank=not changed)
        with self.folder.staged() as path:
            save_model(session, path)
        if getattr(config, "critic", None) == "adapter":
            with self.folder.staged("critic") as path:
                _save_role(session, "critic", path)
        seconds = self.clock.seconds()
        measured = {
            "seconds": round(seconds, 2),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1),
            "peak_memory_bytes": memory.read(),
            "phase_memory_bytes": memory.above(),
        }
        train_rows = [row for row in self.rows if row["kind"] == "train"]
        mean_loss = sum(row.get("loss", 0.0) for row in train_rows) / max(1, len(train_rows))
        self.folder.write_results(
            "train",
            {
                "epoch": round(self.step / self.trainer.steps_per_epoch, 4),
                "train_loss": mean_loss,
                "train_runtime": measured["seconds"],
                "train_steps_per_second": round(self.step / max(seconds, 1e-9), 4),
                "train_tokens_per_second": measured["tokens_per_second"],
            },
        )
        if self.last_eval:
            self.folder.write_results(
                "eval", {f"eval_{name.replace('/', '_')}": v for name, v in self.last_eval.items()}
            )
        self._write_state(None)
        self.folder.update_manifest(measured=measured, steps=self.step, micro_batch_tokens=session.budget)
        say(_beside(session, measured))
        settings = {**dump_resolved(config), "compute_dtype": str(session.dtype).removeprefix("torch.")}
        for finding in diagnose.diagnose(self.rows, settings):
            say(str(finding))

    def _write_state(self, into: Path | None) -> None:
        best = self.folder.checkpoint_path(self.best_step) if self.best_step is not None else None
        self.folder.write_state(
            global_step=self.step,
            epoch=round(self.step / self.trainer.steps_per_epoch, 4),
            max_steps=self.total,
            log_history=self.folder.trainer_log(),
            best_metric=self.best,
            best_model_checkpoint=str(best) if best is not None else None,
            into=into,
        )


def _weights(roles: Roles) -> dict[str, nn.Parameter]:
    """Everything a resume must restore: what is trained, and the frozen adapters that a user's folder may no longer hold.

    Not frozen weights of whole models: those are read again from the folders that the config names.
    """
    found: dict[str, nn.Parameter] = {}
    adapters = {name: roles.of(role) for role, spec in roles.specs.items() for name in spec.adapters}
    for adapter in sorted(adapters):
        found |= {f"{adapter}|{name}": p for name, p in lora.parameters(adapters[adapter], adapter).items()}
    if roles.masters is not None:
        found |= {f"model|{name}": p for name, p in roles.masters.parameters.items()}
    for role, spec in roles.specs.items():
        if spec.head is not None:
            found |= {f"{role}|head.{name}": p for name, p in spec.head.named_parameters()}
    return found


def _restore(roles: Roles, path: Path, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights and optimizers as a checkpoint has them; returns its JSON values."""
    values = load_state(path, _weights(roles), optimizers)
    if roles.masters is not None:
        roles.masters.publish()
    return values


def save_model(session: Session, folder: Path) -> None:
    """The trained model as users load it, its tokenizer, and a head if it has one.

    An adapter is one peft adapter on the raw base; trained weights are a whole model folder, in the type that they compute in.
    """
    role = "reward" if session.config.stage == "rm" else "policy"
    _save_role(session, role, folder)
    session.tokenizer.save_pretrained(str(folder))


def _save_role(session: Session, role: str, folder: Path) -> None:
    spec, model = session.roles.specs[role], session.roles.of(role)
    if session.roles.trains_weights(role):
        with quiet_unless_watched():
            model.save_pretrained(folder)
    else:
        lora.save_adapter(model, spec.adapters, folder, base=session.base)
        contains = session.contains if role in ("policy", "reward") else []
        write_json(folder / BASE_RECORD, {**session.fingerprint, "contains": contains})
    if spec.head is not None:
        record = session.record or HeadRecord()
        save_head(spec.head, folder, record if role == "reward" else replace(record, purpose="critic"))
