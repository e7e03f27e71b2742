"""A tiny model, data sets of a dozen rows, and one call that runs a stage on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab.rundir import RunFolder

QUESTIONS = [
    "a",
    "b c",
    "tell me d",
    "is it e or f",
    "g",
    "the h",
    "i j k",
    "say l",
    "m n",
    "what is o",
    "p",
    "the q r s",
]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reference log-probabilities of these tests go into a folder of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qa` and `qa_eval` (alpaca), `pairs` and `pairs_eval` ("yes" over "no"), `marks` (the same, labelled), `text` (plain)."""
    folder = tmp_path_factory.mktemp("data")
    qa = [{"instruction": q, "output": q.upper()} for q in QUESTIONS]
    pairs = [{"instruction": q, "chosen": "yes" * (1 + i % 2), "rejected": "no"} for i, q in enumerate(QUESTIONS)]
    marks = [
        {"instruction": q, "output": "no" if i % 2 else "yes", "kto_tag": not i % 2} for i, q in enumerate(QUESTIONS)
    ]
    texts = [{"text": f"{q} and then {q}"} for q in QUESTIONS]
    sets: dict[str, tuple[list[dict[str, str]], dict[str, Any]]] = {
        "qa": (qa[:9], {}),
        "qa_eval": (qa[9:], {}),
        "pairs": (pairs[:9], {"ranking": True}),
        "pairs_eval": (pairs[9:], {"ranking": True}),
        "marks": (marks[:9], {}),
        "marks_eval": (marks[8:], {}),
        "text": (texts, {"columns": {"prompt": "text"}}),
    }
    for name, (rows, _) in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    entries = {name: {"file_name": f"{name}.json", **more} for name, (_, more) in sets.items()}
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def keys(tiny_folder: Callable[..., Path], data_dir: Path) -> Callable[..., dict[str, Any]]:
    """`keys(stage, output_dir, **more)`: a file's worth of keys for a stage, float32 on the CPU."""
    own: dict[str, dict[str, Any]] = {
        "pt": {"dataset": "text"},
        "sft": {"dataset": "qa"},
        "rm": {"dataset": "pairs"},
        **{stage: {"dataset": "pairs"} for stage in ("dpo", "orpo", "simpo")},
        "kto": {"dataset": "marks"},
        "ppo": {"dataset": "qa", "max_new_tokens": 6, "ppo_epochs": 2, "ppo_buffer_size": 2},
        **{
            stage: {"dataset": "qa", "max_new_tokens": 6, "ppo_buffer_size": 2, "group_size": 4}
            for stage in ("rloo", "grpo", "reinforce_pp", "remax", "raft", "online_dpo")
        },
    }

    def make(stage: str, output_dir: Path | str, **more: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(tiny_folder("qwen2")),
            "stage": stage,
            "do_train": True,
            "template": "chatml",
            "dataset_dir": str(data_dir),
            "cutoff_len": 64,
            "lora_rank": 4,
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "logging_steps": 1,
            "compute_dtype": "float32",
            "use_cpu": True,
            **own[stage],
            **more,
        }

    return make


@pytest.fixture(scope="session")
def run(keys: Callable[..., dict[str, Any]]) -> Callable[..., RunFolder]:
    """`run(stage, output_dir, resume=False, **more)`: train a stage; its folder."""
    from trimtab.pipeline import run_exp

    def go(stage: str, output_dir: Path | str, *, resume: bool = False, **more: Any) -> RunFolder:
        return run_exp(keys(stage, output_dir, **more), resume=resume)

    return go


@pytest.fixture(scope="session")
def sft_folder(run: Callable[..., RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SFT run, which PPO and reward models continue."""
    return run("sft", tmp_path_factory.mktemp("sft") / "run", learning_rate=1e-2).path


@pytest.fixture(scope="session")
def rm_folder(run: Callable[..., RunFolder], sft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished reward model on top of the SFT adapter."""
    folder = tmp_path_factory.mktemp("rm") / "run"
    return run("rm", folder, adapter_name_or_path=str(sft_folder), create_new_adapter=True, learning_rate=1e-2).path
