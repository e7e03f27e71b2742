"""Predictions over a data set: files, order, figures, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab import ChatModel
from trimtab.config import load
from trimtab.errors import ConfigError, DataError, ModelError, RunError
from trimtab.rundir import PREDICTIONS, read_rows
from trimtab.serve.predict import predict

pytestmark = pytest.mark.unit

QUESTIONS = ("哪些镇名?", "a much longer question about villages and towns", "b", "no gold")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"instruction": text, "input": "", "output": "SELECT 1;"} for text in QUESTIONS[:3]]
    rows.append({"instruction": QUESTIONS[3], "input": ""})
    pairs = [{"instruction": text, "input": "", "chosen": "good", "rejected": "bad one"} for text in QUESTIONS]
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "gold.json").write_text(json.dumps(rows[:3], ensure_ascii=False), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")
    info = {
        "rows": {"file_name": "rows.json"},
        "gold": {"file_name": "gold.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.fixture
def task(args: dict[str, Any], data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        **args,
        "do_predict": True,
        "eval_dataset": "rows",
        "dataset_dir": str(data),
        "output_dir": str(tmp_path / "out"),
        "do_sample": False,
    }


def test_a_row_for_every_row_in_their_order(task: dict[str, Any]) -> None:
    folder = predict(load(task))
    rows = read_rows(folder.path / PREDICTIONS)
    assert len(rows) == 4
    model = ChatModel(task)
    for number, (row, question) in enumerate(zip(rows, QUESTIONS, strict=True), 1):
        assert {"prompt", "predict", "label"} <= row.keys()
        assert row["prompt"] == f"user\n{question}\nassistant\n"
        assert row["predict"] == model.chat([{"role": "user", "content": question}])[0].response_text
        assert row["label"] == ("" if question == "no gold" else "SELECT 1;")
        assert re.search(rf"rows\.json:{number}$", row["row"])
    results = folder.results("predict")
    assert results["predict_samples"] == 4
    assert results["predict_labelled"] == 3
    assert results["predict_exact_match"] == 0.0
    assert folder.results() == results


def test_exact_match_and_the_files_tasks(task: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.serve.answer import Text

    monkeypatch.setattr(Text, "whole", lambda self, ids: "select  1")
    results = predict(load({**task, "eval_dataset": "gold", "eval_tasks": "sql_match, exact_match"})).results("predict")
    assert results["predict_exact_match"] == 0.0  # case counts
    assert results["predict_sql_match"] == 1.0
    assert "predict_labelled" not in results
    monkeypatch.setattr(Text, "whole", lambda self, ids: "SELECT  1")
    results = predict(load({**task, "overwrite_output_dir": True})).results("predict")
    assert results["predict_exact_match"] == 1.0


def test_sampled_predictions_repeat_by_seed(task: dict[str, Any], tmp_path: Path) -> None:
    sampled = {**task, "do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": 0}

    def texts(name: str, **more: Any) -> list[str]:
        folder = predict(load({**sampled, "output_dir": str(tmp_path / name), **more}))
        return [row["predict"] for row in read_rows(folder.path / PREDICTIONS)]

    first = texts("a", seed=1)
    assert texts("b", seed=1) == first
    assert texts("c", seed=1, max_samples=2) == first[:2]  # companions change nothing
    assert texts("d", seed=2) != first


def test_a_data_set_without_held_out_rows_is_predicted_whole_and_val_size_gives_its_part(
    task: dict[str, Any], tmp_path: Path
) -> None:
    del task["eval_dataset"]
    whole = predict(load({**task, "dataset": "rows"}))
    assert len(read_rows(whole.path / PREDICTIONS)) == 4
    part = predict(load({**task, "dataset": "gold", "val_size": 1, "output_dir": str(tmp_path / "part")}))
    assert len(read_rows(part.path / PREDICTIONS)) == 1


def test_pairs_are_scored_by_a_reward_model(task: dict[str, Any], reward_args: dict[str, Any], tmp_path: Path) -> None:
    folder = predict(load({**task, **reward_args, "eval_dataset": "pairs"}))
    rows = read_rows(folder.path / PREDICTIONS)
    judge = ChatModel(reward_args)
    for row, question in zip(rows, QUESTIONS, strict=True):
        for name, answer in (("chosen", "good"), ("rejected", "bad one")):
            dialogue = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            assert row[name] == pytest.approx(judge.get_scores([dialogue])[0], abs=1e-4)
    results = folder.results("predict")
    leads = [row["chosen"] - row["rejected"] for row in rows]
    assert results["predict_accuracy"] == sum(lead > 0 for lead in leads) / 4
    assert results["predict_margin"] == pytest.approx(sum(leads) / 4)


def test_older_predictions_are_kept_unless_they_may_go(task: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    (out / "trainer_state.json").write_text("{}", encoding="utf-8")
    predict(load(task))
    before = (out / PREDICTIONS).read_bytes()
    with pytest.raises(RunError, match="holds predictions already"):
        predict(load(task))
    assert (out / PREDICTIONS).read_bytes() == before
    predict(load({**task, "max_new_tokens": 3, "overwrite_output_dir": True}))
    assert (out / PREDICTIONS).read_bytes() != before
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (out / "trainer_state.json").read_text(encoding="utf-8") == "{}"
    assert not list(tmp_path.glob("out.*"))


def test_what_cannot_be_predicted_is_refused(task: dict[str, Any], reward_args: dict[str, Any], tmp_path: Path) -> None:
    loose = {key: value for key, value in task.items() if key != "do_predict"}
    with pytest.raises(ConfigError, match="output_dir"):
        predict(load({key: value for key, value in loose.items() if key != "output_dir"}))
    with pytest.raises(ConfigError, match="nothing to predict"):
        predict(load({key: value for key, value in loose.items() if key != "eval_dataset"}))
    adapter = reward_args["adapter_name_or_path"]
    with pytest.raises(ModelError, match="reward model"):
        predict(load({**task, "adapter_name_or_path": adapter}))
    with pytest.raises(DataError, match="not a set of preferences"):
        predict(load({**task, **reward_args}))
    assert not (tmp_path / "out" / PREDICTIONS).exists()
