"""REINFORCE with a leave-one-out baseline: each answer measured against the other answers to its prompt. Read from the top.

**Sampled.** k = `group_size` completions of each prompt, each scored once.

**Credited** (`credit`, over the whole rollout batch, no gradients). A completion is one action, its reward what it scored less what it
paid for leaving the reference; the baseline is the mean reward of the other k - 1, which does not depend on the completion itself, so that
the gradient stays unbiased:

    R_i = score_i - beta sum_t (logp_old - logp_ref)[i, t]
    A_i = R_i - mean of R_j over the other completions j of the same prompt

**Minimised** (`policy_loss`, `epochs` times), with the ratio of the whole answer, rho = exp(sum_t (logp - logp_old)):

    max(-A rho, -A clip(rho, 1 - eps, 1 + eps))      mean over completions

On fresh answers rho is 1 and the gradient is that of -A sum_t logp. `ratio_level: token` has a ratio and a clip for each token, as some
codebases do; then the loss is a mean over tokens (`loss_reduction`).

**Assumed.** As in ppo.py, the policy samples from its whole distribution at the rollout temperature.

Kool, van Hoof and Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free!"; for language models Ahmadian et al. (2402.14740).
Details with sources, metrics, signs of failure: docs/algorithms/rloo.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from trimtab.algos import Needs
from trimtab.algos.surrogate import (
    Surrogate,
    clip_bounds,
    describe_kl,
    kl_figures,
    kl_penalty,
    over_tokens,
    policy_terms,
    without_truncated,
)
from trimtab.ops.advantages import Baseline, Normalisation, group_advantages
from trimtab.ops.kl import adapt_kl_coef
from trimtab.ops.masked import Reduce, alone
from trimtab.ops.reduction import Reduction
from trimtab.types import LossTerms, RolloutBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Rloo:
    """RLOO with the keys of its config.

    Attributes:
        group_size: k, completions per prompt.
        epochs: passes over each rollout batch (`ppo_epochs`).
        kl_coef, kl_target, kl_horizon: beta; with a target it is steered.
        baseline, normalisation: of the group (`ops.advantages`).
        how: ratio, clip and where the KL is.
        token_reduction: the mean over tokens, where tokens have ratios.
        mask_truncated: answers that did not end by themselves are not trained on.
        dynamic: groups of equal scores are replaced by other prompts' (`dynamic_sampling`).
    """

    kind: ClassVar[Literal["online"]] = "online"
    unit: ClassVar[Literal["completion"]] = "completion"

    group_size: int = 4
    epochs: int = 1
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    baseline: Baseline = "leave_one_out"
    normalisation: Normalisation = "none"
    how: Surrogate = field(default_factory=lambda: Surrogate(level="sequence"))
    token_reduction: Reduction = "token"
    mask_truncated: bool = False
    dynamic: bool = False

    @property
    def needs(self) -> Needs:
        kl = self.kl_coef > 0
        return Needs(reference=kl, critic=False, reward=True, old=kl and self.how.kl_placement == "reward")

    @property
    def reduction(self) -> Reduction:
        """One loss per answer, unless tokens have ratios of their own."""
        return self.token_reduction if self.how.level == "token" else "row"

    @classmethod
    def from_config(cls, config: Any) -> Rloo:
        low, high = clip_bounds(config)
        return cls(
            group_size=config.group_size,
            epochs=config.ppo_epochs,
            kl_coef=config.kl_coef,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            baseline=config.baseline,
            normalisation=config.advantage_norm,
            how=Surrogate(
                level=config.ratio_level,
                clip_low=low,
                clip_high=high,
                dual_clip=config.dual_clip,
                kl_placement=config.kl_placement,
                kl_estimator=config.kl_estimator,
                entropy_coef=config.entropy_coef,
            ),
            token_reduction=config.loss_reduction,
            mask_truncated=config.mask_truncated,
            dynamic=config.dynamic_sampling,
        )

    @torch.no_grad()
    def credit(self, batch: RolloutBatch, *, reduce: Reduce = alone) -> RolloutBatch:
        """The whole rollout batch with `advantages` and `stats` filled in."""
        rewards = batch.score - kl_penalty(batch, self.how)
        advantages = group_advantages(rewards, batch.group, self.baseline, self.normalisation, reduce=reduce)
        stats = {
            **batch.stats,
            **kl_figures(batch, reduce=reduce),
            "advantage_std": float(advantages.std(correction=0)),
        }
        if self.mask_truncated:
            batch = without_truncated(batch)
        return replace(batch, advantages=over_tokens(advantages, batch), stats=stats)

    def policy_loss(self, scores: Scores, batch: RolloutBatch) -> LossTerms:
        """The clipped surrogate of each answer `[b]` (of each token `[b t]` with `ratio_level: token`)."""
        return policy_terms(scores, batch, self.how)

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Beta for the next rollout batch; fixed unless there is a target."""
        if self.kl_target is None:
            return kl_coef
        return adapt_kl_coef(kl_coef, kl, self.kl_target, n, self.kl_horizon)

    def describe(self) -> str:
        """What the run optimises, and what moves its optimum."""
        line = f"REINFORCE, baseline {self.baseline}; {describe_kl(self.how, self.kl_coef, self.kl_target)}"
        if self.normalisation == "group":
            line += "; dividing by the group's deviation weighs prompts by difficulty: another objective than the mean reward"
        if self.how.level == "token" and self.token_reduction == "sequence":
            line += "; 1 / length favours short right answers and spares long wrong ones"
        return line
