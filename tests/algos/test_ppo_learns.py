"""PPO on problems small enough to know the answer: it must find it, and a negated advantage must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimtab.algos.ppo import Ppo
from trimtab.ops.kl import Estimator
from trimtab.ops.reduction import reduction_weights
from trimtab.types import RolloutBatch, Scores, take

pytestmark = pytest.mark.learning

REF = torch.tensor([[0.2, 0.3, 0.5]])
REWARD = torch.tensor([0.0, 1.0, 0.5])
BETA = 0.5


def train(
    algorithm: Ppo, ref: Tensor, reward_of: object, *, steps: int, seed: int, rate: float, sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A table policy and critic `[t v]`, `[t]` that write t tokens. Returns the average of the last policies, and the values."""
    g = torch.Generator().manual_seed(seed)
    t, b = len(ref), 128
    theta, values = ref.log().clone().requires_grad_(), torch.zeros(t, requires_grad=True)
    policy, critic = torch.optim.Adam([theta], lr=rate), torch.optim.Adam([values], lr=0.05)
    mask, average = torch.ones(b, t, dtype=torch.bool), torch.zeros_like(ref)
    for step in range(steps):
        policy.param_groups[0]["lr"] = rate * (1 - step / steps)
        tokens = torch.multinomial(theta.detach().softmax(-1), b, replacement=True, generator=g).T

        def logp_of(log_p: Tensor, tokens: Tensor = tokens) -> Tensor:
            return log_p.expand(len(tokens), -1, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

        score = reward_of(tokens)  # type: ignore[operator]
        batch = algorithm.credit(
            RolloutBatch(
                mask=mask,
                logp_old=logp_of(theta.detach().log_softmax(-1)),
                logp_ref=logp_of(ref.log()),
                values=values.detach().expand(b, -1),
                score=score,
                group=torch.arange(b),
                finished=mask[:, 0],
                kl_coef=algorithm.kl_coef,
                score_std=score.std().item() or 1.0,
            )
        )
        assert batch.advantages is not None
        batch = replace(batch, advantages=sign * batch.advantages)
        for _ in range(algorithm.epochs):
            for rows in torch.randperm(b, generator=g).split(b // 2):
                part = take(batch, rows.tolist())
                weights = reduction_weights(part.mask, algorithm.reduction)
                log_p = theta.log_softmax(-1)
                scores = Scores(logp=logp_of(log_p, tokens[rows]), entropy=torch.zeros(len(rows), t))
                for optimizer, terms in (
                    (policy, algorithm.policy_loss(scores, part)),
                    (critic, algorithm.value_loss(values.expand(len(rows), -1), part)),
                ):
                    optimizer.zero_grad()
                    (terms.loss * weights).sum().backward()
                    optimizer.step()
        if step >= steps - 20:
            average += theta.detach().softmax(-1) / 20
    return average, values.detach()


TARGET = torch.tensor([2, 0, 1])


def right(tokens: Tensor) -> Tensor:
    """The share of tokens that are the wanted ones."""
    return (tokens == TARGET).float().mean(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_writes_the_wanted_sequence(seed: int) -> None:
    """Three tokens of four words, from a uniform start; the critic learns that the score to come is about 1."""
    uniform = torch.full((3, 4), 0.25)
    algorithm = Ppo(kl_coef=0.001, epochs=2)
    policy, values = train(algorithm, uniform, right, steps=40, seed=seed, rate=0.1)
    assert policy[torch.arange(3), TARGET].min() > 0.9
    assert values[0] == pytest.approx(1.0, abs=0.2)
    wrong, _ = train(algorithm, uniform, right, steps=40, seed=seed, rate=0.1, sign=-1.0)
    assert wrong[torch.arange(3), TARGET].max() < 0.1


@pytest.mark.parametrize(
    ("estimator", "placement", "finds_it"), [("k1", "reward", True), ("k3", "reward", False), ("k1", "loss", False)]
)
def test_only_the_right_pair_finds_the_kl_regularised_optimum(
    estimator: Estimator, placement: str, finds_it: bool
) -> None:
    """pi* proportional to pi_ref exp(reward / beta) = (0.063, 0.698, 0.429) / total, by sampling one token at a time."""
    optimum = torch.softmax(REF.log() + REWARD / BETA, -1)
    algorithm = Ppo(kl_coef=BETA, kl_estimator=estimator, kl_placement=placement, epochs=2)  # type: ignore[arg-type]
    policy, _ = train(algorithm, REF, lambda tokens: REWARD[tokens[:, 0]], steps=80, seed=0, rate=0.06)
    assert ((policy - optimum).abs().max().item() < 0.03) is finds_it
