"""`trimtab prove`: its claims hold, and stop holding when the algorithm under them is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trimtab import proofs
from trimtab.algos.dpo import Dpo
from trimtab.algos.grpo import Grpo
from trimtab.algos.ppo import Ppo
from trimtab.algos.rloo import Rloo
from trimtab.cli import app
from trimtab.proofs.claims import Claim, at_least, at_most, table
from trimtab.proofs.convergence import Outcome, rewards, train
from trimtab.proofs.gradients import difficulty_factor, forward_optimum, gradients, kl
from trimtab.proofs.optima import Point, above, frontier, per_token_optimum, preferences
from trimtab.proofs.problem import Problem, answers, prefixes, random_problem
from trimtab.types import LossTerms, PreferenceBatch, RolloutBatch, Scores

pytestmark = pytest.mark.property


def failed(claims: list[Claim]) -> list[str]:
    return [claim.text for claim in claims if not claim.held]


@pytest.mark.parametrize("item", [gradients, kl, preferences, frontier])
def test_the_claims_hold(item: Callable[[], list[Claim]]) -> None:
    claims = item()
    assert len(claims) >= 4
    assert failed(claims) == []


# ------------------------------------------------------------------------------------------------------ faults are seen


def test_the_group_s_own_mean_as_rloo_s_baseline_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    credit = Rloo.credit
    monkeypatch.setattr(
        Rloo, "credit", lambda self, batch, **keys: credit(replace(self, baseline="mean"), batch, **keys)
    )
    seen = failed(gradients())
    assert "RLOO's expected gradient is that of J" in seen
    assert not any(text.startswith(("PPO", "ReMax", "GRPO")) for text in seen)


def test_a_turned_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Grpo.policy_loss

    def turned(self: Grpo, scores: Scores, batch: RolloutBatch) -> LossTerms:
        terms = loss(self, scores, batch)
        return replace(terms, loss=-terms.loss)

    monkeypatch.setattr(Grpo, "policy_loss", turned)
    seen = failed(gradients())
    assert "Dr.GRPO's is (k - 1)/k of it, k = 3" in seen
    assert not any(text.startswith(("RLOO", "PPO", "ReMax")) for text in seen)


def test_a_shifted_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A critic that has seen the token that it should judge is no baseline."""
    credit = Ppo.credit

    def late(self: Ppo, batch: RolloutBatch, **keys: Any) -> RolloutBatch:
        assert batch.values is not None
        return credit(self, replace(batch, values=batch.values.roll(-1, dims=-1)), **keys)

    monkeypatch.setattr(Ppo, "credit", late)
    seen = failed(gradients())
    assert "PPO's is that of J with any critic, lambda = 1, not whitened" in seen
    assert not any(text.startswith(("RLOO", "GRPO", "ReMax")) for text in seen)


def test_a_forgotten_reference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Dpo.loss

    def blind(self: Dpo, scores: Scores, batch: PreferenceBatch) -> LossTerms:
        assert batch.logp_ref is not None
        return loss(self, scores, replace(batch, logp_ref=torch.zeros_like(batch.logp_ref)))

    monkeypatch.setattr(Dpo, "loss", blind)
    seen = failed(preferences())
    assert {"DPO rests at pi*", "IPO rests at its own optimum"} <= set(seen)
    assert "robust DPO rests at pi* with 20% of the labels turned round" in seen


# ------------------------------------------------------------------------------------------------- the problems by hand


def test_answers_and_prefixes() -> None:
    assert answers("ab", 2) == [".", "a.", "b.", "aa", "ab", "ba", "bb"]
    assert prefixes("ab", 2) == ["", "a", "b"]


def test_a_problem_by_hand() -> None:
    """Two answers of one token, reference 1/4 and 3/4, rewards log 3 and 0, beta 1: weights 3/4 and 3/4, so pi* = (1/2, 1/2), Z = 3/2."""
    problem = Problem(
        letters="a",
        depth=1,
        logits_ref=torch.tensor([[3.0, 1.0]], dtype=torch.float64).log(),  # a, then the end
        rewards=torch.tensor([math.log(3), 0.0], dtype=torch.float64),  # the end, then a
        beta=1.0,
    )
    assert problem.answers == [".", "a"]
    assert problem.logp_ref.exp().tolist() == pytest.approx([0.25, 0.75])
    assert problem.optimum.exp().tolist() == pytest.approx([0.5, 0.5])
    assert problem.best == pytest.approx(math.log(1.5))
    assert float(problem.objective(problem.optimum)) == pytest.approx(math.log(1.5))
    # KL(pi*, ref) = log 2 / 2 + log(2/3) / 2, E r = log 3 / 2: their difference is log 1.5 as well
    on = Point(0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.5 * math.log(3))
    assert above(problem, on) == pytest.approx(0.0, abs=1e-6)
    assert above(problem, replace(on, reward=on.reward + 0.1)) == pytest.approx(0.1, abs=1e-6)


