"""Preference losses: values and slopes by hand, an oracle in NumPy, fixed points and symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops import preference as P

pytestmark = [pytest.mark.unit, pytest.mark.property]

LN2, LN3 = math.log(2), math.log(3)
Loss = Callable[[Tensor], Tensor]


def f64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(got: Tensor | None, want: object) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


def value_and_slope(loss: Loss, at: float) -> tuple[float, float]:
    h = f64([at]).requires_grad_()
    got = loss(h)
    got.sum().backward()
    assert h.grad is not None
    return got.item(), h.grad.item()


# ------------------------------------------------------------------------------------------------ functions of the lead

# beta h = ln 3 means sig = 3/4, so every figure is a fraction and a logarithm; beta = 1/2, h = 2 ln 3.
BY_HAND: list[tuple[str, Loss, float, float, float]] = [
    ("dpo", lambda h: P.dpo(h, 0.5), 2 * LN3, math.log(4 / 3), -0.5 / 4),
    ("dpo, tie", lambda h: P.dpo(h, 0.5), 0.0, LN2, -0.25),
    # 9/10 ln 4/3 + 1/10 ln 4; slope 1/2 (-9/10 1/4 + 1/10 3/4)
    ("cdpo", lambda h: P.dpo(h, 0.5, 0.1), 2 * LN3, 0.9 * math.log(4 / 3) + 0.1 * math.log(4), 0.5 * (-0.225 + 0.075)),
    # [9/10 ln 4/3 - 1/10 ln 4] / (8/10); slope 1/2 (-9/10 1/4 - 1/10 3/4) / (8/10)
    ("robust", lambda h: P.robust(h, 0.5, 0.1), 2 * LN3, (0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8, -0.1875),
    ("hinge", lambda h: P.hinge(h, 0.5), 1.0, 0.5, -0.5),
    ("hinge, enough", lambda h: P.hinge(h, 0.5), 3.0, 0.0, 0.0),
    ("ipo", lambda h: P.ipo(h, 0.5), 3.0, 4.0, 4.0),
    ("ipo, at its optimum", lambda h: P.ipo(h, 0.25), 2.0, 0.0, 0.0),
    # 3/4 ln(3/4 / 9/10) + 1/4 ln(1/4 / 1/10); slope beta s (1 - s) [ln(3/4 / 9/10) - ln(1/4 / 1/10)]
    (
        "exo",
        lambda h: P.exo(h, 0.5, 0.1),
        2 * LN3,
        0.75 * math.log(5 / 6) + 0.25 * math.log(5 / 2),
        0.5 * 3 / 16 * (math.log(5 / 6) - math.log(5 / 2)),
    ),
    ("simpo", lambda m: P.simpo(m, torch.zeros_like(m), 2.0, LN3), LN3, math.log(4 / 3), -0.5),  # 2 ln 3 - ln 3
]


@pytest.mark.parametrize(("name", "loss", "at", "value", "slope"), BY_HAND, ids=[row[0] for row in BY_HAND])
def test_by_hand(name: str, loss: Loss, at: float, value: float, slope: float) -> None:
    assert value_and_slope(loss, at) == pytest.approx((value, slope), rel=1e-12, abs=1e-12)


def test_nca_by_hand() -> None:
    """beta h_w = ln 3, beta h_l = -ln 3: ln 4/3 + 1/2 ln 4 + 1/2 ln 4/3; slopes beta (-1/4 + 3/8) and beta 1/8."""
    w, v = f64([2 * LN3]).requires_grad_(), f64([-2 * LN3]).requires_grad_()
    got = P.nca(w, v, 0.5)
    close(got, [1.5 * math.log(4 / 3) + 0.5 * math.log(4)])
    got.sum().backward()
    close(w.grad, [0.5 * (-1 / 4 + 3 / 8)])
    close(v.grad, [0.5 * 1 / 8])


def test_kto_by_hand() -> None:
    """beta = 1, z0 = 1. Wanted, h - z0 = ln 3: w_D / 4, slope -w_D 3/16; unwanted, z0 - h = -ln 3: w_U 3/4, +w_U 3/16."""
    h = f64([1 + LN3, 1 + LN3]).requires_grad_()
    got = P.kto(h, torch.tensor([True, False]), 1.0, 1.0, chosen_weight=2.0, rejected_weight=3.0)
    close(got, [0.5, 2.25])
    got.sum().backward()
    close(h.grad, [-2 * 3 / 16, 3 * 3 / 16])


def test_kto_z0_is_a_number_that_is_never_negative() -> None:
    h = f64([1.0, 2.0, 6.0]).requires_grad_()
    assert P.kto_z0(h) == 3.0
    assert P.kto_z0(-h) == 0.0
    assert P.kto_z0(h[:0]) == 0.0


def test_kto_pair_by_hand() -> None:
    """Each half against the other's level: [1 - sig(h_w - z_l) + 1 - sig(z_w - h_l)] / 2 with ln 3 and 0: (1/4 + 1/2) / 2."""
    w, v = f64([LN3 + 0.5]).requires_grad_(), f64([2.0]).requires_grad_()
    got = P.kto_pair(w, v, 1.0, z_w=2.0, z_l=0.5)
    close(got, [3 / 8])
    got.sum().backward()
    close(w.grad, [-3 / 32])
    close(v.grad, [1 / 8])


