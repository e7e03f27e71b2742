"""Runs without a critic: what is asked of the rollout, dynamic sampling, the greedy baseline, a reference that is refreshed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.config import load
from trimtab.rewards import Answer
from trimtab.rewards.model import ModelReward
from trimtab.rewards.shaping import overlong_cost
from trimtab.rundir import RunFolder
from trimtab.train import online, rollout
from trimtab.train.assemble import POLICY, REFERENCE, Session, assemble
from trimtab.train.online import OnlineTrainer, what_moves_the_optimum
from trimtab.train.rollout import score_role
from trimtab.types import Completion, Prompt, RolloutBatch, TokenRow

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]


def trainer(keys: Keys, stage: str, tmp_path: Path, rm_folder: Path, **more: Any) -> OnlineTrainer:
    config = load(keys(stage, tmp_path / "run", reward_model=str(rm_folder), **more))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir(exist_ok=True)
    return OnlineTrainer(assemble(config), folder)


@pytest.mark.parametrize("stage", ["rloo", "grpo", "reinforce_pp", "remax"])
def test_the_first_minibatch_stands_still(stage: str, keys: Keys, rm_folder: Path, tmp_path: Path) -> None:
    figures = trainer(keys, stage, tmp_path, rm_folder, learning_rate=1e-2, ppo_epochs=2).step(0)
    assert figures["first_minibatch/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert figures["first_minibatch/clip_fraction"] == 0
    assert figures["first_minibatch/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert figures["first_minibatch/policy_loss"] == pytest.approx(-figures["first_minibatch/advantage"], abs=1e-4)
    assert figures["kl/k1_sequence"] == pytest.approx(0, abs=1e-4)
    assert "grad_norm/critic" not in figures and "value_loss" not in figures


@pytest.mark.parametrize("stage", ["rloo", "grpo"])
def test_results_do_not_depend_on_how_a_batch_is_cut(stage: str, keys: Keys, rm_folder: Path, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for i, way in enumerate(({"micro_batch_tokens": 1}, {"layout": "padded"}, {"layout": "shared"})):
        (tmp_path / str(i)).mkdir()
        one = trainer(keys, stage, tmp_path / str(i), rm_folder, ppo_epochs=2, **way)
        one.step(0)
        weights = {name: p.detach().clone() for name, p in one.parameters[POLICY].items()}
        for name, weight in expected.items():
            assert torch.allclose(weights[name], weight, atol=2e-5), name
        expected = weights


def by_prompt(varied: set[str]) -> Callable[[Any, Sequence[Answer]], list[float]]:
    """Scores that vary for these questions and are 1 for every other."""

    def score(self: Any, answers: Sequence[Answer]) -> list[float]:
        return [
            float(answer.completion.sample_index) if answer.prompt.example.prompt[-1].content in varied else 1.0
            for answer in answers
        ]

    return score


def test_dynamic_sampling_fills_the_batch_with_groups_that_vary(
    keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of nine questions vary: a batch of six prompts is filled by going twice through the data."""
    varied = {"a", "g", "say l"}
    monkeypatch.setattr(ModelReward, "score", by_prompt(varied))
    settings = {"dynamic_sampling": True, "missing_eos_penalty": 0.0, "group_size": 3}
    one = trainer(keys, "grpo", tmp_path, rm_folder, **settings)
    figures = one.step(0)
    assert {row["prompt"][-1] for row in one.current} == varied
    assert len(one.current) == 6 * 3
    assert figures["zero_variance_groups"] == 0
    assert figures["dynamic/left_out"] == one.cursor - 6 > 0
    assert figures["dynamic/rounds"] > 1
    assert one.state()["cursor"] == one.cursor


