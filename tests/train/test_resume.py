"""Killed and resumed: to the last bit the run that was never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimtab.config.stages import ONLINE
from trimtab.errors import RunError
from trimtab.rundir import RunFolder
from trimtab.train.offline import OfflineTrainer
from trimtab.train.online import OnlineTrainer
from trimtab.train.preference import PreferenceTrainer

pytestmark = pytest.mark.resume

Run = Callable[..., RunFolder]


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows without times."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and not k.endswith("_time")} for row in rows]


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, trainer: type) -> None:
    step = trainer.step

    def until(self: Any, n: int) -> Any:
        if n == number:
            raise Killed
        return step(self, n)

    monkeypatch.setattr(trainer, "step", until)


CASES: dict[str, dict[str, Any]] = {
    # dropout is a random number per element; evaluation and the best model are state too
    "sft": {"lora_dropout": 0.2, "eval_dataset": "qa_eval", "load_best_model_at_end": True, "early_stopping_steps": 9},
    "rm": {"eval_dataset": "pairs_eval"},
    "sft-stream": {"streaming": True, "buffer_size": 4, "eval_dataset": "qa_eval"},
    # a controller, running moments, and a reference that differs from the start of the resumed process
    "ppo": {"kl_target": 0.1, "kl_horizon": 20, "score_norm": True, "eval_dataset": "qa_eval", "group_size": 2},
    # the mean log-ratio of all answers so far is state; so is the frozen copy of where the policy started
    "dpo": {"eval_dataset": "pairs_eval", "pref_bco_weight": 0.5, "load_best_model_at_end": True},
    "kto": {"eval_dataset": "marks_eval"},
    # how far dynamic sampling has come in the data, and a reference that was moved on the way
    "grpo-dynamic": {
        "preset": "dapo",
        "kl_coef": 0.1,
        "ref_update_every": 3,
        "overlong_buffer": 3,
        "eval_dataset": "qa_eval",
    },
    "ppo-head": {"critic": "head", "critic_warmup_steps": 3, "eval_dataset": "qa_eval"},
}


@pytest.mark.parametrize("case", list(CASES))
def test_six_steps_are_four_a_kill_and_two(
    case: str, run: Run, sft_folder: Path, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = case.partition("-")[0]
    keys = {
        "max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "warmup_steps": 2, "eval_on_start": True,
        "adapter_name_or_path": str(sft_folder), "logging_steps": 3, "lr_scheduler_type": "cosine", **CASES[case],
    }  # fmt: skip
    if stage in ONLINE:
        keys["reward_model"] = str(rm_folder)
    straight = run(stage, tmp_path / "straight", **keys)
    with monkeypatch.context() as patch:
        trainers = {**dict.fromkeys(ONLINE, OnlineTrainer), "dpo": PreferenceTrainer, "kto": PreferenceTrainer}
        killed_at(patch, 5, trainers.get(stage, OfflineTrainer))
        with pytest.raises(Killed):
            run(stage, tmp_path / "killed", **keys)
    torn = RunFolder(tmp_path / "killed")
    assert torn.status() == "stopped"
    assert [row["step"] for row in torn.metrics("train")] == [1, 2, 3, 4, 5]  # step 5 is after the last checkpoint
    resumed = run(stage, tmp_path / "killed", resume=True, **keys)
    assert resumed.opened == "resumed"
    for name in ("metrics.jsonl", "trainer_log.jsonl", *(["samples.jsonl"] if stage == "ppo" else [])):
        assert lines(resumed.path / name) == lines(straight.path / name), name
    files = ["adapter_model.safetensors"]
    if stage in ("rm", "ppo"):
        files.append("value_head.safetensors" if case != "ppo" else "critic/value_head.safetensors")
    for name in files:
        a, b = load_file(straight.path / name), load_file(resumed.path / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    names = [{path.name for path in folder.checkpoints()} for folder in (straight, resumed)]
    assert names[0] == names[1]


def test_killed_before_the_first_checkpoint_it_starts_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run("sft", tmp_path / "straight")
    with monkeypatch.context() as patch:
        killed_at(patch, 1, OfflineTrainer)
        with pytest.raises(Killed):
            run("sft", tmp_path / "killed")
    resumed = run("sft", tmp_path / "killed", resume=True)
    assert lines(resumed.path / "metrics.jsonl") == lines(straight.path / "metrics.jsonl")


def test_killed_after_the_last_step_it_only_finishes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"eval_dataset": "pairs_eval", "eval_strategy": "steps", "eval_steps": 2}
    straight = run("rm", tmp_path / "straight", **keys)

    def finish(self: Any) -> bool:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OfflineTrainer, "finish", finish)
        with pytest.raises(Killed):
            run("rm", tmp_path / "killed", **keys)
    resumed = run("rm", tmp_path / "killed", resume=True, **keys)
    assert lines(resumed.path / "metrics.jsonl") == lines(straight.path / "metrics.jsonl")
    a, b = (load_file(folder.path / "value_head.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)  # centred once, not twice


def test_from_a_checkpoint_by_name(run: Run, tmp_path: Path) -> None:
    straight = run("sft", tmp_path / "straight", max_steps=4, save_steps=2)
    other = run("sft", tmp_path / "other", max_steps=4, resume_from_checkpoint=str(straight.path / "checkpoint-2"))
    assert lines(other.path / "metrics.jsonl") == lines(straight.path / "metrics.jsonl")[2:]


def test_weights_alone_cannot_be_resumed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"max_steps": 4, "save_steps": 2, "save_only_model": True}
    with monkeypatch.context() as patch:
        killed_at(patch, 3, OfflineTrainer)
        with pytest.raises(Killed):
            run("sft", tmp_path / "r", **keys)
    with pytest.raises(RunError, match="holds no training state"):
        run("sft", tmp_path / "r", resume=True, **keys)


def test_another_config_cannot_continue_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_at(patch, 1, OfflineTrainer)
        with pytest.raises(Killed):
            run("sft", tmp_path / "r")
    with pytest.raises(RunError, match="learning_rate"):
        run("sft", tmp_path / "r", resume=True, learning_rate=2e-3)
