"""DPO and its relatives, ORPO, SimPO and KTO on plain tensors: losses, gradients and figures by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.algos.dpo import FORMULAS, Dpo
from trimtab.algos.kto import Kto
from trimtab.algos.orpo import Orpo
from trimtab.algos.simpo import SimPo
from trimtab.ops import preference as P
from trimtab.types import LabelledBatch, LossTerms, PreferenceBatch, Scores, take

pytestmark = pytest.mark.unit

NAN = float("nan")
LN3 = math.log(3)

# One pair: a chosen answer of two tokens and a rejected one of one; then one of one and three. Padding is nan.
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
LOGP = torch.tensor([[-1.0, -2.0, NAN], [-3.0, NAN, NAN], [-1.5, NAN, NAN], [-1.0, -1.0, -1.0]], dtype=torch.float64)
REF = torch.tensor([[-2.0, -2.0, NAN], [-2.0, NAN, NAN], [-1.0, NAN, NAN], [-2.0, -1.5, -0.5]], dtype=torch.float64)
# so h_w = 1, h_l = -1, lead 2; and h_w = -1/2, h_l = 1, lead -3/2


def close(got: Tensor | None, want: object) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


def scores(logp: Tensor = LOGP) -> Scores:
    return Scores(logp=logp, entropy=torch.full_like(logp, NAN))


def pairs(**more: Any) -> PreferenceBatch:
    return PreferenceBatch(mask=MASK, logp_ref=REF, **more)


def f64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


H_W, H_L = f64([1.0, -0.5]), f64([-1.0, 1.0])


def test_dpo_by_hand() -> None:
    """beta = 1/2: leads of 2 and -3/2 give -logsig(1) and -logsig(-3/4); each token's slope is -+ beta sig(-beta h)."""
    logp = LOGP.clone().requires_grad_()
    terms = Dpo(beta=0.5).loss(scores(logp), pairs())
    close(terms.loss, [math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.75))])
    terms.loss.sum().backward()
    a, b = 0.5 / (1 + math.e), 0.5 / (1 + math.exp(-0.75))
    close(logp.grad, [[-a, -a, 0], [a, 0, 0], [-b, 0, 0], [b, b, b]])
    want = {
        "rewards/chosen": [0.5, -0.25],
        "rewards/rejected": [-0.5, 0.5],
        "accuracy": [1, 0],
        "margin": [1, -0.75],
        "logps/chosen": [-3, -1.5],
        "logps/rejected": [-3, -3],
    }
    assert terms.means.keys() == want.keys()
    for name, array in want.items():
        close(terms.means[name], array)


EACH: list[tuple[Dpo, Tensor]] = [
    (Dpo(beta=0.5, smoothing=0.1), P.dpo(H_W - H_L, 0.5, 0.1)),
    (Dpo(pref_loss="robust", beta=0.5, smoothing=0.1), P.robust(H_W - H_L, 0.5, 0.1)),
    (Dpo(pref_loss="hinge", beta=0.5), P.hinge(H_W - H_L, 0.5)),
    (Dpo(pref_loss="ipo", beta=0.5), P.ipo(H_W - H_L, 0.5)),
    (Dpo(pref_loss="ipo_avg", beta=0.5), P.ipo(f64([0.5 + 1, -0.5 - 1 / 3]), 0.5)),
    (Dpo(pref_loss="exo", beta=0.5, smoothing=0.1), P.exo(H_W - H_L, 0.5, 0.1)),
    (Dpo(pref_loss="exo", beta=0.5), P.exo(H_W - H_L, 0.5, 1e-3)),
    (Dpo(pref_loss="nca", beta=0.5), P.nca(H_W, H_L, 0.5)),
    (Dpo(pref_loss="kto_pair", beta=0.5), P.kto_pair(H_W, H_L, 0.5, 0.7, 0.2)),
    (Dpo(beta=0.5, length_normalized=True), P.dpo(f64([0.5 + 1, -0.5 - 1 / 3]), 0.5)),
    # the second token of the first answer and the last two of the fourth count a quarter: 0.25 (0) and 0.25 (0.5 - 0.5)
    (Dpo(beta=0.5, ld_alpha=0.25), P.dpo(f64([1.0 + 1, -0.5 - 1.0]), 0.5)),
    (Dpo(beta=0.5, ftx=0.3), P.dpo(H_W - H_L, 0.5) + 0.3 * f64([1.5, 1.5])),
    (Dpo(beta=0.5, bco_weight=0.25), (P.dpo(H_W - H_L, 0.5) + 0.25 * P.bco(H_W, H_L, 0.5, 0.5 * 0.6)) / 1.25),
]


