"""Losses on preferences, from log-probabilities of whole answers. One number per pair or per answer `[b]`.

Shapes: b pairs or answers, r rows (of pairs: chosen, rejected, chosen, rejected ..., so r = 2 b), t scored tokens.

With h_y = log pi(y|x) - log pi_ref(y|x), summed over the scored tokens of an answer y, w the chosen and l the rejected
answer of a pair, h = h_w - h_l. beta is `pref_beta` everywhere: the weight of the KL to the reference in the problem
whose optimum the loss looks for, so beta h_y is the answer's implicit reward.

    sigmoid    -logsig(beta h); smoothed: -(1 - e) logsig(beta h) - e logsig(-beta h)
    robust     [-(1 - e) logsig(beta h) + e logsig(-beta h)] / (1 - 2 e)
    hinge      max(0, 1 - beta h)
    ipo        (h - 1 / (2 beta))^2
    exo        KL of the policy's choice to the smoothed label, the policy's side first
    nca        -logsig(beta h_w) - 1/2 logsig(-beta h_w) - 1/2 logsig(-beta h_l)
    kto        w_D (1 - sig(beta (h_w - z0))) for a wanted answer, w_U (1 - sig(beta (z0 - h_l))) for an unwanted one
    bco        -logsig(beta h_w - delta) - logsig(-(beta h_l - delta))
    simpo      -logsig(beta (logp_w / |w| - logp_l / |l|) - gamma), no reference
    orpo       -logp_w / |w| - lambda logsig(log-odds_w - log-odds_l) of averaged log-probabilities, no reference

z0 and delta are statistics of a whole optimizer step; they arrive as plain numbers, so no gradient passes through them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.ops.masked import lengths, row_sum

# ------------------------------------------------------------------------------------------------- answers from tokens


def log_ratios(
    logp: Float[Tensor, "r t"], logp_ref: Float[Tensor, "r t"], mask: Bool[Tensor, "r t"]
) -> Float[Tensor, " r"]:
    """h of each row: log pi / pi_ref of the whole answer."""
    return row_sum(logp, mask) - row_sum(logp_ref, mask)


def tail_weights(
    mask: Bool[Tensor, "r t"], alpha: float, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "r t"]:
    """1 for the tokens up to the length of the shorter answer of a pair, `alpha` for those beyond it, 0 on padding.

    LD-DPO (Liu et al. 2409.06411, equation 8): the part of the longer answer that has no counterpart counts by alpha;
    1 is DPO, 0 compares equal lengths. Rows are pairs.
    """
    own = lengths(mask)
    shared = own.view(-1, 2).amin(dim=-1).repeat_interleave(2)
    place = mask.cumsum(dim=-1)  # 1 at the first scored token
    beyond = place > shared.unsqueeze(-1)
    return mask.to(dtype).masked_fill(mask & beyond, alpha)


# ------------------------------------------------------------------------------------------------- pairs, by their lead


def dpo(h: Float[Tensor, " b"], beta: float, smoothing: float = 0.0) -> Float[Tensor, " b"]:
    """-(1 - e) logsig(beta h) - e logsig(-beta h): Rafailov et al. (2305.18290), equation 7; e: cDPO (Mitchell 2023).

    With e the probability that a label is the wrong way round, the optimum is beta h = log((1 - e) / e), finite.
    """
    return -(1 - smoothing) * logsigmoid(beta * h) - smoothing * logsigmoid(-beta * h)


def robust(h: Float[Tensor, " b"], beta: float, smoothing: float) -> Float[Tensor, " b"]:
    """[-(1 - e) logsig(beta h) + e logsig(-beta h)] / (1 - 2 e): Chowdhury et al. (2403.00409), equation 8.

    Its mean over labels that are flipped with probability e is the DPO loss of the true labels. e < 1/2.
    """
    return (-(1 - smoothing) * logsigmoid(beta * h) + smoothing * logsigmoid(-beta * h)) / (1 - 2 * smoothing)


def hinge(h: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]:
    """max(0, 1 - beta h): SLiC (Zhao et al. 2305.10425) on the log-ratio, as in RSO (Liu et al. 2309.06657)."""
    return torch.relu(1 - beta * h)


def ipo(h: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]:
    """(h - 1 / (2 beta))^2: Azar et al. (2310.12036), equation 17, where beta is called tau."""
    return (h - 1 / (2 * beta)) ** 2


def exo(h: Float[Tensor, " b"], beta: float, smoothing: float) -> Float[Tensor, " b"]:
    """sig(beta h) log(sig(beta h) / (1 - e)) + sig(-beta h) log(sig(-beta h) / e): Ji et al. (2402.00856), equation 16.

    The reverse of DPO's direction: KL(policy's choice || smoothed label), so it needs 0 < e < 1.
    """
    won, lost = logsigmoid(beta * h), logsigmoid(-beta * h)
    return won.exp() * (won - math.log(1 - smoothing)) + lost.exp() * (lost - math.log(smoothing))


# ------------------------------------------------------------------------------------- pairs and answers, each on its own


def nca(h_w: Float[Tensor, " b"], h_l: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]:
    """-logsig(beta h_w) - 1/2 logsig(-beta h_w) - 1/2 logsig(-beta h_l): Chen et al. (2402.05369), for two answers.

    Unlike in the losses above, the level of both counts, so the chosen answer does not become less likely.
    """
    return -logsigmoid(beta * h_w) - logsigmoid(-beta * h_w) / 2 - logsigmoid(-beta * h_l) / 2


def kto(
    h: Float[Tensor, " b"],
    desirable: Bool[Tensor, " b"],
    beta: float,
    z0: float,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> Float[Tensor, " b"]:
    """w_D (1 - sig(beta (h - z0))) where wanted, w_U (1 - sig(beta (z0 - h))) elsewhere: Ethayarajh et al. (2402.01306),
    equations 7 and 8, less their constant.

    z0 stands for KL(pi || pi_ref): the log-ratio that an answer has for no reason (`kto_z0`).
    """
    return torch.where(
        desirable,
        chosen_weight * torch.sigmoid(-beta * (h - z0)),  # 1 - sig(x) = sig(-x), without the cancellation
        rejected_weight * torch.sigmoid(-beta * (z0 - h)),
    )


def kto_z0(h: Float[Tensor, " b"]) -> float:
    """max(0, mean h): the KL estimate of an optimizer step from answers that do not belong to their prompts."""
    return max(0.0, float(h.detach().mean())) if len(h) else 0.0


def kto_pair(
    h_w: Float[Tensor, " b"], h_l: Float[Tensor, " b"], beta: float, z_w: float, z_l: float
) -> Float[Tensor, " b"]:
    """[1 - sig(beta (h_w - z_l)) + 1 - sig(beta (z_w - h_l))] / 2: KTO on pairs, each half measured against the other.

    z_w and z_l are max(0, mean) of the chosen and of the rejected answers' log-ratios over the optimizer step.
    """
    return (torch.sigmoid(-beta * (h_w - z_l)) + torch.sigmoid(-beta * (z_w - h_l))) / 2


def bco(h_w: Float[Tensor, " b"], h_l: Float[Tensor, " b"], beta: float, delta: float) -> Float[Tensor, " b"]:
    """-logsig(beta h_w - delta) - logsig(-(beta h_l - delta)): Jung et al. (2404.04656), equation 8.

    delta: mean implicit reward of both kinds of answer over the steps so far, the point where a classifier is undecided.
    """
    return -logsigmoid(beta * h_w - delta) - logsigmoid(delta - beta * h_l)


# ----------------------------------------------------------------------------------------------------- without reference


def simpo(mean_w: Float[Tensor, " b"], mean_l: Float[Tensor, " b"], beta: float, gamma: float) -> Float[Tensor, " b"]:
    """-logsig(beta (mean_w - mean_l) - gamma): Meng et al. (2405.14734), equation 6; log-probabilities per token."""
    return -logsigmoid(beta * (mean_w - mean_l) - gamma)


def log_odds(mean: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """log(p / (1 - p)) of p = exp(mean), the geometric mean of an answer's token probabilities.

    p = 1 has no odds: it is held one rounding below, where the gradient is 0 as there is nothing left to gain.
    """
    held = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return held - torch.log(-torch.expm1(held))


def orpo(mean_w: Float[Tensor, " b"], mean_l: Float[Tensor, " b"], weight: float) -> Float[Tensor, " b"]:
    """-mean_w - lambda logsig(log-odds_w - log-odds_l): Hong et al. (2403.07691), equations 6 and 7; lambda = weight."""
    return -mean_w - weight * logsigmoid(log_odds(mean_w) - log_odds(mean_l))


# --------------------------------------------------------------------------------------------------------------- figures


def pair_figures(
    reward_w: Float[Tensor, " b"],
    reward_l: Float[Tensor, " b"],
    logp_w: Float[Tensor, " b"],
    logp_l: Float[Tensor, " b"],
) -> dict[str, Tensor]:
    """What is logged of pairs under every loss, without gradients; a tie counts as an error in `accuracy`."""
    reward_w, reward_l = reward_w.detach(), reward_l.detach()
    return {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "accuracy": (reward_w > reward_l).to(reward_w.dtype),
        "margin": reward_w - reward_l,
        "logps/chosen": logp_w.detach(),
        "logps/rejected": logp_l.detach(),
    }
