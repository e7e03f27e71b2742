"""The closing table and the summary of a run, from made folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trimtab.errors import RunError
from trimtab.report.tables import stage_rows, stage_table, summarise, summary
from trimtab.rundir import RunFolder

pytestmark = pytest.mark.unit

MEASURED = {"seconds": 75.4, "tokens": 15080, "tokens_per_second": 200.0, "peak_memory_bytes": 3 * 2**29}


def make(path: Path, stage: str, rows: list[dict[str, Any]], **config: Any) -> RunFolder:
    folder = RunFolder.start(path, {"stage": stage, "model_name_or_path": "tiny", **config})
    for row in rows:
        folder.append_metrics({"kind": "eval" if any(n.startswith("eval/") for n in row) else "train", **row})
    return folder


def text(renderable: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    make(tmp_path / "sft", "sft", [{"step": 10, "eval/loss": 0.5, "eval/exact_match": 0.25}]).finish(
        "finished", steps=10, measured=MEASURED
    )
    ppo = make(
        tmp_path / "ppo",
        "ppo",
        [
            {"step": 0, "eval/reward_greedy": -0.25, "eval/exact_match": 0.25, "eval/kl": 0.0},
            {"step": 5, "eval/reward_greedy": 1.5, "eval/exact_match": 0.375, "eval/kl": 2.0},
            {"step": 9, "eval/reward_greedy": 1.25, "eval/exact_match": 0.125, "eval/kl": 12.5},
        ],
    )
    ppo.close()  # as if killed: the manifest says running, and nobody holds the lock
    return [tmp_path / "sft", tmp_path / "ppo"]


def test_rows_hold_before_after_and_cost(folders: list[Path]) -> None:
    sft, ppo = stage_rows(folders)
    assert sft == {
        "folder": str(folders[0]),
        "stage": "sft",
        "status": "finished",
        "steps": 10,
        "metrics": {"eval/loss": {"before": None, "after": 0.5}, "eval/exact_match": {"before": None, "after": 0.25}},
        **MEASURED,
    }
    assert ppo["status"] == "interrupted" and ppo["seconds"] is None
    assert ppo["metrics"]["eval/reward_greedy"] == {"before": -0.25, "after": 1.25}


def test_an_evaluation_before_training_alone_is_no_after(tmp_path: Path) -> None:
    make(tmp_path / "run", "rm", [{"step": 0, "eval/accuracy": 0.5}]).close()
    assert stage_rows([tmp_path / "run"])[0]["metrics"] == {"eval/accuracy": {"before": 0.5, "after": None}}


def test_the_table_fits_eighty_columns(folders: list[Path]) -> None:
    shown = text(stage_table(folders))
    lines = [line.split() for line in shown.splitlines()]
    assert ["SFT", "loss", "-", "0.500", "75", "s", "200", "1.50", "GiB"] in lines
    assert ["exact", "match", "25.0", "%", "12.5", "%"] in lines
    assert ["interrupted"] in lines and "…" not in shown and max(map(len, shown.splitlines())) <= 80


def test_better_is_green_and_worse_is_red(folders: list[Path]) -> None:
    table = stage_table(folders)
    after = list(table.columns[3].cells)
    assert after == ["0.500", "25.0 %", "[green]1.250[/]", "[red]12.5 %[/]", "12.50", ""]


def test_summary_has_first_last_best_and_the_doctor(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": n, "loss": float(n), "clip_fraction": 0.5, "seconds": 2.0 * n} for n in range(1, 21)
    ]
    rows.insert(10, {"step": 10, "eval/loss": 0.25, "eval/length": 30.0, "eval/accuracy": 0.75})
    rows.append({"step": 20, "eval/loss": 0.5, "eval/length": 20.0, "eval/accuracy": 0.5, "seconds": 41.0})
    with make(tmp_path / "run", "ppo", rows):
        facts = summary(tmp_path / "run")
    assert facts["status"] == "running" and facts["steps"] == 20 and facts["seconds"] == 41.0
    assert facts["held_out"] == {
        "eval/loss": {"first": 0.25, "last": 0.5, "best": 0.25, "best_step": 10},
        "eval/accuracy": {"first": 0.75, "last": 0.5, "best": 0.75, "best_step": 10},
        "eval/length": {"first": 30.0, "last": 20.0, "best": None, "best_step": None},
    }
    assert facts["training"]["loss"] == {"first": 1.5, "last": 19.5}  # means of steps 1, 2 and of 19, 20
    assert [finding.rule for finding in facts["findings"]] == ["clip_fraction_high"]
    shown = text(summarise(tmp_path / "run"))
    assert "clip_fraction_high" in shown and "41 s" in shown and "0.250" in shown and "tiny" in shown


def test_the_summary_uses_the_type_that_was_computed_in(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", "ppo", [{"step": 1, "sampler_diff/max": 0.01}], compute_dtype="auto")
    folder.update_manifest(dtype="float32")
    assert [finding.rule for finding in summary(tmp_path / "run")["findings"]] == ["sampler_differs"]
    folder.update_manifest(dtype="bfloat16")
    assert summary(tmp_path / "run")["findings"] == []
    folder.close()


def test_a_run_without_figures_says_so(tmp_path: Path) -> None:
    make(tmp_path / "run [x]", "sft", []).close()
    shown = text(summarise(tmp_path / "run [x]"))
    assert "no figures yet" in shown and "[x]" in shown.replace("\n", "")
    assert "not evaluated" in text(stage_table([tmp_path / "run [x]"]))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        stage_rows([tmp_path])
