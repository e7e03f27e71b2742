"""Peaks of memory by phase, and that they are those that a plan foresees on a real run's folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.train import memory
from trimtab.train.memory import PeakMemory, resident

pytestmark = pytest.mark.unit

MB = 2**20


def hold(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MB // 4)


def test_a_phase_has_its_own_peak() -> None:
    watch = PeakMemory(torch.device("cpu"))
    with watch.watch(), watch.phase("large"):
        hold(200)
        with watch.phase("small"):
            kept = hold(60)
    with watch.phase("after"):
        pass
    found = watch.above()
    assert 190 * MB < found["large"] < 300 * MB
    if sys.platform == "linux":  # elsewhere two samples a second apart see what they see
        assert 50 * MB < found["small"] < 160 * MB
        assert found["after"] < 160 * MB
    assert watch.read() >= watch.base + 190 * MB
    assert kept.numel()


def test_without_a_mark_of_the_system_memory_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_RESET", Path("/nowhere/clear_refs"))
    watch = PeakMemory(torch.device("cpu"))
    with watch.watch(), watch.phase("held"):
        kept = hold(100)
    assert watch.above()["held"] > 90 * MB
    assert resident() > 0 and kept.numel()


def test_the_manifest_has_predicted_beside_measured(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = run("sft", tmp_path / "run", max_steps=2, do_eval=True)
    manifest = folder.manifest()
    predicted, measured = manifest["predicted"], manifest["measured"]
    assert predicted["phase_memory_bytes"].keys() >= {"load", "update", "save"}
    assert measured["phase_memory_bytes"].keys() >= {"load", "update"}
    assert manifest["gradient_checkpointing"] is False
    assert manifest["micro_batch_tokens"] == 1024


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_memory_is_flat_over_two_hundred_steps(
    stage: str, run: Callable[..., Any], tmp_path: Path, rm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is resident after 200 steps is what was after 20, up to a few megabytes of records and of the allocator."""
    from trimtab.train import loop

    seen: dict[int, int] = {}
    log = loop._Progress.log

    def noted(self: Any, step: int, figures: Any) -> None:
        log(self, step, figures)
        if step % 20 == 0:
            seen[step] = resident()

    monkeypatch.setattr(loop._Progress, "log", noted)
    more = {"reward_model": str(rm_folder), "ppo_epochs": 1, "ppo_buffer_size": 1} if stage == "ppo" else {}
    run(stage, tmp_path / "run", max_steps=200, num_train_epochs=1000, save_strategy="no", **more)
    assert seen[200] - seen[20] < 24 * MB, seen
