"""A question whose every answer can be written down: rewards, the reference and the optimum are exact numbers.

An answer is up to `depth` letters and an end; one that reaches the limit has none. The reference is any distribution over them; the
objective of a policy and the best that any policy reaches are

    J(pi)  = sum_y pi(y) (r(y) - beta log(pi(y) / pi_ref(y)))
    J(pi*) = beta log Z,  Z = sum_y pi_ref(y) exp(r(y) / beta)

where pi* = pi_ref exp(r / beta) / Z is the policy that PPO and RLOO with k1 in the reward are said to find (Rafailov et al. 2305.18290,
app. A.1).

Shapes: y answers, s prefixes, a tokens (letters, then the end). All float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

END = "."
"""How the end of an answer is written here."""


def answers(letters: str, depth: int) -> list[str]:
    """Every answer: with its end where it has one, `depth` tokens at most."""
    found = ["".join(word) + END for n in range(depth) for word in product(letters, repeat=n)]
    return found + ["".join(word) for word in product(letters, repeat=depth)]


def prefixes(letters: str, depth: int) -> list[str]:
    """Every prefix that a token follows, the empty one first, shorter ones before longer ones."""
    return ["".join(word) for n in range(depth) for word in product(letters, repeat=n)]


def objective(logp: Tensor, logp_ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J of a policy, from the log-probabilities `[y]` of every answer."""
    return (logp.exp() * (rewards - beta * (logp - logp_ref))).sum()


def best(logp_ref: Tensor, rewards: Tensor, beta: float) -> float:
    """J(pi*) = beta log Z."""
    return beta * float(torch.logsumexp(logp_ref + rewards / beta, dim=0))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question.

    Attributes:
        logits_ref: `[s a]`, the reference's table.
        rewards: `[y]`, in the order of `answers`.
        beta: weight of the KL.
    """

    letters: str
    depth: int
    logits_ref: Tensor
    rewards: Tensor
    beta: float

    @property
    def answers(self) -> list[str]:
        return answers(self.letters, self.depth)

    @property
    def mask(self) -> Tensor:
        """`[y t]`: which of `depth` places of an answer hold a token."""
        lengths = torch.tensor([len(answer) for answer in self.answers])
        return torch.arange(self.depth) < lengths[:, None]

    def token_logps(self, logits: Tensor) -> Tensor:
        """`[y t]`: the log-probability of each token of each answer under a table of logits `[s a]`; 0 where there is none."""
        places = {prefix: i for i, prefix in enumerate(prefixes(self.letters, self.depth))}
        tokens = self.letters + END
        logp = torch.log_softmax(logits, dim=-1)
        rows = []
        for answer in self.answers:
            at = [(places[answer[:i]], tokens.index(answer[i])) for i in range(len(answer))]
            picked = logp[torch.tensor([s for s, _ in at]), torch.tensor([a for _, a in at])]
            rows.append(torch.cat([picked, picked.new_zeros(self.depth - len(answer))]))
        return torch.stack(rows)

    def logps(self, logits: Tensor) -> Tensor:
        """`[y]`: the log-probability of each answer."""
        return self.token_logps(logits).sum(dim=-1)

    def padded(self, x: Tensor) -> Tensor:
        """`x` `[y t]` with nan where there is no token: what an algorithm is given may not depend on it."""
        return torch.where(self.mask, x, torch.full((), torch.nan, dtype=x.dtype))

    @property
    def logp_ref(self) -> Tensor:
        return self.logps(self.logits_ref)

    def objective(self, logp: Tensor) -> Tensor:
        """J of a policy given by the log-probability `[y]` of every answer."""
        return objective(logp, self.logp_ref, self.rewards, self.beta)

    @property
    def best(self) -> float:
        """J(pi*)."""
        return best(self.logp_ref, self.rewards, self.beta)

    @property
    def optimum(self) -> Tensor:
        """log pi* `[y]`."""
        return torch.log_softmax(self.logp_ref + self.rewards / self.beta, dim=0)

    def table_of(self, logp: Tensor) -> Tensor:
        """Logits `[s a]` of the table whose answers have these log-probabilities `[y]`: those of its conditionals."""
        found = self.answers
        probability = logp.exp()
        rows = []
        for prefix in prefixes(self.letters, self.depth):
            rows.append(
                torch.stack(
                    [
                        sum(
                            (probability[i] for i, answer in enumerate(found) if answer.startswith(prefix + token)),
                            torch.zeros(()).double(),
                        )
                        for token in self.letters + END
                    ]
                )
            )
        return torch.stack(rows).log()


def random_problem(
    seed: int,
    *,
    letters: str = "ab",
    depth: int = 2,
    beta: float = 0.5,
    spread: float = 1.0,
    reward: Callable[[str], float] | None = None,
) -> Problem:
    """A problem with a random, prefix-dependent reference, and random rewards unless they are given by answer."""
    generator = torch.Generator().manual_seed(seed)
    states, tokens = len(prefixes(letters, depth)), len(letters) + 1
    logits = spread * torch.randn(states, tokens, generator=generator, dtype=torch.float64)
    every = answers(letters, depth)
    drawn = torch.rand(len(every), generator=generator, dtype=torch.float64)
    rewards = drawn if reward is None else torch.tensor([reward(answer) for answer in every], dtype=torch.float64)
    return Problem(letters=letters, depth=depth, logits_ref=logits, rewards=rewards, beta=beta)


def true_gradient(problem: Problem, logits: Tensor) -> Tensor:
    """Of -J, which a step should descend `[s a]`."""
    logits = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-problem.objective(problem.logps(logits)), logits)
    return gradient


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference of two arrays."""
    return float((a - b).abs().max())
