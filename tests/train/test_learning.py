"""Each stage solves something small in seconds; and would not with a sign turned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.algos import ALGORITHMS
from trimtab.algos.dpo import Dpo
from trimtab.algos.kto import Kto
from trimtab.algos.orpo import Orpo
from trimtab.algos.rm import RewardModel
from trimtab.algos.simpo import SimPo
from trimtab.rewards import Answer
from trimtab.rewards.model import ModelReward
from trimtab.rundir import RunFolder
from trimtab.types import LabelledBatch, LossTerms, PreferenceBatch, RolloutBatch, Scores, take

pytestmark = pytest.mark.learning

Run = Callable[..., RunFolder]

seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
"""One in the default suite, three in `make test-learning`."""


@seeds
def test_sft_memorises(seed: int, run: Run, tmp_path: Path) -> None:
    """Three answers by heart: the greedy answer to each question is the one it was taught.

    The loss has a floor: the output head is frozen, and a hidden state of norm 8 along a row of norm 0.8 has a logit of 6.4
    against 300 of about N(0, 0.8^2): -log(e^6.4 / (e^6.4 + 300 e^0.32)) = 0.52.
    """
    folder = run(
        "sft", tmp_path / "r", seed=seed, max_steps=40, learning_rate=2e-2, lora_rank=16, max_samples=3,
        eval_dataset="qa", do_eval=True, eval_tasks="exact_match", max_new_tokens=20,
    )  # fmt: skip
    losses = [row["loss"] for row in folder.metrics("train")]
    assert losses[0] > 5  # log 300 = 5.7
    assert losses[-1] < 0.7
    assert folder.results("eval")["eval_exact_match"] == 1.0


@seeds
def test_a_reward_model_separates(seed: int, run: Run, tmp_path: Path) -> None:
    """On prompts that it has not seen, "yes" scores above "no"."""
    keys = {"max_steps": 15, "learning_rate": 1e-2, "eval_dataset": "pairs_eval", "do_eval": True, "seed": seed}
    results = run("rm", tmp_path / "r", **keys).results("eval")
    assert results["eval_accuracy"] == 1.0
    assert results["eval_margin"] > 1.0
    assert results["eval_nll"] < 0.3


def test_a_reward_model_with_its_pairs_swapped_does_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = RewardModel.loss
    monkeypatch.setattr(RewardModel, "loss", lambda self, rewards, batch: loss(self, rewards.flip(-1), batch))
    keys = {"max_steps": 15, "learning_rate": 1e-2, "eval_dataset": "pairs_eval", "do_eval": True}
    assert run("rm", tmp_path / "r", **keys).results("eval")["eval_accuracy"] == 0.0


PREFERENCES: dict[str, dict[str, Any]] = {
    **{loss: {"pref_loss": loss} for loss in ("sigmoid", "hinge", "nca", "ipo")},
    "robust": {"pref_loss": "robust", "dpo_label_smoothing": 0.1},
    "exo": {"pref_loss": "exo", "dpo_label_smoothing": 0.1},
    "kto_pair": {"pref_loss": "kto_pair"},
    "orpo": {"stage": "orpo", "pref_beta": 1.0},
    "simpo": {"stage": "simpo", "pref_beta": 2.0},
    "kto": {"stage": "kto", "dataset": "marks", "eval_dataset": "marks_eval"},
}


def held_out(run: Run, folder: Path, name: str, seed: int = 0) -> dict[str, Any]:
    """Figures on prompts that were not trained on, after 10 steps."""
    keys = {"stage": "dpo", "eval_dataset": "pairs_eval", "seed": seed, **PREFERENCES[name]}
    return run(keys.pop("stage"), folder, max_steps=10, learning_rate=1e-2, do_eval=True, **keys).results("eval")


@seeds
@pytest.mark.parametrize("name", list(PREFERENCES))
def test_preferences_are_learnt(name: str, seed: int, run: Run, tmp_path: Path) -> None:
    """On prompts that it has not seen, "yes" has gained on "no": in every pair, and (but for orpo, which starts behind) by a lot."""
    figures = held_out(run, tmp_path / "r", name, seed)
    assert figures["eval_accuracy"] == 1.0
    assert figures["eval_margin"] > 0.3


@pytest.mark.parametrize(("name", "algorithm"), [("sigmoid", Dpo), ("simpo", SimPo), ("orpo", Orpo)])
def test_swapped_pairs_are_not(
    name: str, algorithm: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chosen and rejected swapped where the loss is taken."""
    loss = algorithm.loss

    def swapped(self: Any, scores: Scores, batch: PreferenceBatch) -> LossTerms:
        terms = loss(self, scores, batch)
        if not torch.is_grad_enabled():
            return terms  # evaluation goes by the true labels
        order = [i ^ 1 for i in range(len(batch.mask))]
        flipped = Scores(logp=scores.logp[order], entropy=scores.entropy[order])
        return replace(terms, loss=loss(self, flipped, take(batch, order)).loss)

    monkeypatch.setattr(algorithm, "loss", swapped)
    assert held_out(run, tmp_path / "r", name)["eval_accuracy"] == 0.0


