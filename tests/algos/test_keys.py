"""Every key that an algorithm reads reaches it: each is given a value that is not its default, and looked for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from trimtab.algos import ALGORITHMS
from trimtab.algos.surrogate import Surrogate
from trimtab.config import load

pytestmark = pytest.mark.contract

NEEDED = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}
REWARD = {"reward_model": "r"}
KL = {"kl_coef": 0.3, "kl_target": 5.0, "kl_horizon": 77.0}
KL_FOUND = {"kl_coef": 0.3, "kl_target": 5.0, "kl_horizon": 77.0}
RATIO = {"clip_range_low": 0.11, "clip_range_high": 0.44, "dual_clip": 3.5}

# stage -> (what the file writes, what the algorithm must hold; a key of `how` is written how.NAME)
WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ppo": (
        {**KL, **RATIO, "group_size": 3, "ppo_epochs": 7, "kl_placement": "loss", "kl_estimator": "k2", "gamma": 0.9, "gae_lambda": 0.8,
         "clip_range_value": 0.6, "vf_coef": 0.7, "entropy_coef": 0.02, "whiten_advantages": False, "whiten_rewards": True},
        {**KL_FOUND, "group_size": 3, "epochs": 7, "kl_placement": "loss", "kl_estimator": "k2", "gamma": 0.9, "gae_lambda": 0.8,
         "clip_low": 0.11, "clip_high": 0.44, "dual_clip": 3.5, "clip_range_value": 0.6, "vf_coef": 0.7, "entropy_coef": 0.02,
         "whiten_advantages": False, "whiten_rewards": True},
    ),
    "rloo": (
        {**KL, **RATIO, "group_size": 3, "ppo_epochs": 7, "kl_placement": "loss", "kl_estimator": "k2", "entropy_coef": 0.02,
         "baseline": "mean", "advantage_norm": "batch", "ratio_level": "token", "loss_reduction": "constant", "mask_truncated": True,
         "dynamic_sampling": True},
        {**KL_FOUND, "group_size": 3, "epochs": 7, "baseline": "mean", "normalisation": "batch", "token_reduction": "constant",
         "mask_truncated": True, "dynamic": True, "how.level": "token", "how.clip_low": 0.11, "how.clip_high": 0.44, "how.dual_clip": 3.5,
         "how.kl_placement": "loss", "how.kl_estimator": "k2", "how.entropy_coef": 0.02},
    ),
    "grpo": (
        {**KL, **RATIO, "preset": "cispo", "group_size": 3, "ppo_epochs": 7, "kl_placement": "reward", "kl_estimator": "k2",
         "entropy_coef": 0.02, "baseline": "leave_one_out", "advantage_norm": "batch", "loss_reduction": "constant", "mask_truncated": True,
         "dynamic_sampling": True, "cispo_cap": 4.0},
        {**KL_FOUND, "preset": "cispo", "group_size": 3, "epochs": 7, "baseline": "leave_one_out", "normalisation": "batch",
         "token_reduction": "constant", "mask_truncated": True, "dynamic": True, "how.objective": "cispo", "how.cispo_cap": 4.0,
         "how.clip_low": 0.11, "how.clip_high": 0.44, "how.dual_clip": 3.5, "how.kl_placement": "reward", "how.kl_estimator": "k2",
         "how.entropy_coef": 0.02},
    ),
    "reinforce_pp": (
        {**KL, **RATIO, "group_size": 3, "ppo_epochs": 7, "kl_placement": "loss", "kl_estimator": "k2", "entropy_coef": 0.02, "gamma": 0.9},
        {**KL_FOUND, "group_size": 3, "epochs": 7, "gamma": 0.9, "how.clip_low": 0.11, "how.clip_high": 0.44, "how.dual_clip": 3.5,
         "how.kl_placement": "loss", "how.kl_estimator": "k2", "how.entropy_coef": 0.02},
    ),
    "remax": (
        {**KL, "group_size": 3, "ppo_epochs": 7, "kl_placement": "loss", "kl_estimator": "k2", "entropy_coef": 0.02},
        {**KL_FOUND, "group_size": 3, "epochs": 7, "how.kl_placement": "loss", "how.kl_estimator": "k2", "how.entropy_coef": 0.02},
    ),
    "raft": (
        {**KL, "group_size": 3, "ppo_epochs": 7, "kl_placement": "loss", "kl_estimator": "k2", "entropy_coef": 0.02},
        {**KL_FOUND, "group_size": 3, "epochs": 7, "how.kl_placement": "loss", "how.kl_estimator": "k2", "how.entropy_coef": 0.02},
    ),
    "online_dpo": (
        {"group_size": 3, "ppo_epochs": 7, "pref_beta": 0.6, "dpo_label_smoothing": 0.07},
        {"group_size": 3, "epochs": 7, "beta": 0.6, "smoothing": 0.07},
    ),
    "dpo": (
        {"pref_loss": "robust", "pref_beta": 0.6, "dpo_label_smoothing": 0.07, "pref_ftx": 0.3, "pref_bco_weight": 0.4, "ld_alpha": 0.5},
        {"pref_loss": "robust", "beta": 0.6, "smoothing": 0.07, "ftx": 0.3, "bco_weight": 0.4, "ld_alpha": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", list(WRITTEN))
def test_every_key_reaches_its_algorithm(stage: str) -> None:
    written, expected = WRITTEN[stage]
    given = {**NEEDED, **written, "stage": stage, **({} if stage == "dpo" else REWARD)}
    algorithm = ALGORITHMS.load(stage).from_config(load(given))
    for name, value in expected.items():
        holder = algorithm.how if name.startswith("how.") else algorithm
        assert getattr(holder, name.removeprefix("how.")) == value, name


@pytest.mark.parametrize("stage", list(WRITTEN))
def test_no_field_is_forgotten_above(stage: str) -> None:
    """A field that an algorithm gains is written here too, or is known to be set by no key of its own."""
    kind = ALGORITHMS.load(stage)
    left_out = {"rloo": {"how.objective", "how.cispo_cap"}, "grpo": {"how.level"}, "dpo": {"length_normalized"}}
    left_out |= {"reinforce_pp": {"how.level", "how.objective", "how.cispo_cap"}}
    unclipped = {"how.level", "how.objective", "how.cispo_cap", "how.clip_low", "how.clip_high", "how.dual_clip"}
    left_out |= {"remax": unclipped, "raft": unclipped}
    names = {f.name for f in fields(kind)} - {"how"}
    if any(f.name == "how" for f in fields(kind)):
        names |= {f"how.{f.name}" for f in fields(Surrogate)}
    assert names - set(WRITTEN[stage][1]) == left_out.get(stage, set())
