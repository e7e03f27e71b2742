"""Group-relative policy optimisation, and the variants that differ from it in a setting or two. Read from the top.

**Sampled.** k = `group_size` completions of each prompt, each scored once.

**Credited** (`credit`, over the whole rollout batch, no gradients). The advantage of a completion is its score against its group's, and
every token of it has that advantage:

    A_i = (score_i - mean of the group) / (standard deviation of the group + 1e-4)

**Minimised** (`policy_loss`, `epochs` times), with rho = exp(logp - logp_old) of each token:

    max(-A rho, -A clip(rho, 1 - low, 1 + high)) + beta k3(logp, logp_ref)

as a mean over completions of the mean over their tokens.

| preset | what it changes | source |
|---|---|---|
| `grpo` | nothing; beta 0.04, k3 in the loss | Shao et al. 2402.03300 |
| `dr_grpo` | no division by the deviation; sum over tokens / longest answer; beta 0 | Liu et al. 2503.20783 |
| `dapo` | clip 0.2 / 0.28, mean over tokens, dynamic sampling, overlong penalty, truncated masked; beta 0 | Yu et al. 2503.14476 |
| `gspo` | one ratio per answer, exp(mean log rho), clip 3e-4 / 4e-4; beta 0 | Zheng et al. 2507.18071 |
| `cispo` | -stopgrad(min(rho, 5)) A logp instead of the clipped surrogate, mean over all tokens; beta 0 | MiniMax 2506.13585 |

**Assumed.** As in ppo.py, the policy samples from its whole distribution at the rollout temperature.

What these settings do to the optimum, and details with sources: docs/algorithms/grpo.md.
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
class Grpo:
    """GRPO with the keys of its config; the attributes are those of `Rloo`, with other defaults.

    Attributes:
        preset: the variant's name, for the start line.
    """

    kind: ClassVar[Literal["online"]] = "online"
    unit: ClassVar[Literal["completion"]] = "completion"

    preset: str = "grpo"
    group_size: int = 8
    epochs: int = 1
    kl_coef: float = 0.04
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    baseline: Baseline = "mean"
    normalisation: Normalisation = "group"
    how: Surrogate = field(default_factory=lambda: Surrogate(kl_placement="loss", kl_estimator="k3"))
    token_reduction: Reduction = "sequence"
    mask_truncated: bool = False
    dynamic: bool = False

    @property
    def needs(self) -> Needs:
        kl = self.kl_coef > 0
        return Needs(reference=kl, critic=False, reward=True, old=kl and self.how.kl_placement == "reward")

    @property
    def reduction(self) -> Reduction:
        """One loss per answer where the ratio is the answer's, else the mean over tokens that the variant takes."""
        return self.token_reduction if self.how.level == "token" else "row"

    @classmethod
    def from_config(cls, config: Any) -> Grpo:
        low, high = clip_bounds(config)
        return cls(
            preset=config.preset,
            group_size=config.group_size,
            epochs=config.ppo_epochs,
            kl_coef=config.kl_coef,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            baseline=config.baseline,
            normalisation=config.advantage_norm,
            how=Surrogate(
                level=config.ratio_level,
                objective=config.policy_objective,
                clip_low=low,
                clip_high=high,
                dual_clip=config.dual_clip,
                cispo_cap=config.cispo_cap,
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
        """The whole rollout batch with `advantages` and `stats` filled in; a group of equal scores has advantages of 0."""
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
        """The surrogate of each token `[b t]`, or of each answer `[b]` with a sequence-level ratio, and the KL where it is in the loss."""
        return policy_terms(scores, batch, self.how)

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Beta for the next rollout batch; fixed unless there is a target."""
        if self.kl_target is None:
            return kl_coef
        return adapt_kl_coef(kl_coef, kl, self.kl_target, n, self.kl_horizon)

    def describe(self) -> str:
        """What the run optimises, and what moves its optimum."""
        line = f"{self.preset}: {describe_kl(self.how, self.kl_coef, self.kl_target)}"
        if self.normalisation == "group":
            line += "; dividing by the group's deviation weighs prompts by difficulty"
            if self.kl_coef:
                line += " and makes beta count as beta x that deviation"
        if self.how.level == "token" and self.token_reduction == "sequence":
            line += "; 1 / length favours short right answers and spares long wrong ones"
        return line
