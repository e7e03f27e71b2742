"""REINFORCE++: PPO's reward and clip without its critic, advantages normalised over the whole batch. Read from the top.

**Sampled.** `group_size` completions of each prompt (1 unless set), each scored once.

**Credited** (`credit`, over the whole rollout batch, no gradients). Tokens pay for leaving the reference, the last one receives the score;
the advantage of a token is its reward to go, normalised over all tokens of the batch:

    R[t] = -beta (logp_old - logp_ref)[t] + score 1[t = last],    G[t] = R[t] + gamma G[t+1],    A = (G - mean) / std

With more than one completion per prompt the mean score of the group is taken off the score first (the paper's variant with a baseline).

**Minimised** (`policy_loss`, `epochs` times), with rho = exp(logp - logp_old) of each token, mean over all tokens:

    max(-A rho, -A clip(rho, 1 - eps, 1 + eps))

**Assumed.** As in ppo.py. Normalising makes beta count as beta over the standard deviation of the returns: the optimum stays that of PPO.

Hu et al. (2501.03262). Details with sources, metrics, signs of failure: docs/algorithms/reinforce_pp.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from trimtab.algos import Needs
from trimtab.algos.surrogate import Surrogate, clip_bounds, describe_kl, kl_figures, policy_terms
from trimtab.ops.advantages import discounted_returns, group_baseline, shaped_rewards
from trimtab.ops.kl import adapt_kl_coef
from trimtab.ops.masked import Reduce, alone, masked_mean, masked_var, whiten
from trimtab.types import LossTerms, RolloutBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforcePp:
    """REINFORCE++ with the keys of its config.

    Attributes:
        group_size: completions per prompt; above 1 with the group's mean as a baseline.
        epochs: passes over each rollout batch (`ppo_epochs`).
        kl_coef, kl_target, kl_horizon: beta; with a target it is steered.
        gamma: discount of rewards to go.
        how: clip and where the KL is.
    """

    kind: ClassVar[Literal["online"]] = "online"
    reduction: ClassVar[Literal["token"]] = "token"
    unit: ClassVar[Literal["completion"]] = "completion"

    group_size: int = 1
    epochs: int = 1
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    gamma: float = 1.0
    how: Surrogate = field(default_factory=Surrogate)

    @property
    def needs(self) -> Needs:
        kl = self.kl_coef > 0
        return Needs(reference=kl, critic=False, reward=True, old=kl and self.how.kl_placement == "reward")

    @classmethod
    def from_config(cls, config: Any) -> ReinforcePp:
        low, high = clip_bounds(config)
        return cls(
            group_size=config.group_size,
            epochs=config.ppo_epochs,
            kl_coef=config.kl_coef,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            gamma=config.gamma,
            how=Surrogate(
                clip_low=low,
                clip_high=high,
                dual_clip=config.dual_clip,
                kl_placement=config.kl_placement,
                kl_estimator=config.kl_estimator,
                entropy_coef=config.entropy_coef,
            ),
        )

    @torch.no_grad()
    def credit(self, batch: RolloutBatch, *, reduce: Reduce = alone) -> RolloutBatch:
        """The whole rollout batch with `advantages` and `stats` filled in."""
        score, mask = batch.score, batch.mask
        if self.group_size > 1:
            score = score - group_baseline(score, batch.group, "mean")
        beta = batch.kl_coef if self.how.kl_placement == "reward" else 0.0
        reference = batch.logp_old if batch.logp_ref is None else batch.logp_ref
        rewards = shaped_rewards(batch.logp_old, reference, score, mask, beta, self.how.kl_estimator)
        returns = discounted_returns(rewards, mask, self.gamma)
        stats = {
            **batch.stats,
            **kl_figures(batch, reduce=reduce),
            "return_mean": float(masked_mean(returns, mask, reduce=reduce)),
            "advantage_std": float(masked_var(returns, mask, reduce=reduce).sqrt()),
        }
        return replace(batch, advantages=whiten(returns, mask, reduce=reduce), stats=stats)

    def policy_loss(self, scores: Scores, batch: RolloutBatch) -> LossTerms:
        """The clipped surrogate of each token `[b t]`."""
        return policy_terms(scores, batch, self.how)

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Beta for the next rollout batch; fixed unless there is a target."""
        if self.kl_target is None:
            return kl_coef
        return adapt_kl_coef(kl_coef, kl, self.kl_target, n, self.kl_horizon)

    def describe(self) -> str:
        """What the run optimises, and what moves its optimum."""
        line = f"REINFORCE++; {describe_kl(self.how, self.kl_coef, self.kl_target)}"
        if self.how.kl_placement == "loss" and self.kl_coef:
            line += "; normalising makes beta count as beta x std of the returns"
        return line
