"""Whole runs: the files they leave, the best model, early stopping, how many checkpoints stay."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimtab.errors import ConfigError, RunError
from trimtab.rundir import RunFolder
from trimtab.train import loop
from trimtab.train.offline import OfflineTrainer

pytestmark = pytest.mark.unit

Run = Callable[..., RunFolder]

MODEL = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
RECORDS = {
    "trainer_state.json",
    "trainer_log.jsonl",
    "train_results.json",
    "all_results.json",
    "eval_results.json",
    "config.resolved.json",
    "manifest.json",
    "metrics.jsonl",
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def whole(folder: RunFolder, steps: int, files: set[str]) -> None:
    """What every finished run must have."""
    assert MODEL | RECORDS | files | {f"checkpoint-{steps}"} <= names(folder.path)
    assert {"chat_template.jinja"} <= names(folder.path)
    assert folder.status() == "finished"
    assert [row["step"] for row in folder.metrics("train")] == list(range(1, steps + 1))
    for row in folder.metrics("train"):
        assert {"loss", "lr", "tokens", "seconds", "epoch"} <= row.keys()
        assert all(not isinstance(value, str) for key, value in row.items() if key not in ("kind", "stage"))
    log = folder.trainer_log()
    assert {
        "current_steps",
        "total_steps",
        "loss",
        "lr",
        "epoch",
        "percentage",
        "elapsed_time",
        "remaining_time",
    } <= log[0].keys()
    assert [row["current_steps"] for row in log if "loss" in row] == list(range(1, steps + 1))
    state = json.loads((folder.path / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == state["max_steps"] == steps
    results = folder.results()
    assert results["train_loss"] == pytest.approx(sum(r["loss"] for r in folder.metrics("train")) / steps)
    checkpoint = folder.latest_checkpoint()
    assert checkpoint is not None
    assert names(checkpoint) >= MODEL | {"state", "trainer_state.json", "complete.json"}
    manifest = folder.manifest()
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]["torch"]
    assert manifest["measured"]["tokens"] > 0


EVAL: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "plot_loss": True}


def test_sft(run: Run, tmp_path: Path) -> None:
    folder = run("sft", tmp_path / "r", eval_dataset="qa_eval", eval_tasks="exact_match", max_new_tokens=4, **EVAL)
    whole(folder, 2, {"training_loss.png"})
    assert "value_head.safetensors" not in names(folder.path)
    row = folder.metrics("eval")[-1]
    assert {"eval/loss", "eval/perplexity", "eval/exact_match"} <= row.keys()
    assert folder.results("eval")["eval_loss"] == row["eval/loss"]
    assert [row["eval_loss"] for row in folder.trainer_log() if "eval_loss" in row] == [
        row["eval/loss"] for row in folder.metrics("eval")
    ]


def test_pt(run: Run, tmp_path: Path) -> None:
    whole(run("pt", tmp_path / "r", val_size=2, **EVAL), 2, {"training_loss.png"})


def test_rm(run: Run, tmp_path: Path) -> None:
    folder = run("rm", tmp_path / "r", eval_dataset="pairs_eval", **EVAL)
    whole(folder, 2, {"training_loss.png", "value_head.safetensors", "value_head.json"})
    head = load_file(folder.path / "value_head.safetensors")
    assert {name: tuple(t.shape) for name, t in head.items()} == {
        "v_head.summary.weight": (1, 64),
        "v_head.summary.bias": (1,),
    }
    row = folder.metrics("eval")[-1]
    assert {
        "eval/accuracy",
        "eval/margin",
        "eval/nll",
        "eval/calibration_error",
        "eval/length_correlation",
    } <= row.keys()


@pytest.mark.parametrize(
    ("critic", "group_size", "more"),
    [("adapter", 1, {"gradient_checkpointing": True}), ("adapter", 2, {}), ("head", 2, {"critic_warmup_steps": 1})],
)
def test_ppo(
    critic: str, group_size: int, more: dict[str, Any], run: Run, sft_folder: Path, rm_folder: Path, tmp_path: Path
) -> None:
    folder = run(
        "ppo", tmp_path / "r", adapter_name_or_path=str(sft_folder), reward_model=str(rm_folder), critic=critic,
        group_size=group_size, eval_dataset="qa_eval", eval_tasks="exact_match", **EVAL, **more,
    )  # fmt: skip
    whole(
        folder,
        2,
        {"training_loss.png", "training_reward.png", "samples.jsonl"} | ({"critic"} if critic == "adapter" else set()),
    )
    head_files = {"value_head.safetensors", "value_head.json"}
    if critic == "adapter":
        assert head_files | {"adapter_model.safetensors"} <= names(folder.path / "critic")
        assert not head_files & names(folder.path)
    else:
        assert head_files <= names(folder.path)
    wanted = {
        "reward/mean", "reward/std", "reward/parts/model", "score/mean", "kl/k1_sequence", "kl/k3_sequence", "kl/k1_token",
        "kl/k3_token", "entropy", "ratio/mean", "ratio/max", "clip_fraction", "explained_variance", "value_loss", "length/mean",
        "length/p95", "finished_rate", "grad_norm/policy", "grad_norm/critic", "sampler_diff/max", "policy_loss",
    }  # fmt: skip
    first, second = folder.metrics("train")
    assert wanted <= second.keys()
    assert wanted - {"grad_norm/policy"} <= first.keys()
    assert ("grad_norm/policy" in first) == (critic == "adapter")  # in a warm-up the critic moves alone
    row = folder.metrics("eval")[-1]
    assert {
        f"eval/{n}" for n in ("reward_greedy", "reward_sampled", "kl", "length", "finished_rate", "exact_match")
    } <= row.keys()
    shown = [sample for sample in folder.samples() if sample["kind"] == "eval" and sample["step"] == 2]
    assert len(shown) == 3
    assert {"prompt", "greedy", "sampled", "reward_greedy", "reward_sampled", "gold"} <= shown[0].keys()


def graded(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Evaluation after step n finds losses[n - 1]."""
    monkeypatch.setattr(OfflineTrainer, "evaluate", lambda self, step: {"loss": losses[step - 1], "perplexity": 1.0})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


