"""KL estimators by hand; what they are worth as values and as losses, by enumerating a three-token softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.ops.kl import Estimator, adapt_kl_coef, estimate, k1, k3

pytestmark = pytest.mark.unit

LN2 = math.log(2)


def close(got: Tensor, want: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        # p = 1/2, p_ref = 1/4: l = ln 2. Slopes are with respect to logp, that is to l.
        ("k1", LN2, 1.0),
        ("k2", LN2**2 / 2, LN2),  # d/dl l^2/2 = l
        ("k3", 0.5 - 1 + LN2, 0.5),  # d/dl (exp(-l) - 1 + l) = 1 - exp(-l) = 1 - 1/2
    ],
)
def test_estimators_by_hand(estimator: Estimator, value: float, slope: float) -> None:
    logp = torch.tensor([[math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    got = estimate(logp, torch.full_like(logp, math.log(0.25)), estimator)
    close(got, [[value]])
    got.sum().backward()
    close(logp.grad, [[slope]])


def test_k3_keeps_the_digits_of_a_small_difference() -> None:
    """At l = 1e-4, k3 = l^2/2 - l^3/6 + ... = 5e-9; float32 exp(-l) - 1 + l would be all rounding."""
    logp = torch.tensor([[1e-4]])
    assert k3(logp, torch.zeros_like(logp)).item() == pytest.approx(5e-9, rel=2e-2)


# ------------------------------------------------------------------------------- identities, by enumeration of three tokens

PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REF = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
KL = (PI * (PI / REF).log()).sum()  # KL(pi || pi_ref) = 0.3 ln 2.5


def softmax_of(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[1 3]` of all three tokens, with gradient; and the same as plain probabilities."""
    logp = theta.log_softmax(-1).unsqueeze(0)
    return logp, logp.detach().exp()


def test_values_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    logp, ref = PI.log().unsqueeze(0), REF.log().unsqueeze(0)
    assert KL.item() == pytest.approx(0.3 * math.log(2.5))
    close((PI * estimate(logp, ref, "k1")).sum(), KL)
    close((PI * estimate(logp, ref, "k3")).sum(), KL)
    # k2: l = (ln 2.5, 0, -ln 2.5), so E = (0.5 + 0.2) ln(2.5)^2 / 2
    close((PI * estimate(logp, ref, "k2")).sum(), 0.35 * math.log(2.5) ** 2)
    assert (estimate(logp, ref, "k3") >= 0).all()
    assert (estimate(logp, ref, "k1") < 0).any()


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [
        ("k1", torch.zeros(3, dtype=torch.float64)),
        ("k2", PI * ((PI / REF).log() - KL)),  # gradient of KL(pi || ref): pi_j (l_j - KL)
        ("k3", PI - REF),  # gradient of KL(ref || pi), the cross-entropy of a softmax
    ],
)
def test_expected_gradient_as_a_loss(estimator: Estimator, gradient: Tensor) -> None:
    """E over tokens of pi of grad k(token), with respect to the three logits."""
    theta = PI.log().requires_grad_()
    logp, p = softmax_of(theta)
    (p * estimate(logp, REF.log().unsqueeze(0), estimator)).sum().backward()
    close(theta.grad, gradient)


BETA = 0.5
REWARD = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
OPTIMUM = torch.softmax(REF.log() + REWARD / BETA, -1)  # pi* proportional to pi_ref exp(r / beta)


def ascent(pi: Tensor, placement: str, estimator: Estimator) -> Tensor:
    """The expected policy gradient at `pi` with respect to its logits: E[R grad logp] - beta E[grad k]."""
    theta = pi.log().requires_grad_()
    logp, p = softmax_of(theta)
    penalty = BETA * estimate(logp, REF.log().unsqueeze(0), estimator)
    if placement == "reward":
        (p * (REWARD - penalty.detach()) * logp).sum().backward()
    else:
        (p * (REWARD * logp - penalty)).sum().backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize(("placement", "estimator"), [("reward", "k1"), ("loss", "k2")])
def test_these_pairs_rest_at_the_kl_regularised_optimum(placement: str, estimator: Estimator) -> None:
    assert ascent(OPTIMUM, placement, estimator).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("placement", "estimator"), [("reward", "k2"), ("reward", "k3"), ("loss", "k1"), ("loss", "k3")]
)
def test_these_pairs_move_away_from_it(placement: str, estimator: Estimator) -> None:
    assert ascent(OPTIMUM, placement, estimator).abs().max() > 1e-2


def test_k1_in_the_loss_goes_where_no_penalty_goes() -> None:
    theta = OPTIMUM.log().requires_grad_()
    logp, p = softmax_of(theta)
    (p * REWARD * logp).sum().backward()
    close(ascent(OPTIMUM, "loss", "k1"), theta.grad)


def test_k3_in_the_loss_rests_at_the_forward_kl_optimum() -> None:
    """There pi_j (r_j - mean r) = beta (pi_j - ref_j), so pi_j = beta ref_j / (beta + mean r - r_j)."""
    low, high = 0.5, 1.0  # the mean reward m solves sum_j pi_j = 1; bisect it
    for _ in range(100):
        m = (low + high) / 2
        low, high = (m, high) if (BETA * REF / (BETA + m - REWARD)).sum() > 1 else (low, m)
    pi = BETA * REF / (BETA + m - REWARD)
    assert ascent(pi, "loss", "k3").abs().max() < 1e-9
    assert (pi - OPTIMUM).abs().max() > 0.02


# ----------------------------------------------------------------------------------------------------------- the controller


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        # beta 0.2, target 6, 64 completions, horizon 10000: n / horizon = 0.0064
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 0.0064)),  # 10 % above, inside the clip: 0.200128
        (5.4, 0.2 * (1 - 0.1 * 0.0064)),
        (12.0, 0.2 * (1 + 0.2 * 0.0064)),  # 100 % above, clipped to 20 %: 0.200256
        (1e9, 0.2 * (1 + 0.2 * 0.0064)),
        (3.0, 0.2 * (1 - 0.2 * 0.0064)),  # 50 % below, clipped: 0.199744
        (-1.0, 0.2 * (1 - 0.2 * 0.0064)),  # k1 may be negative
    ],
)
def test_adaptive_kl_by_hand(kl: float, beta: float) -> None:
    assert adapt_kl_coef(0.2, kl, target=6.0, n=64, horizon=10_000.0) == pytest.approx(beta, rel=1e-12)


def test_k1_is_the_log_ratio() -> None:
    close(k1(torch.tensor([[-1.0]]), torch.tensor([[-3.0]])), [[2.0]])
