"""Losses, unreduced: one number per scored token `[b, t]` or per pair `[b]`. `reduction` holds the one denominator.

Shapes: b completions or pairs, t scored tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def nll(logp: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """-log p of each token: the loss of SFT and of pre-training."""
    return -logp


def bradley_terry(
    chosen: Float[Tensor, "*b"],
    rejected: Float[Tensor, "*b"],
    margin: Float[Tensor, ...] | float = 0.0,
    center_coef: float = 0.0,
    smoothing: float = 0.0,
) -> Float[Tensor, "*b"]:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x) + c (r_w + r_l)^2, x = r_w - r_l - margin; one number per pair.

    The first term is the negative log-likelihood of the preference under Bradley and Terry (1952), as in Ouyang et al.
    (2203.02155), equation 1, with the margin of Llama 2 (2307.09288), equation 2. It sees differences only, so the
    scores may drift together; the last term, of Eisenstein et al. (2312.09244), ties their sum to 0. e is the share of
    labels taken to be the wrong way round (Wang et al. 2401.06080): the best lead is then finite,
    margin + log((1 - e) / e).
    """
    lead = chosen - rejected - margin
    loss = -logsigmoid(lead) if smoothing == 0 else -(1 - smoothing) * logsigmoid(lead) - smoothing * logsigmoid(-lead)
    return loss + center_coef * (chosen + rejected) ** 2


def ppo_policy_loss(
    logp: Float[Tensor, "b t"],
    logp_old: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    low: float,
    high: float,
) -> tuple[Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) with rho = exp(logp - logp_old).

    Schulman et al. (1707.06347), equation 7, as a loss. The larger of the two is the more pessimistic one: a ratio that
    has already moved the way the advantage points, past its bound, earns nothing more, while one that moved the wrong
    way is always pulled back.

    Returns the loss, and where the clipped term won: there the gradient is 0.
    """
    ratio = torch.exp(logp - logp_old)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(
    values: Float[Tensor, "b t"],
    values_old: Float[Tensor, "b t"],
    returns: Float[Tensor, "b t"],
    eps: float | None,
) -> tuple[Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """1/2 max((v - G)^2, (clip(v, v_old - eps, v_old + eps) - G)^2); `eps` in units of value, None = no clip.

    The value clip of the original PPO code (detail 9 of docs/algorithms/ppo.md): a value that has already moved eps
    towards its return since the rollout stops there until the next one.

    Returns the loss, and where the clipped term won: there the gradient is 0.
    """
    plain = (values - returns) ** 2
    if eps is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (values.clamp(values_old - eps, values_old + eps) - returns) ** 2
    return torch.maximum(plain, clipped) / 2, clipped > plain