BEST: dict[str, Any] = {"eval_dataset": "qa_eval", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


def test_the_best_model_comes_back(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, 3.0, 1.0, 2.0, 4.0, 1.0, 1.0)
    folder = run("sft", tmp_path / "r", max_steps=4, load_best_model_at_end=True, save_total_limit=1, **BEST)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2", "checkpoint-4"]  # the best, and the newest
    assert equal(weights(folder.path), weights(folder.path / "checkpoint-2"))
    assert not equal(weights(folder.path), weights(folder.path / "checkpoint-4"))  # the weights of step 4 are step 4's
    state = json.loads((folder.path / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == 1.0
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-2"


def test_the_last_checkpoint_is_there_also_when_the_last_evaluation_was_the_best(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graded(monkeypatch, 3.0, 2.0)
    folder = run("sft", tmp_path / "r", **{**BEST, "save_steps": 500})
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2"]


def test_early_stopping(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, 3.0, 1.0, 2.0, 1.5, 0.1, 0.1)
    folder = run("sft", tmp_path / "r", max_steps=6, early_stopping_steps=2, **BEST)
    assert [row["step"] for row in folder.metrics("train")] == [1, 2, 3, 4]
    assert folder.status() == "finished"
    assert folder.latest_checkpoint() == folder.path / "checkpoint-4"


def test_a_run_ends_by_the_minutes_in_its_steps(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps a minute at every look: two looks a step, so a step takes a minute, and 2.5 minutes are over after three."""
    minutes = itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: 60.0 * next(minutes))
    monkeypatch.setattr(loop._Clock, "seconds", lambda self: 0.0)
    folder = run(
        "sft", tmp_path / "r", max_steps=9, max_minutes=2.5, eval_dataset="qa_eval", eval_strategy="steps", eval_steps=1
    )
    assert [row["step"] for row in folder.metrics("train")] == [1, 2, 3]
    assert folder.status() == "finished"
    state = json.loads((folder.path / "checkpoint-3" / "state" / "state.json").read_text())
    assert state["in_steps"] == 180.0


def test_the_oldest_checkpoints_go(run: Run, tmp_path: Path) -> None:
    folder = run("sft", tmp_path / "r", max_steps=5, save_steps=1, save_total_limit=2)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-4", "checkpoint-5"]


def test_a_metric_by_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no evaluation gives a metric 'eval_bleu'") as caught:
        run("sft", tmp_path / "a", metric_for_best_model="eval_bleu", load_best_model_at_end=True, **BEST)
    assert "loss, perplexity" in caught.value.remedy
    monkeypatch.setattr(OfflineTrainer, "evaluate", lambda self, step: {"loss": 1.0, "perplexity": float(step)})
    folder = run("sft", tmp_path / "b", metric_for_best_model="eval_perplexity", load_best_model_at_end=True, **BEST)
    assert equal(weights(folder.path), weights(folder.path / "checkpoint-1"))  # less perplexity is better
    with pytest.raises(ConfigError, match="save_only_model"):
        run("sft", tmp_path / "c", load_best_model_at_end=True, save_only_model=True, **BEST)


def test_epochs_and_partial_batches(run: Run, tmp_path: Path) -> None:
    """9 rows by 4 are 3 steps an epoch, the last with one row: 2 epochs are 6 steps."""
    folder = run(
        "sft", tmp_path / "r", per_device_train_batch_size=4, max_steps=-1, num_train_epochs=2, save_strategy="epoch",
        warmup_ratio=0.5,
    )  # fmt: skip
    rows = folder.metrics("train")
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-4)
    tokens = [b - a for a, b in zip([0, *(r["tokens"] for r in rows)], [r["tokens"] for r in rows], strict=False)]
    assert tokens[0] + tokens[1] + tokens[2] == tokens[3] + tokens[4] + tokens[5]  # every row once an epoch
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-3", "checkpoint-6"]
    # 3 steps of warm-up from 0, then linearly to 0
    assert [row["lr"] for row in rows] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_a_finished_run_is_not_trained_into(run: Run, tmp_path: Path) -> None:
    run("sft", tmp_path / "r")
    with pytest.raises(RunError, match="finished run"):
        run("sft", tmp_path / "r")
    assert run("sft", tmp_path / "r", resume=True).opened == "finished"
    assert run("sft", tmp_path / "r", overwrite_output_dir=True).opened == "new"
    assert (tmp_path / "r.1").is_dir()
