"""Thirty steps of every stage, against the curves that are on record: what no other test names moves one of these.

`make golden` records them anew, for a change that is meant to move them; its difference belongs to the commit that moves them.
A curve is of a tiny model in float32 at one thread. Other processors round otherwise, and thirty steps carry that on, so figures are
compared to a thousandth; what a fault in a formula moves, it moves by more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.rundir import RunFolder

pytestmark = pytest.mark.golden

Run = Callable[..., RunFolder]

RECORD = Path(__file__).parent / "golden"
STEPS = 30
RELATIVE, ABSOLUTE = 1e-3, 2e-4

ONLINE: dict[str, Any] = {"group_size": 4, "per_device_train_batch_size": 3, "ppo_buffer_size": 1, "ppo_epochs": 2}
STAGES: dict[str, dict[str, Any]] = {
    "pt": {},
    "sft": {},
    "rm": {},
    "dpo": {"pref_ftx": 0.1},
    "kto": {},
    "orpo": {},
    "simpo": {},
    "ppo": {**ONLINE, "critic_warmup_steps": 3},
    "rloo": ONLINE,
    "grpo": ONLINE,
    "reinforce_pp": ONLINE,
    "remax": ONLINE,
    "raft": ONLINE,
    "online_dpo": {**ONLINE, "kl_coef": 0.0},
}
"""Every stage, and what its run writes beside the keys that all share."""

LEFT_OUT = ("seconds", "memory", "tokens_per_second", "accuracy")
"""Times; and the sign of a margin, which is rounding where the policy still is the reference (the margin itself is on record)."""


def curve(folder: RunFolder) -> dict[str, list[float]]:
    """Each logged figure but those left out, one number a step, to six digits."""
    rows = folder.metrics("train")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    figures = {
        name: [float(f"{row[name]:.6g}") for row in rows]
        for name, value in rows[0].items()
        if isinstance(value, int | float) and not name.startswith(LEFT_OUT) and all(name in row for row in rows)
    }
    return {name: values for name, values in sorted(figures.items()) if name not in ("step", "epoch")}


@pytest.mark.parametrize("stage", list(STAGES))
def test_the_curve_is_the_one_on_record(stage: str, run: Run, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    keys = dict(STAGES[stage])
    if "group_size" in keys:
        keys["reward_model"] = str(request.getfixturevalue("rm_folder"))
        keys["adapter_name_or_path"] = str(request.getfixturevalue("sft_folder"))
    found = curve(run(stage, tmp_path / "r", max_steps=STEPS, seed=7, learning_rate=2e-3, adam_epsilon=1e-4, **keys))
    file = RECORD / f"{stage}.json"
    if os.environ.get("TRIMTAB_GOLDEN") == "record":
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        return
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert sorted(found) == sorted(recorded), "other figures than on record"
    moved = {}
    for name, values in found.items():
        scale = max(abs(value) for value in recorded[name])
        pairs = zip(values, recorded[name], strict=True)
        far = [
            i
            for i, (a, b) in enumerate(pairs)
            if not math.isclose(a, b, rel_tol=0, abs_tol=RELATIVE * scale + ABSOLUTE)
        ]
        if far:
            step = far[0]
            moved[name] = (
                f"step {step + 1}: {values[step]:g}, on record {recorded[name][step]:g} ({len(far)} steps differ)"
            )
    assert not moved, "the curve has moved (make golden records it anew):\n" + "\n".join(
        f"  {name}: {what}" for name, what in moved.items()
    )
