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
