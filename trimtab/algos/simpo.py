"""Simple preference optimisation: the reward of an answer is its log-probability per token, and there is no reference.

With m_y the mean log-probability of an answer's scored tokens:

    loss = -logsig(beta (m_w - m_l) - gamma) + pref_ftx (-m_w),     mean over pairs

gamma is the lead that the chosen answer should have (`simpo_gamma`, before division by beta). Being per token, the
reward has another scale than DPO's: the paper uses a beta of 2 to 10, and nothing but the learning rate and the number
of steps keeps the policy near where it started.

Meng et al. (2405.14734), equation 6. Details and metrics: docs/algorithms/simpo.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from trimtab.algos import Needs
from trimtab.ops.masked import row_mean, row_sum
from trimtab.ops.preference import pair_figures, simpo
from trimtab.types import LossTerms, PreferenceBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class SimPo:
    """SimPO.

    Attributes:
        beta: scale of the reward (`pref_beta`).
        gamma: the lead that is asked for (`simpo_gamma`).
        ftx: weight of the chosen answer's NLL per token (`pref_ftx`).
    """

    kind: ClassVar[Literal["preference"]] = "preference"
    unit: ClassVar[Literal["pair"]] = "pair"
    reduction: ClassVar[Literal["row"]] = "row"
    needs: ClassVar[Needs] = Needs(reference=False, critic=False, reward=False)
    observes: ClassVar[Literal["nothing"]] = "nothing"

    beta: float = 0.1
    gamma: float = 0.5
    ftx: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> SimPo:
        return cls(beta=config.pref_beta, gamma=config.simpo_gamma, ftx=config.pref_ftx)

    def loss(self, scores: Scores, batch: PreferenceBatch) -> LossTerms:
        """One number per pair `[b]` from the log-probabilities of its two rows `[2 b, t]`, chosen first."""
        mean, total = row_mean(scores.logp, batch.mask), row_sum(scores.logp, batch.mask)
        mean_w, mean_l = mean[0::2], mean[1::2]
        loss = simpo(mean_w, mean_l, self.beta, self.gamma)
        if self.ftx:
            loss = loss - self.ftx * mean_w
        real = batch.mask.any(dim=-1).view(-1, 2).all(dim=-1)
        return LossTerms(
            loss=torch.where(real, loss, torch.zeros_like(loss)),
            means=pair_figures(self.beta * mean_w, self.beta * mean_l, total[0::2], total[1::2]),
        )

    def describe(self) -> str:
        """What the run optimises."""
        ftx = f" + {self.ftx:g} x NLL per token of the chosen answer" if self.ftx else ""
        return (
            f"simpo: minimises -logsig({self.beta:g} x (log-probability per token of chosen - of rejected) - "
            f"{self.gamma:g}){ftx}; no reference"
        )