def test_a_table_is_that_of_its_answers() -> None:
    problem = random_problem(0, letters="abc", depth=3)
    assert float(problem.logp_ref.exp().sum()) == pytest.approx(1.0)
    again = problem.logps(problem.table_of(problem.optimum))
    assert again.tolist() == pytest.approx(problem.optimum.tolist(), abs=1e-12)


def test_the_forward_optimum_by_hand() -> None:
    """Two answers, reference 1/2 each, rewards 0 and 1, beta 1: 0.5 / x + 0.5 / (x - 1) = 1 at x = 1 + sqrt(1/2)."""
    problem = Problem(
        letters="a",
        depth=1,
        logits_ref=torch.zeros(1, 2, dtype=torch.float64),
        rewards=torch.tensor([0.0, 1.0], dtype=torch.float64),
        beta=1.0,
    )
    x = 1 + math.sqrt(0.5)
    assert forward_optimum(problem).exp().tolist() == pytest.approx([0.5 / x, 0.5 / (x - 1)], abs=1e-9)


def test_the_optimum_per_token_by_hand() -> None:
    """Lengths 1, 2, 2, reference 1/2, 1/4, 1/4, h = log 2, 0, 0: with x = exp(c), x + x^2 / 2 = 1 at x = sqrt(3) - 1."""
    problem = Problem(
        letters="a",
        depth=2,
        logits_ref=torch.zeros(2, 2, dtype=torch.float64),
        rewards=torch.zeros(3, dtype=torch.float64),
        beta=1.0,
    )
    assert problem.answers == [".", "a.", "aa"]
    x = math.sqrt(3) - 1
    found = per_token_optimum(problem, torch.tensor([math.log(2), 0.0, 0.0], dtype=torch.float64))
    assert found.exp().tolist() == pytest.approx([x, x**2 / 4, x**2 / 4])


def test_the_factor_of_difficulty_by_hand() -> None:
    """k = 2: one right of two has s = sqrt(1/2), so 2 p (1-p) x 1/4 / (s p (1-p)) = 0.5 / s, whatever p."""
    for p in (0.1, 0.5):
        assert difficulty_factor(p, 2) == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4))


# -------------------------------------------------------------------------------------------------------- runs, output


def test_a_short_run_goes_most_of_the_way(tmp_path: Path) -> None:
    found = train(tmp_path / "run", "table", "rloo", seed=0, steps=25, group_size=64)
    assert found.logp.exp().sum(dim=-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert found.to_be_won > 0.1
    assert found.gap() < 0.1 * found.to_be_won
    assert found.noise(64) < 5


def test_the_transformer_answers_in_its_letters_only(tmp_path: Path) -> None:
    found = train(tmp_path / "run", "transformer", "rloo", seed=0, steps=1, group_size=4)
    for logp in (found.logp, found.logp_ref):
        assert logp.exp().sum(dim=-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_a_gap_by_hand() -> None:
    """A policy that is the reference, uniform over 15 answers, has J = mean r, and beta log Z is a log of a mean."""
    logp = torch.full((2, 15), -math.log(15), dtype=torch.float64)
    gains = torch.zeros(2, 15, dtype=torch.float64)
    gains[:, 0] = 1.0
    found = Outcome(logp=logp, logp_ref=logp)
    assert found.gap(gains, beta=1.0) == pytest.approx(math.log((14 + math.e) / 15) - 1 / 15)


def test_noise_by_hand() -> None:
    """Uniform over 15 answers and equal to the reference: no KL, and rewards whose variance is that of the numbers themselves."""
    logp = torch.full((2, 15), -math.log(15), dtype=torch.float64)
    gains = rewards()
    error = math.sqrt(float(gains.var(dim=-1, correction=0).sum()) / 100) / 2
    reward = float(gains.mean()) + 3 * error
    moved = logp + 0.1 * torch.tensor([1.0, -1.0] * 7 + [0.0], dtype=torch.float64)
    assert Outcome(logp=logp, logp_ref=moved, logged=(reward, 0.0)).noise(100) == pytest.approx(3.0)


def test_a_number_that_is_none_holds_nothing() -> None:
    assert not at_most(1, "x", math.nan, 1.0).held
    assert not at_least(1, "x", math.nan, 1.0).held
    assert "DOES NOT HOLD" in table([at_most(1, "x", 2.0, 1.0)])


@pytest.mark.parametrize(("number", "code"), [(0.5, 0), (2.0, 1)])
def test_the_exit_code_says_whether_all_held(
    number: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "prove", lambda *, full: [at_most(1, "x", number, 1.0)])
    done = CliRunner().invoke(app, ["prove", "--output", str(tmp_path / "claims.json")])
    assert done.exit_code == code
    (claim,) = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert claim["held"] is (code == 0)
