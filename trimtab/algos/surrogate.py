"""What the algorithms without a critic have in common: how a policy that has moved since it sampled is measured, and the KL they report.

Functions, not a parent: each algorithm's own file says what is credited and what is minimised.

Shapes: b completions, t scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.kl import CONVERGES_TO, Estimator, Placement, estimate, k1, k3
from trimtab.ops.losses import cispo_loss, dual_clip, ppo_policy_loss, sequence_log_ratio
from trimtab.ops.masked import Reduce, alone, masked_mean, masked_sum, zero_padding
from trimtab.types import LossTerms, RolloutBatch, Scores

Level = Literal["token", "sequence", "sequence_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """How the loss of a policy is formed from advantages.

    Attributes:
        level: what has a ratio: each token; the answer as one action (`sequence`); the answer per token (`sequence_mean`).
        objective: the clipped surrogate, or CISPO's capped weight (tokens only).
        clip_low, clip_high: a ratio outside [1 - low, 1 + high] is clipped; None = never, as on a policy's own fresh answers.
        dual_clip: c of the bound on losses with a negative advantage; None = off.
        cispo_cap: the largest weight of CISPO.
        kl_placement, kl_estimator: the KL penalty; `policy_loss` adds it where it is placed in the loss.
        entropy_coef: weight of the entropy bonus.
    """

    level: Level = "token"
    objective: Literal["clip", "cispo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    kl_placement: Placement = "reward"
    kl_estimator: Estimator = "k1"
    entropy_coef: float = 0.0


def clip_bounds(config: Any) -> tuple[float, float]:
    """`clip_range` is both bounds unless `clip_range_low` or `clip_range_high` names one."""
    low, high = config.clip_range_low, config.clip_range_high
    return (config.clip_range if low is None else low, config.clip_range if high is None else high)


def policy_terms(scores: Scores, batch: RolloutBatch, how: Surrogate) -> LossTerms:
    """The loss of each token `[b t]`, or of each answer `[b]` where the ratio is the answer's.

    Tokens that `batch.mask` leaves out have loss 0. Terms that are added to an answer's loss (KL, entropy) are summed over its tokens
    where the answer is one action, and averaged where its ratio is a mean.
    """
    assert batch.advantages is not None, "credit comes before the loss"
    mask = batch.mask
    logp, logp_old = zero_padding(scores.logp, mask), zero_padding(batch.logp_old, mask)
    entropy = zero_padding(scores.entropy, mask)
    tokens = mask.sum(dim=-1).clamp(min=1)

    if how.level == "token":
        advantages, log_ratio = zero_padding(batch.advantages, mask), logp - logp_old
        if how.objective == "cispo":
            surrogate, clipped = cispo_loss(logp, logp_old, advantages, how.cispo_cap)
        else:
            surrogate, clipped = ppo_policy_loss(logp, logp_old, advantages, how.clip_low, how.clip_high)
    else:
        advantages = zero_padding(batch.advantages, mask).sum(dim=-1) / tokens
        log_ratio = sequence_log_ratio(logp, logp_old, mask, mean=how.level == "sequence_mean")
        surrogate, clipped = ppo_policy_loss(
            log_ratio, torch.zeros_like(log_ratio), advantages, how.clip_low, how.clip_high
        )
    if how.dual_clip is not None:
        surrogate, held = dual_clip(surrogate, advantages, how.dual_clip)
        clipped = clipped | held

    def level(x: Float[Tensor, "b t"]) -> Tensor:
        return x if how.level == "token" else x.sum(dim=-1) if how.level == "sequence" else x.sum(dim=-1) / tokens

    loss = surrogate
    if how.kl_placement == "loss" and batch.kl_coef:
        assert batch.logp_ref is not None, "a KL in the loss needs the reference's log-probabilities"
        logp_ref = zero_padding(batch.logp_ref, mask)
        loss = loss + batch.kl_coef * level(zero_padding(estimate(logp, logp_ref, how.kl_estimator), mask))
    if how.entropy_coef:  # never as 0 x entropy: a backward pass through the entropy is not free
        loss = loss - how.entropy_coef * level(entropy)

    ratio = torch.exp(log_ratio.detach())
    per_token = how.level == "token"
    return LossTerms(
        loss=loss,
        means={
            "policy_loss": surrogate.detach(),
            "entropy": entropy.detach() if per_token else entropy.detach().sum(dim=-1) / tokens,
            "approx_kl": torch.expm1(log_ratio.detach()) - log_ratio.detach(),  # how far this update has moved
            "clip_fraction": clipped.to(ratio.dtype),
            "ratio_mean": ratio,
        },
        maxima={"ratio_max": zero_padding(ratio, mask) if per_token else ratio},
    )


def kl_figures(batch: RolloutBatch, *, reduce: Reduce = alone) -> dict[str, float]:
    """KL to the reference of a rollout batch, per answer and per token, by k1 and k3; nothing without a reference."""
    if batch.logp_ref is None:
        return {}
    mask = batch.mask
    completions = reduce(mask.any(dim=-1).sum()).clamp(min=1)
    figures = {}
    for name, estimator in (("kl", k1), ("kl_k3", k3)):
        found = estimator(zero_padding(batch.logp_old, mask), zero_padding(batch.logp_ref, mask))
        figures[name] = float(masked_sum(found, mask, reduce=reduce) / completions)
        figures[f"{name}_per_token"] = float(masked_mean(found, mask, reduce=reduce))
    return figures


def kl_penalty(batch: RolloutBatch, how: Surrogate) -> Float[Tensor, " b"]:
    """beta times the KL of each answer, summed over its tokens, where the penalty is part of the reward; else 0."""
    if how.kl_placement == "loss" or not batch.kl_coef:
        return torch.zeros_like(batch.score)
    assert batch.logp_ref is not None, "a KL in the reward needs the reference's log-probabilities"
    found = estimate(
        zero_padding(batch.logp_old, batch.mask), zero_padding(batch.logp_ref, batch.mask), how.kl_estimator
    )
    return batch.kl_coef * zero_padding(found, batch.mask).sum(dim=-1)


def over_tokens(advantages: Float[Tensor, " b"], batch: RolloutBatch) -> Float[Tensor, "b t"]:
    """An answer's advantage at each of its tokens, 0 on padding."""
    return advantages.unsqueeze(-1) * batch.mask.to(advantages.dtype)


def without_truncated(batch: RolloutBatch) -> RolloutBatch:
    """The batch with answers that did not end by themselves masked out: they are sampled and credited, and not trained on."""
    return replace(batch, mask=batch.mask & batch.finished.unsqueeze(-1))


def describe_kl(how: Surrogate, kl_coef: float, kl_target: float | None) -> str:
    """A half-sentence for the start line: the penalty, and what the run converges to."""
    if not kl_coef:
        return "no KL penalty: converges to the argmax of the reward"
    beta = f"beta {kl_coef:g}"
    if kl_target is not None:
        beta += f" at first, adapted to hold a KL of {kl_target:g} nats per completion"
    limit = CONVERGES_TO[how.kl_placement, how.kl_estimator]
    return f"KL penalty {how.kl_estimator} in the {how.kl_placement}, {beta}: converges to {limit}"
