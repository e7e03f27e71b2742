"""`train --dry-run` and `plan`: what is checked, what is printed, what is not touched, and that torch stays out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.cli import main

pytestmark = pytest.mark.e2e

ARTICLE = Path(__file__).parents[2] / "examples" / "article"
ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(6)]


@pytest.fixture
def write(tmp_path: Path, tiny_folder: Callable[..., Path]) -> Callable[..., str]:
    """A training file with everything right; keys given on top of it."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "bad.json").write_text(json.dumps([{"question": "?"}] * 3), encoding="utf-8")
    info = {"qa": {"file_name": "rows.json"}, "bad": {"file_name": "bad.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")

    def file(**keys: Any) -> str:
        values = {
            "model_name_or_path": str(tiny_folder("qwen2")), "stage": "sft", "do_train": True, "template": "chatml",
            "dataset": "qa", "dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), "cutoff_len": 64,
            "num_train_epochs": 2, "per_device_train_batch_size": 4, **keys,
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return file


def test_nothing_is_trained_and_torch_stays_out(write: Callable[..., str], tmp_path: Path) -> None:
    code = (
        "import sys; from trimtab.cli import main; "
        f"code = main(['train', {write()!r}, '--dry-run']); print(code, sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "4 steps; nothing was trained" in done.stdout  # two epochs of ceil(6 / 4)
    assert "update, policy" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model_name_or_path": "./nowhere"}, "there is no model folder './nowhere'"),
        ({"dataset": "qaa"}, "qaa"),
        ({"dataset": "bad"}, "none of the first 3 rows of data set 'bad' can be used"),
        ({"eval_dataset": "bad"}, "none of the first 3 rows of data set 'bad' can be used"),
        ({"adapter_name_or_path": "nowhere"}, "no adapter in 'nowhere'"),
        ({"stage": "rm"}, "not a set of preferences"),
        ({"eval_tasks": "exact_mtch"}, "exact_mtch"),
        ({"stage": "ppo", "reward_model": "nowhere"}, "no adapter in 'nowhere'"),
        ({"stage": "ppo", "reward_funcs": "nowhere.py:f"}, "there is no file 'nowhere.py'"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
        ({"output_dir": None}, "output_dir"),
        ({"do_train": False}, "does not train"),
    ],
)
def test_what_a_run_would_end_with(
    keys: dict[str, Any], told: str, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", write(**keys), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert told in error and "\n  do:    " in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_plan_without_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The article's reader: its three files, as they stand, for a card that is not here."""
    for stage in ("sft", "rm", "ppo"):
        assert main(["plan", str(ARTICLE / f"{stage}.yaml"), "--device", "cuda:24GB", "--rows", "3000"]) == 0
        shown = capsys.readouterr().out
        assert "qwen2-7b, 7.62 B parameters" in shown
        assert "24.0 GiB to use" in shown
        assert "hours" in shown
    assert "update, critic" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "h10"], "unknown device 'h10'"),
        (["model_name_or_path=some/model"], "its sizes are not known"),
        (["do_train=false"], "does not train"),
    ],
)
def test_a_plan_that_cannot_be(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ARTICLE / "sft.yaml"), *words]) == 2
    assert told in capsys.readouterr().err
