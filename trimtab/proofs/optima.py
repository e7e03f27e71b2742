"""Items 3 and 4: where preference losses are at rest, and that no policy lies above the best of its KL.

Item 3 gives a loss every pair of answers with the labels that a Bradley-Terry annotator would give, in the proportions in which it would
give them, through the algorithm's own `loss`. The optimum of DPO is then pi* (Rafailov et al. 2305.18290), that of IPO the one of its paper
(Azar et al. 2310.12036), that of robust DPO pi* again when a known share of the labels is turned round (Chowdhury et al. 2403.00409).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from trimtab.algos.dpo import Dpo
from trimtab.algos.rloo import Rloo
from trimtab.ops.kl import k1
from trimtab.proofs.claims import EXACT, Claim, at_least, at_most, worst
from trimtab.proofs.gradients import expected_gradient, forward_optimum
from trimtab.proofs.problem import Problem, far, random_problem
from trimtab.proofs.steps import visits
from trimtab.types import PreferenceBatch, Scores

FLIPPED = 0.2
"""Share of labels that are the wrong way round, where robust DPO is told so."""


# -------------------------------------------------------------------------------------------------------- 3: preferences


def expected_loss(
    problem: Problem, algorithm: Dpo, logits: Tensor, *, flipped: float = 0.0, drawn: Tensor | None = None
) -> Tensor:
    """The mean loss over all ordered pairs of different answers, labelled by sigmoid(r_w - r_l).

    Args:
        drawn: the share `[y]` that each answer has of those that are paired; None: all as likely as one another.
    """
    count = len(problem.answers)
    pairs = torch.tensor([(i, j) for i in range(count) for j in range(count) if i != j])
    right = torch.sigmoid(problem.rewards[pairs[:, 0]] - problem.rewards[pairs[:, 1]])
    weight = (1 - flipped) * right + flipped * (1 - right)
    if drawn is not None:
        weight = weight * drawn[pairs].prod(dim=-1)
    rows = pairs.flatten()
    logp = problem.padded(problem.token_logps(logits))[rows]
    logp_ref = problem.padded(problem.token_logps(problem.logits_ref))[rows]
    batch = PreferenceBatch(mask=problem.mask[rows], logp_ref=logp_ref)
    loss = algorithm.loss(Scores(logp=logp, entropy=torch.zeros_like(logp)), batch).loss
    return (weight * loss).sum() / weight.sum()


def _slope(
    problem: Problem, algorithm: Dpo, logp: Tensor, *, flipped: float = 0.0, drawn: Tensor | None = None
) -> float:
    """The largest part of the gradient at a policy given by its answers' log-probabilities."""
    return float(_gradient(problem, algorithm, logp, flipped=flipped, drawn=drawn).abs().max())


def _gradient(
    problem: Problem, algorithm: Dpo, logp: Tensor, *, flipped: float = 0.0, drawn: Tensor | None = None
) -> Tensor:
    logits = problem.table_of(logp).requires_grad_()
    loss = expected_loss(problem, algorithm, logits, flipped=flipped, drawn=drawn)
    return torch.autograd.grad(loss, logits)[0]


def _minimised(problem: Problem, algorithm: Dpo, *, flipped: float = 0.0) -> Tensor:
    """log pi `[y]` where the loss is least, from the reference on."""

    def loss(flat: Tensor) -> Tensor:
        return expected_loss(problem, algorithm, flat.view_as(problem.logits_ref), flipped=flipped)

    # Newton's method, damped: a step that does not lower the loss is taken back and shortened. Without damping a row's curvature has
    # no inverse, for a shift of its logits changes nothing.
    at, damping = problem.logits_ref.flatten(), 1.0
    here = loss(at)
    for _ in range(200):
        down, curvature = jacobian(loss, at), hessian(loss, at)  # type: ignore[no-untyped-call]
        if float(down.abs().max()) < 1e-13 or damping > 1e6:
            break
        new = at - torch.linalg.solve(curvature + damping * torch.eye(len(at), dtype=torch.float64), down)
        there = loss(new)
        if float(there) <= float(here):
            at, here, damping = new, there, max(damping / 10, 1e-9)
        else:
            damping *= 10
    return problem.logps(at.view_as(problem.logits_ref))