def test_swapped_labels_are_not(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Kto.loss

    def swapped(self: Kto, scores: Scores, batch: LabelledBatch) -> LossTerms:
        return loss(self, scores, replace(batch, desirable=~batch.desirable) if torch.is_grad_enabled() else batch)

    monkeypatch.setattr(Kto, "loss", swapped)
    assert held_out(run, tmp_path / "r", "kto")["eval_margin"] < -0.3


def small_ids(self: Any, answers: Sequence[Answer]) -> list[float]:
    """A reward that a token earns by itself: the share of an answer's tokens in the first half of the vocabulary."""
    return [sum(t < 150 for t in a.completion.token_ids) / len(a.completion.token_ids) for a in answers]


ONLINE_KEYS: dict[str, dict[str, Any]] = {
    "ppo": {"ppo_epochs": 2, "critic_warmup_steps": 0, "clip_range": 0.9},
    "rloo": {"ppo_epochs": 2, "clip_range": 0.9},
    "grpo": {"ppo_epochs": 2, "clip_range": 0.9},
    "reinforce_pp": {"ppo_epochs": 2, "clip_range": 0.9},
    "remax": {"ppo_epochs": 2},
    "raft": {"ppo_epochs": 2, "max_steps": 14, "learning_rate": 1e-2},  # nothing is pushed down, so it takes longer
    "online_dpo": {"ppo_epochs": 2, "pref_beta": 0.05, "kl_coef": 0.0},
}


def rewards(run: Run, rm_folder: Path, folder: Path, stage: str = "ppo", **keys: Any) -> list[float]:
    """Mean reward of each step. The temperature gives a random model something to prefer; the wide clip makes it quick."""
    shared = {"max_steps": 8, "learning_rate": 2e-2, "kl_coef": 0.01}
    done = run(
        stage, folder, reward_model=str(rm_folder), per_device_train_batch_size=9, group_size=8, ppo_buffer_size=1, max_new_tokens=2,
        missing_eos_penalty=0.0, lr_scheduler_type="constant", temperature=0.5, **{**shared, **ONLINE_KEYS[stage]}, **keys,
    )  # fmt: skip
    return [row["reward/mean"] for row in done.metrics("train")]


@seeds
@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_ppo_raises_the_reward(
    critic: str, seed: int, run: Run, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelReward, "score", small_ids)
    found = rewards(run, rm_folder, tmp_path / "r", seed=seed, critic=critic)
    assert found[0] == pytest.approx(0.5, abs=0.15)
    assert sum(found[-3:]) / 3 > 0.8


@seeds
@pytest.mark.parametrize("stage", ["rloo", "grpo", "reinforce_pp", "remax", "raft", "online_dpo"])
def test_the_others_raise_it_without_a_critic(
    stage: str, seed: int, run: Run, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelReward, "score", small_ids)
    assert sum(rewards(run, rm_folder, tmp_path / "r", stage, seed=seed)[-3:]) / 3 > 0.8


@pytest.mark.parametrize("stage", [stage for stage in ONLINE_KEYS if stage != "online_dpo"])  # it has no advantage
def test_with_a_negated_advantage_they_do_not(
    stage: str, run: Run, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelReward, "score", small_ids)
    algorithm = ALGORITHMS.load(stage)
    credit = algorithm.credit

    def negated(self: Any, batch: RolloutBatch, **keys: Any) -> RolloutBatch:
        credited: RolloutBatch = credit(self, batch, **keys)
        assert credited.advantages is not None
        return replace(credited, advantages=-credited.advantages)

    monkeypatch.setattr(algorithm, "credit", negated)
    found = rewards(run, rm_folder, tmp_path / "r", stage)
    assert sum(found[-3:]) / 3 < 0.3
