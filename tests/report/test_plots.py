"""The plots of a run: which are drawn, that they are pictures, that odd runs do not stop them, and the smoothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from trimtab.report.plots import ema_weight, plot_run, smooth
from trimtab.rundir import RunFolder

pytestmark = pytest.mark.unit


def run(path: Path, rows: list[dict[str, Any]], stage: str = "sft") -> Path:
    path.mkdir(parents=True)
    folder = RunFolder(path)
    for row in rows:
        folder.append_metrics({"kind": "train", "stage": stage, **row})
    folder.close()
    return path


def names(paths: list[Path]) -> list[str]:
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return [path.name for path in paths]


def ppo_row(step: int, **over: float) -> dict[str, Any]:
    quantities = ["loss", "reward/mean", "kl/k1_sequence", "entropy", "length/mean", "length/p95", "finished_rate"]
    quantities += ["clip_fraction", "explained_variance", "value_loss"]
    return {"step": step, **dict.fromkeys(quantities, 0.5), **over}


def test_each_stage_gets_its_plots(tmp_path: Path) -> None:
    losses = [{"step": step, "loss": 1.0 / step} for step in range(1, 4)]
    assert names(plot_run(run(tmp_path / "sft", losses))) == ["training_loss.png"]

    evals = [{"step": 3, "kind": "eval", "eval/loss": 0.5, "eval/accuracy": 0.9}]
    assert names(plot_run(run(tmp_path / "rm", losses + evals, "rm"))) == [
        "training_loss.png",
        "training_eval_loss.png",
        "training_eval_accuracy.png",
    ]
    ppo = [ppo_row(step) for step in range(1, 61)] + [{"step": 60, "kind": "eval", "eval/reward_greedy": 0.7}]
    assert names(plot_run(run(tmp_path / "ppo", ppo, "ppo"))) == [
        "training_loss.png",
        "training_reward.png",
        "ppo_panel.png",
    ]


def test_a_run_without_metrics_gets_none(tmp_path: Path) -> None:
    assert plot_run(tmp_path) == []


def test_a_plot_replaces_the_last_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = run(tmp_path / "sft", [{"step": 1, "loss": 1.0}])
    plot_run(folder)
    first = (folder / "training_loss.png").stat().st_size
    RunFolder(folder).append_metrics({"step": 2, "kind": "train", "stage": "sft", "loss": 0.5})
    plot_run(folder)
    assert (folder / "training_loss.png").stat().st_size != first
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "training_loss.png"]


@pytest.mark.parametrize("name", ["运行", "a [b] $c_d$"])
def test_odd_values_and_names_are_drawn_without_a_warning(
    tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    odd = [ppo_row(1, **{"loss": math.nan, "value_loss": math.inf, "explained_variance": -1e9, "entropy": 0.0})]
    assert "ppo_panel.png" in names(plot_run(run(tmp_path / name, odd, "ppo")))
    assert [str(warning.message) for warning in recwarn] == []


def test_smoothing_is_the_corrected_moving_average() -> None:
    # weight 1/2: (1), (1/2 + 3)/(1/2 + 1) = 7/3, (7/4 + 2)/(3/4 + 1) = 15/7
    assert smooth([1.0, 3.0, 2.0], 0.5) == pytest.approx([1.0, 7 / 3, 15 / 7], abs=1e-15)
    assert smooth([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    assert smooth([], 0.9) == [] and smooth([1.0, 5.0], 0.0) == [1.0, 5.0]


@pytest.mark.parametrize(("count", "weight"), [(11, 0.0), (12, 0.5), (100, 0.7), (300, 0.9), (9000, 0.98)])
def test_more_points_are_smoothed_more(count: int, weight: float) -> None:
    assert ema_weight(count) == pytest.approx(weight)
