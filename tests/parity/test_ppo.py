"""PPO's credit and losses against those of TRL 1.12.0, the last release that had them.

They stand in the middle of a training method there, so their lines are read from the release's file and run on plain tensors; the
environment variable TRL_PPO names that file (`make parity` fetches the wheel and sets it).
"""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.algos.ppo import Ppo
from trimtab.ops.reduction import reduction_weights
from trimtab.types import RolloutBatch, Scores

pytestmark = pytest.mark.parity

ARGS = SimpleNamespace(
    kl_estimator="k1",
    kl_coef=0.07,
    whiten_rewards=False,
    gamma=0.97,
    lam=0.9,
    cliprange=0.2,
    cliprange_value=0.3,
    vf_coef=0.1,
)


@pytest.fixture(scope="module")
def source() -> str:
    return Path(os.environ["TRL_PPO"]).read_text(encoding="utf-8")


def part(source: str, first: str, last: str) -> str:
    """The lines from the one that begins with `first` to the one that begins with `last`."""
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i >= start and line.strip().startswith(last))
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def run(source: str, pieces: list[str], **names: Any) -> dict[str, Any]:
    """Their whitening functions, and these pieces of their code, on these names."""
    space: dict[str, Any] = {"torch": torch, "args": ARGS, "INVALID_LOGPROB": 1.0, **names}
    helpers = part(source, "def masked_mean", "return whitened")
    exec("from __future__ import annotations\n" + helpers, space)
    for piece in pieces:
        exec(piece, space)
    return space


@dataclass(frozen=True)
class Numbers:
    """Three completions of five tokens at most."""

    logp: torch.Tensor
    ref: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    lengths: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(5) < self.lengths[:, None]


def numbers(lengths: list[int]) -> Numbers:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Numbers(-draw(3, 5).abs(), -draw(3, 5).abs(), draw(3, 5), draw(3), torch.tensor(lengths))


def batch_of(n: Numbers) -> RolloutBatch:
    return RolloutBatch(
        mask=n.mask, logp_old=n.logp, logp_ref=n.ref, values=n.values, score=n.scores, group=torch.arange(3),
        finished=torch.ones(3, dtype=torch.bool), kl_coef=ARGS.kl_coef,
    )  # fmt: skip


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_rewards_advantages_and_returns(estimator: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On completions of full length, whose score lies on the last token for both."""
    monkeypatch.setattr(ARGS, "kl_estimator", estimator)
    n = numbers([5, 5, 5])
    none = torch.zeros(3, 5, dtype=torch.bool)
    found = run(
        source, [part(source, "# 4. compute rewards", "advantages = torch.masked_fill")],
        logprobs=n.logp, ref_logprobs=n.ref, values=n.values, scores=n.scores, responses=n.logp, padding_mask=none, padding_mask_p1=none,
        sequence_lengths=n.lengths - 1, sequence_lengths_p1=n.lengths,
    )  # fmt: skip
    plain = Ppo(
        kl_coef=ARGS.kl_coef, kl_estimator=estimator, gamma=ARGS.gamma, gae_lambda=ARGS.lam, whiten_advantages=False
    )
    credited = plain.credit(batch_of(n))
    assert credited.advantages is not None and credited.returns is not None
    assert torch.allclose(credited.returns, found["returns"], atol=1e-10)
    assert torch.allclose(credited.advantages, found["returns"] - n.values, atol=1e-10)
    # whitening: the variance is biased here and unbiased there, a factor of sqrt(15 / 14)
    from dataclasses import replace

    whitened = replace(plain, whiten_advantages=True).credit(batch_of(n)).advantages
    assert whitened is not None
    assert torch.allclose(whitened, found["advantages"] * (15 / 14) ** 0.5, atol=1e-6)


def test_the_score_of_a_short_completion_lies_elsewhere_on_purpose(source: str) -> None:
    """Theirs stands one place past the last token, ours on it: what PPO learns from differs by one step of discount and lambda."""
    n = numbers([3, 3, 3])
    beyond = torch.arange(5)[None] >= n.lengths[:, None]
    later = torch.arange(5)[None] > n.lengths[:, None]
    lines = part(source, "# 4. compute rewards", "rewards[actual_start, actual_end]")
    found = run(
        source, [lines], logprobs=n.logp.masked_fill(beyond, 1.0), ref_logprobs=n.ref.masked_fill(beyond, 1.0), scores=n.scores,
        padding_mask=beyond, padding_mask_p1=later, sequence_lengths=n.lengths - 1, sequence_lengths_p1=n.lengths,
    )  # fmt: skip
    assert torch.allclose(found["rewards"][:, 3], n.scores)
    ours = Ppo(kl_coef=ARGS.kl_coef, gamma=1.0, gae_lambda=1.0, whiten_advantages=False).credit(batch_of(n)).returns
    assert ours is not None
    kl = ARGS.kl_coef * (n.logp - n.ref)[:, 2]
    assert torch.allclose(ours[:, 2], n.scores - kl, atol=1e-10)


def test_losses_and_their_gradients(source: str) -> None:
    n = numbers([5, 3, 4])
    padding = ~n.mask
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(3, 5, generator=generator, dtype=torch.float64).masked_fill(padding, 0)
    returns = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    moved = 0.4 * torch.randn(3, 5, generator=generator, dtype=torch.float64)

    theirs_logp = (n.logp + moved).requires_grad_()
    theirs_value = (n.values + moved).requires_grad_()
    found = run(
        source, [part(source, "vpredclipped = torch.clamp(", "loss = pg_loss + args.vf_coef")],
        new_logprobs=theirs_logp.masked_fill(padding, 1.0), vpred=theirs_value.masked_fill(padding, 0), micro_batch_inds=slice(None),
        padding_mask=padding, padding_mask_p1=padding, mb_advantage=advantages, mb_return=returns,
        mb_values=n.values.masked_fill(padding, 0),
        mb_logprobs=n.logp.masked_fill(padding, 1.0),
    )  # fmt: skip
    gradients = torch.autograd.grad(found["loss"], [theirs_logp, theirs_value])

    from dataclasses import replace

    algorithm = Ppo(
        clip_low=ARGS.cliprange, clip_high=ARGS.cliprange, clip_range_value=ARGS.cliprange_value, vf_coef=ARGS.vf_coef
    )
    batch = replace(batch_of(n), advantages=advantages, returns=returns)
    logp, value = (n.logp + moved).requires_grad_(), (n.values + moved).requires_grad_()
    weights = reduction_weights(n.mask, algorithm.reduction, dtype=torch.float64)
    policy = (algorithm.policy_loss(Scores(logp=logp, entropy=torch.zeros_like(logp)), batch).loss * weights).sum()
    critic = (algorithm.value_loss(value, batch).loss * weights).sum()
    assert float(policy.detach()) == pytest.approx(float(found["pg_loss"]), abs=1e-10)
    assert float(critic.detach()) == pytest.approx(ARGS.vf_coef * float(found["vf_loss"]), abs=1e-10)
    for a, b in zip(torch.autograd.grad(policy + critic, [logp, value]), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
