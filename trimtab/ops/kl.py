"""Estimators of the KL divergence from single samples, and the controller that holds it at a target.

Shapes: b completions, t scored tokens. With l = logp - logp_ref on tokens drawn from the policy (Schulman 2020,
"Approximating KL divergence"):

    k1 = l                  as a value: unbiased, may be negative     as a loss: expected gradient 0
    k2 = l^2 / 2            as a value: biased, low variance          as a loss: gradient of KL(pi || pi_ref)
    k3 = exp(-l) - 1 + l    as a value: unbiased, never negative      as a loss: gradient of KL(pi_ref || pi)

The last column is why the place of the penalty (reward or loss) and the estimator must be chosen together: the pair
decides which distribution a run converges to. tests/ops/test_kl.py derives each entry by enumerating a three-token
softmax.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


Placement = Literal["reward", "loss"]

CONVERGES_TO: dict[tuple[Placement, Estimator], str] = {
    ("reward", "k1"): "pi* proportional to pi_ref exp(reward / beta)",
    ("reward", "k2"): "a wrong distribution, not pi_ref exp(reward / beta): k2 is biased as a value",
    ("reward", "k3"): "a wrong distribution, not pi_ref exp(reward / beta): the gradient of k3 itself is lost",
    ("loss", "k1"): "the argmax of the reward: the expected gradient of k1 is 0, so nothing holds the policy",
    ("loss", "k2"): "pi_ref exp(reward / beta) for one-step problems, and is myopic for sequences",
    ("loss", "k3"): "the forward-KL optimum: another distribution than pi_ref exp(reward / beta)",
}
"""What a run drifts to, by where the KL penalty is put and how it is estimated (docs/algorithms/ppo.md, detail 4)."""


def k1(logp: Float[Tensor, "b t"], logp_ref: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """k1 = l: the log-ratio itself."""
    return logp - logp_ref


def k2(logp: Float[Tensor, "b t"], logp_ref: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """k2 = l^2 / 2."""
    return (logp - logp_ref) ** 2 / 2


def k3(logp: Float[Tensor, "b t"], logp_ref: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """k3 = exp(-l) - 1 + l; `expm1` keeps the digits of a small l."""
    l = logp - logp_ref  # noqa: E741  (the name of FORMULAS and of the source)
    return torch.expm1(-l) + l


def estimate(logp: Float[Tensor, "b t"], logp_ref: Float[Tensor, "b t"], estimator: Estimator) -> Float[Tensor, "b t"]:
    """The named estimator at every token."""
    return {"k1": k1, "k2": k2, "k3": k3}[estimator](logp, logp_ref)


def adapt_kl_coef(coef: float, kl: float, target: float, n: int, horizon: float) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon): the controller of Ziegler et al. (1909.08593).

    Args:
        coef: beta of the batch just seen.
        kl: its KL, in nats per completion: mean over completions of the sum of k1.
        target: the KL to hold, same unit.
        n: completions in that batch.
        horizon: completions over which a lasting error of 20 % or more changes beta by about 20 %.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * n / horizon)
