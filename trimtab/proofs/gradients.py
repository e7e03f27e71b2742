"""Items 1 and 2: what an algorithm's gradient is on average, by enumeration, and what each way of measuring KL does.

Every group of k answers that could be drawn is put through the algorithm's own `credit` and `policy_loss`, as a batch of its own, and its
loss is weighed by the probability of the draw. Nothing is sampled, so an unbiased gradient is the true one to rounding; and the credit that
is checked is the one that trains.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import comb
from typing import Any

import torch
from torch import Tensor

from trimtab.algos.grpo import Grpo
from trimtab.algos.ppo import Ppo
from trimtab.algos.remax import Remax
from trimtab.algos.rloo import Rloo
from trimtab.algos.surrogate import Surrogate
from trimtab.ops.kl import Estimator, Placement, estimate
from trimtab.proofs.claims import EXACT, Claim, at_least, at_most, worst
from trimtab.proofs.problem import Problem, far, random_problem, true_gradient
from trimtab.proofs.steps import kl_steps, steps
from trimtab.types import RolloutBatch, Scores

# -------------------------------------------------------------------------------------------------------- expectations


def expected_gradient(
    problem: Problem, algorithm: Any, logits: Tensor, *, k: int, values: Tensor | None = None
) -> Tensor:
    """The mean over all draws of k answers of the gradient `[s a]` that a step descends, of a policy that has not moved since it sampled.

    Sums over tokens are not divided by their number here: in a token mean that number is the batch's, and no longer depends on one answer.

    Args:
        values: what a critic says at each token of each answer `[y t]`.
    """
    logits = logits.detach().clone().requires_grad_()
    every = problem.token_logps(logits)
    draws = torch.tensor(list(product(range(len(every)), repeat=k)))
    rows = draws.flatten()
    mask = problem.mask[rows]
    batch = RolloutBatch(
        mask=mask,
        logp_old=every.detach()[rows],
        logp_ref=problem.token_logps(problem.logits_ref)[rows],
        values=values[rows] if values is not None else None,
        score=problem.rewards[rows],
        greedy=problem.rewards[every.detach().sum(dim=-1).argmax()].expand(len(rows)),
        group=torch.arange(len(draws)).repeat_interleave(k),
        finished=torch.ones(len(rows), dtype=torch.bool),
        kl_coef=problem.beta,
    )
    credited = algorithm.credit(batch)
    scores = Scores(logp=every[rows] * mask, entropy=torch.zeros_like(every[rows]))
    loss = algorithm.policy_loss(scores, credited).loss
    if loss.ndim == 2:
        loss = (loss * mask).sum(dim=-1)
    probability = every.detach().sum(dim=-1).exp()[draws].prod(dim=-1)
    (gradient,) = torch.autograd.grad((probability * loss.view(len(draws), k).mean(dim=-1)).sum(), logits)
    return gradient


# ------------------------------------------------------------------------------------------------------ 1: the gradients


def gradients() -> list[Claim]:
    """Item 1."""
    problem = random_problem(1, depth=2)
    logits = random_problem(2, depth=2).logits_ref
    truth = true_gradient(problem, logits)
    k = 3
    rloo = expected_gradient(problem, Rloo(group_size=k), logits, k=k)
    plain = replace(Grpo(), preset="dr_grpo", group_size=k, normalisation="none", kl_coef=problem.beta, how=Surrogate())
    dr_grpo = expected_gradient(problem, plain, logits, k=k)
    critic = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # a critic knows the prefix alone: answers that begin alike have one value there
    first = {answer[:i]: critic[y, i] for y, answer in enumerate(problem.answers) for i in range(len(answer))}
    for y, answer in enumerate(problem.answers):
        for i in range(len(answer)):
            critic[y, i] = first[answer[:i]]
    ppo = expected_gradient(problem, Ppo(gae_lambda=1.0, whiten_advantages=False), logits, k=1, values=critic)
    bootstrapped = expected_gradient(problem, Ppo(gae_lambda=0.5, whiten_advantages=False), logits, k=1, values=critic)
    remax = expected_gradient(problem, Remax(), logits, k=1)
    return [
        at_most(1, "RLOO's expected gradient is that of J", far(rloo, truth), EXACT),
        at_most(1, f"Dr.GRPO's is (k - 1)/k of it, k = {k}", far(dr_grpo, (k - 1) / k * truth), EXACT),
        at_most(1, "ReMax's is that of J", far(remax, truth), EXACT),
        at_most(1, "PPO's is that of J with any critic, lambda = 1, not whitened", far(ppo, truth), EXACT),
        at_least(1, "... and is not with a wrong critic and lambda = 0.5", far(bootstrapped, truth), 1e-3),
        *_difficulty(),
        *steps(),
    ]


def difficulty_factor(p: float, k: int) -> float:
    """By how much dividing by the group's deviation multiplies the gradient of a prompt that is solved with probability p.

    With m right answers of k the deviation is s = sqrt(m (k - m) / (k (k - 1))), a right one has advantage (1 - m/k) / (s + 1e-4) and
    pulls along grad p / p, a wrong one -(m/k) / (s + 1e-4) along -grad p / (1 - p). Summed over m with its binomial weights:

        sum_m C(k, m) p^m (1-p)^(k-m)  (m/k)(1 - m/k) / ((s + 1e-4) p (1 - p))
    """
    total = 0.0
    for m in range(1, k):
        s = (m * (k - m) / (k * (k - 1))) ** 0.5
        total += comb(k, m) * p**m * (1 - p) ** (k - m) * (m / k) * (1 - m / k) / ((s + 1e-4) * p * (1 - p))
    return total


def _difficulty() -> list[Claim]:
    """What the deviation of a group does, on prompts that are solved with probability p."""
    k = 8
    grpo = replace(Grpo(), group_size=k, kl_coef=0.0)
    quiz = Problem(
        letters="a",
        depth=1,
        logits_ref=torch.zeros(1, 2, dtype=torch.float64),
        rewards=torch.tensor([0.0, 1.0], dtype=torch.float64),  # ends at once, or answers a
        beta=0.0,
    )
    errors, factors = [], {}
    for p in (0.05, 0.2, 0.5):
        logits = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
        factors[p] = difficulty_factor(p, k)
        found = expected_gradient(quiz, grpo, logits, k=k)
        errors.append(far(found, factors[p] * true_gradient(quiz, logits)))
    return [
        at_most(1, f"GRPO's is c(p, k) times that of J, c derived by hand, k = {k}", worst(errors), EXACT),
        at_least(1, f"... so it is of no mean reward: c(0.05, {k}) / c(0.5, {k})", factors[0.05] / factors[0.5], 1.2),
    ]


# ---------------------------------------------------------------------------------------------------------------- 2: KL


def kl() -> list[Claim]:
    """Item 2."""
    one = random_problem(4, letters="abcd", depth=1, beta=0.5)
    logits = random_problem(5, letters="abcd", depth=1).logits_ref
    return [*_kl_values(one, logits), *_kl_losses(one, logits), *_kl_optima(one, logits), *kl_steps()]


def _kl_values(problem: Problem, logits: Tensor) -> list[Claim]:
    logp, logp_ref = problem.logps(logits), problem.logp_ref
    truth = float((logp.exp() * (logp - logp_ref)).sum())
    value = {
        kind: float((logp.exp() * estimate(logp[:, None], logp_ref[:, None], kind)[:, 0]).sum())
        for kind in ("k1", "k2", "k3")
    }
    return [
        at_most(2, "k1 and k3 are KL on average", worst(abs(value[kind] - truth) for kind in ("k1", "k3")), EXACT),
        at_least(2, "... k2 is not", abs(value["k2"] - truth), 1e-3),
    ]


def _kl_losses(problem: Problem, logits: Tensor) -> list[Claim]:
    logits = logits.detach().clone().requires_grad_()
    logp, logp_ref = problem.logps(logits), problem.logp_ref
    weight = logp.detach().exp()

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    found = {
        kind: gradient((weight * estimate(logp[:, None], logp_ref[:, None], kind)[:, 0]).sum())
        for kind in ("k1", "k2", "k3")
    }
    reverse = gradient((logp.exp() * (logp - logp_ref)).sum())
    forward = gradient((logp_ref.exp() * (logp_ref - logp)).sum())
    return [
        at_most(2, "as a loss, k1 has gradient 0 on average", float(found["k1"].abs().max()), EXACT),
        at_most(2, "... k2 that of KL(pi, ref)", far(found["k2"], reverse), EXACT),
        at_most(2, "... k3 that of KL(ref, pi)", far(found["k3"], forward), EXACT),
        at_least(2, "... which is another gradient", far(found["k3"], reverse), 1e-3),
    ]


def _kl_optima(problem: Problem, logits: Tensor) -> list[Claim]:
    """Where the gradient of an algorithm is 0: at pi* for k1 in the reward, elsewhere for others."""

    def at(where: Tensor, placement: Placement, estimator: Estimator, given: Problem = problem) -> Tensor:
        rloo = Rloo(group_size=2, how=Surrogate(level="token", kl_placement=placement, kl_estimator=estimator))
        return expected_gradient(given, rloo, where, k=2)

    def size(gradient: Tensor) -> float:
        return float(gradient.abs().max())

    best = problem.table_of(problem.optimum)
    two = random_problem(6, letters="ab", depth=2, beta=0.5)
    best_of_two = two.table_of(two.optimum)
    free = Rloo(group_size=2, kl_coef=0.0, how=Surrogate(level="token"))
    no_kl = expected_gradient(replace(problem, beta=0.0), free, logits, k=2)
    return [
        at_most(
            2,
            "k1 in the reward rests at pi*",
            worst([size(at(best, "reward", "k1")), size(at(best_of_two, "reward", "k1", two))]),
            EXACT,
        ),
        at_most(2, "k2 in the loss rests at pi*, where an answer is one token", size(at(best, "loss", "k2")), EXACT),
        at_least(
            2,
            "... not where it is two: it does not see what a token does to later ones",
            size(at(best_of_two, "loss", "k2", two)),
            1e-3,
        ),
        at_least(2, "k3 in the loss does not rest at pi*", size(at(best, "loss", "k3")), 1e-3),
        at_most(
            2,
            "... but where beta ref / (lambda - r) is",
            size(at(problem.table_of(forward_optimum(problem)), "loss", "k3")),
            1e-10,
        ),
        at_least(2, "k3 in the reward does not rest at pi*", size(at(best, "reward", "k3")), 1e-3),
        at_most(
            2,
            "k1 in the loss is no KL at all: the gradient is that of the reward",
            far(at(logits, "loss", "k1"), no_kl),
            EXACT,
        ),
    ]


def forward_optimum(problem: Problem) -> Tensor:
    """log pi `[y]` that maximises E[r] - beta KL(ref, pi): pi = beta ref / (lambda - r), with lambda such that it sums to 1."""
    reference = problem.logp_ref.exp()
    low = float(problem.rewards.max()) + 1e-12
    high = low + problem.beta * len(reference) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if float((problem.beta * reference / (middle - problem.rewards)).sum()) > 1:
            low = middle
        else:
            high = middle
    found = problem.beta * reference / (high - problem.rewards)
    return (found / found.sum()).log()
