"""Proximal policy optimisation of a language model against a reward, with a critic. Read from the top.

**Sampled.** For each prompt the policy writes `group_size` completions. Each is scored once, when it is complete.
Three numbers are kept for every token: its log-probability under the policy that wrote it (`logp_old`), its
log-probability under the reference, which is the policy as it was when the run began (`logp_ref`), and the critic's
value of the state before it.

**Credited** (`credit`, once per rollout batch, no gradients). The reward of a token is what the policy pays for
leaving the reference there, and the last token also receives the score; GAE turns rewards and values into advantages:

    R[t] = -beta (logp_old - logp_ref)[t] + score 1[t = last]
    delta[t] = R[t] + gamma V[t+1] - V[t],    A[t] = delta[t] + gamma lambda A[t+1],    returns = A + V
    A is then whitened over all tokens of the rollout batch; the returns are not.

**Minimised** (`policy_loss`, `value_loss`, `epochs` times over the same rollouts, in minibatches), with
rho = exp(logp - logp_old):

    policy   max(-A rho, -A clip(rho, 1 - eps, 1 + eps))                        - entropy_coef H
    critic   vf_coef 1/2 max((v - returns)^2, (clip(v, v_old +- eps_v) - returns)^2)

both as means over the tokens of a minibatch. The two roles have a backward pass and a gradient clip each.

**Assumed.** The policy samples from its whole distribution at the rollout temperature (no top-k, no top-p: with them
`logp_old` would not be the probability of what was drawn), and every log-probability above is taken at that
temperature.

Schulman et al. (1707.06347); for language models Ziegler et al. (1909.08593) and Stiennon et al. (2009.01325).
Details with sources, what each metric means, signs of failure: docs/algorithms/ppo.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.algos import Needs
from trimtab.ops.advantages import gae, shaped_rewards
from trimtab.ops.kl import CONVERGES_TO, Estimator, Placement, adapt_kl_coef, estimate, k1, k3
from trimtab.ops.losses import dual_clip, ppo_policy_loss, value_loss
from trimtab.ops.masked import Reduce, alone, masked_mean, masked_sum, masked_var, whiten, zero_padding
from trimtab.ops.stats import explained_variance
from trimtab.types import LossTerms, RolloutBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Ppo:
    """PPO with the keys of its config.

    Attributes:
        group_size: completions per prompt.
        epochs: passes over each rollout batch (`ppo_epochs`).
        kl_coef: beta at the start.
        kl_target: KL per completion that the controller holds; None = beta is fixed.
        kl_horizon: over how many completions the controller moves beta.
        kl_placement, kl_estimator: where the KL penalty is put, and which estimate of it.
        gamma, gae_lambda: of GAE.
        clip_low, clip_high: a ratio outside [1 - low, 1 + high] is clipped.
        dual_clip: c, the bound on the loss of tokens with a negative advantage; None = off.
        clip_range_value: eps_v in units of the running standard deviation of the scores; None = off.
        vf_coef, entropy_coef: weights of the critic's loss and of the entropy bonus.
        whiten_advantages: advantages to mean 0 and std 1, over the tokens of the rollout batch.
        whiten_rewards: per-token rewards to std 1, their mean kept.
    """

    kind: ClassVar[Literal["online"]] = "online"
    needs: ClassVar[Needs] = Needs(reference=True, critic=True, reward=True)
    reduction: ClassVar[Literal["token"]] = "token"
    unit: ClassVar[Literal["completion"]] = "completion"

    group_size: int = 1
    epochs: int = 4
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    kl_placement: Placement = "reward"
    kl_estimator: Estimator = "k1"
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    clip_range_value: float | None = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    whiten_rewards: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Ppo:
        """`clip_range` is both bounds unless `clip_range_low` or `clip_range_high` names one."""
        low, high = config.clip_range_low, config.clip_range_high
        return cls(
            group_size=config.group_size,
            epochs=config.ppo_epochs,
            kl_coef=config.kl_coef,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            kl_placement=config.kl_placement,
            kl_estimator=config.kl_estimator,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            clip_low=config.clip_range if low is None else low,
            clip_high=config.clip_range if high is None else high,
            dual_clip=config.dual_clip,
            clip_range_value=config.clip_range_value,
            vf_coef=config.vf_coef,
            entropy_coef=config.entropy_coef,
            whiten_advantages=config.whiten_advantages,
            whiten_rewards=config.whiten_rewards,
        )

    @torch.no_grad()
    def credit(self, batch: RolloutBatch, *, reduce: Reduce = alone) -> RolloutBatch:
        """The whole rollout batch with `advantages`, `returns` and `stats` filled in.

        Needs `logp_ref` and `values`. All moments are taken here, before anything is split into minibatches.
        """
        assert batch.logp_ref is not None, "PPO needs the reference's log-probabilities"
        assert batch.values is not None, "PPO needs the critic's values"
        mask = batch.mask
        kl_in_reward = batch.kl_coef if self.kl_placement == "reward" else 0.0
        rewards = shaped_rewards(batch.logp_old, batch.logp_ref, batch.score, mask, kl_in_reward, self.kl_estimator)
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=reduce)
        advantages, returns = gae(rewards, batch.values, mask, self.gamma, self.gae_lambda)
        used = whiten(advantages, mask, reduce=reduce) if self.whiten_advantages else advantages

        completions = reduce(mask.any(dim=-1).sum()).clamp(min=1)
        stats = {
            "kl": masked_sum(k1(batch.logp_old, batch.logp_ref), mask, reduce=reduce) / completions,
            "kl_k3": masked_sum(k3(batch.logp_old, batch.logp_ref), mask, reduce=reduce) / completions,
            "kl_per_token": masked_mean(k1(batch.logp_old, batch.logp_ref), mask, reduce=reduce),
            "kl_k3_per_token": masked_mean(k3(batch.logp_old, batch.logp_ref), mask, reduce=reduce),
            "explained_variance": explained_variance(batch.values, returns, mask, reduce=reduce),
            "value_mean": masked_mean(batch.values, mask, reduce=reduce),
            "return_mean": masked_mean(returns, mask, reduce=reduce),
            "advantage_mean": masked_mean(advantages, mask, reduce=reduce),
            "advantage_std": masked_var(advantages, mask, reduce=reduce).sqrt(),
        }
        return replace(
            batch,
            advantages=used,
            returns=returns,
            stats={**batch.stats, **{name: float(figure) for name, figure in stats.items()}},
        )

    def policy_loss(self, scores: Scores, batch: RolloutBatch) -> LossTerms:
        """The clipped surrogate of each token, less the entropy bonus, plus the KL where it is placed in the loss."""
        assert batch.advantages is not None, "credit comes before the loss"
        logp, logp_old = zero_padding(scores.logp, batch.mask), zero_padding(batch.logp_old, batch.mask)
        surrogate, clipped = ppo_policy_loss(logp, logp_old, batch.advantages, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            surrogate, held = dual_clip(surrogate, batch.advantages, self.dual_clip)
            clipped = clipped | held
        loss = surrogate
        if self.kl_placement == "loss":
            assert batch.logp_ref is not None, "PPO needs the reference's log-probabilities"
            logp_ref = zero_padding(batch.logp_ref, batch.mask)
            loss = loss + batch.kl_coef * estimate(logp, logp_ref, self.kl_estimator)
        if self.entropy_coef:  # never as 0 x entropy: a backward pass through the entropy is not free
            loss = loss - self.entropy_coef * zero_padding(scores.entropy, batch.mask)

        ratio = zero_padding(torch.exp(logp.detach() - logp_old), batch.mask)
        return LossTerms(
            loss=loss,
            means={
                "policy_loss": surrogate.detach(),
                "entropy": zero_padding(scores.entropy.detach(), batch.mask),
                "approx_kl": k3(logp_old, logp.detach()),  # rho - 1 - log rho: how far this update has moved
                "clip_fraction": clipped.to(ratio.dtype),
                "ratio_mean": ratio,
            },
            maxima={"ratio_max": ratio},
        )

    def value_loss(self, values: Float[Tensor, "b t"], batch: RolloutBatch) -> LossTerms:
        """The critic's clipped squared error at each token, times `vf_coef`."""
        assert batch.values is not None, "PPO needs the critic's values"
        assert batch.returns is not None, "credit comes before the loss"
        eps = None if self.clip_range_value is None else self.clip_range_value * batch.score_std
        values, values_old = zero_padding(values, batch.mask), zero_padding(batch.values, batch.mask)
        loss, clipped = value_loss(values, values_old, batch.returns, eps)
        return LossTerms(
            loss=self.vf_coef * loss,
            means={"value_loss": loss.detach(), "value_clip_fraction": clipped.to(loss.dtype)},
        )

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Beta after a batch of n completions whose KL was `kl` (`stats["kl"]`); unchanged without a target."""
        if self.kl_target is None:
            return kl_coef
        return adapt_kl_coef(kl_coef, kl, self.kl_target, n, self.kl_horizon)

    def describe(self) -> str:
        """What the run optimises, and what the chosen KL placement and estimator converge to."""
        beta = f"beta {self.kl_coef:g}"
        if self.kl_target is not None:
            beta += f" at first, adapted to hold a KL of {self.kl_target:g} nats per completion"
        limit = CONVERGES_TO[self.kl_placement, self.kl_estimator]
        if self.kl_placement == "loss" and self.whiten_advantages:
            limit += "; whitening makes beta count as beta x std of the advantages"
        return f"KL penalty {self.kl_estimator} in the {self.kl_placement}, {beta}: converges to {limit}"