def test_dynamic_sampling_gives_up(
    keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing varies: after three rounds the step is taken on what is there, and moves nothing."""
    monkeypatch.setattr(ModelReward, "score", by_prompt(set()))
    settings = {"dynamic_sampling": True, "missing_eos_penalty": 0.0, "dynamic_sampling_rounds": 3, "kl_coef": 0.0}
    one = trainer(keys, "grpo", tmp_path, rm_folder, **settings)
    figures = one.step(0)
    assert figures["dynamic/rounds"] == 3
    assert figures["zero_variance_groups"] == 1
    assert figures["grad_norm/policy"] == 0


def test_the_greedy_answer_is_the_baseline(
    keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward of length: the greedy answers are scored beside the samples, once per prompt."""
    asked: list[int] = []

    def length(self: Any, answers: Sequence[Answer]) -> list[float]:
        asked.append(len(answers))
        return [float(len(answer.completion.token_ids)) for answer in answers]

    monkeypatch.setattr(ModelReward, "score", length)
    one = trainer(keys, "remax", tmp_path, rm_folder, group_size=2, missing_eos_penalty=0.0)
    figures = one.step(0)
    assert asked == [12, 6]
    assert 1 <= figures["reward/greedy"] <= 6


def test_each_answer_has_its_own_prompt_s_greedy_score(
    keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that is the prompt's number: with two answers each, the greedy score beside every answer is its own score."""
    seen: list[RolloutBatch] = []
    monkeypatch.setattr(ModelReward, "score", lambda self, answers: [float(a.prompt.index) for a in answers])
    one = trainer(keys, "remax", tmp_path, rm_folder, group_size=2, missing_eos_penalty=0.0)
    credit = type(one.algorithm).credit

    def watched(self: Any, batch: RolloutBatch, **more: Any) -> RolloutBatch:
        seen.append(batch)
        return credit(self, batch, **more)

    monkeypatch.setattr(type(one.algorithm), "credit", watched)
    one.step(0)
    (batch,) = seen
    assert batch.greedy is not None
    assert len(set(batch.score.tolist())) == 6
    assert batch.greedy.tolist() == batch.score.tolist()


def test_a_score_is_credited_less_its_costs(
    keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer scores 9, clipped to 5: half a point off without an end, up to 2 off for a length near the limit."""
    seen: list[RolloutBatch] = []
    monkeypatch.setattr(ModelReward, "score", lambda self, answers: [9.0] * len(answers))
    costs = {"reward_clip": 5.0, "missing_eos_penalty": 0.5, "overlong_buffer": 30, "overlong_penalty": 2.0}
    one = trainer(keys, "rloo", tmp_path, rm_folder, max_new_tokens=60, **costs)
    credit = type(one.algorithm).credit

    def watched(self: Any, batch: RolloutBatch, **more: Any) -> RolloutBatch:
        seen.append(batch)
        return credit(self, batch, **more)

    monkeypatch.setattr(type(one.algorithm), "credit", watched)
    one.step(0)
    (batch,) = seen
    free = one.session.config.answer_limit - 30
    lengths = batch.mask.sum(dim=-1).tolist()
    assert set(batch.finished.tolist()) == {True, False}, "the seed's answers are to be of both kinds"
    expected = [
        5.0 - (0.0 if done else 0.5) - 2.0 * max(0, n - free) / 30
        for n, done in zip(lengths, batch.finished.tolist(), strict=True)
    ]
    assert batch.score.tolist() == pytest.approx(expected)


def test_the_start_says_what_moves_the_optimum(keys: Keys, tmp_path: Path) -> None:
    def said(stage: str, **more: Any) -> str:
        return "; ".join(
            what_moves_the_optimum(load(keys(stage, tmp_path, reward_model="r", missing_eos_penalty=0.0, **more)))
        )

    assert said("rloo") == ""
    every = said(
        "grpo", ref_update_every=5, entropy_coef=0.01, mask_truncated=True, overlong_buffer=2, overlong_penalty=0.5, score_norm=True,
        reward_clip=3.0, reward_length_penalty=0.1, reward_length_free=4,
    )  # fmt: skip
    for words in (
        "every 5 steps",
        "0.01 a token",
        "cut by the limit",
        "last 2 tokens",
        "up to 0.5",
        "beyond 4 costs 0.1",
        "deviation",
        "minus 3",
    ):
        assert words in every
    assert "costs 1" in "; ".join(what_moves_the_optimum(load(keys("rloo", tmp_path, reward_model="r"))))


def distance(one: OnlineTrainer) -> float:
    rows = [TokenRow(token_ids=(20, 30, 40, 50, 60), scored=(2, 3, 4))]
    policy, reference = (score_role(one.session, role, rows, temperature=1.0)["logp"] for role in (POLICY, REFERENCE))
    return float((policy - reference).abs().max())


@pytest.mark.parametrize("continued", [False, True])
def test_the_reference_is_refreshed(
    continued: bool, keys: Keys, sft_folder: Path, rm_folder: Path, tmp_path: Path
) -> None:
    """Equal at the start, apart after one step, equal again after two (ref_update_every: 2), and apart after three."""
    more = {"adapter_name_or_path": str(sft_folder)} if continued else {}
    one = trainer(keys, "rloo", tmp_path, rm_folder, ref_update_every=2, learning_rate=1e-2, **more)
    assert distance(one) < 1e-6
    one.step(0)
    assert distance(one) > 1e-4
    one.step(1)
    assert distance(one) < 1e-6
    one.step(2)
    assert distance(one) > 1e-4


def test_overlong_cost() -> None:
    """Limit 100, buffer 20: free up to 80, half at 90, all at 100."""
    costs = [overlong_cost(n, 100, 20, 2.0) for n in (1, 80, 85, 90, 100)]
    assert costs == [0.0, 0.0, 0.5, 1.0, 2.0]
    assert overlong_cost(100, 100, 0, 2.0) == 0.0


def test_the_rows_own_answer_as_a_baseline(
    keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are less what the row's answer is worth, asked for once per prompt: a constant per prompt, so advantages do not change."""
    asked: list[str] = []

    def lengths(self: Any, answers: Sequence[Answer]) -> list[float]:
        asked.extend(answer.text for answer in answers)
        return [float(len(answer.text)) for answer in answers]

    monkeypatch.setattr(ModelReward, "score", lengths)
    plain, less = {}, {}
    for found, own in ((plain, "none"), (less, "answer")):
        (tmp_path / own).mkdir()
        one = trainer(keys, "rloo", tmp_path / own, rm_folder, reward_baseline=own)
        asked.clear()
        found |= one.step(0)
        texts = {p.example.response.content for p in one.prompts if p.example.response}
        assert sum(text in texts for text in asked) >= (6 if own == "answer" else 0)
    assert plain["reward/mean"] == less["reward/mean"]
    assert plain["advantage/std"] == pytest.approx(less["advantage/std"], rel=1e-5)
    assert plain["score/mean"] > less["score/mean"] - 10
    assert plain["score/mean"] != less["score/mean"]


@pytest.mark.parametrize(("stage", "more"), [("rloo", {}), ("online_dpo", {}), ("grpo", {"preset": "gspo"})])
def test_minibatches_of_unlike_lengths(
    stage: str, more: dict[str, Any], keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loss an answer or a pair, and the longest answer of the rollout batch is in one minibatch only."""
    one = trainer(keys, stage, tmp_path, rm_folder, ppo_buffer_size=3, per_device_train_batch_size=1, **more)
    make = Session.generator

    def generator(session: Session) -> Any:
        engine = make(session)
        whole = engine.generate

        def cut(prompts: Sequence[Prompt], *rest: Any, k: int = 1, **named: Any) -> list[Completion]:
            return [
                replace(c, token_ids=c.token_ids[: 2 + i // k], logprobs=c.logprobs[: 2 + i // k], finish="length")
                for i, c in enumerate(whole(prompts, *rest, k=k, **named))
            ]

        return SimpleNamespace(update=engine.update, generate=cut)

    monkeypatch.setattr(Session, "generator", generator)
    figures = one.step(0)
    assert figures["length/mean"] == pytest.approx(3.0)
    assert figures["loss"] != 0 and figures["grad_norm/policy"] > 0


@pytest.mark.parametrize("stage", ["rloo", "grpo", "reinforce_pp", "remax", "raft", "online_dpo"])
def test_one_optimizer_step_needs_no_pass_for_the_old_log_probabilities(
    stage: str, keys: Keys, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update's own pass has them: the same figures and the same weights as with that pass made."""
    scored: list[str] = []
    score, collect = rollout.score_role, online.collect

    def watched(session: Session, role: str, *rest: Any, **named: Any) -> dict[str, torch.Tensor]:
        scored.append(role)
        return score(session, role, *rest, **named)

    def made(*rest: Any, **named: Any) -> Any:
        return collect(*rest, **{**named, "one_step": False, "one_minibatch": False})

    monkeypatch.setattr(rollout, "score_role", watched)
    found = []
    for name, way in (("without", collect), ("with", made)):
        monkeypatch.setattr(online, "collect", way)
        (tmp_path / name).mkdir()
        one = trainer(keys, stage, tmp_path / name, rm_folder, learning_rate=1e-2, adam_epsilon=1e-4, ppo_buffer_size=1)
        one.step(0)  # the reference has been left behind
        scored.clear()
        figures = one.step(1)
        assert (POLICY in scored) == (name == "with") and REFERENCE in scored
        assert 0 < figures["sampler_diff/max"] < 1e-4
        found.append((figures, {n: p.detach().clone() for n, p in one.parameters[POLICY].items()}))
    (without, ours), (passed, theirs) = found
    assert without.keys() == passed.keys()
    for name in without.keys() - {n for n in without if n.startswith("seconds/")}:
        if not name.startswith("sampler_diff/"):
            assert without[name] == pytest.approx(passed[name], rel=1e-3, abs=2e-4), name
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=2e-5), name
