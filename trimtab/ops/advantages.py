"""From a score per completion to an advantage per token.

Shapes: b completions, t scored tokens padded on the right. `values[t]` is the value of the state *before* token t;
the value beyond a completion's last token is 0, also when the length limit cut it. Padding of every result is 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.kl import Estimator, estimate
from trimtab.ops.masked import is_last, zero_padding


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
    return penalty + score.unsqueeze(-1) * is_last(mask).to(score.dtype)


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
    value_after = torch.zeros_like(values[:, 0])  # V and A beyond the last token; padding keeps them at 0
    advantage_after = torch.zeros_like(value_after)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        advantages[:, t] = advantage_after = delta + gamma * lam * advantage_after
        value_after = values[:, t]
    return advantages, advantages + values


def discounted_returns(rewards: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], gamma: float) -> Float[Tensor, "b t"]:
    """G[t] = R[t] + gamma G[t+1]: the reward to go, without a critic."""
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return returns
