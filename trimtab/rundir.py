"""The run folder: the name and format of every file that a run leaves in `output_dir`, in one place.

| file | what it holds |
|---|---|
| `config.resolved.json` | every key of the stage with the value it resolved to; `trimtab train` takes it as it is |
| `manifest.json` | stage, status, versions, seed, hardware, threads, fingerprints, times, steps, `measured` |
| `metrics.jsonl` | a row per logged step: every quantity; `kind` "train", or "eval" (its names start with `eval/`) |
| `samples.jsonl` | a row per shown sample: `step` and what the trainer shows of it (prompt, text, reward ...) |
| `trainer_log.jsonl` | a row per logged step: current_steps, total_steps, loss, reward, lr, remaining_time, ... |
| `trainer_state.json` | global_step, epoch, max_steps, log_history, best_metric, best_model_checkpoint |
| `train_results.json` | final figures; also `eval_results.json`, `predict_results.json` |
| `all_results.json` | the three above in one |
| `generated_predictions.jsonl` | a row per data row: prompt, predict, label (do_predict) |
| `training_*.png`, `ppo_panel.png` | the plots of `report/plots.py` |
| `checkpoint-N/` | all that a resume needs, written by `train/state.py`; `complete.json` lists its files |
| `adapter_*`, `value_head.safetensors` | the model, written by `models`, and tokenizer files; `critic/` |
| `failed_step.json` | the rows of a step whose loss or gradient was not finite |
| `run.lock` | pid, host and start of the process that holds the operating system's lock on this file |

A jsonl row is with the system when its append returns. Every row carries `step` (`current_steps` in the trainer log), and a
checkpoint counts the rows of each record, so that a resume can cut them back. Figures that are not finite are the strings
"NaN", "Infinity" and "-Infinity" in `metrics.jsonl`: strict JSON, and nothing is lost. Other files have null there.

A folder is never deleted and no run is overwritten: what is in the way is renamed to `NAME.1`, `NAME.2` ...
Torch-free; standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, cast

from trimtab.errors import RunError

CONFIG = "config.resolved.json"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TRAINER_LOG = "trainer_log.jsonl"
TRAINER_STATE = "trainer_state.json"
TRAIN_RESULTS = "train_results.json"
EVAL_RESULTS = "eval_results.json"
PREDICT_RESULTS = "predict_results.json"
ALL_RESULTS = "all_results.json"
PREDICTIONS = "generated_predictions.jsonl"
FAILED_STEP = "failed_step.json"
LOCK = "run.lock"
COMPLETE = "complete.json"
CRITIC = "critic"

RECORDS = (METRICS, SAMPLES, TRAINER_LOG)
LOG_COLUMNS = ("loss", "eval_loss", "reward", "accuracy", "lr", "epoch")

# Keys that say when to write or show something, or how to start, and never what is trained: a resume may change them.
RESUME_MAY_CHANGE = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "overwrite_cache",
        "resume_from_checkpoint",
        "run_name",
        "report_to",
        "logging_dir",
        "logging_steps",
        "logging_first_step",
        "logging_strategy",
        "save_total_limit",
        "plot_loss",
        "disable_tqdm",
        "log_level",
        "print_param_status",
        "dataloader_num_workers",
        "preprocessing_num_workers",
        "ddp_timeout",
        "cache_dir",
    }
)
# The ends of keys whose values are secrets (hub tokens, API keys): never written into a run folder.
SECRET_ENDS = ("_token", "_api_key", "_secret")

Status = Literal["running", "finished", "stopped", "failed"]
Opened = Literal["read", "new", "resumed", "finished"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]{8}")
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunFolder:
    """One run's folder. `RunFolder(path)` only reads; `RunFolder.start(...)` makes or continues a run, locked.

    Attributes:
        path: the folder.
        opened: "read", or what `start` found: "new", "resumed", or "finished" (asked to resume a run that is done).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.opened: Opened = "read"
        self._lock: int | None = None
        self._files: dict[str, IO[bytes]] = {}
        self._begin: Callable[[], None] | None = None
        self._made_folder = self._made_lock = False

    # ------------------------------------------------------------------------------------------------ start and finish

    @classmethod
    def start(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[str | Path] = (),
        say: Callable[[str], None] = print,
    ) -> RunFolder:
        """`claim` and `begin` in one."""
        folder = cls.claim(path, config, overwrite=overwrite, resume=resume, inputs=inputs, say=say)
        try:
            folder.begin()
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def claim(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[str | Path] = (),
        say: Callable[[str], None] = print,
    ) -> RunFolder:
        """Lock `path` for a run of this resolved config and decide what becomes of what is there; nothing of it is changed.

        What is found there decides:
        nothing: a new run. An unfinished run: continued with `resume` if its config is the same (see
        `RESUME_MAY_CHANGE`), else moved aside. A finished run: with `resume` and the same config there is nothing to do
        (`opened` is "finished" and nothing is written); with `overwrite` it is moved aside; else an error. Files that
        no run of ours left: used in place with `overwrite`, else an error.

        `begin` then acts on it. Between the two comes what may still go wrong (data, model, adapters): a run that cannot
        start moves nobody's folder.

        Args:
            config: the resolved config as plain values; secrets in it (`SECRET_ENDS`) are written as null.
            overwrite: `overwrite_output_dir`.
            resume: `--resume`, or any `resume_from_checkpoint`.
            inputs: folders and files that this run reads; none may lie in a folder that is moved aside.
            say: takes each line the user should see.

        Raises:
            RunError: in use by a live process; a finished run or other files without `overwrite`; a resume with another
                config; a folder that cannot be made or written.
        """
        folder = cls(path)
        wanted = {key: None if key.endswith(SECRET_ENDS) else _plain(value) for key, value in config.items()}
        folder.make()
        folder.lock(say=say)
        try:
            folder._settle(wanted, overwrite=overwrite, resume=resume, inputs=[Path(p) for p in inputs], say=say)
        except BaseException:
            folder.close()
            raise
        return folder

    def make(self) -> None:
        """Make the folder.

        Raises:
            RunError: something else has its name, or the system refuses.
        """
        in_the_way: Path | None = None
        try:
            self._made_folder = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):
                in_the_way = next((p for p in (self.path, *self.path.parents) if p.is_file()), None)
            raise RunError(
                f"cannot make the folder {self.path.absolute()}",
                where="output_dir",
                why=f"{in_the_way} is a file" if in_the_way else str(error),
                remedy="choose another output_dir",
            ) from error

    def _settle(
        self,
        wanted: dict[str, Any],
        *,
        overwrite: bool,
        resume: bool,
        inputs: list[Path],
        say: Callable[[str], None],
    ) -> None:
        """Decide between new, resumed and finished (see `claim`); `begin` is left to do."""
        self.opened = "new"
        aside = ""
        if self.has_run():
            changed = changed_keys(self.config(), wanted)
            done = self.status() == "finished"
            if resume and not changed:
                self.opened = "finished" if done else "resumed"
                if done:
                    return
            elif resume and not (done and overwrite):
                broken = not self.config()
                raise RunError(
                    f"the run in {self.path} cannot be resumed: "
                    + (f"{CONFIG} cannot be read" if broken else f"its config differs in {', '.join(changed[:8])}"),
                    where=str(self.path / CONFIG),
                    why="nothing says which config its checkpoints belong to"
                    if broken
                    else "a run continued under another config is neither the one nor the other",
                    remedy=("" if broken else "put those keys back, or ")
                    + "choose another output_dir, or start without --resume"
                    + (" and with overwrite_output_dir: true" if done else ""),
                )
            elif done and not overwrite:
                raise RunError(
                    f"{self.path} holds a finished run",
                    where="output_dir",
                    why="training into it would mix two runs",
                    remedy="choose another output_dir, or write overwrite_output_dir: true "
                    "(the run there is then renamed, not deleted)",
                )
            else:
                aside = "finished" if done else "unfinished"
                self._refuse_inputs(aside, inputs)
        elif any(self._foreign()) and not overwrite:
            raise RunError(
                f"{self.path} is not empty",
                where="output_dir",
                why=f"it holds {', '.join(sorted(p.name for p in self._foreign())[:4])}, which no run of ours left",
                remedy="choose another output_dir, or write overwrite_output_dir: true",
            )
        if self.opened == "new" and resume:
            say(f"nothing to resume in {self.path}: a new run starts")
        self._begin = lambda: self._prepare(wanted, aside, say)

    def begin(self) -> None:
        """Do what `claim` decided: move the old run aside, sweep what a killed process left half written, write config and
        manifest. To be called once, before the first record.

        Raises:
            RunError: the folder cannot be moved or written, or the disk is full.
        """
        if self._begin is not None:
            begin, self._begin = self._begin, None
            with self.room("the run's config"):
                begin()

    def _prepare(self, wanted: dict[str, Any], aside: str, say: Callable[[str], None]) -> None:
        if aside:
            self._move_aside(aside, say)
        for torn in [path for path in self.path.rglob("*.tmp-*") if _TEMPORARY.fullmatch(path.name)]:
            shutil.rmtree(torn, ignore_errors=True) if torn.is_dir() else torn.unlink(missing_ok=True)
        now = _now()
        if self.opened == "resumed" and self.manifest():
            self.update_manifest(status="running", error=None, resumed=[*self.manifest().get("resumed", []), now])
            return
        if self.opened == "new":
            for name in RECORDS:  # of something else than a run: appending to them would mix the two
                if (self.path / name).exists():
                    (self.path / name).rename(free_name(self.path / name))
            write_json(self.path / CONFIG, wanted)
        write_json(
            self.path / MANIFEST,
            {
                "format": 1,
                "stage": wanted.get("stage"),
                "status": "running",
                "started": now,
                "finished": None,
                "steps": 0,
            },
        )

    def _refuse_inputs(self, what: str, inputs: list[Path]) -> None:
        here = self.path.resolve()
        for path in inputs:
            if path.exists() and (path.resolve() == here or here in path.resolve().parents):
                raise RunError(
                    f"output_dir {self.path} holds {path}, which this run reads",
                    where="output_dir",
                    why=f"the {what} run there would have to be moved aside",
                    remedy="choose another output_dir",
                )

    def _move_aside(self, what: str, say: Callable[[str], None]) -> None:
        aside = free_name(self.path)
        if sys.platform == "win32":  # an open handle forbids the rename there, which also keeps a rival from moving it
            self.close()
        try:
            self.path.rename(aside)
        except OSError as error:
            raise RunError(
                f"cannot rename {self.path} to {aside.name}",
                where="output_dir",
                why=str(error),
                remedy="choose another output_dir, or move the folder by hand",
            ) from error
        self.close()
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        say(f"the {what} run in {self.path} was moved aside to {aside}")

    def finish(self, status: Status, **fields: Any) -> None:
        """Write how the run ended into the manifest, with any further fields (`steps`, `measured` ...), and let go."""
        self.update_manifest(status=status, finished=_now(), **fields)
        self.close()

    def close(self) -> None:
        """Close the records and release the lock; a folder that was made for a run that never began goes."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock is not None:
            os.close(self._lock)  # closing releases the lock on every system
            _HELD.discard(self._lock)
            self._lock = None
            with contextlib.suppress(OSError):
                if self._made_lock and not any(self._foreign()):
                    (self.path / LOCK).unlink()
                    if self._made_folder:
                        self.path.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go; a run that an exception ends is marked "stopped" (Ctrl-C, exit) or "failed"."""
        begun = self._begin is None and self._lock is not None
        if error is not None and begun and self.opened in ("new", "resumed"):
            ended: Status = "failed" if isinstance(error, Exception) else "stopped"
            with contextlib.suppress(OSError):  # the disk may be full, and that is not the error to show
                self.update_manifest(status=ended, error=str(error).partition("\n")[0] or type(error).__name__)
        self.close()

    # ------------------------------------------------------------------------------------------------------------ lock

    def lock(self, *, say: Callable[[str], None] = print) -> None:
        """Take the folder for this process; the system gives it back when the process dies.

        Raises:
            RunError: a live process holds it, or the folder cannot be written.
        """
        path = self.path / LOCK
        self._made_lock = not path.exists()
        for _ in range(4):  # a reader asking `in_use` holds the lock for an instant
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            except OSError as error:
                raise RunError(
                    f"cannot write in {self.path.absolute()}",
                    where="output_dir",
                    why=str(error),
                    remedy="choose another output_dir",
                ) from error
            taken = _try_lock(handle)
            if taken == "unsupported":
                taken = "held" if _lives(read_json(path, {})) else "taken"
                if taken == "taken":
                    say(f"{self.path}: this file system has no locks; make sure that no other machine writes here")
            if taken != "held" and _same_file(handle, path):
                break
            os.close(handle)
            time.sleep(0.05)
        else:
            owner = read_json(path, {})
            raise RunError(
                f"{self.path} is in use by pid {owner.get('pid', '?')} on {owner.get('host', '?')}, "
                f"since {owner.get('started', '?')}",
                where="output_dir",
                why="two runs would write the same files",
                remedy="wait for it or stop it, or choose another output_dir",
            )
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}) + "\n"
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text.encode("utf-8"))
        self._lock = handle
        _HELD.add(handle)

    def in_use(self) -> bool:
        """Whether a live process (this one too) holds the folder."""
        try:
            handle = os.open(self.path / LOCK, os.O_RDWR | getattr(os, "O_BINARY", 0))
        except OSError:
            return False
        try:
            return _try_lock(handle) == "held"
        finally:
            os.close(handle)

    # --------------------------------------------------------------------------------------------- config and manifest

    def has_run(self) -> bool:
        """Whether a run of ours was started here."""
        return (self.path / MANIFEST).is_file() or (self.path / CONFIG).is_file()

    def config(self) -> dict[str, Any]:
        """The resolved config; empty when there is none."""
        return read_json(self.path / CONFIG, {})

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty when there is none."""
        return read_json(self.path / MANIFEST, {})

    def update_manifest(self, **fields: Any) -> None:
        """Set these fields of the manifest, keeping the others."""
        write_json(self.path / MANIFEST, {**self.manifest(), **fields})

    def status(self) -> Status | None:
        """The manifest's status; None without a manifest. A killed run still says "running": see `in_use`."""
        status: Status | None = self.manifest().get("status")
        return status

    # --------------------------------------------------------------------------------------------------------- records

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a row to `metrics.jsonl`; it must carry `step` and `kind` ("train" or "eval")."""
        self._append(METRICS, {"step": row["step"], "kind": row["kind"], **row}, special=True)

    def append_sample(self, row: Mapping[str, Any]) -> None:
        """Add a row to `samples.jsonl`; it must carry `step`."""
        self._append(SAMPLES, {"step": row["step"], **row})

    def append_log(self, step: int, total_steps: int, *, seconds: float, **figures: float | None) -> None:
        """Add a row to `trainer_log.jsonl`, the file that other tools watch.

        Args:
            step: steps done.
            total_steps: steps in all.
            seconds: training time so far, earlier parts of a resumed run included.
            figures: any of `LOG_COLUMNS`; None is left out.
        """
        unknown = sorted(set(figures) - set(LOG_COLUMNS))
        if unknown:
            raise KeyError(f"no columns of {TRAINER_LOG}: {', '.join(unknown)}")
        row: dict[str, Any] = {"current_steps": step, "total_steps": total_steps}
        row.update({name: figures[name] for name in LOG_COLUMNS if figures.get(name) is not None})
        left = seconds / step * (total_steps - step) if step else 0.0
        row["percentage"] = round(100 * step / total_steps, 2) if total_steps else 0.0
        row["elapsed_time"] = str(timedelta(seconds=int(seconds)))
        row["remaining_time"] = str(timedelta(seconds=int(left)))
        self._append(TRAINER_LOG, row)

    def _append(self, name: str, row: Mapping[str, Any], *, special: bool = False) -> None:
        line = json.dumps(_plain(row, special=special), ensure_ascii=False, allow_nan=False) + "\n"
        with self.room(name, f"the last whole checkpoint is {self._last_name()}"):
            if name not in self._files:
                # unbuffered: what a full disk refuses must not come up again when the file is closed
                self._files[name] = cast(IO[bytes], (self.path / name).open("ab", buffering=0))
            left = memoryview(line.encode("utf-8", errors="replace"))
            while left:
                left = left[self._files[name].write(left) :]

    def metrics(self, kind: Literal["train", "eval"] | None = None) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, of one kind or all, figures that are not finite as floats again."""
        rows = [
            {k: _SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
            for row in read_rows(self.path / METRICS)
        ]
        return [row for row in rows if kind is None or row.get("kind") == kind]

    def samples(self) -> list[dict[str, Any]]:
        """The rows of `samples.jsonl`."""
        return read_rows(self.path / SAMPLES)

    def trainer_log(self) -> list[dict[str, Any]]:
        """The rows of `trainer_log.jsonl`."""
        return read_rows(self.path / TRAINER_LOG)

    def row_counts(self) -> dict[str, int]:
        """Rows in each record now, for a checkpoint to remember; they are brought to the disk first."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: len(read_rows(self.path / name)) for name in RECORDS}

    def truncate_after(self, step: int, *, evaluated: bool = True, counts: Mapping[str, int] | None = None) -> None:
        """Cut every record back to rows of steps <= `step` and drop a torn last line; -1 empties them.

        Args:
            evaluated: keep the evaluation of `step` itself; False where the checkpoint was written before it.
            counts: the rows of each record when the checkpoint was written, which settle it exactly.

        Later checkpoints, which belong to the rows that go, are renamed so that none is taken for the latest.
        """
        for name in RECORDS:
            path = self.path / name
            if name in self._files:
                self._files.pop(name).close()
            if path.exists():
                kept = [line for line, row in _lines(path) if _belongs(row, step, evaluated)]
                if counts is not None and name in counts:
                    kept = [line for line, _ in _lines(path)][: counts[name]]
                write_bytes(path, b"".join(kept))
        for later in self.checkpoints():
            if checkpoint_step(later) > step:
                later.rename(free_name(later))

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.path / f"checkpoint-{step}"

    @contextlib.contextmanager
    def write_checkpoint(self, step: int) -> Iterator[Path]:
        """Yield an empty folder to fill: `checkpoint-N` once the block ends well, gone when it does not.

        `complete.json`, written last, lists every file with its size and SHA-256: a folder without it, or with other
        sizes, is never chosen.

        Raises:
            RunError: the disk is full; earlier checkpoints are untouched.
        """
        target = self.checkpoint_path(step)
        temporary = _temporary(target)
        with self.room(target.name, f"the last whole checkpoint is {self._last_name()}"):
            try:
                temporary.mkdir(parents=True)
                yield temporary
                files = {
                    path.relative_to(temporary).as_posix(): {
                        "bytes": path.stat().st_size,
                        "sha256": _sha256(path, sync=True),
                    }
                    for path in sorted(temporary.rglob("*"))
                    if path.is_file()
                }
                write_json(temporary / COMPLETE, {"step": step, "files": files})
                if (
                    target.exists()
                ):  # ours, saved again after a resume: replaced; anything else: kept under another name
                    old = _temporary(target) if is_complete(target) else free_name(target)
                    target.rename(old)
                    temporary.rename(target)
                    if ".tmp-" in old.name:
                        shutil.rmtree(old, ignore_errors=True)
                else:
                    temporary.rename(target)
                _sync_folder(self.path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first, judged by `complete.json` and file sizes."""
        found = [
            path for path in self.path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and is_complete(path)
        ]
        return sorted(found, key=checkpoint_step)

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose every file has the hash it was written with; None when there is none."""
        return next((path for path in reversed(self.checkpoints()) if is_complete(path, hashes=True)), None)

    def prune(self, save_total_limit: int | None, *, keep: Path | str | None = None) -> list[Path]:
        """Delete the oldest checkpoints beyond the limit and return them; the newest and `keep` (the best) always stay.

        None or 0 keeps all. With a limit of 1 and a best that is not the newest, two stay.
        """
        whole = self.checkpoints()
        if not save_total_limit or save_total_limit < 0:
            return []
        best = Path(keep).name if keep is not None else ""
        spare = [path for path in whole[:-1] if path.name != best]
        removed = spare[: max(0, len(whole) - save_total_limit)]
        for path in removed:
            doomed = _temporary(path)  # renamed first: killed half way, it is not a checkpoint any more
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return removed

    def _last_name(self) -> str:
        whole = self.checkpoints()
        return whole[-1].name if whole else "none"

    # ----------------------------------------------------------------------------------------------- results and model

    @contextlib.contextmanager
    def staged(self, inside: str = "") -> Iterator[Path]:
        """Yield an empty folder; its files replace those of the same names in the run folder when the block ends well.

        For the final model: each file is whole, old or new. `inside` names a subfolder (`critic`).
        """
        target = self.path / inside
        temporary = _temporary(self.path / (inside or "final"))
        with self.room(inside or "the model", f"the last whole checkpoint is {self._last_name()}"):
            try:
                temporary.mkdir(parents=True)
                yield temporary
                for path in sorted(temporary.rglob("*")):
                    if path.is_file():
                        place = target / path.relative_to(temporary)
                        place.parent.mkdir(parents=True, exist_ok=True)
                        path.replace(place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def write_results(self, split: Literal["train", "eval", "predict"], figures: Mapping[str, Any]) -> None:
        """Write `SPLIT_results.json` and add its figures to `all_results.json`."""
        write_json(self.path / f"{split}_results.json", figures)
        write_json(self.path / ALL_RESULTS, {**self.results(), **figures})

    def results(self, split: Literal["train", "eval", "predict", "all"] = "all") -> dict[str, Any]:
        """The figures of `SPLIT_results.json`; empty when there are none."""
        return read_json(self.path / f"{split}_results.json", {})

    def write_state(
        self,
        *,
        global_step: int,
        epoch: float,
        max_steps: int,
        log_history: list[dict[str, Any]],
        best_metric: float | None = None,
        best_model_checkpoint: str | None = None,
        into: Path | None = None,
        **further: Any,
    ) -> None:
        """Write `trainer_state.json`, its fields named as in transformers, here or into a checkpoint folder."""
        write_json(
            (into or self.path) / TRAINER_STATE,
            {
                "best_metric": best_metric,
                "best_model_checkpoint": best_model_checkpoint,
                "epoch": epoch,
                "global_step": global_step,
                "log_history": log_history,
                "max_steps": max_steps,
                **further,
            },
        )

    def write_predictions(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Write `generated_predictions.jsonl` row by row, as `rows` yields them; returns how many."""
        count = 0
        with (self.path / PREDICTIONS).open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                with self.room(PREDICTIONS):
                    file.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
                    file.flush()
                count += 1
        return count

    # ---------------------------------------------------------------------------------------------------------- inside

    def _foreign(self) -> Iterator[Path]:
        """What is there besides the lock and what a process that was killed left half written."""
        return (path for path in self.path.iterdir() if path.name != LOCK and not _TEMPORARY.fullmatch(path.name))

    @contextlib.contextmanager
    def room(self, name: str, left: str = "") -> Iterator[None]:
        """Turn a full disk into a RunError that says what was being written."""
        try:
            yield
        except Exception as error:
            if isinstance(error, RunError) or not is_disk_full(error):
                raise
            raise RunError(
                f"the disk is full: {name} was not saved" + (f"; {left}" if left else ""),
                where=str(self.path.absolute()),
                why=str(error),
                remedy="free some space (save_total_limit keeps fewer checkpoints) and run again with --resume",
            ) from error


# -------------------------------------------------------------------------------------------------------------- checks


def _belongs(row: Mapping[str, Any], step: int, evaluated: bool) -> bool:
    """Was this record written up to the checkpoint of `step`?"""
    at = row.get("step", row.get("current_steps", 0))
    is_evaluation = row.get("kind") == "eval" or "eval_loss" in row
    return bool(at < step or (at == step and (evaluated or not is_evaluation)))


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ between two resolved configs and which a resume may not change."""
    names = sorted({*before, *after} - RESUME_MAY_CHANGE)
    return [name for name in names if before.get(name) != after.get(name)]


def checkpoint_step(path: str | Path) -> int:
    """The N of `checkpoint-N`.

    Raises:
        RunError: the name is of another kind.
    """
    match = _CHECKPOINT.fullmatch(Path(path).name)
    if match is None:
        raise RunError(
            f"{path} is not a checkpoint folder", why="its name is not checkpoint-N", remedy="name one, or use --resume"
        )
    return int(match.group(1))


def is_complete(checkpoint: str | Path, *, hashes: bool = False) -> bool:
    """Whether every file that `complete.json` lists is there in its full size (and, if asked, with its hash)."""
    checkpoint = Path(checkpoint)
    listed = read_json(checkpoint / COMPLETE, {}).get("files")
    if not isinstance(listed, dict):
        return False
    for name, facts in listed.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return False
        if hashes and _sha256(path) != facts["sha256"]:
            return False
    return True


def check_checkpoint(path: str | Path, *, where: str) -> None:
    """Refuse a named checkpoint that is not one, is torn, or holds weights alone.

    Raises:
        RunError: which of these.
    """
    folder = Path(path)
    if folder.is_dir() and is_complete(folder, hashes=True) and (folder / "state").is_dir():
        return
    if not folder.is_dir():
        why = f"{folder.absolute()} " + ("is not a folder" if folder.exists() else "does not exist")
    elif not (folder / COMPLETE).is_file():
        whole = RunFolder(folder).checkpoints()
        why = f"it has no {COMPLETE}, which is written last: " + (
            f"it is a run folder; its newest checkpoint is {whole[-1].name}" if whole else "its save was cut off"
        )
    elif not is_complete(folder, hashes=True):
        why = f"a file in it is missing or damaged: it is not what {COMPLETE} says"
    else:
        why = "it was saved with save_only_model: true and holds no optimizer state"
    raise RunError(
        f"{str(path)!r} is not a checkpoint to resume from",
        where=where,
        why=why,
        remedy="name a checkpoint-N folder of a run, or write resume_from_checkpoint: auto for the newest whole one",
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk or an exhausted quota is behind `error`, also as safetensors and torch word it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return True
        if isinstance(seen, OSError) and getattr(seen, "winerror", None) == 112:  # ERROR_DISK_FULL
            return True
        if any(
            words in str(seen) for words in ("No space left on device", "StorageFull", "os error 28", "os error 112")
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


# --------------------------------------------------------------------------------------------------------------- files


def free_name(path: Path) -> Path:
    """`path` with the first of .1, .2, ... appended that nothing is called."""
    path = path.absolute() if path.name == "" else path
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write under; the file is flushed to the disk and takes `path`'s place."""
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole; figures that are not finite become null."""
    text = json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-8"))


def read_json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    """A JSON object, or `default` when the file is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return dict(default)
    return value if isinstance(value, dict) else dict(default)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, empty when it is missing; a torn last line is left out.

    Raises:
        RunError: a line before the last is not a JSON object.
    """
    return [row for _, row in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line, newline included, with the row it holds."""
    lines = path.read_bytes().split(b"\n")
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    for i, line in enumerate(lines[: last + 1]):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if i == last:
                return
            raise RunError(
                f"{path} is damaged: line {i + 1} is not a JSON object",
                where=f"{path}:{i + 1}",
                why=str(error),
                remedy="remove that line",
            ) from error
        yield line + b"\n", row


def _plain(value: Any, *, special: bool = False) -> Any:
    """`value` as JSON values, paths as text; figures that are not finite as names (`special`) or None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, special=special) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, special=special) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item, special=special) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return ("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity") if special else None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a scalar of NumPy or torch
        return _plain(value.item(), special=special)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sha256(path: Path, *, sync: bool = False) -> str:
    if sync:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    """Make a rename in this folder last through a power cut, where the system can."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    """Whether `path` still is the open file: a rival may have moved the folder between our open and our lock."""
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(handle)
    return sys.platform == "win32" or (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _try_lock(handle: int) -> Literal["taken", "held", "unsupported"]:
    """Lock an open file without waiting; closing it, or dying, unlocks it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 1 << 20, os.SEEK_SET)  # far beyond the text, which others may go on reading
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "held" if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) else "unsupported"
    return "taken"


def _lives(owner: Mapping[str, Any]) -> bool:
    """Whether the process that a lock file names lives; for file systems that lock nothing. Another machine's is unknown."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or owner.get("host") != socket.gethostname() or sys.platform == "win32":
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


_HELD: set[int] = set()
"""Locks of this process. A forked child inherits the handles, and would keep the folder in use after its parent's death."""


def _let_go_in_child() -> None:
    for handle in _HELD:
        with contextlib.suppress(OSError):
            os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
