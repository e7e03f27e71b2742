"""Baselines and advantages of groups, the losses of policies without a critic: by hand, then by gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.workers import together
from trimtab.ops.advantages import Baseline, Normalisation, group_advantages, group_baseline, group_mean, group_std
from trimtab.ops.losses import cispo_loss, dual_clip, ppo_policy_loss, sequence_log_ratio

pytestmark = pytest.mark.unit

SCORE = torch.tensor([3.0, 1.0, 2.0, 6.0, 0.0], dtype=torch.float64)
GROUP = torch.tensor([7, 7, 7, 2, 2])
"""A group of three with mean 2 and one of two with mean 3, in no order of their numbers."""


def near(found: torch.Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_mean_and_deviation_of_each_group() -> None:
    near(group_mean(SCORE, GROUP), [2, 2, 2, 3, 3])
    # (1 + 1 + 0) / 2 = 1; (9 + 9) / 1 = 18
    near(group_std(SCORE, GROUP), [1, 1, 1, math.sqrt(18), math.sqrt(18)])
    near(group_std(SCORE, torch.arange(5)), [0] * 5)


def test_baselines() -> None:
    # the others of 3: (1 + 2) / 2; of 1: (3 + 2) / 2; of 2: (3 + 1) / 2; of 6: 0; of 0: 6
    near(group_baseline(SCORE, GROUP, "leave_one_out"), [1.5, 2.5, 2, 0, 6])
    near(group_baseline(SCORE, GROUP, "mean"), [2, 2, 2, 3, 3])
    near(group_baseline(SCORE, GROUP, "none"), [0] * 5)
    near(group_baseline(SCORE, torch.arange(5), "leave_one_out"), [0] * 5)


def test_advantages() -> None:
    near(group_advantages(SCORE, GROUP, "leave_one_out", "none"), [1.5, -1.5, 0, 6, -6])
    wide = math.sqrt(18) + 1e-4
    near(group_advantages(SCORE, GROUP, "mean", "group"), [1 / 1.0001, -1 / 1.0001, 0, 3 / wide, -3 / wide])
    # over the batch: 1, -1, 0, 3, -3 have mean 0 and variance 20 / 4
    near(group_advantages(SCORE, GROUP, "mean", "batch"), [x / (math.sqrt(5) + 1e-4) for x in (1, -1, 0, 3, -3)])
    # without a baseline the batch's mean, 12 / 5, goes too; squares 0.36 + 1.96 + 0.16 + 12.96 + 5.76 = 21.2
    std = math.sqrt(21.2 / 4) + 1e-4
    near(group_advantages(SCORE, GROUP, "none", "batch"), [x / std for x in (0.6, -1.4, -0.4, 3.6, -2.4)])
    # a batch of two: 1 and -1 about their mean, variance 2 / 1
    near(group_advantages(SCORE[:2], GROUP[:2], "none", "batch"), [x / (math.sqrt(2) + 1e-4) for x in (1, -1)])


@pytest.mark.parametrize("normalisation", ["none", "group", "batch"])
def test_a_single_completion_has_an_advantage_that_is_finite(normalisation: Normalisation) -> None:
    one, group = torch.tensor([3.0]), torch.tensor([0])
    expected = 3.0 / 1e-4 if normalisation == "group" else 3.0 if normalisation == "none" else 0.0
    assert group_advantages(one, group, "leave_one_out", normalisation).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean", "none"])
def test_workers_normalise_over_the_batch_of_all(baseline: Baseline) -> None:
    parts = [slice(3), slice(3, 5)]
    found = together(
        *(lambda reduce, p=p: group_advantages(SCORE[p], GROUP[p], baseline, "batch", reduce=reduce) for p in parts)
    )
    torch.testing.assert_close(torch.cat(found), group_advantages(SCORE, GROUP, baseline, "batch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 7, 8])
@pytest.mark.parametrize("normalisation", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_equal_scores_have_no_advantage(baseline: str, normalisation: str, k: int, dtype: torch.dtype) -> None:
    """Exactly none: Adam makes a full step of whatever rounding leaves. 0.7, -2.9 and 57.7 have sums that are rounded."""
    score = torch.tensor([0.7] * k + [-2.9] * k + [57.7] * k, dtype=dtype)
    group = torch.arange(3).repeat_interleave(k)
    found = group_advantages(score, group, baseline, normalisation)  # type: ignore[arg-type]
    assert found.tolist() == [0] * (3 * k)


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_the_mean_is_a_share_of_leaving_one_out(scores: list[float]) -> None:
    """score - mean = (k - 1) / k (score - mean of the others), k = 3."""
    score, group = torch.tensor(scores, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    alone, mean = (group_advantages(score, group, kind, "none") for kind in ("leave_one_out", "mean"))
    assert torch.allclose(mean, alone * 2 / 3, atol=1e-12)


def test_dual_clip() -> None:
    """A = -2, rho = 5, eps = 0.2: the surrogate is max(10, 2.4) = 10; c = 3 bounds it at 6. A = 2 is never bounded."""
    logp = torch.tensor([math.log(5.0), math.log(5.0), math.log(2.0)], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([-2.0, 2.0, -2.0], dtype=torch.float64)
    loss, _ = ppo_policy_loss(logp, torch.zeros(3, dtype=torch.float64), advantages, 0.2, 0.2)
    held, acts = dual_clip(loss, advantages, 3.0)
    near(held, [6, -2.4, 4])
    assert acts.tolist() == [True, False, False]
    held.sum().backward()
    assert logp.grad is not None
    near(logp.grad, [0, 0, 4])  # d(-A rho) = -A rho; clipped and held tokens have none


def test_what_is_at_a_bound_is_not_held_by_it() -> None:
    """A loss of exactly c times the advantage, a ratio of exactly the cap; and an advantage in (0, 1), which nothing bounds."""
    held, acts = dual_clip(torch.tensor([6.0, -0.5]), torch.tensor([-2.0, 0.5]), 3.0)
    assert held.tolist() == [6.0, -0.5] and acts.tolist() == [False, False]
    zero = torch.zeros(1, 1)
    assert cispo_loss(zero, zero, zero, 1.0)[1].tolist() == [[False]]


def test_cispo() -> None:
    """rho = 2 and 8, cap 5: weights 2 and 5 on A logp; the gradient is weight x A, never cut off."""
    logp = torch.tensor([[-1.0, -0.5]], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - torch.tensor([[math.log(2.0), math.log(8.0)]], dtype=torch.float64)
    advantages = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    loss, capped = cispo_loss(logp, old, advantages, 5.0)
    near(loss[0], [-2 * 3 * -1.0, -5 * -1 * -0.5])
    assert capped.tolist() == [[False, True]]
    loss.sum().backward()
    assert logp.grad is not None
    near(logp.grad[0], [-6, 5])


def test_log_ratio_of_an_answer() -> None:
    """Differences 0.1, 0.2, 0.3, the last one padding in the second row."""
    logp = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, float("nan")]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    near(sequence_log_ratio(logp, torch.zeros_like(logp), mask, mean=False), [0.6, 0.3])
    near(sequence_log_ratio(logp, torch.full_like(logp, 0.05), mask, mean=False), [0.45, 0.2])
    near(sequence_log_ratio(logp, torch.zeros_like(logp), mask, mean=True), [0.2, 0.15])
    assert sequence_log_ratio(logp, logp, mask & False, mean=True).tolist() == [0, 0]
    assert sequence_log_ratio(logp[:, :1], torch.zeros(2, 1, dtype=torch.float64), mask[:, :1], mean=True).tolist() == [
        0.1,
        0.1,
    ]
