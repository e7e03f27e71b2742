"""Every rule of the doctor on made rows: silent on a healthy run; on a sick one a finding with its number and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from trimtab.diagnose import RULES, Finding, diagnose

pytestmark = pytest.mark.unit


def rows(kind: str = "train", first: int = 1, **series: Sequence[float]) -> list[dict[str, Any]]:
    """A row per step from `first` on; `__` in a name stands for `/`."""
    count = len(next(iter(series.values())))
    return [
        {
            "step": first + i,
            "kind": kind,
            "stage": "ppo",
            **{n.replace("__", "/"): values[i] for n, values in series.items()},
        }
        for i in range(count)
    ]


def only(found: list[Finding], rule: str) -> Finding:
    assert [finding.rule for finding in found] == [rule]
    assert found[0].remedy and str(found[0].step) in f"{found[0].message} {found[0].step}"
    return found[0]


HEALTHY = rows(
    loss=[1.0 - 0.01 * i for i in range(30)],
    lr=[0.0, *[1e-5] * 28, 0.0],
    grad_norm__policy=[0.5] * 30,
    reward__mean=[0.1 * i for i in range(30)],
    finished_rate=[0.9] * 30,
    kl__k1_token=[0.001 * i for i in range(30)],
    kl__k1_sequence=[0.1 * i for i in range(30)],
    entropy=[0.5 - 0.01 * i for i in range(30)],
    clip_fraction=[0.1] * 30,
    first_minibatch__ratio_max=[1.0001] * 30,
    first_minibatch__approx_kl=[1e-4] * 30,
    sampler_diff__mean=[0.03] * 30,
    sampler_diff__max=[0.4] * 30,
    explained_variance=[-0.2] * 5 + [0.4] * 25,
    zero_variance_groups=[0.2] * 30,
    length__mean=[40.0] * 30,
)


def test_a_healthy_run_gets_no_finding() -> None:
    assert diagnose(HEALTHY, {"max_grad_norm": 1.0, "group_size": 4, "compute_dtype": "bfloat16"}) == []
    assert diagnose([], {}) == []


def test_every_rule_is_tested_here() -> None:
    tested = {name.removeprefix("test_rule_") for name in globals() if name.startswith("test_rule_")}
    assert tested == set(RULES)


def test_errors_come_first() -> None:
    found = diagnose(rows(clip_fraction=[0.5] * 4, loss=[1.0, 1.0, 1.0, math.nan]))
    assert [finding.severity for finding in found] == ["error", "warning"]


def test_rule_not_finite() -> None:
    found = only(diagnose(rows(loss=[1.0, math.inf, math.nan])), "not_finite")
    assert found.severity == "error" and found.step == 2 and "loss is inf" in found.message


def test_rule_lr_zero() -> None:
    assert diagnose(rows(lr=[0.0, 0.0, 1e-5, 0.0])) == []
    assert only(diagnose(rows(lr=[1e-5, 0.0, 0.0, 0.0])), "lr_zero").step == 2


def test_rule_grad_always_clipped() -> None:
    norms = rows(grad_norm__critic=[3.0] * 19 + [0.5])  # 19 of 20 is 95 %
    assert "19 of 20" in only(diagnose(norms, {"max_grad_norm": 1.0}), "grad_always_clipped").message
    assert diagnose(rows(grad_norm__critic=[3.0] * 18 + [0.5] * 2), {"max_grad_norm": 1.0}) == []
    assert diagnose(norms, {}) == [] and diagnose(norms, {"max_grad_norm": 0.0}) == []


def test_rule_overfitting() -> None:
    train = rows(loss=[2.0, 1.5, 1.0, 0.5])
    evals = rows("eval", eval__loss=[2.0, 1.0, 1.1, 1.2])
    found = only(diagnose(train + evals), "overfitting")
    assert found.step == 2 and "from 1 (step 2) to 1.2" in found.message
    assert diagnose(train + rows("eval", eval__loss=[2.0, 1.0, 1.1, 1.01])) == []  # the last is within 2 %
    assert diagnose(rows(loss=[0.5, 0.5, 0.6, 0.7]) + evals) == []  # training does not fall: not overfitting


def test_rule_rm_guesses() -> None:
    coin = rows("eval", first=10, eval__accuracy=[0.9, 0.52, 0.50])
    found = only(diagnose(coin, {"stage": "rm"}), "rm_guesses")
    assert found.step == 11 and "0.510" in found.message
    assert diagnose(coin, {"stage": "sft"}) == []
    assert diagnose(rows("eval", eval__accuracy=[0.5, 0.7]), {"stage": "rm"}) == []
    assert only(diagnose(rows(accuracy=[0.5] * 20), {"stage": "rm"}), "rm_guesses")
    assert diagnose(rows(accuracy=[0.5] * 19), {"stage": "rm"}) == []


def test_rule_ratio_not_one() -> None:
    run = rows(first_minibatch__ratio_max=[1.0, 1.01, 1.0], first_minibatch__approx_kl=[0.0, 5e-5, 0.02])
    assert only(diagnose(run, {"compute_dtype": "float32"}), "ratio_not_one").step == 2
    found = only(diagnose(run, {"compute_dtype": "bfloat16"}), "ratio_not_one")
    assert found.step == 3 and "approx_kl 0.02" in found.message
    assert diagnose(run[:2], {"compute_dtype": "bfloat16"}) == []


def test_rule_sampler_differs() -> None:
    run = rows(sampler_diff__mean=[0.01, 0.06], sampler_diff__max=[0.1, 0.3])
    found = only(diagnose(run, {"compute_dtype": "bfloat16"}), "sampler_differs")
    assert found.step == 2 and "0.06" in found.message
    found = only(diagnose(run, {"compute_dtype": "float32"}), "sampler_differs")
    assert found.step == 1 and "sampler_diff/max is 0.3" in found.message


def test_rule_kl_negative() -> None:
    assert diagnose(rows(kl__k1_token=[-0.01] * 4 + [0.0] + [-0.01] * 4)) == []
    found = only(diagnose(rows(kl__k1_token=[0.0] + [-0.01] * 5)), "kl_negative")
    assert found.step == 2 and "-0.0100" in found.message


def test_rule_kl_exploding() -> None:
    run = rows(kl__k1_sequence=[1.0, 31.0, 40.0, 35.0])
    found = only(diagnose(run), "kl_exploding")
    assert found.step == 2 and "40 nat at step 3" in found.message
    assert diagnose(run, {"kl_target": 8.0}) == []  # 5 x 8 = 40
    assert only(diagnose(rows(kl__k1_token=[0.6] * 3)), "kl_exploding").step == 1


def test_rule_entropy_collapse() -> None:
    found = only(diagnose(rows(entropy=[1.0, 1.0, 1.0, 0.09, 0.08, 0.07])), "entropy_collapse")
    assert found.step == 4 and "from 1 to 0.07" in found.message
    assert diagnose(rows(entropy=[1.0, 1.0, 1.0, 0.09, 0.2, 0.07])) == []


def test_rule_reward_without_end() -> None:
    up, down = [0.0] * 4 + [1.0] * 4, [1.0] * 4 + [0.8] * 4
    assert "100% to 80%" in only(diagnose(rows(reward__mean=up, finished_rate=down)), "reward_without_end").message
    assert diagnose(rows(reward__mean=down, finished_rate=down)) == []
    assert diagnose(rows(reward__mean=up[1:], finished_rate=down[1:])) == []  # seven rows are no trend


def test_rule_length_at_limit() -> None:
    run = rows(finished_rate=[0.4, 0.2, 0.3], length__mean=[50.0, 60.0, 64.0])
    found = only(diagnose(run, {"max_new_tokens": 64}), "length_at_limit")
    assert found.step == 1 and "30%" in found.message and "64 tokens long" in found.message
    assert diagnose(rows(finished_rate=[0.4, 0.5, 0.3])) == []


def test_rule_clip_fraction_high() -> None:
    assert only(diagnose(rows(clip_fraction=[0.1, 0.4, 0.4, 0.4])), "clip_fraction_high").step == 2
    assert diagnose(rows(clip_fraction=[0.3] * 9)) == []


def test_rule_critic_useless() -> None:
    run = rows(explained_variance=[-0.5] * 12)
    found = only(diagnose(run), "critic_useless")
    assert found.step == 1 and "-0.50" in found.message
    assert diagnose(run, {"critic_warmup_steps": 5}) == []  # seven rows left


def test_rule_zero_variance_groups() -> None:
    run = rows(zero_variance_groups=[0.5, 0.75, 0.75])
    assert only(diagnose(run, {"group_size": 4}), "zero_variance_groups").step == 1
    assert diagnose(run, {"group_size": 1}) == [] and diagnose(run) == []
