"""Reward model: a score per answer, learnt from which of two answers people preferred.

    loss = -log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2, mean over pairs

r = head(hidden state at the answer's end marker): the one read-out that every later use of the model repeats. Only
differences of scores are learnt; their common level is settled after training, by folding the mean score of the
reference answers into the head's bias.

Details with sources, and what each metric means: docs/algorithms/rm.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from trimtab.ops.losses import bradley_terry
from trimtab.types import LossTerms, PairBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """Bradley-Terry on pairs.

    Attributes:
        center_coef: c, how strongly the two scores of a pair are drawn to sum to 0; 0 = off.
    """

    kind: ClassVar[Literal["offline"]] = "offline"
    reads: ClassVar[Literal["reward"]] = "reward"
    reduction: ClassVar[Literal["row"]] = "row"
    unit: ClassVar[Literal["pair"]] = "pair"

    center_coef: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> RewardModel:
        return cls(center_coef=config.center_rewards_coef)

    def loss(self, rewards: Float[Tensor, "b 2"], batch: PairBatch) -> LossTerms:
        """One number per pair `[b]`; column 0 of `rewards` is the chosen answer's, column 1 the rejected one's."""
        chosen, rejected = rewards.unbind(dim=-1)
        lead = (chosen - rejected).detach()
        return LossTerms(
            loss=bradley_terry(chosen, rejected, batch.margin, self.center_coef),
            means={
                "accuracy": (lead > 0).to(rewards.dtype),  # a tie is an error: the model could not tell
                "margin": lead,
                "nll": bradley_terry(chosen.detach(), rejected.detach()),  # comparable across margins and c
                "reward_chosen": chosen.detach(),
                "reward_rejected": rejected.detach(),
            },
        )

    def describe(self) -> str:
        centred = f" + {self.center_coef:g} (r_w + r_l)^2" if self.center_coef else ""
        return f"minimises -log sigmoid(r_w - r_l - margin){centred}, averaged over pairs"
