"""Losses of ranked answers to one prompt, unreduced: one number per ranking `[b]`.

Shapes: b rankings, k the most answers of any; scores r_1, r_2 ... of each from best to worst, padded on the right; `mask` says
which are real.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.losses import bradley_terry


def pairs_of(mask: Bool[Tensor, "b k"]) -> Bool[Tensor, "b k k"]:
    """Which (i, j) are a real pair with i ranked above j."""
    above = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).triu(1)
    return mask.unsqueeze(-2) & above  # padding is on the right: where j is real, so is i


def mean_over_pairs(values: Float[Tensor, "b k k"], mask: Bool[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """The mean over the n (n - 1) / 2 pairs of each ranking of n answers; 0 where there is no pair."""
    real = pairs_of(mask)
    kept = torch.where(real, values, 0.0)
    return kept.sum(dim=(-2, -1)) / real.sum(dim=(-2, -1)).clamp(min=1)


def ranked_pairs(
    scores: Float[Tensor, "b k"],
    mask: Bool[Tensor, "b k"],
    margin: Float[Tensor, " b"] | float = 0.0,
    center_coef: float = 0.0,
    smoothing: float = 0.0,
) -> Float[Tensor, " b"]:
    """Bradley-Terry, averaged over all pairs of a ranking: Ouyang et al. (2203.02155), equation 1.

        1 / C(n, 2) sum over i < j of -log sigmoid(r_i - r_j - margin) + c (r_i + r_j)^2

    All pairs of a prompt are one entry, so a ranking of nine answers weighs no more than one of two.
    """
    held = torch.where(mask, scores, 0.0)
    wide = margin[:, None, None] if isinstance(margin, Tensor) else margin
    better = held.unsqueeze(-1).expand(-1, -1, held.shape[1])
    worse = held.unsqueeze(-2).expand(-1, held.shape[1], -1)
    return mean_over_pairs(bradley_terry(better, worse, wide, center_coef, smoothing), mask)


def plackett_luce(scores: Float[Tensor, "b k"], mask: Bool[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """- sum over i < n of log( exp r_i / sum over j >= i of exp r_j ): the negative log-likelihood of the whole ranking.

    Luce (1959), Plackett (1975); as a loss Xia et al. (2008, ListMLE). The best answer is drawn from all with probability
    softmax(r), the next from those that are left, and so on. For two answers it is Bradley-Terry. It sees differences only.
    """
    k = mask.shape[1]
    held = torch.where(mask, scores, 0.0)
    left = torch.ones(k, k, dtype=torch.bool, device=mask.device).triu()  # j is among what is left at stage i
    alone = torch.eye(k, dtype=torch.bool, device=mask.device)  # keeps a padded stage finite: it is its own only choice
    choices = torch.where(left & (mask.unsqueeze(-2) | alone), held.unsqueeze(-2), -torch.inf)
    stages = torch.logsumexp(choices, dim=-1) - held
    return torch.where(mask, stages, 0.0).sum(dim=-1)


def squared_error(scores: Float[Tensor, " b"], targets: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """(r - s)^2: regression on a score s that the data gives each answer."""
    return (scores - targets) ** 2
