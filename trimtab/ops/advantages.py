"""From a score per completion to an advantage per token, or per completion.

Shapes: b completions, t scored tokens padded on the right. `values[t]` is the value of the state *before* token t;
the value beyond a completion's last token is 0, also when the length limit cut it. Padding of every result is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.ops.kl import Estimator, estimate
from trimtab.ops.masked import Reduce, alone, is_last, zero_padding

Baseline = Literal["leave_one_out", "mean", "none"]
Normalisation = Literal["group", "batch", "none"]


def shaped_rewards(
    logp: Float[Tensor, "b t"],
    logp_ref: Float[Tensor, "b t"],
    score: Float[Tensor, " b"],
    mask: Bool[Tensor, "b t"],
    kl_coef: float,
    estimator: Estimator = "k1",
) -> Float[Tensor, "b t"]:
    """R[t] = -beta k[t] + score 1[t = last]: the KL is paid token by token, the score arrives with the last token.

    Ziegler et al. (1909.08593), Stiennon et al. (2009.01325). `logp` are those of the policy that sampled; with k1 the rewards
    of a completion sum to score - beta log(pi / pi_ref), whose maximiser is pi_ref exp(score / beta) up to a
    constant.
    """
    penalty = zero_padding(-kl_coef * estimate(logp, logp_ref, estimator), mask)
    return penalty + score.unsqueeze(-1) * is_last(mask)


def gae(
    rewards: Float[Tensor, "b t"],
    values: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Generalised advantage estimation, Schulman et al. (1506.02438), equation 16.

        delta[t] = R[t] + gamma V[t+1] - V[t]
        A[t] = delta[t] + gamma lambda A[t+1]
        returns[t] = A[t] + V[t]

    Returns advantages and returns. lambda = 0 is the one-step error, lambda = 1 the Monte Carlo return less the value.
    """
    rewards, values = zero_padding(rewards, mask), zero_padding(values, mask)
    advantages = torch.zeros_like(rewards)
    value_after = advantage_after = torch.zeros_like(values[:, 0])  # beyond the last token; padding keeps them at 0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        advantages[:, t] = advantage_after = delta + gamma * lam * advantage_after
        value_after = values[:, t]
    return advantages, advantages + values


def discounted_returns(rewards: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], gamma: float) -> Float[Tensor, "b t"]:
    """G[t] = R[t] + gamma G[t+1]: the reward to go, without a critic."""
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return returns


# ------------------------------------------------------------------------------------------------- several answers a prompt


def group_mean(score: Float[Tensor, " b"], group: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The mean score of each completion's group; groups are whole and may have any size."""
    index, count = _members(group, score)
    first = _first(score, index, count)
    return first + (torch.zeros_like(count).index_add(0, index, score - first) / count)[index]


def group_std(score: Float[Tensor, " b"], group: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The standard deviation of each completion's group, sqrt(sum (x - mean)^2 / (k - 1)); 0 for a group of one."""
    index, count = _members(group, score)
    squares = torch.zeros_like(count).index_add(0, index, (score - group_mean(score, group)) ** 2)
    return (squares / (count - 1).clamp(min=1)).sqrt()[index]


def group_baseline(score: Float[Tensor, " b"], group: Int[Tensor, " b"], kind: Baseline) -> Float[Tensor, " b"]:
    """What is taken off the score of each completion, of k to its prompt.

        leave_one_out   the mean of the other k - 1: independent of the completion, so the gradient stays unbiased
                        (Kool et al. 2019; RLOO, Ahmadian et al. 2402.14740)
        mean            the mean of all k (GRPO, 2402.03300): score - mean is (k - 1) / k of score - leave_one_out
        none            0

    A group of one has no others: its leave-one-out baseline is 0.
    """
    if kind == "none":
        return torch.zeros_like(score)
    if kind == "mean":
        return group_mean(score, group)
    index, count = _members(group, score)
    k, first = count[index], _first(score, index, count)
    others = torch.zeros_like(count).index_add(0, index, score - first)[index] - (score - first)
    return torch.where(k > 1, first + others / (k - 1), 0.0)


def group_advantages(
    score: Float[Tensor, " b"],
    group: Int[Tensor, " b"],
    baseline: Baseline,
    normalisation: Normalisation,
    *,
    eps: float = 1e-4,
    reduce: Reduce = alone,
) -> Float[Tensor, " b"]:
    """A = score - baseline, divided by the standard deviation (ddof 1) + eps of its group or of the batch, or by nothing.

    A group of equal scores has advantages of exactly 0. Dividing by a group's own deviation weighs prompts by how rarely or often
    they are answered well: it is another objective than the mean score (docs/algorithms/grpo.md, detail 3).

    Args:
        group: completions of one prompt share a number.
        reduce: adds moments over workers (see `masked`); groups are never split over workers.
    """
    advantages = score - group_baseline(score, group, baseline)
    if normalisation == "none":
        return advantages
    if normalisation == "group":
        return advantages / (group_std(score, group) + eps)
    count = reduce(torch.ones_like(score).sum())
    mean = reduce(advantages.sum()) / count
    std = (reduce(((advantages - mean) ** 2).sum()) / (count - 1).clamp(min=1)).sqrt()
    return (advantages - mean) / (std + eps)


def _first(score: Float[Tensor, " b"], index: Int[Tensor, " b"], count: Float[Tensor, " g"]) -> Float[Tensor, " b"]:
    """One score of each completion's group (its smallest). Sums are taken of differences from it: those of equal scores are exactly 0."""
    return count.scatter_reduce(0, index, score, "amin", include_self=False)[index]  # of `count` the shape alone


def _members(group: Int[Tensor, " b"], like: Float[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " g"]]:
    """For each completion the number of its group, from 0 on; and the size of each group."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    return index, count.to(like.dtype)