@pytest.mark.parametrize(("algorithm", "want"), EACH, ids=[a.describe()[:60] for a, _ in EACH])
def test_each_loss_reads_its_log_ratios(algorithm: Dpo, want: Tensor) -> None:
    close(algorithm.loss(scores(), pairs(z_chosen=0.7, z_rejected=0.2, h_mean=0.6)).loss, want)


def test_every_loss_has_a_case_here() -> None:
    assert {a.pref_loss for a, _ in EACH} == set(FORMULAS)


def test_ld_alpha_weighs_the_tail_of_the_longer_answer_on_both_sides() -> None:
    """Lengths 2 and 1: log-ratios 1 and 4 of the longer one count 1 + 4 alpha. alpha 1 is DPO; the reference moves with it."""
    logp = f64([-1.0, -1.0, -3.0, NAN]).view(2, 2)
    ref = f64([-2.0, -5.0, -3.0, NAN]).view(2, 2)
    batch = PreferenceBatch(mask=torch.tensor([[True, True], [True, False]]), logp_ref=ref)
    for alpha, lead in ((0.0, 1.0), (0.5, 3.0), (1.0, 5.0)):
        close(Dpo(ld_alpha=alpha).loss(scores(logp), batch).loss, P.dpo(f64([lead]), 0.1))
    start = Dpo(ld_alpha=0.5).loss(scores(ref), batch)
    close(start.means["margin"], [0.0])  # at the start of a run the implicit rewards are 0 whatever alpha


def test_observe_takes_the_means_of_the_whole_step() -> None:
    """h is 1, -1/2 of the chosen and -1, 1 of the rejected: max(0, 1/4), max(0, 0); and 1/2 over four answers after six of mean 2."""
    batch = Dpo().observe(LOGP, pairs(), pairs(h_mean=2.0, h_count=6))
    assert (batch.z_chosen, batch.z_rejected) == (0.25, 0.0)
    assert batch.h_mean == pytest.approx((6 * 2.0 + 0.5) / 10)
    assert batch.h_count == 10
    assert take(batch, [2, 3]).h_mean == batch.h_mean  # a micro-batch keeps the step's figures


def test_only_the_losses_that_need_the_step_look_at_it_first() -> None:
    assert {loss: Dpo(pref_loss=loss).observes for loss in FORMULAS} == {
        loss: "own" if loss == "kto_pair" else "nothing" for loss in FORMULAS
    }
    assert Dpo(bco_weight=0.1).observes == "own"


def test_orpo_by_hand() -> None:
    """Means of -3/2 and -3, then -3/2 and -1, with lambda 0.5 and as much NLL again by pref_ftx."""
    terms = Orpo(weight=0.5).loss(scores(), PreferenceBatch(mask=MASK))
    p = [math.exp(-m) for m in (1.5, 3.0, 1.5, 1.0)]
    odds = [x / (1 - x) for x in p]
    want = [1.5 + 0.5 * math.log(1 + odds[1] / odds[0]), 1.5 + 0.5 * math.log(1 + odds[3] / odds[2])]
    close(terms.loss, want)
    close(terms.means["rewards/chosen"], [-0.75, -0.75])
    close(terms.means["logps/rejected"], [-3.0, -3.0])
    close(Orpo(weight=0.5, ftx=2.0).loss(scores(), PreferenceBatch(mask=MASK)).loss, [want[0] + 3, want[1] + 3])


def test_simpo_by_hand() -> None:
    """beta 2, gamma 1: leads per token of 3/2 and -1/2 give -logsig(2) and -logsig(-2); slopes are spread over the tokens."""
    logp = LOGP.clone().requires_grad_()
    terms = SimPo(beta=2.0, gamma=1.0).loss(scores(logp), PreferenceBatch(mask=MASK))
    close(terms.loss, [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))])
    terms.loss.sum().backward()
    a, b = 2 / (1 + math.exp(2)), 2 / (1 + math.exp(-2))
    close(logp.grad, [[-a / 2, -a / 2, 0], [a, 0, 0], [-b, 0, 0], [b / 3, b / 3, b / 3]])
    close(terms.means["margin"], [3.0, -1.0])
    with_nll = SimPo(beta=2.0, gamma=1.0, ftx=0.2).loss(scores(), PreferenceBatch(mask=MASK))
    close(with_nll.loss - terms.loss.detach(), [0.3, 0.3])


