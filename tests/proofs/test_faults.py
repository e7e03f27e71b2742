"""Faults planted in the algorithms and in the formulas under them, and the items of `trimtab prove` that see each.

A claim that no fault can move says nothing; this is where the claims are seen to fail.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimtab.ops.advantages import gae, group_advantages, shaped_rewards
from trimtab.ops.kl import estimate
from trimtab.ops.losses import cispo_loss, ppo_policy_loss, sequence_log_ratio, value_loss
from trimtab.ops.masked import row_sum
from trimtab.ops.preference import dpo, robust
from trimtab.ops.reduction import reduction_weights
from trimtab.proofs.claims import Claim, worst
from trimtab.proofs.gradients import gradients, kl
from trimtab.proofs.optima import preferences
from trimtab.proofs.problem import random_problem, true_gradient
from trimtab.proofs.steps import algorithm, places, state_values, unexplained, whole_batch

pytestmark = pytest.mark.property


def baselines_swapped(score: Any, group: Any, baseline: Any, *rest: Any, **more: Any) -> Any:
    other = {"leave_one_out": "mean", "mean": "leave_one_out", "none": "none"}[baseline]
    return group_advantages(score, group, other, *rest, **more)


def no_baseline(score: Any, group: Any, baseline: Any, *rest: Any, **more: Any) -> Any:
    return group_advantages(score, group, "none", *rest, **more)


def never_divided(score: Any, group: Any, baseline: Any, normalisation: Any, **more: Any) -> Any:
    return group_advantages(score, group, baseline, "none", **more)


def sign_turned(logp: Any, logp_old: Any, advantages: Any, low: float, high: float) -> Any:
    return ppo_policy_loss(logp, logp_old, -advantages, low, high)


def kl_earns(logp: Any, logp_ref: Any, score: Any, mask: Any, kl_coef: float, estimator: Any) -> Any:
    return shaped_rewards(logp, logp_ref, score, mask, -kl_coef, estimator)


def values_late(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
    return gae(rewards, values.roll(-1, dims=-1), mask, gamma, lam)


def discounted(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
    return gae(rewards, values, mask, 0.99 * gamma, lam)


def not_whitened(x: Any, mask: Any, **more: Any) -> Any:
    return x


def k2_for_k3(logp: Any, logp_ref: Any, estimator: Any) -> Any:
    return estimate(logp, logp_ref, {"k1": "k1", "k2": "k3", "k3": "k2"}[estimator])


def policies_swapped(logp: Any, logp_ref: Any, estimator: Any) -> Any:
    return estimate(logp_ref, logp, estimator)


def k3_turned(logp: Any, logp_ref: Any) -> Any:
    return torch.expm1(logp - logp_ref) - (logp - logp_ref)


def per_token(x: Any, mask: Any) -> Any:
    return row_sum(x, mask) / mask.sum(dim=-1)


def padding_kept(x: Any, mask: Any) -> Any:
    return x


def ratio_upside_down(logp: Any, logp_old: Any, mask: Any, *, mean: bool) -> Any:
    return -sequence_log_ratio(logp, logp_old, mask, mean=mean)


def critic_repelled(values: Any, values_old: Any, returns: Any, eps: Any) -> Any:
    return value_loss(values, values_old, 2 * values.detach() - returns, eps)


def by_row_length(mask: Any, kind: Any, **more: Any) -> Any:
    return reduction_weights(mask, "sequence" if kind == "constant" else kind, **more)


FAULTS = [
    (gradients, "trimtab.algos.rloo.group_advantages", baselines_swapped),
    (gradients, "trimtab.algos.rloo.group_advantages", no_baseline),
    (gradients, "trimtab.algos.grpo.group_advantages", baselines_swapped),
    (gradients, "trimtab.algos.grpo.group_advantages", never_divided),
    (gradients, "trimtab.algos.surrogate.ppo_policy_loss", sign_turned),
    (gradients, "trimtab.algos.ppo.ppo_policy_loss", sign_turned),
    (gradients, "trimtab.algos.ppo.shaped_rewards", kl_earns),
    (gradients, "trimtab.algos.ppo.gae", values_late),
    (gradients, "trimtab.algos.ppo.gae", discounted),
    (gradients, "trimtab.algos.ppo.whiten", not_whitened),
    (gradients, "trimtab.algos.reinforce_pp.shaped_rewards", kl_earns),
    (gradients, "trimtab.algos.reinforce_pp.whiten", not_whitened),
    (gradients, "trimtab.algos.remax.kl_penalty", lambda batch, how: 0 * batch.score),
    (gradients, "trimtab.algos.ppo.value_loss", critic_repelled),
    (gradients, "trimtab.algos.ppo.zero_padding", padding_kept),
    (gradients, "trimtab.algos.surrogate.zero_padding", padding_kept),
    (gradients, "trimtab.algos.surrogate.sequence_log_ratio", ratio_upside_down),
    (gradients, "trimtab.algos.surrogate.cispo_loss", lambda logp, old, a, cap: cispo_loss(logp, logp, a, cap)),
    (gradients, "trimtab.proofs.steps.reduction_weights", by_row_length),
    (kl, "trimtab.algos.surrogate.estimate", k2_for_k3),
    (kl, "trimtab.algos.surrogate.estimate", policies_swapped),
    (kl, "trimtab.algos.ppo.estimate", policies_swapped),
    (kl, "trimtab.ops.kl.k3", k3_turned),
    (kl, "trimtab.ops.kl.k2", lambda logp, logp_ref: (logp - logp_ref) ** 2),
    (kl, "trimtab.algos.surrogate.k1", lambda logp, logp_ref: logp_ref - logp),
    (preferences, "trimtab.ops.preference.dpo", lambda h, beta, smoothing=0.0: dpo(-h, beta, smoothing)),
    (preferences, "trimtab.ops.preference.ipo", lambda h, beta: (h - 1 / beta) ** 2),
    (preferences, "trimtab.ops.preference.robust", lambda h, beta, smoothing: robust(h, beta, smoothing / 2)),
    (preferences, "trimtab.algos.dpo.row_sum", per_token),
]


def named(fault: Any) -> str:
    return fault.__name__ if callable(fault) else str(fault)


@pytest.mark.parametrize(("item", "where", "fault"), FAULTS, ids=named)
def test_a_planted_fault_is_seen(
    item: Callable[[], list[Claim]], where: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = where.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, fault)
    assert any(not claim.held for claim in item())


# ------------------------------------------------------------------------------------------- the yardsticks of steps.py


def test_the_worst_of_numbers_forgets_no_nan() -> None:
    assert worst([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(worst([1.0, math.nan]))


def test_what_no_multiple_explains() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    assert unexplained(-2 * one, one) == pytest.approx(0.0, abs=1e-6)
    assert unexplained(other, one) == pytest.approx(1.0)
    assert unexplained(one + other, one) == pytest.approx(0.5**0.5)


def test_the_first_prefix_of_every_answer_is_the_empty_one() -> None:
    problem = random_problem(1, depth=2)  # ".", "a.", "b.", "aa", "ab", "ba", "bb"
    assert places(problem).tolist() == [[0, 0], [0, 1], [0, 2], [0, 1], [0, 1], [0, 2], [0, 2]]


def test_the_value_of_the_start_is_the_objective() -> None:
    problem, logits = random_problem(1, depth=2), random_problem(2, depth=2).logits_ref
    assert float(state_values(problem, logits)[0]) == pytest.approx(float(problem.objective(problem.logps(logits))))


def test_a_step_on_the_whole_policy_by_hand() -> None:
    """One answer in four is right, scores 1 and 0, no KL, no whitening, no critic: minus the gradient of p, which is p (1 - p) = 3/16."""
    problem = random_problem(1, letters="a", depth=1, beta=0.0, reward=lambda answer: float(answer == "a"))
    counts = torch.tensor([3, 1])  # the end, "a"
    policy = problem.table_of(torch.tensor([0.75, 0.25], dtype=torch.float64).log())
    plain = algorithm("ppo", whiten_advantages=False, gae_lambda=1.0)
    step, batch = whole_batch(problem, plain, policy, counts)
    assert batch.finished.tolist() == [True, True, True, False]
    assert step.flatten().tolist() == pytest.approx([-3 / 16, 3 / 16])
    assert true_gradient(problem, policy).flatten().tolist() == pytest.approx([-3 / 16, 3 / 16])
