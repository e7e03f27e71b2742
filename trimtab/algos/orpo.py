"""Odds-ratio preference optimisation: supervised fine-tuning on the chosen answer, and a push away from the rejected one.

With m_y the mean log-probability of an answer's scored tokens, and its log-odds log(p / (1 - p)) at p = exp(m_y):

    loss = -m_w - lambda logsig(log-odds_w - log-odds_l) + pref_ftx (-m_w),     mean over pairs

lambda is `pref_beta`. There is no reference: the first term holds the model to the data, so the stage may start from a
base model and replaces SFT (do not run it twice as long for having SFT before it).

Hong et al. (2403.07691), equations 6 and 7. Details and metrics: docs/algorithms/orpo.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from trimtab.algos import Needs
from trimtab.ops.masked import row_mean, row_sum
from trimtab.ops.preference import orpo, pair_figures
from trimtab.types import LossTerms, PreferenceBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Orpo:
    """ORPO.

    Attributes:
        weight: lambda (`pref_beta`), of the odds ratio.
        ftx: further weight of the chosen answer's NLL per token (`pref_ftx`).
    """

    kind: ClassVar[Literal["preference"]] = "preference"
    unit: ClassVar[Literal["pair"]] = "pair"
    reduction: ClassVar[Literal["row"]] = "row"
    needs: ClassVar[Needs] = Needs(reference=False, critic=False, reward=False)
    observes: ClassVar[Literal["nothing"]] = "nothing"

    weight: float = 0.1
    ftx: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> Orpo:
        return cls(weight=config.pref_beta, ftx=config.pref_ftx)

    def loss(self, scores: Scores, batch: PreferenceBatch) -> LossTerms:
        """One number per pair `[b]` from the log-probabilities of its two rows `[2 b, t]`, chosen first."""
        mean, total = row_mean(scores.logp, batch.mask), row_sum(scores.logp, batch.mask)
        mean_w, mean_l = mean[0::2], mean[1::2]
        loss = orpo(mean_w, mean_l, self.weight)
        if self.ftx:
            loss = loss - self.ftx * mean_w
        real = batch.mask.any(dim=-1).view(-1, 2).all(dim=-1)
        return LossTerms(
            loss=torch.where(real, loss, torch.zeros_like(loss)),
            means=pair_figures(self.weight * mean_w, self.weight * mean_l, total[0::2], total[1::2]),
        )

    def describe(self) -> str:
        """What the run optimises."""
        return (
            f"orpo: minimises {1 + self.ftx:g} x NLL per token of the chosen answer - {self.weight:g} x "
            "logsig(log-odds of chosen - log-odds of rejected); no reference"
        )
