"""The run folder: what starting one finds, the lock, the records, the checkpoints, a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import rundir
from trimtab.errors import RunError
from trimtab.rundir import RunFolder

pytestmark = pytest.mark.unit

CONFIG = {"stage": "sft", "learning_rate": 1e-4, "logging_steps": 10, "output_dir": "a"}


@pytest.fixture
def lines() -> list[str]:
    return []


def start(path: Path, lines: list[str], **options: object) -> RunFolder:
    config = {**CONFIG, **options.pop("change", {})}  # type: ignore[dict-item]
    return RunFolder.start(path, config, say=lines.append, **options)  # type: ignore[arg-type]


def left(path: Path, lines: list[str], status: str) -> None:
    """A run that ended with this status, with one metric row."""
    with start(path, lines) as run:
        run.append_metrics({"step": 1, "kind": "train", "loss": 2.5})
        run.finish(status)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- starting


def test_a_new_run_writes_config_and_manifest(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "x" / "run", lines) as run:
        assert run.opened == "new" and run.status() == "running" and run.in_use()
        assert run.config() == CONFIG
        assert run.manifest()["stage"] == "sft" and run.manifest()["steps"] == 0
        run.finish("finished", steps=7, measured={"seconds": 1.5})
    assert run.manifest()["steps"] == 7 and run.manifest()["measured"] == {"seconds": 1.5}
    assert run.manifest()["finished"] and not run.in_use() and lines == []


def test_secrets_are_not_written(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines, change={"hf_hub_token": "hf_abc", "ignore_pad_token_for_loss": True}) as run:
        assert "hf_abc" not in (run.path / rundir.CONFIG).read_text(encoding="utf-8")
        assert run.config()["ignore_pad_token_for_loss"] is True


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("change", [{}, {"learning_rate": 1e-3}])
def test_an_unfinished_run_is_moved_aside_without_resume(
    tmp_path: Path, lines: list[str], overwrite: bool, change: dict[str, object]
) -> None:
    left(tmp_path / "run", lines, "stopped")
    left(tmp_path / "run", lines, "stopped")
    with start(tmp_path / "run", lines, overwrite=overwrite, change=change) as run:
        assert run.opened == "new" and run.metrics() == []
    assert len(lines) == 2 and "unfinished" in lines[1] and "run.2" in lines[1]
    for aside in ("run.1", "run.2"):
        assert RunFolder(tmp_path / aside).metrics()[0]["loss"] == 2.5


def test_resume_continues_an_unfinished_run_of_the_same_config(tmp_path: Path, lines: list[str]) -> None:
    left(tmp_path / "run", lines, "failed")
    with start(tmp_path / "run", lines, resume=True, overwrite=True, change={"logging_steps": 5}) as run:
        assert run.opened == "resumed" and run.status() == "running" and len(run.metrics()) == 1
        assert len(run.manifest()["resumed"]) == 1
    assert lines == []


def test_resume_under_another_config_names_the_key(tmp_path: Path, lines: list[str]) -> None:
    left(tmp_path / "run", lines, "stopped")
    with pytest.raises(RunError, match="learning_rate"):
        start(tmp_path / "run", lines, resume=True, overwrite=True, change={"learning_rate": 1e-3, "logging_steps": 1})
    assert not RunFolder(tmp_path / "run").in_use() and len(RunFolder(tmp_path / "run").metrics()) == 1


def test_resume_of_nothing_starts_anew(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines, resume=True) as run:
        assert run.opened == "new"
    assert len(lines) == 1 and "nothing to resume" in lines[0]


def test_resume_of_a_finished_run_has_nothing_to_do(tmp_path: Path, lines: list[str]) -> None:
    left(tmp_path / "run", lines, "finished")
    before = (tmp_path / "run" / rundir.MANIFEST).read_bytes()
    with start(tmp_path / "run", lines, resume=True, overwrite=True) as run:
        assert run.opened == "finished"
    assert (tmp_path / "run" / rundir.MANIFEST).read_bytes() == before


def test_a_finished_run_needs_overwrite_and_is_kept(tmp_path: Path, lines: list[str]) -> None:
    left(tmp_path / "run", lines, "finished")
    with pytest.raises(RunError) as caught:
        start(tmp_path / "run", lines)
    assert "another output_dir" in caught.value.remedy and "overwrite_output_dir: true" in caught.value.remedy
    with start(tmp_path / "run", lines, overwrite=True) as run:
        assert run.opened == "new" and run.metrics() == []
    assert len(RunFolder(tmp_path / "run.1").metrics()) == 1 and len(lines) == 1


def test_a_folder_that_the_run_reads_is_not_moved(tmp_path: Path, lines: list[str]) -> None:
    left(tmp_path / "run", lines, "finished")
    with pytest.raises(RunError, match="which this run reads"):
        start(tmp_path / "run", lines, overwrite=True, inputs=[tmp_path / "other", tmp_path / "run"])
    (tmp_path / "run" / "critic").mkdir()
    with pytest.raises(RunError, match="critic, which this run reads"):
        start(tmp_path / "run", lines, overwrite=True, inputs=[tmp_path / "run" / "critic"])
    assert not (tmp_path / "run.1").exists()


def test_files_of_others_need_overwrite_and_stay(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / rundir.TRAINER_LOG).write_text('{"current_steps": 9}\n', encoding="utf-8")
    with pytest.raises(RunError, match="not empty"):
        start(tmp_path, lines)
    with start(tmp_path, lines, overwrite=True) as run:
        assert run.trainer_log() == []
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / (rundir.TRAINER_LOG + ".1")).exists()


@pytest.mark.parametrize(("error", "status"), [(ValueError("boom\nmore"), "failed"), (KeyboardInterrupt(), "stopped")])
def test_an_exception_marks_the_run(tmp_path: Path, lines: list[str], error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), start(tmp_path / "run", lines):
        raise error
    manifest = RunFolder(tmp_path / "run").manifest()
    assert manifest["status"] == status and manifest["error"] == ("boom" if status == "failed" else "KeyboardInterrupt")


# --------------------------------------------------------------------------------------------------------------- lock


def test_a_live_process_keeps_the_folder_and_a_dead_one_does_not(tmp_path: Path, lines: list[str]) -> None:
    code = (
        "import sys; from trimtab.rundir import RunFolder\n"
        f"RunFolder.start({str(tmp_path / 'run')!r}, {CONFIG!r})\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by pid {child.pid} "):
            start(tmp_path / "run", lines, resume=True)
        assert RunFolder(tmp_path / "run").in_use()
        child.kill()
        child.wait()
    assert not RunFolder(tmp_path / "run").in_use()
    with start(tmp_path / "run", lines, resume=True) as run:
        assert run.opened == "resumed"


def test_the_lock_holds_within_one_process(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines):
        with pytest.raises(RunError, match=f"pid {os.getpid()}"):
            start(tmp_path / "run", lines, resume=True)
        with pytest.raises(RunError, match="in use"):
            start(tmp_path / "run", lines)
    assert not (tmp_path / "run.1").exists()


# ------------------------------------------------------------------------------------------------------------ records


def test_metrics_keep_what_is_not_finite_in_strict_json(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        run.append_metrics({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "kl": -math.inf})
        run.append_metrics({"kind": "eval", "step": 1, "eval/loss": 0.5})
        row = run.metrics("train")[0]
        assert len(run.metrics()) == 2 and run.metrics("eval")[0]["eval/loss"] == 0.5
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf and row["kl"] == -math.inf
    text = (run.path / rundir.METRICS).read_text(encoding="utf-8").splitlines()[0]
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_word_nan_in_a_sample_stays_a_word(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        run.append_sample({"step": 1, "text": "NaN", "prompt": "查询所有客户", "reward": math.nan})
        assert run.samples() == [{"step": 1, "text": "NaN", "prompt": "查询所有客户", "reward": None}]
        assert "查询" in (run.path / rundir.SAMPLES).read_text(encoding="utf-8")


def test_trainer_log_counts_the_time_left(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        run.append_log(25, 100, seconds=50.0, loss=1.25, lr=1e-4, epoch=0.5, eval_loss=None)
        assert run.trainer_log() == [
            {
                "current_steps": 25,
                "total_steps": 100,
                "loss": 1.25,
                "lr": 1e-4,
                "epoch": 0.5,
                "percentage": 25.0,
                "elapsed_time": "0:00:50",
                "remaining_time": "0:02:30",
            }
        ]
        with pytest.raises(KeyError, match="learning_rate"):
            run.append_log(1, 2, seconds=1.0, learning_rate=1.0)


def test_truncation_cuts_every_record_to_the_step_and_drops_a_torn_line(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        for step in (1, 2, 3):
            run.append_metrics({"step": step, "kind": "train", "loss": float(step)})
            run.append_sample({"step": step, "text": "x"})
            run.append_log(step, 3, seconds=1.0)
        first_two = (run.path / rundir.METRICS).read_bytes().split(b"\n")[:2]
        with (run.path / rundir.METRICS).open("ab") as file:
            file.write(b'{"step": 4, "ki')
        assert [row["step"] for row in run.metrics()] == [1, 2, 3]
        run.truncate_after(2)
        assert (run.path / rundir.METRICS).read_bytes() == b"\n".join(first_two) + b"\n"
        run.append_metrics({"step": 3, "kind": "train", "loss": 9.0})
        assert [row["loss"] for row in run.metrics()] == [1.0, 2.0, 9.0]
        assert [row["step"] for row in run.samples()] == [1, 2]
        assert [row["current_steps"] for row in run.trainer_log()] == [1, 2]
        run.truncate_after(-1)
        assert run.metrics() == run.samples() == run.trainer_log() == []


def test_damage_in_the_middle_is_said_with_its_line(tmp_path: Path) -> None:
    (tmp_path / rundir.METRICS).write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2"):
        RunFolder(tmp_path).metrics()


# -------------------------------------------------------------------------------------------------------- checkpoints


def save(run: RunFolder, step: int, text: str = "weights") -> Path:
    with run.write_checkpoint(step) as folder:
        (folder / "critic").mkdir()
        (folder / "critic" / "head.bin").write_text(text, encoding="utf-8")
        (folder / "state.json").write_text("{}", encoding="utf-8")
    return run.checkpoint_path(step)


def fail_in(path: Path) -> None:
    """Write half a file and break."""
    path.write_text("half", encoding="utf-8")
    raise ValueError("boom")


def test_checkpoints_are_whole_and_in_order_of_number(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        assert run.latest_checkpoint() is None
        for step in (100, 20, 3):
            save(run, step)
        assert [path.name for path in run.checkpoints()] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
        listed = json.loads((run.checkpoint_path(3) / rundir.COMPLETE).read_text(encoding="utf-8"))
        assert listed["step"] == 3 and listed["files"]["critic/head.bin"]["bytes"] == 7


def test_torn_checkpoints_are_never_chosen(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        for step in (1, 2, 3, 4, 5):
            save(run, step)
        (run.checkpoint_path(5) / rundir.COMPLETE).unlink()  # never completed
        (run.checkpoint_path(4) / "state.json").unlink()  # a file lost
        (run.checkpoint_path(3) / "critic" / "head.bin").write_text("weight", encoding="utf-8")  # cut short
        (run.checkpoint_path(2) / "critic" / "head.bin").write_text(
            "WEIGHTS", encoding="utf-8"
        )  # same size, other bytes
        assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-2"]
        latest = run.latest_checkpoint()
        assert latest is not None and latest.name == "checkpoint-1"


def test_a_failed_save_leaves_nothing_and_the_last_one_whole(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        save(run, 1)
        with pytest.raises(ValueError, match="boom"), run.write_checkpoint(2) as folder:
            fail_in(folder / "half")
        assert sorted(p.name for p in run.path.glob("checkpoint*")) == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("IoError(Os { code: 28, kind: StorageFull })"),
        RuntimeError("There is not enough space on the disk. (os error 112)"),
    ],
)
def test_a_full_disk_is_a_run_error_naming_the_last_whole_checkpoint(
    tmp_path: Path, lines: list[str], error: Exception
) -> None:
    with start(tmp_path / "run", lines) as run:
        save(run, 1)
        with pytest.raises(RunError, match=r"disk is full: checkpoint-2 .*checkpoint-1"), run.write_checkpoint(2):
            raise error
        assert [p.name for p in run.checkpoints()] == ["checkpoint-1"] and not list(run.path.glob("*.tmp-*"))


def test_a_full_disk_is_known_behind_another_error() -> None:
    outer = RuntimeError("cannot write weights")
    outer.__cause__ = OSError(errno.ENOSPC, "full")
    assert rundir.is_disk_full(outer)
    assert not rundir.is_disk_full(OSError(errno.EACCES, "denied"))


def test_a_checkpoint_saved_again_replaces_ours_and_keeps_what_is_not(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        save(run, 1, "old")
        run.checkpoint_path(2).mkdir()
        (run.checkpoint_path(2) / "theirs").write_text("x", encoding="utf-8")
        for step in (1, 2):
            assert (save(run, step, "new") / "critic" / "head.bin").read_text(encoding="utf-8") == "new"
        names = sorted(p.name for p in run.path.glob("checkpoint*"))
        assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-2.1"]


def test_truncation_takes_later_checkpoints_out_of_the_way(tmp_path: Path, lines: list[str]) -> None:
    with start(tmp_path / "run", lines) as run:
        for step in (1, 2, 3):
            save(run, step)
        run.truncate_after(1)
        assert [p.name for p in run.checkpoints()] == ["checkpoint-1"]
        assert (run.path / "checkpoint-3.1").is_dir()


@pytest.mark.parametrize(
    ("limit", "best", "stay"),
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (1, 2, [2, 4]),
        (1, 4, [4]),
        (9, None, [1, 2, 3, 4]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(
    tmp_path: Path, lines: list[str], limit: int | None, best: int | None, stay: list[int]
) -> None:
    with start(tmp_path / "run", lines) as run:
        for step in (1, 2, 3, 4):
            save(run, step)
        removed = run.prune(limit, keep=run.checkpoint_path(best) if best else None)
        assert [rundir.checkpoint_step(p) for p in run.checkpoints()] == stay
        assert len(removed) == 4 - len(stay)


def test_leftovers_of_a_kill_are_swept_on_resume(tmp_path: Path, lines: list[str]) -> None:
    left(tmp_path / "run", lines, "stopped")
    (tmp_path / "run" / "checkpoint-7.tmp-abcd0123").mkdir()
    with start(tmp_path / "run", lines, resume=True) as run:
        assert not list(run.path.glob("*.tmp-*"))


# ---------------------------------------------------------------------------------------------------- results and model


def test_results_gather_in_all_results(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_results("train", {"train_loss": 1.0, "epoch": 3.0})
    run.write_results("eval", {"eval_loss": 2.0})
    assert run.results() == {"train_loss": 1.0, "epoch": 3.0, "eval_loss": 2.0}
    assert run.results("eval") == {"eval_loss": 2.0}
    run.write_state(global_step=4, epoch=1.0, max_steps=8, log_history=[{"loss": math.nan}], best_metric=2.0)
    state = json.loads((tmp_path / rundir.TRAINER_STATE).read_text(encoding="utf-8"))
    assert state["global_step"] == 4 and state["log_history"] == [{"loss": None}] and state["best_metric"] == 2.0


def test_predictions_are_on_disk_as_they_come(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def rows() -> object:
        yield {"prompt": "甲", "predict": "a", "label": "b"}
        assert len(rundir.read_rows(tmp_path / rundir.PREDICTIONS)) == 1
        yield {"prompt": "乙", "predict": "c", "label": "d"}

    assert run.write_predictions(rows()) == 2  # type: ignore[arg-type]
    assert rundir.read_rows(tmp_path / rundir.PREDICTIONS)[1]["prompt"] == "乙"


def test_staged_files_replace_those_of_the_same_name_only_at_the_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="boom"), run.staged() as folder:
        fail_in(folder / "adapter_config.json")
    assert (tmp_path / "adapter_config.json").read_text(encoding="utf-8") == "old"
    with run.staged() as folder, run.staged("critic") as critic:
        (folder / "adapter_config.json").write_text("new", encoding="utf-8")
        (critic / "head").write_text("h", encoding="utf-8")
    assert (tmp_path / "adapter_config.json").read_text(encoding="utf-8") == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "critic"]
    assert (tmp_path / "critic" / "head").exists()


def test_atomic_json_leaves_the_old_file_when_the_value_cannot_be_written(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "a.json", {"a": 1, "path": Path("x")})
    with pytest.raises(TypeError, match="object"):
        rundir.write_json(tmp_path / "a.json", {"a": object()})
    assert rundir.read_json(tmp_path / "a.json", {}) == {"a": 1, "path": "x"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys, trimtab.rundir, trimtab.diagnose, trimtab.report.plots, trimtab.report.tables\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
