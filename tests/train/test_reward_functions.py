"""Stages rewarded by Python functions: from a YAML file, from a program, beside a reward model, and when they fail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.cli import main
from trimtab.config import dump_resolved, load
from trimtab.errors import ConfigError, RewardError
from trimtab.pipeline import run_exp
from trimtab.rundir import RunFolder
from trimtab.train.assemble import CRITIC, REWARD, assemble

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
TIMES = ("seconds", "seconds/sample", "seconds/reward", "seconds/score", "seconds/update")

FILE = """
from pathlib import Path

def wordy(completion):
    return len(completion) / 10

async def gold_letters(completions, output):
    return [sum(c in o for c in text) for text, o in zip(completions, output)]

def fails_when_told(completion, **columns):
    if (Path(__file__).parent / "fail").exists():
        raise ValueError("told to fail")
    return len(completion)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in folder.metrics()]


def test_functions_alone_from_a_yaml_file(
    keys: Keys, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = keys("ppo", "run", reward_weights=[1, -2.0], reward_length_penalty=0.25, reward_length_free=2, val_size=3)
    config = tmp_path / "ppo.yaml"
    config.write_text(
        yaml.safe_dump({**given, "eval_strategy": "steps", "eval_steps": 2})
        + "reward_funcs: my_rewards.py:wordy, my_rewards.py:gold_letters\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config)]) in (0, None)
    folder = RunFolder(tmp_path / "run")
    train = folder.metrics("train")
    for row in train:
        parts = [row[f"reward/parts/{name}"] for name in ("wordy", "gold_letters", "length")]
        assert row["reward/mean"] == pytest.approx(parts[0] - 2 * parts[1] + parts[2])
    for sample in folder.samples():
        if sample["kind"] == "train":
            assert set(sample["parts"]) == {"wordy", "gold_letters", "length"}
            assert sample["parts"]["wordy"] == pytest.approx(len(sample["text"]) / 10)
    (digest,) = folder.manifest()["reward_files"].values()
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    (evaluation,) = folder.metrics("eval")
    assert "eval/reward_greedy" in evaluation


def test_functions_from_a_program_and_beside_a_reward_model(keys: Keys, rm_folder: Path, tmp_path: Path) -> None:
    def short(completion: str) -> float:
        return -float(len(completion))

    given = keys("ppo", tmp_path / "run", reward_funcs=[short], reward_model=str(rm_folder), reward_weights=[0.5, 3])
    folder = run_exp(given)
    for row in folder.metrics("train"):
        assert row["reward/mean"] == pytest.approx(0.5 * row["reward/parts/model"] + 3 * row["reward/parts/short"])
    assert folder.manifest()["reward_files"] == {}
    assert folder.config()["reward_funcs"] == [f"{__name__}:{short.__qualname__}"]
    one = load({**given, "reward_funcs": short})
    assert one.reward_funcs == (short,)  # type: ignore[attr-defined]
    assert dump_resolved(one) == dump_resolved(load(given))


def test_without_a_reward_model_the_critic_is_fresh(keys: Keys, file: Path, tmp_path: Path) -> None:
    for kind in ("lora", "freeze"):
        session = assemble(load(keys("ppo", tmp_path / "x", reward_funcs=f"{file}:wordy", finetuning_type=kind)))
        assert REWARD not in session.roles.specs and CRITIC in session.roles.specs
        assert session.fresh_critic


def test_a_function_that_fails_leaves_a_checkpoint_and_the_run_goes_on(
    keys: Keys, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"reward_funcs": f"{file}:fails_when_told", "max_steps": 4, "save_steps": 100, "critic_warmup_steps": 0}
    more |= {"val_size": 3, "eval_strategy": "steps", "eval_steps": 2}
    more |= {"max_new_tokens": 3, "ppo_epochs": 1, "ppo_buffer_size": 1, "per_device_train_batch_size": 6}
    whole = run_exp(keys("ppo", tmp_path / "whole", **more))
    for name, calls in (("in a step", 1), ("in an evaluation", 2)):
        from trimtab.train import online

        seen = [0]
        plain = online.reward_completions if name == "in an evaluation" else online.collect

        def told(*args: Any, plain: Any = plain, seen: list[int] = seen, calls: int = calls, **kw: Any) -> Any:
            seen[0] += 1
            if seen[0] > calls:
                (tmp_path / "fail").touch()
            return plain(*args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(online, plain.__name__, told)
            with pytest.raises(RewardError, match="told to fail") as caught:
                run_exp(keys("ppo", tmp_path / name, **more))
        assert "qa.json:" in caught.value.where and f"{file}:12" in caught.value.where
        part = RunFolder(tmp_path / name)
        kept = 1 if name == "in a step" else 4
        assert part.latest_checkpoint() == part.checkpoint_path(kept)
        (tmp_path / "fail").unlink()
        assert rows(run_exp(keys("ppo", tmp_path / name, **more), resume=True)) == rows(whole)


def test_a_changed_file_is_told_when_the_run_goes_on(
    keys: Keys, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "reward_funcs": f"{file}:fails_when_told",
        "max_steps": 2,
        "save_steps": 1,
        "max_new_tokens": 3,
        "ppo_epochs": 1,
    }
    more["critic_warmup_steps"] = 0
    (tmp_path / "fail").touch()
    with pytest.raises(RewardError):
        run_exp(keys("ppo", tmp_path / "run", **more))
    (tmp_path / "fail").unlink()
    capsys.readouterr()
    run_exp(keys("ppo", tmp_path / "run", **more), resume=True)
    assert "is not the file that this run began with" not in capsys.readouterr().out

    (tmp_path / "fail").touch()
    with pytest.raises(RewardError):
        run_exp(keys("ppo", tmp_path / "other", **more))
    (tmp_path / "fail").unlink()
    file.write_text(file.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    run_exp(keys("ppo", tmp_path / "other", **more), resume=True)
    assert f"{file} is not the file that this run began with" in capsys.readouterr().out


def test_a_column_that_is_missing_is_found_before_the_model_is_loaded(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def f(completion: str, difficulty: int) -> float:
        return 0.0

    monkeypatch.setattr("trimtab.train.assemble.load_parts", None)
    with pytest.raises(RewardError, match="asks for 'difficulty'") as caught:
        assemble(load(keys("ppo", tmp_path / "x", reward_funcs=f)))
    assert "qa.json:1" in caught.value.where


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ("reward_model is missing", "reward_funcs: FILE.py:NAME")),
        ({"reward_funcs": "a.py:f", "reward_weights": [1, 2]}, ("2 weights for 1 sources", "a.py:f")),
        ({"reward_funcs": "a.py:f", "reward_model": "r", "reward_weights": 1}, ("reward_weights",)),
        ({"reward_funcs": "a.py:f", "reward_model": "r", "reward_weights": [1]}, ("the reward model, a.py:f",)),
        ({"reward_funcs": 3}, ("reward_funcs: 3 cannot be used",)),
        ({"reward_funcs": "a.py:f", "reward_length_free": 3}, ("reward_length_penalty",)),
        ({"reward_funcs": "a.py:f", "reward_length_penalty": -1}, ("reward_length_penalty: -1",)),
    ],
)
def test_settings_that_do_not_fit(more: dict[str, Any], words: tuple[str, ...], keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(keys("ppo", tmp_path / "x", **more))
    for word in words:
        assert word in str(caught.value)
