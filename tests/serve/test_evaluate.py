"""`trimtab eval` as a user meets it: what it prints for each kind of model, and of which rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.cli import main
from trimtab.config import dump_resolved, load
from trimtab.rundir import CONFIG, PREDICTIONS, read_rows, write_json

pytestmark = pytest.mark.unit

Go = Callable[..., tuple[dict[str, float], str]]
PAIRS = [{"instruction": f"q {i}", "chosen": "good", "rejected": "bad one" + " so" * i} for i in range(5)]
MARKS = [{"instruction": f"q {i}", "output": "good" * (i + 1), "mark": i / 2} for i in range(5)]


@pytest.fixture
def file(reward_args: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    """A file of these keys on top of a reward model's; None deletes one."""
    data = tmp_path / "data"
    data.mkdir()
    entries = {"pairs": {"ranking": True}, "others": {"ranking": True}, "marks": {"columns": {"score": "mark"}}}
    for name, rows in (("pairs", PAIRS), ("others", PAIRS[:3]), ("marks", MARKS)):
        (data / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        entries[name]["file_name"] = f"{name}.json"
    (data / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")

    def write(**keys: Any) -> str:
        merged = {**reward_args, "dataset_dir": str(data), **keys}
        path = tmp_path / "file.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def measured(file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Go:
    """What `trimtab eval` prints: its figures, and all of it."""

    def go(*words: str, **keys: Any) -> tuple[dict[str, float], str]:
        capsys.readouterr()
        assert main(["eval", file(**keys), *words]) == 0
        out = capsys.readouterr().out
        lines = [line.split("  ") for line in out.splitlines() if line.startswith("eval_")]
        return {name: float(value) for name, value in lines}, out

    return go


def test_a_reward_model_is_measured_on_pairs(measured: Go, file: Callable[..., str], tmp_path: Path) -> None:
    found, _ = measured("eval_dataset=pairs")
    assert {"eval_loss", "eval_accuracy", "eval_margin", "eval_calibration_error"} <= found.keys()
    assert found["eval_samples"] == 5
    assert main(["predict", file(eval_dataset="pairs", output_dir=str(tmp_path / "out"))]) == 0
    leads = [row["chosen"] - row["rejected"] for row in read_rows(tmp_path / "out" / PREDICTIONS)]
    assert found["eval_accuracy"] == pytest.approx(sum(lead > 0 for lead in leads) / 5)
    assert found["eval_margin"] == pytest.approx(sum(leads) / 5, rel=1e-4)


def test_a_pointwise_reward_model_is_measured_on_marks(measured: Go) -> None:
    found, _ = measured("eval_dataset=marks", "rm_loss=pointwise")
    assert {"eval_loss", "eval_abs_error", "eval_score_correlation"} <= found.keys()
    assert found["eval_samples"] == 5


def a_run(reward: Path, folder: Path, **keys: Any) -> Path:
    """The reward model as the run folder of a training with these keys."""
    shutil.copytree(reward, folder)
    config = load({**keys, "stage": "rm", "do_train": True, "output_dir": str(folder)})
    write_json(folder / CONFIG, dump_resolved(config))
    return folder


@pytest.mark.parametrize(
    ("held", "line", "title"),
    [
        (
            {},
            "these are rows that it was trained on (pairs)",
            "the pairs it was trained on: no measure of how it judges others",
        ),
        ({"val_size": 2}, "scoring its held-out pairs", "held-out pairs"),
        ({"eval_dataset": ["others"]}, "scoring its held-out pairs", "held-out pairs"),
    ],
)
def test_a_report_says_which_pairs(
    held: dict[str, Any],
    line: str,
    title: str,
    reward: Path,
    reward_args: dict[str, Any],
    file: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = {
        **reward_args,
        "dataset": ["pairs"],
        "dataset_dir": str(tmp_path / "data"),
        **held,
        "adapter_name_or_path": [],
    }
    file()
    run = a_run(reward, tmp_path / "run", **trained)
    for told in (line, ""):  # the second time the scores are there
        assert main(["rm", "report", str(run)]) == 0
        out = capsys.readouterr().out
        assert told in out
        assert f"Reward model on {title}" in " ".join(out.split())
    figures = json.loads((run / "rm_report.json").read_text(encoding="utf-8"))
    assert figures["rows"] == title


def test_rows_of_dataset_are_said_to_be_perhaps_seen(
    measured: Go, reward: Path, reward_args: dict[str, Any], tmp_path: Path
) -> None:
    said = "if it was trained on them, they are no measure of how it judges others"
    assert said in measured("dataset=pairs")[1]
    assert said not in measured("eval_dataset=pairs")[1] and said not in measured("dataset=pairs", "val_size=2")[1]
    trained = {**reward_args, "adapter_name_or_path": [], "dataset": ["pairs"], "dataset_dir": str(tmp_path / "data")}
    run = a_run(reward, tmp_path / "run", **trained)
    words = ["eval_dataset=pairs", f"adapter_name_or_path={run}"]
    assert "these are rows that it was trained on (pairs)" in measured(*words)[1]
    words = ["dataset=pairs", "val_size=2", f"adapter_name_or_path={run}"]  # its training held out none of them
    assert "these are rows that it was trained on (pairs)" in measured(*words)[1]


def test_scores_of_nobody_knows_which_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"chosen": 1.0, "rejected": 0.0}\n', encoding="utf-8")
    assert main(["rm", "report", str(path)]) == 0
    assert "Reward model on the pairs of scores.jsonl" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stage", ["rm", "sft"])
def test_no_more_rows_than_eval_max_samples(
    stage: str, measured: Go, file: Callable[..., str], policy: Path, tmp_path: Path
) -> None:
    keys = {"stage": stage, "eval_dataset": "pairs", "eval_max_samples": 2, "max_new_tokens": 3}
    if stage == "sft":
        keys |= {"adapter_name_or_path": str(policy), "eval_dataset": "marks"}
    assert measured(**keys)[0]["eval_samples"] == 2
    assert main(["predict", file(**keys, output_dir=str(tmp_path / "out"))]) == 0
    rows = read_rows(tmp_path / "out" / PREDICTIONS)
    assert [row["row"].rpartition(":")[2] for row in rows] == ["1", "2"]
    results = json.loads((tmp_path / "out" / "predict_results.json").read_text(encoding="utf-8"))
    assert results["predict_samples"] == 2
