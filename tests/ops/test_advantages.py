"""Shaped rewards, GAE and returns: by hand, and against the sums that they are recursions of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops.advantages import discounted_returns, gae, shaped_rewards

pytestmark = [pytest.mark.unit, pytest.mark.property]

NAN = float("nan")


def f64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(got: Tensor, want: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


def test_shaped_rewards_by_hand() -> None:
    """l = (0.5, -1), beta 0.1: the KL costs 0.05 and pays 0.1; the score 2 comes with the last real token."""
    got = shaped_rewards(
        f64([[-1.0, -2.0, NAN], [-1.0, NAN, NAN], [NAN, NAN, NAN]]),
        f64([[-1.5, -1.0, NAN], [-2.0, NAN, NAN], [NAN, NAN, NAN]]),
        f64([2.0, -1.0, 5.0]),
        torch.tensor([[True, True, False], [True, False, False], [False, False, False]]),
        kl_coef=0.1,
    )
    close(got, [[-0.05, 2.1, 0], [-1.1, 0, 0], [0, 0, 0]])  # row 1: -0.1 x 1 - 1; row 2 has no token to be paid at


def test_shaped_rewards_with_k3() -> None:
    """l = 0.5: k3 = exp(-0.5) - 1 + 0.5 = 0.10653066."""
    got = shaped_rewards(f64([[-1.0]]), f64([[-1.5]]), f64([0.0]), torch.tensor([[True]]), 1.0, "k3")
    assert got.item() == pytest.approx(-0.10653065971263342, rel=1e-12)


REWARDS = f64([[-0.125, 0.25, 1.0]])
VALUES = f64([[0.5, 0.25, 0.75]])
THREE = torch.ones(1, 3, dtype=torch.bool)


def test_gae_by_hand() -> None:
    """gamma 1, lambda 1/2, V beyond the end 0, from the last token to the first:

    delta[2] = 1 + 0 - 0.75 = 0.25               A[2] = 0.25
    delta[1] = 0.25 + 0.75 - 0.25 = 0.75         A[1] = 0.75 + 0.5 x 0.25 = 0.875
    delta[0] = -0.125 + 0.25 - 0.5 = -0.375      A[0] = -0.375 + 0.5 x 0.875 = 0.0625
    """
    advantages, returns = gae(REWARDS, VALUES, THREE, gamma=1.0, lam=0.5)
    close(advantages, [[0.0625, 0.875, 0.25]])
    close(returns, [[0.5625, 1.125, 1.0]])


def test_gae_with_a_discount_by_hand() -> None:
    """gamma 1/2, lambda 1/2, so gamma lambda = 1/4:

    delta[2] = 0.25                                          A[2] = 0.25
    delta[1] = 0.25 + 0.5 x 0.75 - 0.25 = 0.375              A[1] = 0.375 + 0.25 x 0.25 = 0.4375
    delta[0] = -0.125 + 0.5 x 0.25 - 0.5 = -0.5              A[0] = -0.5 + 0.25 x 0.4375 = -0.390625
    """
    advantages, returns = gae(REWARDS, VALUES, THREE, gamma=0.5, lam=0.5)
    close(advantages, [[-0.390625, 0.4375, 0.25]])
    close(returns, [[0.109375, 0.6875, 1.0]])


def test_a_padded_row_is_the_row_alone() -> None:
    """What lies in the padding, nan or a large number, is not a value to bootstrap from."""
    wide = torch.tensor([[True, True, True, False], [False] * 4])
    rewards = f64([[-0.125, 0.25, 1.0, NAN], [NAN] * 4])
    values = f64([[0.5, 0.25, 0.75, 99.0], [NAN] * 4])
    advantages, returns = gae(rewards, values, wide, gamma=1.0, lam=0.5)
    close(advantages, [[0.0625, 0.875, 0.25, 0], [0, 0, 0, 0]])
    close(returns, [[0.5625, 1.125, 1.0, 0], [0, 0, 0, 0]])


def test_discounted_returns_by_hand() -> None:
    """gamma 1/2: G[2] = 1, G[1] = 0.25 + 0.5 = 0.75, G[0] = -0.125 + 0.375 = 0.25."""
    close(discounted_returns(REWARDS, THREE, 0.5), [[0.25, 0.75, 1.0]])


Figures = st.floats(-10, 10)
Row = st.lists(st.tuples(Figures, Figures), min_size=1, max_size=6)
Fraction = st.floats(0, 1)


@given(Row, Fraction, Fraction)
def test_gae_is_the_discounted_sum_of_errors(row: list[tuple[float, float]], gamma: float, lam: float) -> None:
    """A[t] = sum_k (gamma lambda)^k delta[t+k], written with NumPy as the paper has it."""
    r, v = np.array(row).T
    delta = r + gamma * np.append(v[1:], 0.0) - v
    want = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(row))) for t in range(len(row))]
    mask = torch.ones(1, len(row), dtype=torch.bool)
    advantages, returns = gae(torch.tensor(r)[None], torch.tensor(v)[None], mask, gamma, lam)
    np.testing.assert_allclose(advantages[0].numpy(), want, atol=1e-9)
    np.testing.assert_allclose(returns[0].numpy(), want + v, atol=1e-9)


@given(Row, Fraction)
def test_at_lambda_one_the_returns_owe_nothing_to_the_critic(row: list[tuple[float, float]], gamma: float) -> None:
    r, v = (torch.tensor(column, dtype=torch.float64)[None] for column in zip(*row, strict=True))
    mask = torch.ones_like(r, dtype=torch.bool)
    _, returns = gae(r, v, mask, gamma, 1.0)
    torch.testing.assert_close(returns, discounted_returns(r, mask, gamma), rtol=1e-9, atol=1e-9)


def test_wrong_shapes_are_refused_in_tests() -> None:
    """The annotations are checked here: a mask of another width is an error, not a broadcast."""
    with pytest.raises(Exception, match="Type-check error"):
        gae(REWARDS, VALUES, THREE[:, :1], 1.0, 0.95)
