"""SFT and the reward model: losses, gradients and metrics by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.algos.rm import RewardModel
from trimtab.algos.sft import Sft
from trimtab.ops.reduction import reduction_weights
from trimtab.types import PairBatch, RankBatch, ScoreBatch, Scores, TokenBatch

pytestmark = pytest.mark.unit


def close(got: Tensor | None, want: object) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


def test_sft_is_the_mean_over_tokens_not_over_rows() -> None:
    """Rows of two tokens at p = 1/2 and of one at p = 1/8: (ln 2 + ln 2 + ln 8) / 3 = 5/3 ln 2; each slope is -1/3."""
    nan = float("nan")
    logp = torch.tensor([[0.5, 0.5], [0.125, nan]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    terms = Sft().loss(Scores(logp=logp, entropy=torch.full_like(logp, nan)), TokenBatch(mask=mask))
    loss = (terms.loss * reduction_weights(mask, Sft.reduction, dtype=torch.float64)).sum()
    close(loss, 5 / 3 * math.log(2))
    loss.backward()
    close(logp.grad, [[-1 / 3, -1 / 3], [-1 / 3, 0]])


def test_rm_by_hand() -> None:
    """Leads of ln 3, 0 and -ln 3: a win, a tie, which counts as an error, and a loss."""
    rewards = torch.tensor(
        [[math.log(3), 0.0], [1.0, 1.0], [0.0, math.log(3)]], dtype=torch.float64, requires_grad=True
    )
    terms = RewardModel().loss(rewards, PairBatch(margin=torch.zeros(3, dtype=torch.float64)))
    close(terms.loss, [math.log(4 / 3), math.log(2), math.log(4)])
    close(terms.means["accuracy"], [1.0, 0.0, 0.0])
    close(terms.means["margin"], [math.log(3), 0.0, -math.log(3)])
    close(terms.means["nll"], terms.loss)
    terms.loss.mean().backward()
    close(rewards.grad, torch.tensor([[-1 / 4, 1 / 4], [-1 / 2, 1 / 2], [-3 / 4, 3 / 4]], dtype=torch.float64) / 3)


def test_rm_logs_a_nll_without_margin_and_centring() -> None:
    """Margin ln 3 makes a lead of ln 3 a draw, ln 2; centring adds 0.5 (ln 3)^2; the logged nll stays ln 4/3."""
    rewards = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    batch = PairBatch(margin=torch.tensor([math.log(3)], dtype=torch.float64))
    terms = RewardModel(center_coef=0.5).loss(rewards, batch)
    close(terms.loss, [math.log(2) + 0.5 * math.log(3) ** 2])
    close(terms.means["nll"], [math.log(4 / 3)])


def test_rankings_by_hand() -> None:
    """Scores ln 3, 0, 0 and ln 3, 0: pair means (2 ln 4/3 + ln 2) / 3 and ln 4/3; one of three pairs is a tie, an error."""
    nan = float("nan")
    rewards = torch.tensor([[math.log(3), 0.0, 0.0], [math.log(3), 0.0, nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    batch = RankBatch(mask=mask, margin=torch.zeros(2, dtype=torch.float64))
    pairs = [(2 * math.log(4 / 3) + math.log(2)) / 3, math.log(4 / 3)]
    terms = RewardModel().loss(rewards, batch)
    close(terms.loss, pairs)
    luce = RewardModel(rm_loss="listwise").loss(rewards, batch)
    close(luce.loss, [math.log(5 / 3) + math.log(2), math.log(4 / 3)])
    for one in (terms, luce):
        close(one.means["accuracy"], [2 / 3, 1.0])
        close(one.means["margin"], [2 / 3 * math.log(3), math.log(3)])
        close(one.means["nll"], pairs)
        close(one.means["reward_chosen"], [math.log(3)] * 2)
        close(one.means["reward_rejected"], [0.0, 0.0])
    centred = RewardModel(rm_loss="listwise", center_coef=0.3).loss(rewards, batch)  # squared sums ln^2 3, ln^2 3, 0
    close(centred.loss - luce.loss, [0.2 * math.log(3) ** 2, 0.3 * math.log(3) ** 2])


def test_scored_answers_by_hand() -> None:
    rewards = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    terms = RewardModel(rm_loss="pointwise").loss(
        rewards, ScoreBatch(score=torch.tensor([3.0, -2.0], dtype=torch.float64))
    )
    close(terms.loss, [4.0, 0.0])
    close(terms.means["abs_error"], [2.0, 0.0])
    close(terms.means["reward"], [1.0, -2.0])


def test_rm_smoothing_and_margin_by_hand() -> None:
    """Lead ln 3 + 2, margin 2, e = 1/4: 3/4 ln 4/3 + 1/4 ln 4; the logged nll is without both."""
    rewards = torch.tensor([[math.log(3) + 2, 0.0]], dtype=torch.float64)
    terms = RewardModel(smoothing=0.25).loss(rewards, PairBatch(margin=torch.tensor([2.0], dtype=torch.float64)))
    close(terms.loss, [0.75 * math.log(4 / 3) + 0.25 * math.log(4)])
    close(terms.means["nll"], [math.log1p(math.exp(-2) / 3)])
