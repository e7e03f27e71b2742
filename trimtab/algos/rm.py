"""Reward model: a score per answer, learnt from what people preferred. `rm_loss` says from what.

    pairwise    -log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2           one of two answers was chosen (Bradley-Terry); of a
                                                                             ranking, the mean over all its pairs
    listwise    -sum over i < n of log(exp r_i / sum over j >= i of exp r_j) + c (...)    answers ranked from best to worst (Plackett-Luce)
    pointwise   (r - s)^2                                                    every answer has a score s of its own

as means over rows of the data. r = head(hidden state at the answer's end marker): the one read-out that every later use of the model
repeats. The first two learn differences of scores only; their common level is settled after training, by folding the mean score of
the reference answers into the head's bias.

Details with sources, and what each metric means: docs/algorithms/rm.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.ranking import mean_over_pairs, plackett_luce, ranked_pairs, squared_error
from trimtab.types import LossTerms, PairBatch, RankBatch, ScoreBatch

Kind = Literal["pairwise", "listwise", "pointwise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """A reward model's losses.

    Attributes:
        rm_loss: which of them.
        center_coef: c, how strongly the two scores of a pair are drawn to sum to 0; 0 = off.
        smoothing: e, how often a pair is the wrong way round (pairwise).
    """

    kind: ClassVar[Literal["offline"]] = "offline"
    reads: ClassVar[Literal["reward"]] = "reward"
    reduction: ClassVar[Literal["row"]] = "row"
    unit: ClassVar[Literal["pair"]] = "pair"

    rm_loss: Kind = "pairwise"
    center_coef: float = 0.0
    smoothing: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> RewardModel:
        # a file for inference says how to measure, and has no keys of training
        return cls(
            rm_loss=config.rm_loss,
            center_coef=getattr(config, "center_rewards_coef", 0.0),
            smoothing=getattr(config, "rm_label_smoothing", 0.0),
        )

    def loss(self, rewards: Float[Tensor, "b k"], batch: PairBatch | RankBatch | ScoreBatch) -> LossTerms:
        """One number per row of the data `[b]`.

        Args:
            rewards: of a pair the chosen answer's and the rejected one's; of a ranking from the best to the worst, padded on the right;
                one column for single answers.
        """
        if isinstance(batch, ScoreBatch):
            return self._single(rewards[:, 0], batch)
        if isinstance(batch, PairBatch):
            batch = RankBatch(mask=torch.ones_like(rewards, dtype=torch.bool), margin=batch.margin)
        return self._ranked(rewards, batch)

    def _ranked(self, rewards: Float[Tensor, "b k"], batch: RankBatch) -> LossTerms:
        mask = batch.mask
        if self.rm_loss == "listwise":
            loss = plackett_luce(rewards, mask)
            if self.center_coef:
                held = torch.where(mask, rewards, torch.zeros_like(rewards))
                sums = (held.unsqueeze(-1) + held.unsqueeze(-2)) ** 2
                loss = loss + self.center_coef * mean_over_pairs(sums, mask)
        else:
            loss = ranked_pairs(rewards, mask, batch.margin, self.center_coef, self.smoothing)
        fixed = torch.where(mask, rewards, torch.zeros_like(rewards)).detach()
        leads = fixed.unsqueeze(-1) - fixed.unsqueeze(-2)
        worst = (mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        return LossTerms(
            loss=loss,
            means={
                "accuracy": mean_over_pairs(
                    (leads > 0).to(rewards.dtype), mask
                ),  # a tie is an error: the model could not tell
                "margin": mean_over_pairs(leads, mask),
                "nll": ranked_pairs(fixed, mask),  # comparable across margins, smoothing and c
                "reward_chosen": fixed[:, 0],
                "reward_rejected": fixed.gather(-1, worst).squeeze(-1),
            },
        )

    def _single(self, rewards: Float[Tensor, " b"], batch: ScoreBatch) -> LossTerms:
        fixed = rewards.detach()
        return LossTerms(
            loss=squared_error(rewards, batch.score),
            means={"abs_error": (fixed - batch.score).abs(), "reward": fixed},
        )

    def describe(self) -> str:
        centred = f" + {self.center_coef:g} (r_i + r_j)^2 averaged over pairs" if self.center_coef else ""
        smoothed = f", label smoothing {self.smoothing:g}" if self.smoothing else ""
        formula = {
            "pairwise": f"-log sigmoid(r_w - r_l - margin){centred}{smoothed}, averaged over pairs",
            "listwise": f"the Plackett-Luce negative log-likelihood of each ranking{centred}",
            "pointwise": "(r - score)^2, averaged over answers; the scores' level is that of the data",
        }
        return f"minimises {formula[self.rm_loss]}"