def ipo_optimum(problem: Problem, tau: float) -> Tensor:
    """log pi `[y]` proportional to ref exp(P(y) / tau), P the mean probability of y being preferred, answers as likely as one another.

    With p the probability that y is preferred to z, the mean of (h - 1/(2 tau))^2 over both labels of a pair is
    (h_y - h_z - (2 p - 1)/(2 tau))^2 and a constant; least squares over all pairs makes h_y the mean of (2 p - 1)/(2 tau) over all answers
    z, y itself (p = 1/2) among them.
    """
    n = len(problem.answers)
    p = torch.sigmoid(problem.rewards[:, None] - problem.rewards[None])
    h = (2 * p - 1).sum(dim=-1) / (2 * tau) / n
    return torch.log_softmax(problem.logp_ref + h, dim=0)


def per_token_optimum(problem: Problem, h: Tensor) -> Tensor:
    """log pi `[y]` of the policy whose log-ratio per token is h + c: ref exp(length (h + c)), with the one c that makes it sum to 1.

    Where a loss compares log-ratios per token, differences of h are what it settles; the c comes with them.
    """
    lengths = problem.mask.sum(dim=-1)
    low, high = (
        -float(h.max()),
        -float(h.min()),
    )  # there no answer is likelier than under the reference, or none less likely
    for _ in range(200):
        middle = (low + high) / 2
        total = float(torch.logsumexp(problem.logp_ref + lengths * (h + middle), dim=0))
        low, high = (low, middle) if total > 0 else (middle, high)
    return problem.logp_ref + lengths * (h + low)


def preferences() -> list[Claim]:
    """Item 3."""
    problem = random_problem(7, letters="ab", depth=2, beta=0.5)
    beta = problem.beta
    # the annotator goes by r_w - r_l and DPO by beta h: at its optimum r = beta log(pi / ref) up to a constant, which is pi*
    dpo, robust, ipo = (
        Dpo(beta=beta),
        Dpo(pref_loss="robust", beta=beta, smoothing=FLIPPED),
        Dpo(pref_loss="ipo", beta=beta),
    )

    best, of_ipo = problem.optimum, ipo_optimum(problem, beta)
    per_token, ipo_avg = Dpo(beta=beta, length_normalized=True), Dpo(pref_loss="ipo_avg", beta=beta)
    of_per_token = per_token_optimum(problem, problem.rewards / beta)
    of_ipo_avg = per_token_optimum(problem, of_ipo - problem.logp_ref)  # up to a constant, which c takes up
    elsewhere = random_problem(9, letters="ab", depth=2).logp_ref
    uneven = torch.softmax(torch.linspace(0, 4, len(problem.answers), dtype=torch.float64), dim=0)
    return [
        at_most(3, "DPO rests at pi*", _slope(problem, dpo, best), EXACT),
        at_most(3, "... from whatever answers pairs are made", _slope(problem, dpo, best, drawn=uneven), EXACT),
        at_most(3, "... and is led there from the reference: log pi", far(_minimised(problem, dpo), best), 1e-6),
        at_most(3, "IPO rests at its own optimum", _slope(problem, ipo, of_ipo), EXACT),
        at_most(3, "... and is led there", far(_minimised(problem, ipo), of_ipo), 1e-6),
        at_least(3, "... which is not pi*", far(of_ipo, best), 1e-2),
        at_least(
            3, "... and moves with the answers that pairs are made of", _slope(problem, ipo, of_ipo, drawn=uneven), 1e-3
        ),
        at_most(
            3,
            f"robust DPO rests at pi* with {FLIPPED:.0%} of the labels turned round",
            _slope(problem, robust, best, flipped=FLIPPED),
            EXACT,
        ),
        at_most(3, "... and is led there", far(_minimised(problem, robust, flipped=FLIPPED), best), 1e-6),
        at_least(3, "... DPO with those labels is not", _slope(problem, dpo, best, flipped=FLIPPED), 1e-3),
        at_most(
            3,
            "dpo_label_smoothing is DPO on labels turned round that often, everywhere",
            far(
                _gradient(problem, replace(dpo, smoothing=FLIPPED), elsewhere),
                _gradient(problem, dpo, elsewhere, flipped=FLIPPED),
            ),
            EXACT,
        ),
        at_most(
            3,
            "pref_length_normalized rests where log-ratios per token differ as r / beta",
            _slope(problem, per_token, of_per_token),
            EXACT,
        ),
        at_least(3, "... which is not pi*", far(of_per_token, best), 1e-2),
        at_most(3, "ipo_avg rests at IPO's optimum taken per token", _slope(problem, ipo_avg, of_ipo_avg), EXACT),
        at_least(3, "... which is another than IPO's", far(of_ipo_avg, of_ipo), 1e-2),
    ]


