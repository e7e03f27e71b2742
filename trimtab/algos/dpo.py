"""Direct preference optimisation: learn from pairs of answers without a reward model and without sampling.

**Compared.** For a chosen answer w and a rejected answer l to one prompt, the log-ratio of each to the reference, which
is the policy as it was when the stage began:

    h_y = sum over the scored tokens of y of (logp - logp_ref),     h = h_w - h_l

`ld_alpha` weighs the tokens that the longer answer has beyond the shorter one; `pref_length_normalized` (and `ipo_avg`)
divides each h_y by the answer's length.

**Minimised**, as a mean over the pairs of the optimizer step, by `pref_loss` (formulas: `ops/preference.py`):

    sigmoid, robust, hinge, ipo, ipo_avg, exo     functions of h: only the lead of w over l matters
    kto_pair, nca                                 functions of h_w and h_l: their level matters too
    orpo, simpo                                   no reference: `algos/orpo.py`, `algos/simpo.py`

    total = (loss + pref_bco_weight bco) / (1 + pref_bco_weight) + pref_ftx NLL_avg(w)

**Assumed.** Labels follow Bradley and Terry with the reward whose optimum under a KL penalty of weight beta is sought;
then the minimum over all pairs is pi_ref exp(r / beta), the very optimum of PPO. The pairs are fixed: what the policy
comes to write later is never judged.

Rafailov et al. (2305.18290). Each loss with its source, and what each metric means: docs/algorithms/dpo.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.algos import Needs
from trimtab.algos.orpo import Orpo
from trimtab.algos.simpo import SimPo
from trimtab.ops import preference
from trimtab.ops.masked import lengths, row_mean, row_sum, zero_padding
from trimtab.types import LossTerms, PreferenceBatch, Scores

PairLoss = Literal["sigmoid", "robust", "hinge", "ipo", "ipo_avg", "kto_pair", "nca", "exo"]

FORMULAS: dict[PairLoss, str] = {
    "sigmoid": "-logsig(beta h)",
    "robust": "the DPO loss corrected for flipped labels",
    "hinge": "max(0, 1 - beta h)",
    "ipo": "(h - 1 / (2 beta))^2, h summed over tokens",
    "ipo_avg": "(h - 1 / (2 beta))^2, h averaged over tokens",
    "kto_pair": "KTO on pairs, each half measured against the other's log-ratio",
    "nca": "noise-contrastive alignment of both answers",
    "exo": "KL of the policy's choice to the smoothed label",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dpo:
    """DPO and its relatives with a reference.

    Attributes:
        pref_loss: which function of the log-ratios.
        beta: `pref_beta`.
        smoothing: e, how often a label is the wrong way round (sigmoid, robust, exo).
        ftx: weight of the chosen answer's NLL per token (`pref_ftx`).
        bco_weight: weight of the binary classifier's loss (`pref_bco_weight`).
        ld_alpha: weight of the tokens beyond the shorter answer's length; None = 1.
        length_normalized: h_y per token instead of summed.
    """

    kind: ClassVar[Literal["preference"]] = "preference"
    unit: ClassVar[Literal["pair"]] = "pair"
    reduction: ClassVar[Literal["row"]] = "row"
    needs: ClassVar[Needs] = Needs(reference=True, critic=False, reward=False)

    pref_loss: PairLoss = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    ftx: float = 0.0
    bco_weight: float = 0.0
    ld_alpha: float | None = None
    length_normalized: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Dpo | Orpo | SimPo:
        """The algorithm of a file with `stage: dpo`; `pref_loss` may name one that has a stage of its own."""
        if config.pref_loss == "orpo":
            return Orpo.from_config(config)
        if config.pref_loss == "simpo":
            return SimPo.from_config(config)
        return cls(
            pref_loss=config.pref_loss,
            beta=config.pref_beta,
            smoothing=config.dpo_label_smoothing,
            ftx=config.pref_ftx,
            bco_weight=config.pref_bco_weight,
            ld_alpha=config.ld_alpha,
            length_normalized=config.pref_length_normalized,
        )

    @property
    def observes(self) -> Literal["nothing", "own"]:
        """Does a loss need figures of the whole optimizer step (`observe`) before the first of its gradients?"""
        return "own" if self.pref_loss == "kto_pair" or self.bco_weight else "nothing"

    def log_ratios(
        self, logp: Float[Tensor, "r t"], batch: PreferenceBatch
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """h_w and h_l `[b]` of log-probabilities `[r t]`, with the weights and the mean that the settings ask for."""
        assert batch.logp_ref is not None, "DPO needs the reference's log-probabilities"
        difference = zero_padding(logp, batch.mask) - zero_padding(batch.logp_ref, batch.mask)
        if self.ld_alpha is not None:
            difference = difference * preference.tail_weights(batch.mask, self.ld_alpha, dtype=difference.dtype)
        h = row_sum(difference, batch.mask)
        if self.length_normalized or self.pref_loss == "ipo_avg":
            h = h / lengths(batch.mask).clamp(min=1).to(h.dtype)
        return h[0::2], h[1::2]

    @torch.no_grad()
    def observe(self, logp: Float[Tensor, "r t"], observed: PreferenceBatch, batch: PreferenceBatch) -> PreferenceBatch:
        """`batch` with the figures of the whole optimizer step that its losses are measured against.

        Args:
            logp: of the rows of `observed`, which are the step's own, under the policy as it is now.
            batch: its `h_mean` and `h_count` are those of the steps before.
        """
        h_w, h_l = self.log_ratios(logp, observed)
        count = batch.h_count + 2 * len(h_w)
        total = batch.h_mean * batch.h_count + float(h_w.sum() + h_l.sum())
        return replace(
            batch,
            z_chosen=preference.kto_z0(h_w),
            z_rejected=preference.kto_z0(h_l),
            h_mean=total / max(count, 1),
            h_count=count,
        )

    def loss(self, scores: Scores, batch: PreferenceBatch) -> LossTerms:
        """One number per pair `[b]` from the log-probabilities of its two rows `[2 b, t]`, chosen first."""
        h_w, h_l = self.log_ratios(scores.logp, batch)
        h, beta = h_w - h_l, self.beta
        match self.pref_loss:
            case "sigmoid":
                loss = preference.dpo(h, beta, self.smoothing)
            case "robust":
                loss = preference.robust(h, beta, self.smoothing)
            case "hinge":
                loss = preference.hinge(h, beta)
            case "ipo" | "ipo_avg":
                loss = preference.ipo(h, beta)
            case "exo":
                loss = preference.exo(h, beta, self.smoothing or EXO_SMOOTHING)
            case "nca":
                loss = preference.nca(h_w, h_l, beta)
            case "kto_pair":
                loss = preference.kto_pair(h_w, h_l, beta, batch.z_chosen, batch.z_rejected)
        if self.bco_weight:
            bco = preference.bco(h_w, h_l, beta, beta * batch.h_mean)
            loss = (loss + self.bco_weight * bco) / (1 + self.bco_weight)
        if self.ftx:
            loss = loss - self.ftx * row_mean(scores.logp, batch.mask)[0::2]
        logp = row_sum(scores.logp, batch.mask)
        real = batch.mask.any(dim=-1).view(-1, 2).all(dim=-1)
        return LossTerms(
            loss=torch.where(real, loss, torch.zeros_like(loss)),
            means=preference.pair_figures(beta * h_w, beta * h_l, logp[0::2], logp[1::2]),
        )

    def describe(self) -> str:
        """What the run optimises."""
        terms = f"{self.pref_loss}: {FORMULAS[self.pref_loss]}, beta {self.beta:g}"
        smoothing = self.smoothing or (EXO_SMOOTHING if self.pref_loss == "exo" else 0.0)
        if smoothing:
            terms += f", label smoothing {smoothing:g}"
        if self.ld_alpha is not None:
            terms += f", tokens beyond the shorter answer count by {self.ld_alpha:g}"
        if self.length_normalized:
            terms += ", h per token"
        if self.bco_weight:
            terms += f"; with BCO, weight {self.bco_weight:g}"
        if self.ftx:
            terms += f"; plus {self.ftx:g} x NLL per token of the chosen answer"
        return f"minimises {terms}"


EXO_SMOOTHING = 1e-3
"""e of the exo loss where `dpo_label_smoothing` is 0: the KL to a certain label is infinite (Ji et al., section 4)."""
