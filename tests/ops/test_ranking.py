"""Losses of rankings against hand-derived values and gradients, in float64."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops.losses import bradley_terry
from trimtab.ops.ranking import mean_over_pairs, pairs_of, plackett_luce, ranked_pairs, squared_error

pytestmark = [pytest.mark.unit, pytest.mark.property]

LN2, LN3 = math.log(2), math.log(3)
NAN = float("nan")


def f64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(got: Tensor | None, want: object) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


def all_real(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def test_the_pairs_of_a_ranking() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])
    assert pairs_of(mask).nonzero().tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 2], [1, 0, 1]]
    values = torch.arange(9, dtype=torch.float64).view(1, 3, 3).expand(4, 3, 3)
    close(mean_over_pairs(values, mask), [(1 + 2 + 5) / 3, 1.0, 0.0, 0.0])


def test_ranked_pairs_by_hand() -> None:
    """Scores ln 3, 0, 0: leads ln 3, ln 3 and 0, with probabilities 3/4, 3/4, 1/2.

    loss = (2 ln 4/3 + ln 2) / 3. A pair gives its better answer -(1 - p) and its worse one 1 - p, each over 3:
    first -(1/4 + 1/4)/3, second (1/4 - 1/2)/3, third (1/4 + 1/2)/3.
    """
    scores = f64([[LN3, 0.0, 0.0]]).requires_grad_()
    loss = ranked_pairs(scores, all_real(scores))
    close(loss, [(2 * math.log(4 / 3) + LN2) / 3])
    loss.sum().backward()
    close(scores.grad, [[-1 / 6, -1 / 12, 1 / 4]])


def test_ranked_pairs_with_margin_centring_and_smoothing() -> None:
    """One pair of 2 and 1, margin 1, c = 0.1, e = 0.25: a draw, so ln 2 for either label, + 0.1 x 9.

    Slope in the lead at a draw: -(3/4) 1/2 + (1/4) 1/2 = -1/4; centring adds 0.2 x 3 to both.
    """
    scores = f64([[2.0, 1.0]]).requires_grad_()
    loss = ranked_pairs(scores, all_real(scores), f64([1.0]), 0.1, 0.25)
    close(loss, [LN2 + 0.9])
    loss.sum().backward()
    close(scores.grad, [[-0.25 + 0.6, 0.25 + 0.6]])


def test_each_ranking_has_its_own_margin() -> None:
    """Leads 1 and 2 with margins 1 and 2 are draws; with 1 for both the second is ahead by 1."""
    scores = f64([[2.0, 1.0], [5.0, 3.0]])
    close(ranked_pairs(scores, all_real(scores), f64([1.0, 2.0])), [LN2, LN2])
    close(ranked_pairs(scores, all_real(scores), 1.0), [LN2, math.log1p(math.exp(-1))])


def test_smoothed_bradley_terry_by_hand() -> None:
    """Lead ln 3, e = 1/4: 3/4 ln 4/3 + 1/4 ln 4. The slope is 0 there: log((1 - e) / e) = ln 3 is the optimum."""
    chosen, rejected = f64([LN3]).requires_grad_(), f64([0.0])
    loss = bradley_terry(chosen, rejected, smoothing=0.25)
    close(loss, [0.75 * math.log(4 / 3) + 0.25 * math.log(4)])
    loss.sum().backward()
    close(chosen.grad, [0.0])
    again = f64([LN3 + 2.0]).requires_grad_()  # with a margin the optimum moves by it
    bradley_terry(again, rejected, 2.0, smoothing=0.25).sum().backward()
    close(again.grad, [0.0])


def test_plackett_luce_by_hand() -> None:
    """exp r = 2, 1, 1: first 2/4, then 1/2 of what is left: probability 1/4.

    d/dr: stage 1 gives softmax (1/2, 1/4, 1/4) - (1, 0, 0), stage 2 (0, 1/2, 1/2) - (0, 1, 0).
    """
    scores = f64([[LN2, 0.0, 0.0]]).requires_grad_()
    loss = plackett_luce(scores, all_real(scores))
    close(loss, [math.log(4)])
    loss.sum().backward()
    close(scores.grad, [[-1 / 2, 1 / 4 + 1 / 2 - 1, 1 / 4 + 1 / 2]])


def test_plackett_luce_of_two_answers_is_bradley_terry() -> None:
    scores = f64([[1.5, -0.5], [0.0, 3.0]])
    close(plackett_luce(scores, all_real(scores)), bradley_terry(scores[:, 0], scores[:, 1]))
    close(ranked_pairs(scores, all_real(scores)), bradley_terry(scores[:, 0], scores[:, 1]))


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=4), st.floats(-5, 5))
def test_the_probabilities_of_all_rankings_sum_to_one(scores: list[float], shift: float) -> None:
    orders = f64([list(order) for order in permutations(scores)])
    losses = plackett_luce(orders, all_real(orders))
    assert float(torch.exp(-losses).sum()) == pytest.approx(1.0)
    moved = plackett_luce(orders + shift, all_real(orders))
    torch.testing.assert_close(moved, losses)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_ragged_rankings_are_those_of_each_alone(rankings: list[list[float]]) -> None:
    """Against plain arithmetic; padding holds NaN and neither it nor its gradient is seen."""
    k = max(map(len, rankings))
    padded = f64([[*r, *[NAN] * (k - len(r))] for r in rankings]).requires_grad_()
    mask = torch.tensor([[i < len(r) for i in range(k)] for r in rankings])
    pairs, luce = ranked_pairs(padded, mask), plackett_luce(padded, mask)
    for row, r in enumerate(rankings):
        terms = [math.log1p(math.exp(b - a)) for a, b in combinations(r, 2)]
        assert float(pairs[row]) == pytest.approx(sum(terms) / max(len(terms), 1), abs=1e-12)
        stages = [math.log(sum(math.exp(x) for x in r[i:])) - r[i] for i in range(len(r))]
        assert float(luce[row]) == pytest.approx(sum(stages), abs=1e-10)
    (pairs.sum() + luce.sum()).backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all() and not padded.grad[~mask].any()


def test_squared_error_by_hand() -> None:
    scores = f64([3.0, -1.0]).requires_grad_()
    loss = squared_error(scores, f64([1.0, -1.0]))
    close(loss, [4.0, 0.0])
    loss.sum().backward()
    close(scores.grad, [4.0, 0.0])