def test_bco_by_hand() -> None:
    """beta = 1/2, delta = 1: rewards 1 + ln 3 and 1 - ln 3 are each ln 3 on their side: 2 ln 4/3, slopes -+ 1/8."""
    w, v = f64([2 + 2 * LN3]).requires_grad_(), f64([2 - 2 * LN3]).requires_grad_()
    got = P.bco(w, v, 0.5, 1.0)
    close(got, [2 * math.log(4 / 3)])
    got.sum().backward()
    close(w.grad, [-1 / 8])
    close(v.grad, [1 / 8])


def test_orpo_by_hand() -> None:
    """p_w = 3/4, p_l = 1/2: log-odds ln 3 and 0, so ln 4/3 + lambda ln 4/3; d log-odds / d mean = 1 / (1 - p) = 4 and 2."""
    w, v = f64([math.log(0.75)]).requires_grad_(), f64([math.log(0.5)]).requires_grad_()
    got = P.orpo(w, v, 0.2)
    close(got, [1.2 * math.log(4 / 3)])
    got.sum().backward()
    close(w.grad, [-1 - 0.2 / 4 * 4])
    close(v.grad, [0.2 / 4 * 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_of_certainty_are_large_and_finite_and_teach_nothing(dtype: torch.dtype) -> None:
    mean = torch.tensor([0.0, -1e-30, -100.0], dtype=dtype).requires_grad_()
    odds = P.log_odds(mean)
    assert torch.isfinite(odds).all()
    assert (odds[:2] > 15).all()
    assert odds[2].item() == pytest.approx(-100.0)
    odds.sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == [0.0, 0.0, pytest.approx(1.0)]


def test_a_hopeless_pair_has_its_lead_as_loss_not_infinity() -> None:
    close(P.dpo(f64([-5000.0]), 0.5), [2500.0])
    close(P.simpo(f64([-1000.0]), f64([0.0]), 1.0, 0.0), [1000.0])


# ----------------------------------------------------------------------------------------------------- answers from tokens


def test_log_ratios_sum_scored_tokens_and_nothing_else() -> None:
    nan = float("nan")
    logp = f64([[-1.0, -2.0, nan], [-3.0, nan, nan]]).requires_grad_()
    ref = f64([[-2.0, -2.5, nan], [-1.0, nan, nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    h = P.log_ratios(logp, ref, mask)
    close(h, [1.5, -2.0])
    h.sum().backward()
    close(logp.grad, [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def test_tail_weights_by_hand() -> None:
    """Pairs of 4 and 2 tokens, of 1 and 3, of 2 and 2: what the longer has beyond the shorter counts by alpha."""
    mask = torch.arange(4)[None] < torch.tensor([4, 2, 1, 3, 2, 2])[:, None]
    want = [[1, 1, 0.25, 0.25], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0.25, 0.25, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    close(P.tail_weights(mask, 0.25, dtype=torch.float64), want)
    close(P.tail_weights(mask, 1.0, dtype=torch.float64), mask.double())


# ---------------------------------------------------------------------------------------------------------------- oracle


def sig(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ORACLE: dict[str, tuple[Callable[..., Tensor], Callable[..., np.ndarray]]] = {
    "dpo": (lambda w, v: P.dpo(w - v, 0.3, 0.2), lambda w, v: -0.8 * np.log(sig(0.3 * (w - v))) - 0.2 * np.log(sig(-0.3 * (w - v)))),
    "robust": (
        lambda w, v: P.robust(w - v, 0.3, 0.2),
        lambda w, v: (-0.8 * np.log(sig(0.3 * (w - v))) + 0.2 * np.log(sig(-0.3 * (w - v)))) / 0.6,
    ),
    "hinge": (lambda w, v: P.hinge(w - v, 0.3), lambda w, v: np.maximum(0, 1 - 0.3 * (w - v))),
    "ipo": (lambda w, v: P.ipo(w - v, 0.3), lambda w, v: (w - v - 1 / 0.6) ** 2),
    "exo": (
        lambda w, v: P.exo(w - v, 0.3, 0.2),
        lambda w, v: sum(
            p * np.log(p / q) for p, q in ((sig(0.3 * (w - v)), 0.8), (sig(-0.3 * (w - v)), 0.2))
        ),
    ),
    "nca": (
        lambda w, v: P.nca(w, v, 0.3),
        lambda w, v: -np.log(sig(0.3 * w)) - 0.5 * np.log(sig(-0.3 * w)) - 0.5 * np.log(sig(-0.3 * v)),
    ),
    "kto_pair": (
        lambda w, v: P.kto_pair(w, v, 0.3, 0.7, 0.4),
        lambda w, v: (1 - sig(0.3 * (w - 0.4)) + 1 - sig(0.3 * (0.7 - v))) / 2,
    ),
    "bco": (
        lambda w, v: P.bco(w, v, 0.3, 0.7),
        lambda w, v: -np.log(sig(0.3 * w - 0.7)) - np.log(1 - sig(0.3 * v - 0.7)),
    ),
    "simpo": (
        lambda w, v: P.simpo(w, v, 2.0, 0.7),
        lambda w, v: -np.log(np.exp(2 * w) / (np.exp(2 * w) + np.exp(2 * v + 0.7))),
    ),
    "orpo": (
        lambda w, v: P.orpo(-abs(w) - 0.1, -abs(v) - 0.1, 0.6),
        lambda w, v: abs(w) + 0.1 + 0.6 * np.log(1 + _odds(-abs(v) - 0.1) / _odds(-abs(w) - 0.1)),
    ),
}  # fmt: skip


def _odds(mean: np.ndarray) -> np.ndarray:
    return np.exp(mean) / (1 - np.exp(mean))


@pytest.mark.parametrize("name", list(ORACLE))
def test_against_plain_numpy_and_numeric_slopes(name: str) -> None:
    ours, theirs = ORACLE[name]
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(2, 40)) * 3
    a, b = f64(w).requires_grad_(), f64(v).requires_grad_()
    got = ours(a, b)
    np.testing.assert_allclose(got.detach().numpy(), theirs(w, v), rtol=1e-10, atol=1e-12)
    got.sum().backward()
    d = 1e-6
    assert a.grad is not None
    assert b.grad is not None
    away = np.abs(np.abs(0.3 * (w - v)) - 1) > 1e-3  # not at hinge's corner
    np.testing.assert_allclose(
        a.grad.numpy()[away], ((theirs(w + d, v) - theirs(w - d, v)) / (2 * d))[away], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        b.grad.numpy()[away], ((theirs(w, v + d) - theirs(w, v - d)) / (2 * d))[away], rtol=1e-5, atol=1e-7
    )


# ------------------------------------------------------------------------------------------------------------ properties

leads = st.floats(-20, 20)
smoothings = st.floats(0.01, 0.45)


@given(leads, smoothings)
def test_robust_undoes_flipped_labels(h: float, e: float) -> None:
    """(1 - e) robust(h) + e robust(-h) = dpo(h): the mean over flips is the loss of the true labels."""
    x = f64([h])
    close((1 - e) * P.robust(x, 0.5, e) + e * P.robust(-x, 0.5, e), P.dpo(x, 0.5))


@given(leads, smoothings)
def test_smoothing_is_the_mean_over_flips(h: float, e: float) -> None:
    x = f64([h])
    close(P.dpo(x, 0.5, e), (1 - e) * P.dpo(x, 0.5) + e * P.dpo(-x, 0.5))


@given(leads)
def test_without_smoothing_cdpo_and_robust_are_dpo(h: float) -> None:
    x = f64([h])
    close(P.dpo(x, 0.5, 0.0), P.dpo(x, 0.5))
    close(P.robust(x, 0.5, 0.0), P.dpo(x, 0.5))


@given(smoothings)
def test_the_optimum_of_a_smoothed_loss_has_odds_of_the_labels(e: float) -> None:
    """cDPO and EXO both have slope 0 where sig(beta h) = 1 - e, and EXO's value there is 0."""
    at = math.log((1 - e) / e) / 0.5
    assert value_and_slope(lambda h: P.dpo(h, 0.5, e), at)[1] == pytest.approx(0, abs=1e-12)
    assert value_and_slope(lambda h: P.exo(h, 0.5, e), at) == pytest.approx((0, 0), abs=1e-12)


@given(leads, leads, st.floats(-5, 5))
def test_losses_of_the_lead_do_not_see_a_common_shift_and_nca_bco_do(w: float, v: float, shift: float) -> None:
    a, b = f64([w]), f64([v])
    close(P.dpo((a + shift) - (b + shift), 0.5), P.dpo(a - b, 0.5))
    if abs(shift) > 0.1:
        assert not torch.equal(P.nca(a + shift, b + shift, 0.5), P.nca(a, b, 0.5))
        close(P.bco(a + shift, b + shift, 0.5, 0.5 * shift), P.bco(a, b, 0.5, 0.0))


@given(leads, st.floats(0, 5))
def test_kto_is_symmetric_about_z0(distance: float, z0: float) -> None:
    """An unwanted answer as far below z0 as a wanted one is above it has the same loss; the two of one answer sum to 1."""
    yes, no = torch.tensor([True]), torch.tensor([False])
    close(P.kto(f64([z0 + distance]), yes, 0.3, z0), P.kto(f64([z0 - distance]), no, 0.3, z0))
    close(P.kto(f64([distance]), yes, 0.3, z0) + P.kto(f64([distance]), no, 0.3, z0), [1.0])


@given(leads)
def test_every_loss_falls_as_the_chosen_answer_becomes_likelier(h: float) -> None:
    for loss in (
        lambda x: P.dpo(x, 0.1),
        lambda x: P.robust(x, 0.1, 0.2),
        lambda x: P.simpo(x, torch.zeros_like(x), 0.1, 0.5),
    ):
        assert value_and_slope(loss, h)[1] < 0


def test_figures_of_pairs_count_a_tie_as_an_error() -> None:
    given = ([1.0, 2.0], [1.0, 1.0], [-3.0, -4.0], [-5.0, -6.0])
    figures = P.pair_figures(*(f64(row).requires_grad_() for row in given))
    assert {name: array.tolist() for name, array in figures.items()} == {
        "rewards/chosen": [1, 2],
        "rewards/rejected": [1, 1],
        "accuracy": [0, 1],
        "margin": [0, 1],
        "logps/chosen": [-3, -4],
        "logps/rejected": [-5, -6],
    }
    assert not any(array.requires_grad for array in figures.values())
    assert all(array.dtype == torch.float64 for array in figures.values())
