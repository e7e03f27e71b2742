"""PPO: credit and losses by hand, the identities of the first minibatch, and the metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.algos.ppo import CONVERGES_TO, Placement, Ppo
from trimtab.ops.kl import Estimator
from trimtab.ops.reduction import reduction_weights
from trimtab.types import RolloutBatch, Scores, take

pytestmark = pytest.mark.unit

NAN = float("nan")


def f64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(got: Tensor | None, want: object, tol: float = 1e-12) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=tol, atol=tol)


# l = (0.5, -1) and (1). With beta 0.1 and scores 2 and -1: R = (-0.05, 2.1) and (-1.1).
BATCH = RolloutBatch(
    mask=torch.tensor([[True, True], [True, False]]),
    logp_old=f64([[-1.0, -2.0], [-1.0, NAN]]),
    logp_ref=f64([[-1.5, -1.0], [-2.0, NAN]]),
    values=f64([[1.0, 0.5], [0.4, NAN]]),
    score=f64([2.0, -1.0]),
    group=torch.tensor([0, 1]),
    finished=torch.tensor([True, True]),
    kl_coef=0.1,
    score_std=2.5,
)
PLAIN = Ppo(gae_lambda=0.5, whiten_advantages=False)
ADVANTAGES = [[0.25, 1.6], [-1.5, 0]]


def test_credit_by_hand() -> None:
    """gamma 1, lambda 1/2.

    row 0: delta[1] = 2.1 - 0.5 = 1.6             A[1] = 1.6                          return 2.1
           delta[0] = -0.05 + 0.5 - 1 = -0.55     A[0] = -0.55 + 0.5 x 1.6 = 0.25     return 1.25
    row 1: delta[0] = -1.1 - 0.4 = -1.5           A[0] = -1.5                         return -1.1
    """
    credited = PLAIN.credit(BATCH)
    close(credited.advantages, ADVANTAGES)
    close(credited.returns, [[1.25, 2.1], [-1.1, 0]])


def test_returns_are_taken_before_whitening() -> None:
    credited = replace(PLAIN, whiten_advantages=True).credit(BATCH)
    a = np.array([0.25, 1.6, -1.5])
    white = (a - a.mean()) / np.sqrt(a.var() + 1e-8)
    close(credited.advantages, [[white[0], white[1]], [white[2], 0]])
    close(credited.returns, [[1.25, 2.1], [-1.1, 0]])
    assert credited.stats["advantage_std"] == pytest.approx(a.std())  # logged before whitening


def test_whitened_rewards_keep_their_mean() -> None:
    """Rewards (-0.05, 2.1, -1.1); with lambda 0 and no values the advantages are the rewards."""
    r = np.array([-0.05, 2.1, -1.1])
    white = (r - r.mean()) / np.sqrt(r.var() + 1e-8) + r.mean()
    algorithm = replace(PLAIN, gae_lambda=0.0, whiten_rewards=True)
    credited = algorithm.credit(replace(BATCH, values=torch.zeros_like(BATCH.logp_old)))
    close(credited.advantages, [[white[0], white[1]], [white[2], 0]])


def test_kl_in_the_loss_leaves_the_reward_alone() -> None:
    """R = (0, 2) and (-1): delta = (-0.5, 1.5) and (-1.4), A = (0.25, 1.5) and (-1.4)."""
    credited = replace(PLAIN, kl_placement="loss").credit(BATCH)
    close(credited.advantages, [[0.25, 1.5], [-1.4, 0]])


def test_stats_by_hand() -> None:
    """Sums of l per completion are -0.5 and 1: mean 0.25 per completion, 0.5 / 3 per token."""
    stats = PLAIN.credit(replace(BATCH, stats={"kept": 1.0})).stats
    assert stats["kept"] == 1.0
    assert stats["kl"] == pytest.approx(0.25)
    assert stats["kl_per_token"] == pytest.approx(0.5 / 3)
    k3 = [math.exp(-0.5) - 0.5, math.exp(1.0) - 2, math.exp(-1.0)]  # exp(-l) - 1 + l at 0.5, -1, 1
    assert stats["kl_k3"] == pytest.approx(sum(k3) / 2)
    assert stats["kl_k3_per_token"] == pytest.approx(sum(k3) / 3)
    g, v = np.array([1.25, 2.1, -1.1]), np.array([1.0, 0.5, 0.4])
    assert stats["explained_variance"] == pytest.approx(1 - (g - v).var() / g.var())
    assert stats["advantage_mean"] == pytest.approx(0.35 / 3)
    assert (stats["value_mean"], stats["return_mean"]) == pytest.approx((1.9 / 3, 2.25 / 3))


def test_at_step_zero_the_kl_is_zero() -> None:
    stats = PLAIN.credit(replace(BATCH, logp_ref=BATCH.logp_old)).stats
    assert stats["kl"] == stats["kl_k3"] == 0.0


def mean(array: Tensor, mask: Tensor) -> float:
    return (array * reduction_weights(mask, "token", dtype=array.dtype)).sum().item()


def test_first_minibatch() -> None:
    """Nothing has moved: ratio 1, clip fraction 0, KL 0, and the loss is minus the mean advantage: 0 when whitened."""
    for algorithm, loss in ((PLAIN, -0.35 / 3), (replace(PLAIN, whiten_advantages=True), 0.0)):
        batch = algorithm.credit(BATCH)
        terms = algorithm.policy_loss(Scores(logp=BATCH.logp_old, entropy=torch.ones_like(BATCH.logp_old)), batch)
        assert mean(terms.loss, BATCH.mask) == pytest.approx(loss, abs=1e-8)
        assert mean(terms.means["ratio_mean"], BATCH.mask) == pytest.approx(1.0)
        assert terms.maxima["ratio_max"].max() == 1.0
        assert terms.means["clip_fraction"].sum() == terms.means["approx_kl"].sum() == 0.0


def test_policy_loss_gradient_and_metrics_by_hand() -> None:
    """Ratios 1.5, 0.5 | 1.1 against A = 0.25, 1.6 | -1.5 with clip 0.2: clipped at 1.2; free; free.

    loss = -0.3, -0.8 | 1.65;  slope = 0, -A rho = -0.8 | 1.65;  approx KL = rho - 1 - ln rho.
    """
    ratios = f64([[1.5, 0.5], [1.1, NAN]])
    logp = (BATCH.logp_old + ratios.log()).requires_grad_()
    terms = PLAIN.policy_loss(Scores(logp=logp, entropy=torch.full_like(logp, 0.7)), PLAIN.credit(BATCH))
    close(terms.loss, [[-0.3, -0.8], [1.65, 0]])
    close(terms.means["clip_fraction"], [[1, 0], [0, 0]])
    close(terms.means["ratio_mean"], [[1.5, 0.5], [1.1, 0]])
    close(terms.means["entropy"], [[0.7, 0.7], [0.7, 0]])
    close(terms.means["approx_kl"], [[0.5 - math.log(1.5), -0.5 - math.log(0.5)], [0.1 - math.log(1.1), 0]])
    terms.loss.sum().backward()
    close(logp.grad, [[0, -0.8], [1.65, 0]])


def test_entropy_bonus() -> None:
    """Loss falls by c H; without a coefficient the entropy is not in the graph at all."""
    batch = PLAIN.credit(BATCH)
    logp, entropy = (
        BATCH.logp_old.clone().requires_grad_(),
        torch.full((2, 2), 0.7, dtype=torch.float64, requires_grad=True),
    )
    scores = Scores(logp=logp, entropy=entropy)
    without, with_bonus = PLAIN.policy_loss(scores, batch), replace(PLAIN, entropy_coef=0.1).policy_loss(scores, batch)
    close(without.loss - with_bonus.loss, [[0.07, 0.07], [0.07, 0]])
    close(with_bonus.means["policy_loss"], without.loss)
    assert torch.autograd.grad(without.loss.sum(), entropy, allow_unused=True)[0] is None
    close(torch.autograd.grad(with_bonus.loss.sum(), entropy)[0], [[-0.1, -0.1], [-0.1, 0]])


def test_kl_in_the_loss() -> None:
    """Adds beta k to the surrogate: k2 = l^2/2 = 0.125, 0.5 | 0.5, with slope beta l."""
    algorithm = replace(PLAIN, kl_placement="loss", kl_estimator="k2")
    batch = replace(algorithm.credit(BATCH), advantages=torch.zeros(2, 2, dtype=torch.float64))
    logp = BATCH.logp_old.clone().requires_grad_()
    terms = algorithm.policy_loss(Scores(logp=logp, entropy=torch.zeros(2, 2, dtype=torch.float64)), batch)
    close(terms.loss, [[0.0125, 0.05], [0.05, 0]])
    terms.loss.sum().backward()
    close(logp.grad, [[0.05, -0.1], [0.1, 0]])


def test_value_loss_by_hand() -> None:
    """eps_v = 0.2 x score_std 2.5 = 0.5. Old values 1, 0.5 | 0.4, returns 1.25, 2.1 | -1.1, new values 1.1, 1.5 | 1.0.

    1.1 is within 0.5 of 1: (0.15)^2 / 2.  1.5 is clipped to 1: max(0.6^2, 1.1^2) / 2, no gradient.
    1.0 moved away, clipped to 0.9: max(2.1^2, 2.0^2) / 2, slope 2.1. All times vf_coef 0.1.
    """
    values = f64([[1.1, 1.5], [1.0, NAN]]).requires_grad_()
    terms = PLAIN.value_loss(values, PLAIN.credit(BATCH))
    close(terms.loss, 0.1 * f64([[0.01125, 0.605], [2.205, 0]]))
    close(terms.means["value_loss"], [[0.01125, 0.605], [2.205, 0]])
    close(terms.means["value_clip_fraction"], [[0, 1], [0, 0]])
    terms.loss.sum().backward()
    close(values.grad, [[-0.015, 0], [0.21, 0]])


def test_value_clip_off() -> None:
    values = f64([[1.1, 1.5], [1.0, NAN]])
    terms = replace(PLAIN, clip_range_value=None).value_loss(values, PLAIN.credit(BATCH))
    close(terms.means["value_loss"], [[0.01125, 0.18], [2.205, 0]])  # 0.6^2 / 2 where it was clipped
    assert not terms.means["value_clip_fraction"].any()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_gradient_does_not_depend_on_the_micro_batch(size: int) -> None:
    """Eight rows of 1 to 5 tokens: credit on all, then losses in parts of `size` rows."""
    g = torch.Generator().manual_seed(0)
    shape = (8, 5)
    lengths = torch.tensor([1, 5, 2, 3, 5, 4, 1, 2])
    logp_old, logp_ref, values, moved = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    batch = Ppo().credit(
        RolloutBatch(
            mask=torch.arange(5) < lengths[:, None],
            logp_old=logp_old,
            logp_ref=logp_ref,
            values=values,
            score=torch.randn(8, generator=g, dtype=torch.float64),
            group=torch.arange(8),
            finished=torch.ones(8, dtype=torch.bool),
            kl_coef=0.05,
        )
    )
    weights = reduction_weights(batch.mask, Ppo.reduction, dtype=torch.float64)

    def gradient(size: int) -> Tensor:
        logp = (logp_old + 0.2 * moved).requires_grad_()
        for start in range(0, 8, size):
            rows = list(range(start, start + size))
            scores = Scores(logp=logp[rows], entropy=torch.zeros(size, 5, dtype=torch.float64))
            (Ppo().policy_loss(scores, take(batch, rows)).loss * weights[rows]).sum().backward()
        assert logp.grad is not None
        return logp.grad

    close(gradient(size), gradient(8))


def test_beta_moves_only_with_a_target() -> None:
    assert Ppo().next_kl_coef(0.05, kl=100.0, n=64) == 0.05
    assert Ppo(kl_target=6.0).next_kl_coef(0.2, kl=12.0, n=64) == pytest.approx(0.200256)


@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_start_line_says_what_a_run_converges_to(placement: Placement, estimator: Estimator) -> None:
    line = Ppo(kl_placement=placement, kl_estimator=estimator).describe()
    assert f"{estimator} in the {placement}" in line
    assert CONVERGES_TO[placement, estimator] in line
    assert ("whitening" in line) == (placement == "loss")
