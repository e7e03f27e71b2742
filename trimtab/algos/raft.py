"""Reward-ranked fine-tuning: the best of k answers is imitated, the others are dropped. Read from the top.

**Sampled.** k = `group_size` completions of each prompt, each scored once.

**Credited** (`credit`, over the whole rollout batch, no gradients). Of each prompt the completion with the highest reward, of equals the
first; a completion's reward is what it scored less what it paid for leaving the reference:

    R_i = score_i - beta sum_t (logp_old - logp_ref)[i, t]        A_i = 1 for the best of the prompt, the others are masked

A prompt whose rewards are all equal has no best: it is masked too.

**Minimised** (`policy_loss`, `epochs` times): -A logp of each token, mean over tokens. It is the loss of SFT on the policy's own best
answers. There is no ratio and no clip: an answer is imitated however far the policy has moved since it was drawn.

**Assumed.** The score says which answer is the best; by how much is not seen. As in ppo.py, the policy samples from its whole distribution
at the rollout temperature.

Dong et al. (2304.06767), RAFT, with the best of k in every step rather than in rounds over a data set. Details with sources, metrics,
signs of failure: docs/algorithms/raft.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from trimtab.algos import Needs
from trimtab.algos.surrogate import Surrogate, kl_figures, kl_penalty, over_tokens
from trimtab.ops.kl import adapt_kl_coef, estimate
from trimtab.ops.masked import Reduce, alone, zero_padding
from trimtab.types import LossTerms, RolloutBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Raft:
    """RAFT with the keys of its config.

    Attributes:
        group_size: k, completions per prompt.
        epochs: passes over each rollout batch (`ppo_epochs`).
        kl_coef, kl_target, kl_horizon: beta; with a target it is steered.
        how: where the KL is: in the reward it moves the ranking alone, in the loss it holds the policy.
    """

    kind: ClassVar[Literal["online"]] = "online"
    unit: ClassVar[Literal["completion"]] = "completion"
    reduction: ClassVar[Literal["token"]] = "token"

    group_size: int = 4
    epochs: int = 1
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    how: Surrogate = field(default_factory=Surrogate)

    @property
    def needs(self) -> Needs:
        kl = self.kl_coef > 0
        return Needs(reference=kl, critic=False, reward=True, old=kl and self.how.kl_placement == "reward")

    @classmethod
    def from_config(cls, config: Any) -> Raft:
        return cls(
            group_size=config.group_size,
            epochs=config.ppo_epochs,
            kl_coef=config.kl_coef,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            how=Surrogate(
                kl_placement=config.kl_placement, kl_estimator=config.kl_estimator, entropy_coef=config.entropy_coef
            ),
        )

    @torch.no_grad()
    def credit(self, batch: RolloutBatch, *, reduce: Reduce = alone) -> RolloutBatch:
        """The whole rollout batch with `advantages` and `stats` filled in, and with the mask of the best answers only."""
        best = best_of_groups(batch.score - kl_penalty(batch, self.how), batch.group)
        kept = replace(batch, mask=batch.mask & best.unsqueeze(-1))
        stats = {**batch.stats, **kl_figures(batch, reduce=reduce), "kept": float(best.float().mean())}
        return replace(kept, advantages=over_tokens(torch.ones_like(batch.score), kept), stats=stats)

    def policy_loss(self, scores: Scores, batch: RolloutBatch) -> LossTerms:
        """-A logp of each token `[b t]`, less the entropy bonus, plus the KL where it is placed in the loss."""
        assert batch.advantages is not None, "credit comes before the loss"
        mask = batch.mask
        logp, entropy = zero_padding(scores.logp, mask), zero_padding(scores.entropy, mask)
        imitation = -zero_padding(batch.advantages, mask) * logp
        loss = imitation
        if self.how.kl_placement == "loss" and batch.kl_coef:
            assert batch.logp_ref is not None, "a KL in the loss needs the reference's log-probabilities"
            found = estimate(logp, zero_padding(batch.logp_ref, mask), self.how.kl_estimator)
            loss = loss + batch.kl_coef * zero_padding(found, mask)
        if self.how.entropy_coef:  # never as 0 x entropy: a backward pass through the entropy is not free
            loss = loss - self.how.entropy_coef * entropy
        return LossTerms(loss=loss, means={"policy_loss": imitation.detach(), "entropy": entropy.detach()})

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Beta for the next rollout batch; fixed unless there is a target."""
        if self.kl_target is None:
            return kl_coef
        return adapt_kl_coef(kl_coef, kl, self.kl_target, n, self.kl_horizon)

    def describe(self) -> str:
        """What the run optimises, and what moves its optimum."""
        line = f"RAFT: the likelihood of the best of {self.group_size} answers"
        if self.kl_coef and self.how.kl_placement == "reward":
            line += f", ranked by score - {self.kl_coef:g} KL ({self.how.kl_estimator})"
        elif self.kl_coef:
            return f"{line} + {self.kl_coef:g} KL ({self.how.kl_estimator}) on them"
        return f"{line}; nothing holds the policy at the reference: it narrows for as long as it runs"


def best_of_groups(reward: Tensor, group: Tensor) -> Bool[Tensor, " b"]:
    """The first row with the highest reward of each group; none of a group whose rewards are all equal."""
    best = torch.zeros_like(group, dtype=torch.bool)
    for number in torch.unique(group):
        rows = (group == number).nonzero().squeeze(-1)
        if bool((reward[rows] != reward[rows[0]]).any()):
            best[rows[reward[rows].argmax()]] = True
    return best
