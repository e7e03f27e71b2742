"""Defaults of the online stages, presets of grpo, and settings that would be lost or make no sense together."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.config import load
from trimtab.errors import ConfigError

pytestmark = pytest.mark.unit


def config(stage: str, **keys: Any) -> Any:
    needed = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True, "reward_model": "r"}
    return load({**needed, "stage": stage, **keys})


@pytest.mark.parametrize(
    ("stage", "epochs", "group", "beta", "placement", "estimator"),
    [
        ("ppo", 4, 1, 0.05, "reward", "k1"),
        ("rloo", 1, 4, 0.05, "reward", "k1"),
        ("grpo", 1, 8, 0.04, "loss", "k3"),
        ("reinforce_pp", 1, 1, 0.05, "reward", "k1"),
        ("remax", 1, 1, 0.05, "reward", "k1"),
    ],
)
def test_defaults(stage: str, epochs: int, group: int, beta: float, placement: str, estimator: str) -> None:
    found = config(stage)
    assert (found.ppo_epochs, found.group_size, found.kl_coef) == (epochs, group, beta)
    assert (found.kl_placement, found.kl_estimator) == (placement, estimator)


def test_an_adaptive_coefficient_starts_higher() -> None:
    assert config("rloo", kl_target=6).kl_coef == 0.2
    assert config("rloo", kl_target=6, kl_coef=0.1).kl_coef == 0.1


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("grpo", {"advantage_norm": "group", "loss_reduction": "sequence", "ratio_level": "token", "kl_coef": 0.04}),
        ("dr_grpo", {"advantage_norm": "none", "loss_reduction": "constant", "kl_coef": 0.0}),
        (
            "dapo",
            {"clip_range_low": None, "clip_range_high": 0.28, "loss_reduction": "token", "kl_coef": 0.0, "dynamic_sampling": True,
             "mask_truncated": True, "missing_eos_penalty": 0.0, "overlong_buffer": 100},
        ),
        (
            "gspo",
            {"ratio_level": "sequence_mean", "clip_range_low": 3e-4, "clip_range_high": 4e-4, "kl_coef": 0.0},
        ),
        ("cispo", {"policy_objective": "cispo", "cispo_cap": 5.0, "loss_reduction": "token", "kl_coef": 0.0}),
    ],
)  # fmt: skip
def test_presets(preset: str, expected: dict[str, Any]) -> None:
    found = config("grpo", preset=preset, max_new_tokens=500)
    assert {name: getattr(found, name) for name in expected} == expected


def test_the_origin_of_a_preset_s_value_is_the_preset() -> None:
    found = config("grpo", preset="dr_grpo", advantage_norm="none")
    assert found.origin("kl_coef") == found.origin("loss_reduction") == "preset: dr_grpo"
    assert found.origin("advantage_norm").startswith("argument")
    assert found.origin("clip_range") == "default"
    assert config("grpo", preset="dr_grpo", kl_target=3.0).origin("kl_coef") == "default"  # 0.2, which no preset says


def test_what_the_file_writes_wins_over_a_preset() -> None:
    found = config("grpo", preset="dapo", clip_range_high=0.3, kl_coef=0.01, dynamic_sampling=False, max_new_tokens=500)
    assert (found.clip_range_high, found.kl_coef, found.dynamic_sampling) == (0.3, 0.01, False)
    assert found.mask_truncated


@pytest.mark.parametrize(
    ("stage", "keys", "said"),
    [
        ("rloo", {"group_size": 1}, "every advantage would be 0"),
        ("grpo", {"group_size": 1, "baseline": "none"}, "every advantage would be 0"),
        ("rloo", {"loss_reduction": "constant"}, "one loss per answer"),
        ("grpo", {"ratio_level": "sequence", "loss_reduction": "token"}, "one loss per answer"),
        ("grpo", {"preset": "cispo", "ratio_level": "sequence"}, "those of tokens"),
        ("grpo", {"overlong_buffer": 300, "max_new_tokens": 300}, "every answer would be penalised"),
        ("rloo", {"ref_update_every": 5, "finetuning_type": "full"}, "frozen copy"),
        ("rloo", {"ref_update_every": 5, "ref_model": "x"}, "never changed"),
        ("grpo", {"dual_clip": 1.0}, "greater than 1"),
        ("rloo", {"temperature": 0}, "nothing to compare"),
    ],
)
def test_what_makes_no_sense(stage: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(stage, **keys)


def test_a_variant_is_no_stage() -> None:
    with pytest.raises(ConfigError, match="stage: grpo with preset: gspo"):
        config("gspo")