# ----------------------------------------------------------------------------------------------------------- 4: frontier


@dataclass(frozen=True, slots=True)
class Point:
    """A policy's KL to the reference and mean reward."""

    kl: float
    reward: float


def point(problem: Problem, logp: Tensor) -> Point:
    """Where a policy given by its answers' log-probabilities `[y]` lies."""
    p = logp.exp()
    kl = k1(logp[:, None], problem.logp_ref[:, None])[:, 0]  # the estimator that runs log
    return Point(float((p * kl).sum()), float((p * problem.rewards).sum()))


def above(problem: Problem, where: Point) -> float:
    """How far a point lies above the best mean reward of any policy with its KL; not above: 0 or less.

    For every beta E[r] <= beta log Z(beta) + beta KL, with equality at pi*(beta): the best reward at a KL is the least of these bounds.
    """
    betas = torch.logspace(-3, 3, 4001, dtype=torch.float64)
    log_z = torch.logsumexp(problem.logp_ref[None] + problem.rewards[None] / betas[:, None], dim=-1)
    return where.reward - float((betas * (log_z + where.kl)).min())


def frontier() -> list[Claim]:
    """Item 4."""
    problem = random_problem(8, letters="ab", depth=2, beta=0.3)
    generator = torch.Generator().manual_seed(9)
    tables = [
        scale * torch.randn(problem.logits_ref.shape, generator=generator, dtype=torch.float64)
        + share * problem.logits_ref
        for scale in (0.1, 0.5, 1.0, 3.0)
        for share in (0.0, 1.0)
        for _ in range(125)
    ]
    drawn = worst(above(problem, point(problem, problem.logps(logits))) for logits in tables)
    path = walk(problem, Rloo(group_size=2))
    walked = [above(problem, point(problem, problem.logps(logits))) for logits in path]
    one = random_problem(4, letters="abcd", depth=1, beta=0.5)
    ahead = above(one, point(one, forward_optimum(one)))
    gap = problem.best - float(problem.objective(problem.logps(path[-1])))
    return [
        at_most(4, f"no random policy of {len(tables)} lies above the frontier", drawn, EXACT),
        at_most(4, f"no step of {len(path) - 1} along RLOO's expected gradient does", worst(walked), EXACT),
        at_most(4, "... whose last lies on it", -walked[-1], 1e-4),
        at_most(4, "... at the point of its beta: beta log Z - J", gap, 1e-6),
        at_least(4, "where k3 in the loss rests lies below it: reward given away at the same KL", -ahead, 1e-3),
    ]


def walk(problem: Problem, algorithm: Any, steps: int = 80) -> list[Tensor]:
    """Tables from the reference on, each a step down the algorithm's expected gradient.

    A row's gradient is divided by how often its prefix is come to, so that rare rows arrive with the others. What is left is curved by the
    KL, at most by beta / 2 (the largest eigenvalue of a softmax's covariance is 1/2); steps of 2 / beta are half of what would not settle.
    """
    logits = problem.logits_ref.clone()
    path = [logits]
    for _ in range(steps):
        down = expected_gradient(problem, algorithm, logits, k=algorithm.group_size)
        logits = logits - 2 / problem.beta * down / visits(problem, logits)[:, None]
        path.append(logits)
    return path
