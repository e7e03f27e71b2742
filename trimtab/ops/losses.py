"""Losses, unreduced: one number per scored token `[b, t]` or per pair `[b]`. `reduction` holds the one denominator.

Shapes: b completions or pairs, t scored tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.ops.masked import zero_padding


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
    loss = -(1 - smoothing) * logsigmoid(lead) - smoothing * logsigmoid(-lead)
    return loss + center_coef * (chosen + rejected) ** 2


def ppo_policy_loss(
    logp: Float[Tensor, "*b"],
    logp_old: Float[Tensor, "*b"],
    advantages: Float[Tensor, "*b"],
    low: float,
    high: float,
) -> tuple[Float[Tensor, "*b"], Bool[Tensor, "*b"]]:
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


def dual_clip(
    loss: Float[Tensor, "*b"], advantages: Float[Tensor, "*b"], bound: float
) -> tuple[Float[Tensor, "*b"], Bool[Tensor, "*b"]]:
    """min(loss, -c A) where A < 0: however large a ratio has become, a bad answer pushes no harder than c times its advantage.

    Ye et al. (1912.09729), equation 5, as a loss; c > 1.

    Returns the loss, and where the bound acts: there the gradient is 0.
    """
    held = -bound * advantages
    acts = (advantages < 0) & (loss > held)
    return torch.where(acts, held, loss), acts


def cispo_loss(
    logp: Float[Tensor, "b t"], logp_old: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"], cap: float
) -> tuple[Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """-stopgrad(min(rho, cap)) A logp with rho = exp(logp - logp_old): REINFORCE with a clipped importance weight.

    CISPO, MiniMax (2506.13585), equation 4. Unlike the clipped surrogate no token's gradient is ever cut off.

    Returns the loss, and where the weight was capped.
    """
    ratio = torch.exp(logp.detach() - logp_old)
    return -ratio.clamp(max=cap) * advantages * logp, ratio > cap


def sequence_log_ratio(
    logp: Float[Tensor, "b t"], logp_old: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, mean: bool
) -> Float[Tensor, " b"]:
    """Sum over a completion's tokens of logp - logp_old, the log-ratio of the whole answer; with `mean`, divided by its length.

    The sum is that of one action (RLOO); the mean, a geometric mean of token ratios, is GSPO's (2507.18071, equation 7).
    """
    total = zero_padding(logp - logp_old, mask).sum(dim=-1)
    return total / mask.sum(dim=-1).clamp(min=1) if mean else total


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
