"""Runs of stage online_dpo: the first minibatch, ties, and a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.rundir import RunFolder

pytestmark = pytest.mark.unit

Run = Callable[..., RunFolder]
TIMES = ("seconds", "seconds/sample", "seconds/reward", "seconds/score", "seconds/update")


def letters(completion: str) -> float:
    return float(len(set(completion)))


def same(completion: str) -> float:
    return 1.0


def test_before_anything_has_moved_every_pair_is_a_draw(run: Run, tmp_path: Path) -> None:
    """One minibatch: h is 0, so the loss is ln 2; and nobody who is tied takes part."""
    folder = run("online_dpo", tmp_path / "run", reward_funcs=letters, ppo_buffer_size=1, max_steps=2)
    first, second = folder.metrics("train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["kl/k1_sequence"] == pytest.approx(0.0, abs=1e-5)
    assert first["pairs/used"] + 3 * first["pairs/tied"] == pytest.approx(3)
    assert first["pairs/used"] > 0 and first["pairs/lead"] > 0
    assert abs(second["kl/k3_sequence"]) > 0


def test_ties_teach_nothing(run: Run, tmp_path: Path) -> None:
    folder = run("online_dpo", tmp_path / "run", reward_funcs=same, missing_eos_penalty=0, max_steps=2)
    for row in folder.metrics("train"):
        assert (row["loss"], row["pairs/used"], row["pairs/tied"]) == (0.0, 0.0, 1.0)
        assert row["kl/k3_sequence"] == pytest.approx(0.0, abs=1e-9)


def test_a_resumed_run_repeats_the_whole_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {"reward_funcs": letters, "max_steps": 3, "save_steps": 1}
    whole = run("online_dpo", tmp_path / "whole", **more)
    from trimtab.train import online

    plain, calls = online.OnlineTrainer.step, [0]

    def killed(self: Any, number: int) -> Any:
        if number == 2 and not calls[0]:
            calls[0] = 1
            raise KeyboardInterrupt
        return plain(self, number)

    monkeypatch.setattr(online.OnlineTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("online_dpo", tmp_path / "part", **more)
    again = run("online_dpo", tmp_path / "part", resume=True, **more)
    kept = [[{k: v for k, v in row.items() if k not in TIMES} for row in f.metrics()] for f in (whole, again)]
    assert kept[0] == kept[1]