def test_kto_by_hand() -> None:
    """h = 1, -1, -1/2, 1, z0 = 1/4, beta 1; rows 1 and 4 wanted. Slopes -+ w beta s (1 - s) on every token."""
    logp = LOGP.clone().requires_grad_()
    wanted = torch.tensor([True, False, False, True])
    batch = LabelledBatch(mask=MASK, logp_ref=REF, desirable=wanted, z0=0.25)
    algorithm = Kto(beta=1.0, chosen_weight=2.0, rejected_weight=0.5)
    terms = algorithm.loss(scores(logp), batch)

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    close(terms.loss, [2 * (1 - s(0.75)), 0.5 * (1 - s(1.25)), 0.5 * (1 - s(0.75)), 2 * (1 - s(0.75))])
    terms.loss.sum().backward()
    g = [-2 * s(0.75) * s(-0.75), 0.5 * s(1.25) * s(-1.25), 0.5 * s(0.75) * s(-0.75), -2 * s(0.75) * s(-0.75)]
    close(logp.grad, [[g[0], g[0], 0], [g[1], 0, 0], [g[2], 0, 0], [g[3]] * 3])
    close(terms.means["accuracy"], [1, 1, 1, 1])
    assert terms.among["rewards/chosen"].tolist() == wanted.tolist()
    assert terms.among["logps/rejected"].tolist() == (~wanted).tolist()
    close(terms.means["z0"], [0.25] * 4)
    with_nll = Kto(beta=1.0, chosen_weight=2.0, rejected_weight=0.5, ftx=0.1).loss(scores(), batch)
    close(with_nll.loss - terms.loss.detach(), [0.15, 0, 0, 0.1])


def test_kto_z0_is_that_of_mismatched_answers() -> None:
    batch = LabelledBatch(mask=MASK[:1], logp_ref=REF[:1], desirable=torch.tensor([True]))
    observed = LabelledBatch(mask=MASK, logp_ref=REF, desirable=torch.ones(4, dtype=torch.bool))
    assert Kto().observe(LOGP, observed, batch).z0 == pytest.approx((1 - 1 - 0.5 + 1) / 4)
    assert Kto().observe(LOGP - 9, observed, batch).z0 == 0.0


KEYS = SimpleNamespace(
    pref_beta=0.3, pref_ftx=0.1, pref_loss="sigmoid", pref_bco_weight=0.2, pref_length_normalized=False,
    dpo_label_smoothing=0.05, ld_alpha=0.4, simpo_gamma=0.7,
)  # fmt: skip


def test_a_file_of_stage_dpo_may_ask_for_any_loss() -> None:
    """The files of other trainers have stage: dpo with pref_loss: orpo or simpo."""
    assert Dpo.from_config(KEYS) == Dpo(beta=0.3, ftx=0.1, bco_weight=0.2, smoothing=0.05, ld_alpha=0.4)
    assert Dpo.from_config(SimpleNamespace(**{**vars(KEYS), "pref_loss": "orpo"})) == Orpo(weight=0.3, ftx=0.1)
    simpo = Dpo.from_config(SimpleNamespace(**{**vars(KEYS), "pref_loss": "simpo"}))
    assert simpo == SimPo(beta=0.3, gamma=0.7, ftx=0.1)


@pytest.mark.parametrize(
    "algorithm", [*(Dpo(pref_loss=loss) for loss in FORMULAS), Orpo(), SimPo(), Dpo(bco_weight=1.0)]
)
def test_a_negated_preference_is_the_opposite_push(algorithm: Any) -> None:
    """With the two answers of a pair swapped, the lead is pushed the other way."""

    def lead_slope(order: list[int]) -> float:
        """Slope of the loss along "the first row's answer becomes likelier, the second's less so"."""
        logp = torch.full((2, 1), -1.0, dtype=torch.float64).requires_grad_()
        mask = torch.ones(2, 1, dtype=torch.bool)
        terms: LossTerms = algorithm.loss(
            Scores(logp=logp[order], entropy=logp.detach()), PreferenceBatch(mask=mask, logp_ref=logp.detach())
        )
        terms.loss.sum().backward()
        assert logp.grad is not None
        return float(logp.grad[0] - logp.grad[1])

    assert lead_slope([0, 1]) < 0 < lead_slope([1, 0])
