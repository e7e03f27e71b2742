"""Losses and their gradients by hand, on every side of every clip."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops.losses import bradley_terry, nll, ppo_policy_loss, value_loss

pytestmark = [pytest.mark.unit, pytest.mark.property]


def f64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(got: Tensor | None, want: object) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        # low 0.2, high 0.3: the ratio is held in [0.8, 1.3]. slope = d loss / d logp = -A rho where not clipped.
        (1.0, 2.0, -2.0, -2.0, False),  # the first pass: loss = -A
        (1.0, -2.0, 2.0, 2.0, False),
        (1.2, 2.0, -2.4, -2.4, False),  # inside the band
        (1.5, 2.0, -2.6, 0.0, True),  # good and already likelier than 1.3: max(-3, -2.6), no more pull
        (1.5, -2.0, 3.0, 3.0, False),  # bad and likelier: max(3, 2.6), pulled back in full
        (0.5, 2.0, -1.0, -1.0, False),  # good and less likely: max(-1, -1.6), pulled up
        (0.5, -2.0, 1.6, 0.0, True),  # bad and already below 0.8: max(1, 1.6), no more push
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float, clipped: bool) -> None:
    logp_old = f64([[-1.0]])
    logp = (logp_old + math.log(ratio)).requires_grad_()
    got, was_clipped = ppo_policy_loss(logp, logp_old, f64([[advantage]]), low=0.2, high=0.3)
    close(got, [[loss]])
    assert was_clipped.item() is clipped
    got.sum().backward()
    close(logp.grad, [[slope]])


@given(st.floats(-2, 2), st.floats(-3, 3))
def test_policy_loss_is_never_below_the_plain_one(log_ratio: float, advantage: float) -> None:
    """Pessimism: clipping may only worsen the objective, and only on the side that the advantage points to."""
    got, clipped = ppo_policy_loss(f64([[log_ratio]]), f64([[0.0]]), f64([[advantage]]), 0.2, 0.2)
    ratio = math.exp(log_ratio)
    assert got.item() >= -advantage * ratio - 1e-12
    assert clipped.item() == ((advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8))


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope", "clipped"),
    [
        # old value 0, eps 0.5: the value is held in [-0.5, 0.5]. slope = v - G where not clipped.
        (0.25, 2.0, 1.75**2 / 2, -1.75, False),  # inside
        (1.0, 2.0, 1.5**2 / 2, 0.0, True),  # moved towards G past 0.5: max(1, 2.25), no more pull
        (1.0, -1.0, 2.0, 2.0, False),  # moved away from G: max(4, 2.25), pulled back in full
        (-1.0, -2.0, 1.5**2 / 2, 0.0, True),
    ],
)
def test_value_loss_by_hand(value: float, target: float, loss: float, slope: float, clipped: bool) -> None:
    v = f64([[value]]).requires_grad_()
    got, was_clipped = value_loss(v, f64([[0.0]]), f64([[target]]), eps=0.5)
    close(got, [[loss]])
    assert was_clipped.item() is clipped
    got.sum().backward()
    close(v.grad, [[slope]])


def test_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    v = f64([[1.0, -3.0]]).requires_grad_()
    got, clipped = value_loss(v, f64([[0.0, 0.0]]), f64([[2.0, 1.0]]), eps=None)
    close(got, [[0.5, 8.0]])
    assert not clipped.any()
    got.sum().backward()
    close(v.grad, [[-1.0, -4.0]])


def test_bradley_terry_by_hand() -> None:
    """A lead of ln 3 has probability 3/4: loss -ln 3/4, gradient -(1 - 3/4) on the chosen and +1/4 on the rejected.

    With a margin of ln 3 the same lead is a draw: loss ln 2, gradient -1/2 and +1/2.
    """
    chosen = f64([math.log(3) + 1, math.log(3) + 1, 1.0]).requires_grad_()
    rejected = f64([1.0, 1.0, 1.0]).requires_grad_()
    got = bradley_terry(chosen, rejected, f64([0.0, math.log(3), 0.0]))
    close(got, [-math.log(0.75), math.log(2), math.log(2)])
    got.sum().backward()
    close(chosen.grad, [-0.25, -0.5, -0.5])
    close(rejected.grad, [0.25, 0.5, 0.5])


def test_centring_by_hand() -> None:
    """Scores 2 and 2, c = 0.1: ln 2 + 0.1 x 16; gradient -1/2 + 0.2 x 4 = 0.3 and 1/2 + 0.8 = 1.3."""
    chosen, rejected = f64([2.0]).requires_grad_(), f64([2.0]).requires_grad_()
    got = bradley_terry(chosen, rejected, center_coef=0.1)
    close(got, [math.log(2) + 1.6])
    got.sum().backward()
    close(chosen.grad, [0.3])
    close(rejected.grad, [1.3])


def test_bradley_terry_of_a_hopeless_pair_is_its_lead() -> None:
    """-log sigmoid(-1000) = 1000, not infinity."""
    close(bradley_terry(f64([0.0]), f64([1000.0])), [1000.0])


@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(-5, 5))
def test_a_common_level_does_not_change_the_preference(a: float, b: float, shift: float) -> None:
    close(
        bradley_terry(f64([a + shift]), f64([b + shift])).round(decimals=9),
        bradley_terry(f64([a]), f64([b])).round(decimals=9),
    )


def test_nll() -> None:
    close(nll(f64([[math.log(0.25), 0.0]])), [[math.log(4), 0.0]])
