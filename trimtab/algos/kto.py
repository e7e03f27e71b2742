"""Kahneman-Tversky optimisation: learn from single answers, each marked as wanted or not. No pairs are needed.

With h = sum over the scored tokens of an answer of (logp - logp_ref), the reference being the policy as it was when the
stage began:

    wanted      w_D (1 - sig(beta (h - z0)))
    unwanted    w_U (1 - sig(beta (z0 - h)))                           mean over the answers of the optimizer step

    z0 = max(0, mean over the step of log pi / pi_ref of *mismatched* answers)

z0 estimates how far the policy has moved from the reference at large: each prompt is given an answer that was written
for another prompt (`train/preference.py`), and those are scored in a pass of their own, without gradient, before the
first gradient of the step. An answer then counts as better or worse than that, so making everything likelier gains
nothing. w_D (`kto_chosen_weight`) and w_U (`kto_rejected_weight`) make up for unequal numbers: the paper keeps
w_D n_D / (w_U n_U) between 1 and 4/3. `pref_ftx` adds the NLL per token of the wanted answers.

Ethayarajh et al. (2402.01306), equations 7 and 8. Details and metrics: docs/algorithms/kto.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.algos import Needs
from trimtab.ops.masked import row_mean, row_sum
from trimtab.ops.preference import kto, kto_z0, log_ratios
from trimtab.types import LabelledBatch, LossTerms, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Kto:
    """KTO on single answers.

    Attributes:
        beta: `pref_beta`.
        chosen_weight, rejected_weight: w_D and w_U.
        ftx: weight of the NLL per token of wanted answers (`pref_ftx`).
    """

    kind: ClassVar[Literal["preference"]] = "preference"
    unit: ClassVar[Literal["row"]] = "row"
    reduction: ClassVar[Literal["row"]] = "row"
    needs: ClassVar[Needs] = Needs(reference=True, critic=False, reward=False)
    observes: ClassVar[Literal["mismatched"]] = "mismatched"

    beta: float = 0.1
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    ftx: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> Kto:
        return cls(
            beta=config.pref_beta,
            chosen_weight=config.kto_chosen_weight,
            rejected_weight=config.kto_rejected_weight,
            ftx=config.pref_ftx,
        )

    @torch.no_grad()
    def observe(self, logp: Float[Tensor, "n t"], observed: LabelledBatch, batch: LabelledBatch) -> LabelledBatch:
        """`batch` with z0 of the whole optimizer step.

        Args:
            logp: of the rows of `observed`, which are the step's mismatched answers, under the policy as it is now.
        """
        assert observed.logp_ref is not None, "KTO needs the reference's log-probabilities"
        return replace(batch, z0=kto_z0(log_ratios(logp, observed.logp_ref, observed.mask)))

    def loss(self, scores: Scores, batch: LabelledBatch) -> LossTerms:
        """One number per answer `[b]` from the log-probabilities of its tokens `[b, t]`."""
        assert batch.logp_ref is not None, "KTO needs the reference's log-probabilities"
        wanted = batch.desirable
        h = log_ratios(scores.logp, batch.logp_ref, batch.mask)
        loss = kto(h, wanted, self.beta, batch.z0, self.chosen_weight, self.rejected_weight)
        if self.ftx:
            nll = -row_mean(scores.logp, batch.mask)
            loss = loss + self.ftx * torch.where(wanted, nll, torch.zeros_like(nll))
        reward, logp = self.beta * h.detach(), row_sum(scores.logp.detach(), batch.mask)
        right = torch.where(wanted, h.detach() > batch.z0, h.detach() < batch.z0)
        real = batch.mask.any(dim=-1)
        return LossTerms(
            loss=torch.where(real, loss, torch.zeros_like(loss)),
            means={
                "rewards/chosen": reward,
                "rewards/rejected": reward,
                "accuracy": right.to(reward.dtype),
                "logps/chosen": logp,
                "logps/rejected": logp,
                "z0": torch.full_like(reward, batch.z0),
            },
            among={
                "rewards/chosen": wanted,
                "rewards/rejected": ~wanted,
                "logps/chosen": wanted,
                "logps/rejected": ~wanted,
            },
        )

    def describe(self) -> str:
        """What the run optimises."""
        ftx = f"; plus {self.ftx:g} x NLL per token of wanted answers" if self.ftx else ""
        return (
            f"kto: minimises 1 - sig(beta (h - z0)) of wanted answers (weight {self.chosen_weight:g}) and "
            f"1 - sig(beta (z0 - h)) of unwanted ones (weight {self.rejected_weight:g}), beta {self.beta:g}{ftx}"
        )
