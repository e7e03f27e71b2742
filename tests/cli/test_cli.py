"""The command line as a user meets it: exit codes, messages without tracebacks, one stage from a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from trimtab import __version__
from trimtab.cli import main

pytestmark = pytest.mark.e2e

ARTICLE = Path(__file__).parents[2] / "examples" / "article"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian", "x.yaml"], "Did you mean 'train'"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["config", str(ARTICLE / "sft.yaml"), "lerning_rate=1"], "learning_rate"),
        (["config", str(ARTICLE / "sft.yaml"), "stage=dpoo"], "dpoo"),
        (["train", str(ARTICLE / "predict.yaml")], "do_train"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_help_loads_nothing_heavy() -> None:
    """Start-up is what is imported: a verb's own imports happen when it is called."""
    heavy = ("torch", "transformers", "pydantic", "yaml", "numpy", "matplotlib", "rich.markdown", "typer.rich_utils")
    code = (
        f"import sys; from trimtab.cli import main; main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "[]"
    assert "..." not in done.stdout.split("Commands:")[1], "a command's first line is too long for the list"


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "version"], capture_output=True, text=True, encoding="utf-8"
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "predict"])
def test_the_articles_files_resolve(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(ARTICLE / f"{stage}.yaml")]) == 0
    assert "model_name_or_path" in capsys.readouterr().out


def test_a_stage_from_a_file(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = {
        "model_name_or_path": str(tiny_folder("llama")),
        "stage": "sft",
        "do_train": True,
        "template": "llama3",
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "plot_loss": True,
    }
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert main(["train", str(file), "learning_rate=1e-3", "--seed", "3"]) == 0
    for name in ("adapter_model.safetensors", "metrics.jsonl", "training_loss.png", "train_results.json"):
        assert (tmp_path / "out" / name).is_file()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["seed"] == 3
    assert main(["train", str(file), "learning_rate=1e-3", "--seed", "3"]) == 2  # never written over
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "loss" in capsys.readouterr().out
    assert main(["data", str(file)]) == 0
    assert "question 0" in capsys.readouterr().out
