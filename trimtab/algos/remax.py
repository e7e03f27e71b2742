"""ReMax: REINFORCE whose baseline is the score of the policy's own greedy answer. Read from the top.

**Sampled.** `group_size` completions of each prompt (1 unless set) and, once per prompt, the greedy answer; all are scored.

**Credited** (`credit`, over the whole rollout batch, no gradients). A completion is one action:

    A_i = score_i - beta sum_t (logp_old - logp_ref)[i, t] - score of the greedy answer

The baseline depends on the prompt and on the policy, not on the completion, so the gradient stays unbiased.

**Minimised** (`policy_loss`): -A sum_t logp, mean over completions; where a batch is used again (`epochs` above 1), -A rho with the ratio
of the whole answer, unclipped.

**Assumed.** As in ppo.py, the policy samples from its whole distribution at the rollout temperature; the greedy answer costs one more
completion per prompt and is never trained on.

Li et al. (2310.10505). Details with sources, metrics, signs of failure: docs/algorithms/remax.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from trimtab.algos import Needs
from trimtab.algos.surrogate import Surrogate, describe_kl, kl_figures, kl_penalty, over_tokens, policy_terms
from trimtab.ops.kl import adapt_kl_coef
from trimtab.ops.masked import Reduce, alone
from trimtab.types import LossTerms, RolloutBatch, Scores

UNCLIPPED = Surrogate(level="sequence", clip_low=1.0, clip_high=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remax:
    """ReMax with the keys of its config.

    Attributes:
        group_size: completions per prompt.
        epochs: passes over each rollout batch (`ppo_epochs`).
        kl_coef, kl_target, kl_horizon: beta; with a target it is steered.
        how: where the KL is.
    """

    kind: ClassVar[Literal["online"]] = "online"
    reduction: ClassVar[Literal["row"]] = "row"
    unit: ClassVar[Literal["completion"]] = "completion"

    group_size: int = 1
    epochs: int = 1
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    how: Surrogate = field(default=UNCLIPPED)

    @property
    def needs(self) -> Needs:
        kl = self.kl_coef > 0
        return Needs(reference=kl, critic=False, reward=True, greedy=True, old=kl and self.how.kl_placement == "reward")

    @classmethod
    def from_config(cls, config: Any) -> Remax:
        return cls(
            group_size=config.group_size,
            epochs=config.ppo_epochs,
            kl_coef=config.kl_coef,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            how=replace(
                UNCLIPPED,
                kl_placement=config.kl_placement,
                kl_estimator=config.kl_estimator,
                entropy_coef=config.entropy_coef,
            ),
        )

    @torch.no_grad()
    def credit(self, batch: RolloutBatch, *, reduce: Reduce = alone) -> RolloutBatch:
        """The whole rollout batch with `advantages` and `stats` filled in; needs `greedy`, the greedy answer's score."""
        assert batch.greedy is not None, "ReMax needs the scores of the greedy answers"
        advantages = batch.score - kl_penalty(batch, self.how) - batch.greedy
        stats = {
            **batch.stats,
            **kl_figures(batch, reduce=reduce),
            "advantage_std": float(advantages.std(correction=0)),
            "reward/greedy": float(batch.greedy.mean()),
        }
        return replace(batch, advantages=over_tokens(advantages, batch), stats=stats)

    def policy_loss(self, scores: Scores, batch: RolloutBatch) -> LossTerms:
        """-A rho of each answer `[b]`."""
        return policy_terms(scores, batch, self.how)

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Beta for the next rollout batch; fixed unless there is a target."""
        if self.kl_target is None:
            return kl_coef
        return adapt_kl_coef(kl_coef, kl, self.kl_target, n, self.kl_horizon)

    def describe(self) -> str:
        """What the run optimises, and what moves its optimum."""
        return f"REINFORCE, baseline: the greedy answer's score; {describe_kl(self.how, self.kl_coef, self.kl_target)}"
