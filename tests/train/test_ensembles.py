"""Ensembles of reward models: several adapters on one base, each scored as it is alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.config import load
from trimtab.errors import AdapterError, ConfigError
from trimtab.rewards import Answer, finished_row
from trimtab.rundir import RunFolder
from trimtab.train.assemble import Session, assemble
from trimtab.types import Completion

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def three(run: Run, rm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three reward models on one base: of other seeds, one of them of another rank."""
    root = tmp_path_factory.mktemp("members")
    found = [str(rm_folder)]
    for seed, rank in ((1, 4), (2, 8)):
        found.append(str(run("rm", root / str(seed), seed=seed, lora_rank=rank, learning_rate=1e-2).path))
    return found


def answers(session: Session) -> list[Answer]:
    made = []
    for prompt in session.data.train[:3]:
        for ids in ((40, 41, 2), (50, 51, 52)):
            finish: Any = "stop" if ids[-1] == 2 else "length"
            one = Completion(prompt_index=0, sample_index=0, token_ids=ids, logprobs=(0.0,) * 3, finish=finish)
            row = finished_row(prompt, one, session.template.stop_ids, session.tail)
            made.append(Answer(prompt=prompt, completion=one, row=row, text=""))
    return made


@pytest.mark.parametrize("kind", ["lora", "freeze"])
def test_each_member_scores_as_it_does_alone(kind: str, keys: Keys, three: list[str], tmp_path: Path) -> None:
    more = {"finetuning_type": kind}
    session = assemble(load(keys("ppo", tmp_path / "x", reward_model=three, reward_ensemble="min", **more)))
    together = session.reward().judge(answers(session))
    alone = []
    for number, one in enumerate(three, 1):
        single = assemble(load(keys("ppo", tmp_path / "x", reward_model=one, **more)))
        alone.append(single.reward().score(answers(single)))
        assert together.parts[f"model/{number}"] == alone[-1]
    assert alone[0] != alone[1] != alone[2]
    assert together.scores == together.parts["model"] == [min(scores) for scores in zip(*alone, strict=True)]
    assert not session.fresh_critic  # it starts from the first member


def test_disagreement_is_logged_and_taken_off(run: Run, three: list[str], tmp_path: Path) -> None:
    folder = run(
        "ppo",
        tmp_path / "run",
        reward_model=", ".join(three),
        reward_ensemble="mean_minus_std",
        reward_ensemble_coef=0.5,
        reward_weights=2,
    )
    for row in folder.metrics("train"):
        parts = {name: row[f"reward/parts/model/{name}"] for name in ("1", "2", "3", "disagreement")}
        assert parts["disagreement"] > 0
        mean = (parts["1"] + parts["2"] + parts["3"]) / 3
        assert row["reward/parts/model"] == pytest.approx(mean - 0.5 * parts["disagreement"])
        assert row["reward/mean"] == pytest.approx(2 * row["reward/parts/model"])
    sample = next(s for s in folder.samples() if s["kind"] == "train")
    assert set(sample["parts"]) == {"model", "model/1", "model/2", "model/3", "model/disagreement"}


def test_members_that_are_read_elsewhere_are_refused(keys: Keys, run: Run, three: list[str], tmp_path: Path) -> None:
    last = run("rm", tmp_path / "last", reward_readout="last").path
    with pytest.raises(AdapterError, match="read at different tokens"):
        assemble(load(keys("ppo", tmp_path / "x", reward_model=[three[0], str(last)])))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reward_model": "a, b", "reward_model_type": "full"}, "an ensemble is made of adapters"),
        ({"reward_model": "http://a/, http://b/", "reward_model_type": "api"}, "an ensemble is made of adapters"),
        ({"reward_model": "a, a"}, "one of them twice"),
        ({"reward_model": "a", "reward_ensemble": "min"}, "min of 1 reward models"),
        ({"reward_model": "a, b", "reward_ensemble_coef": 2}, "only mean_minus_std reads it"),
        ({"reward_model": "a, b", "reward_weights": [1, 1]}, "2 weights for 1 sources"),
        ({"reward_model": "a, b", "reward_ensemble": "median"}, "reward_ensemble"),
    ],
)
def test_settings_that_do_not_fit(more: dict[str, Any], words: str, keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(keys("ppo", tmp_path / "x", **more))
    assert words in str(caught.value)
