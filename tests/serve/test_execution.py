"""`trimtab eval` on rows with databases: predictions, run folders, configs, two of them; what `trimtab predict` keeps of such rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sql.built import GOLDS, built
from trimtab.cli import main
from trimtab.config import dump_resolved, load
from trimtab.errors import ConfigError, DataError, RunError
from trimtab.evals.execution import judge_rows
from trimtab.evals.predictions import labelled
from trimtab.report.execution import compare, figures
from trimtab.rundir import CONFIG, PREDICTIONS, read_rows, write_json
from trimtab.serve.evaluate import evaluate_predictions
from trimtab.serve.execution import ANSWERS, FIGURES, Asked, judged, paired
from trimtab.sql.verdicts import KINDS

pytestmark = pytest.mark.unit

WRITTEN = (
    "SELECT name FROM t WHERE n >= 2",  # equal
    "SELECT count(*) FROM t WHERE n = 2",  # wrong on the second instance alone
    "SELECT name FROM t ORDER BY n DESC, name",  # wrong order
    "SELECT t.name FROM t JOIN u ON t.name = u.name WHERE u.city = 'X'",  # equal
    "SELECT n, count(*), 1 FROM t GROUP BY n",  # wrong columns
    "nothing",  # format error
    "SELECT name FROM t UNION SELECT city FROM u",  # equal
    "SELECT name FROM t WHERE n > 98",  # cannot be judged
)
BETTER = (*WRITTEN[:5], GOLDS[5], "SELECT name FROM t", GOLDS[7])
"""One more right, one less."""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return built(tmp_path / "data")


def predictions(path: Path, texts: tuple[str, ...] = WRITTEN, source: Path | None = None, **more: list[Any]) -> Path:
    """A file of predictions; with `source`, its rows carry the columns of that set."""
    rows = json.loads(source.read_text(encoding="utf-8")) if source else [{} for _ in texts]
    lines = []
    for i, (text, gold) in enumerate(zip(texts, GOLDS, strict=True)):
        kept = {k: v for k, v in rows[i].items() if k not in ("instruction", "input", "output")}
        if source is not None:
            kept["database"] = [f"{source.parent.name}/{path}" for path in kept["database"]]
        extra = {name: values[i] for name, values in more.items()}
        lines.append({"prompt": "q", "predict": text, "label": gold, **kept, **extra})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_figure_by_hand(shop: Path, tmp_path: Path) -> None:
    file = predictions(tmp_path / "p.jsonl", source=shop)
    told = figures(judged(file, (), Asked()).rows)
    assert (told["rows"], told["verifiable"], told["unverified"]) == (8, 7, 1)
    assert told["unverified_reasons"] == {"the query gives no rows": 1}
    assert told["execution_accuracy"]["value"] == pytest.approx(3 / 7)
    assert told["execution_accuracy"]["count"] == 7
    assert told["execution_accuracy"]["low"] < 3 / 7 < told["execution_accuracy"]["high"]
    # weights 1/4 ... 7/4 (killed / total of the rows): right are 1, 4 and 7
    assert told["weighted_by_mutants"]["value"] == pytest.approx((1 + 4 + 7) / (1 + 2 + 3 + 4 + 5 + 6 + 7))
    counts = {kind: count for kind, count in told["verdicts"].items() if count}
    assert counts == {"format_error": 1, "wrong_columns": 1, "wrong_rows": 1, "wrong_order": 1, "equal": 3}
    assert list(told["verdicts"]) == [kind for kind in KINDS if kind != "unverified"]
    # instance 0 cannot tell n = 2 from n > 1
    assert [part["value"] for part in told["instances"]] == pytest.approx([4 / 7, 3 / 7])
    # both public evaluators look at all instances or the first: sets, and order in the test suite
    assert told["test_suite"]["value"] == pytest.approx(3 / 7)
    assert told["bird"]["value"] == pytest.approx(5 / 7)
    assert {name: part["count"] for name, part in told["classes"].items()} == {
        "join": 1, "group": 1, "nested": 1, "set": 1, "order": 1, "date": 0, "none of these": 2,
    }  # fmt: skip
    assert told["classes"]["join"]["value"] == 1.0 and told["classes"]["none of these"]["value"] == 0.5
    assert told["classes"]["date"]["value"] is None
    assert "pass_at_k" not in told
    json.dumps(told, allow_nan=False)


def test_samples_and_nothing_to_judge(shop: Path, tmp_path: Path) -> None:
    samples = [[text, gold, "x"] for text, gold in zip(WRITTEN, GOLDS, strict=True)]
    told = figures(judged(predictions(tmp_path / "p.jsonl", source=shop, samples=samples), (), Asked()).rows)
    assert told["samples"] == 3 and list(told["pass_at_k"]) == ["1", "2", "3"]
    # right answers of 3: 2 where the answer is right (3 rows), else 1 (4 rows)
    assert told["pass_at_k"]["1"]["value"] == pytest.approx((3 * 2 / 3 + 4 * 1 / 3) / 7)
    assert told["pass_at_k"]["2"]["value"] == pytest.approx((3 * 1 + 4 * 2 / 3) / 7)
    assert told["pass_at_k"]["3"]["value"] == 1.0
    nothing = figures(judged(predictions(tmp_path / "q.jsonl", source=shop), (), Asked()).rows[-1:])
    assert nothing["execution_accuracy"] == {"value": None, "low": None, "high": None, "count": 0}
    bad = [*samples[:-1], samples[-1][:2]]
    for wrong in (bad, [*samples[:-1], ["a", "b", 3]], [*samples[:-1], "abc"]):
        file = predictions(tmp_path / "w.jsonl", source=shop, samples=wrong)
        with pytest.raises(DataError, match="same number of sampled answers"):
            judged(file, (), Asked())


def test_the_command_on_predictions(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = predictions(tmp_path / "own.jsonl", source=shop)
    assert main(["eval", str(own), "--output", str(tmp_path / "own.json")]) == 0
    shown = capsys.readouterr().out
    assert "bleu-4" in shown and "right on every instance (EX)" in shown and "42.9 %" in shown
    assert "unverified (in no figure)" in shown and "on instance 1 alone" in shown and "7 -> 6" in shown
    written = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    assert written["execution"]["execution_accuracy"]["count"] == 7 and "bleu-4" in written
    bare = predictions(tmp_path / "bare.jsonl")
    assert main(["eval", str(bare)]) == 0
    assert "EX" not in capsys.readouterr().out
    assert main(["eval", str(bare), "--data", str(shop), "--task", "ex"]) == 0
    shown = capsys.readouterr().out
    assert "bleu-4" not in shown and "execution_accuracy  0.4286" in shown and "42.9 %" in shown
    assert main(["eval", str(bare), "--data", "shop", "--dataset-dir", str(shop.parent), "--task", "sql_match"]) == 0
    assert "EX" not in capsys.readouterr().out
    assert main(["eval", str(bare), "--data", str(shop), "--samples", "2"]) == 2
    assert "takes no --samples" in capsys.readouterr().err


def test_predictions_are_found_by_their_row_or_in_order(shop: Path, tmp_path: Path) -> None:
    rows = read_rows(predictions(tmp_path / "p.jsonl"))
    few = tmp_path / "few.jsonl"
    lines = [{**rows[i], "row": f"elsewhere.json:{i + 1}"} for i in (6, 2)]
    few.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found, told = evaluate_predictions(few, ("ex",), asked=Asked(data=str(shop)))
    assert [row.kind for row in told.rows] == ["equal", "wrong_order"] if told else False
    assert found[0]["mean"] == 0.5
    for change, why in (({"row": "x:99"}, "no such row"), ({"label": "SELECT 1"}, "its label is")):
        few.write_text(json.dumps({**lines[0], **change}), encoding="utf-8")
        with pytest.raises(DataError, match="not about a row of --data") as caught:
            evaluate_predictions(few, asked=Asked(data=str(shop)))
        assert why in caught.value.why
    few.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]), encoding="utf-8")
    with pytest.raises(DataError, match="not about a row of --data"):
        evaluate_predictions(few, asked=Asked(data=str(shop)))
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps([{"instruction": "q", "output": "SELECT 1"}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"no row of .* has a database"):
        evaluate_predictions(few, asked=Asked(data=str(plain)))
    unjudged = predictions(tmp_path / "u.jsonl", WRITTEN, shop, unverified=["nobody knows"] * 8)
    found, _ = evaluate_predictions(unjudged, ("ex",), output=tmp_path / "u.json")
    assert found[0]["count"] == 0 and found[0]["unverified"] == 8
    json.loads((tmp_path / "u.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_a_column_of_that_name_may_mean_something_else(
    file: Callable[..., str], shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what a builder has written is judged without being asked for."""
    rows = [{"instruction": "q", "output": "SELECT 1", "database": "concerts"}]
    (shop.parent / "other.json").write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / "out"
    assert main(["predict", file(eval_dataset="other", output_dir=str(out))]) == 0
    assert "predict_execution_accuracy" not in json.loads((out / "predict_results.json").read_text(encoding="utf-8"))
    assert main(["eval", str(out / PREDICTIONS)]) == 0 and main(["eval", file(eval_dataset="other")]) == 0
    assert "EX" not in capsys.readouterr().out
    assert main(["eval", str(out / PREDICTIONS), "--task", "ex"]) == 2
    assert "has no 'database'" in capsys.readouterr().err
    address = f"sql_database={shop.parent / 'databases' / 'shop-0.sqlite'}"
    assert main(["eval", file(eval_dataset="other", eval_tasks="ex"), address]) == 0
    assert "right on every instance (EX)" in capsys.readouterr().out
    listed = json.loads(shop.read_text(encoding="utf-8"))
    listed[0]["database"] = "gone.sqlite"
    shop.write_text(json.dumps(listed), encoding="utf-8")
    assert main(["predict", file(output_dir=str(tmp_path / "gone"))]) == 2
    assert "no database file" in capsys.readouterr().err and not (tmp_path / "gone" / PREDICTIONS).exists()


def test_two_systems_on_the_same_rows(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = predictions(tmp_path / "one.jsonl", source=shop)
    other = predictions(tmp_path / "other.jsonl", BETTER)
    told, _ = paired(one, other, (), Asked(data=str(shop)))
    assert (told["first"]["value"], told["second"]["value"]) == pytest.approx((3 / 7, 3 / 7))
    assert (told["both"], told["only_first"], told["only_second"], told["neither"]) == (2, 1, 1, 3)
    assert told["p"] == 1.0 and told["difference"]["value"] == 0.0
    low, high = told["difference"]["low"], told["difference"]["high"]
    assert low < 0 < high and low == pytest.approx(-high, abs=0.15)
    right = predictions(tmp_path / "right.jsonl", GOLDS, shop)
    output = tmp_path / "both.json"
    assert main(["eval", str(one), str(right), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "McNemar" in shown and "+57.1 %" in shown and "p = 0.125" in shown  # 4 against 0: 2 / 2^4
    assert json.loads(output.read_text(encoding="utf-8"))["only_second"] == 4
    assert main(["eval", str(one), str(right), "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_systems_on_other_rows_are_not_compared(shop: Path, tmp_path: Path) -> None:
    rows = judged(predictions(tmp_path / "one.jsonl", source=shop), (), Asked()).rows
    with pytest.raises(DataError, match="8 rows here and 7 there"):
        compare(rows, rows[:-1])
    with pytest.raises(DataError, match="not about the same rows") as caught:
        compare(rows, [*rows[1:], rows[0]])
    assert "gold queries differ" in caught.value.why
    texts = [row.answer for row in rows]
    _, examples, _ = labelled(tmp_path / "one.jsonl")
    alone = [e.columns | {"database": e.columns["database"][:1]} for e in examples]
    other = judge_rows(texts, [replace(one, columns=own) for one, own in zip(examples, alone, strict=True)])
    with pytest.raises(DataError, match="not about the same rows") as caught:
        compare(rows, other)
    assert "databases differ" in caught.value.why


# -------------------------------------------------------------------------------------------------------------- a model


@pytest.fixture
def file(args: dict[str, Any], shop: Path, tmp_path: Path) -> Callable[..., str]:
    """`file(**more)`: a config of the tiny policy on the built set."""

    def write(**more: Any) -> str:
        path = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml"
        keys = {**args, "dataset_dir": str(shop.parent), "eval_dataset": "shop", "max_new_tokens": 6, **more}
        path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}), encoding="utf-8")
        return str(path)

    return write


def test_predictions_keep_what_judges_them(
    file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs" / "one"
    assert main(["predict", file(output_dir=str(out))]) == 0
    rows = read_rows(out / PREDICTIONS)
    assert rows[0]["database"] == [f"../../data/databases/shop-{i}.sqlite" for i in range(2)]
    assert rows[1]["mutants_killed"] == 2 and rows[7]["unverified"] and rows[0]["dialect"] == "sqlite"
    results = json.loads((out / "predict_results.json").read_text(encoding="utf-8"))
    assert results["predict_execution_accuracy"] == 0.0 and results["predict_execution_accuracy_unverified"] == 1
    monkeypatch.chdir(tmp_path / "runs")
    capsys.readouterr()
    assert main(["eval", "one"]) == 0
    assert "Execution accuracy: one" in capsys.readouterr().out
    assert not (out / FIGURES).exists()


def test_a_config_and_a_run_folder(
    file: Callable[..., str], policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["eval", file(output_dir=str(out), eval_tasks="ex"), "--samples", "2", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "eval_loss" in shown and "eval_execution_accuracy  0\n" in shown and "pass@2" in shown
    assert "eval_execution_accuracy_unverified  1" in shown
    answers = read_rows(out / ANSWERS)
    assert all(len(row["samples"]) == 2 for row in answers) and answers[0]["verdict"] == "format_error"
    assert json.loads((out / FIGURES).read_text(encoding="utf-8"))["samples"] == 2
    assert main(["eval", str(out / ANSWERS)]) == 0
    assert "pass@2" in capsys.readouterr().out
    # a finished run of an online stage: no loss is measured, answers are
    run = tmp_path / "run"
    shutil.copytree(policy, run)
    given = yaml.safe_load(Path(file()).read_text(encoding="utf-8")) | {
        "stage": "rloo", "do_train": True, "dataset": ["shop"], "eval_dataset": ["shop"], "reward_model_type": "sql",
            "adapter_name_or_path": [],
    }  # fmt: skip
    write_json(run / CONFIG, dump_resolved(load({**given, "output_dir": str(run)})))
    assert main(["eval", str(run), "--samples", "1", "--output", str(tmp_path / "run.json")]) == 0
    assert "pass@1" in capsys.readouterr().out and (run / ANSWERS).exists() and (run / FIGURES).exists()
    assert main(["eval", str(run), str(out / ANSWERS)]) == 0
    assert "McNemar" in capsys.readouterr().out
    config = file(stage="rloo", output_dir=None)
    assert main(["eval", config, "eval_max_samples=2"]) == 0
    shown = capsys.readouterr().out
    assert "eval_loss" not in shown and "eval_samples  2" in shown


@pytest.fixture
def run_of(args: dict[str, Any], shop: Path, tmp_path: Path) -> Callable[..., Path]:
    """`run_of(model, **keys)`: that adapter as the folder of a finished run."""

    def make(model: Path, **keys: Any) -> Path:
        run = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        shutil.copytree(model, run)
        plain = shop.parent / "plain.json"
        plain.write_text(json.dumps([{"instruction": "q", "output": "SELECT 1", "database": "x"}]), encoding="utf-8")
        given = {**args, "do_train": True, "adapter_name_or_path": [], "output_dir": str(run)}
        given |= {"dataset": ["plain"], "dataset_dir": str(shop.parent), "max_new_tokens": 4, "do_eval": True}
        write_json(run / CONFIG, dump_resolved(load({"eval_dataset": ["plain"], **given, **keys})))
        return run

    return make


def test_a_run_without_databases_is_measured_by_its_predictions_or_as_its_config(
    run_of: Callable[..., Path],
    file: Callable[..., str],
    policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, output = run_of(policy), tmp_path / "new" / "run.json"
    write_json(run / "eval_results.json", {"eval_loss": 7.0})
    words = ["eval", str(run)]
    assert main([*words, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "eval_loss" in shown and "EX" not in shown
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["eval_samples"] == 1 and f"eval_loss  {found['eval_loss']:.6g}\n" in shown
    assert json.loads((run / "eval_results.json").read_text(encoding="utf-8")) == {"eval_loss": 7.0}
    for more, told in (
        (["--output", str(output)], "exists already"),
        (["--task", "bleu-4"], "--task: for predictions only"),
        (["--samples", "2"], "no database file"),  # asked for: then the column must mean one
    ):
        assert main([*words, *more]) == 2
        assert told in capsys.readouterr().err
    config = file(eval_dataset="plain", output_dir=str(run))
    assert main(["predict", config]) == 0
    capsys.readouterr()
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "bleu-4" in shown and "exact_match" in shown and "eval_loss" not in shown and "EX" not in shown
    assert main([*words, "--task", "exact_match"]) == 0
    shown = capsys.readouterr().out
    assert "exact_match" in shown and "bleu-4" not in shown


def test_what_a_run_with_databases_writes_and_is_asked_for(
    run_of: Callable[..., Path], policy: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = run_of(policy, eval_dataset=["shop"]), tmp_path / "run.json"
    output.write_text("mine", encoding="utf-8")
    assert main(["eval", str(run), "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err and output.read_text(encoding="utf-8") == "mine"
    predictions(run / PREDICTIONS, source=shop)
    shutil.copytree(shop.parent / "databases", run / "data" / "databases")
    assert main(["eval", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "42.9 %" in shown and "bleu-4" not in shown
    assert main(["eval", str(run), "--task", "exact_match"]) == 0
    shown = capsys.readouterr().out
    assert "exact_match" in shown and "EX" not in shown
    assert main(["eval", str(run), str(run / PREDICTIONS), "--task", "exact_match"]) == 2
    assert "two targets take no --task" in capsys.readouterr().err


def test_a_reward_model_has_no_answers_to_judge(
    run_of: Callable[..., Path], reward: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(shop.read_text(encoding="utf-8"))
    pairs = [{**row, "chosen": row["output"], "rejected": "SELECT 1"} for row in rows]
    (shop.parent / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    run = run_of(reward, stage="rm", dataset=["pairs"], eval_dataset=["pairs"])
    own = str(predictions(tmp_path / "own.jsonl", source=shop))
    for words in ([str(run)], [str(run), own], [own, str(run)]):
        assert main(["eval", *words]) == 2
        error = capsys.readouterr().err
        assert "a reward model writes no answers that could be judged" in error and "trimtab rm report" in error
    assert not (run / ANSWERS).exists()


def test_what_cannot_be_measured(
    file: Callable[..., str],
    reward: Path,
    base: Path,
    shop: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = shop.parent / "plain.json"
    plain.write_text(json.dumps([{"instruction": "q", "output": "SELECT 1"}]), encoding="utf-8")
    with pytest.raises(ConfigError, match="takes no keys"):
        judged(predictions(tmp_path / "p.jsonl", source=shop), ("a=1",), Asked())
    with pytest.raises(RunError, match="neither predictions nor a run"):
        judged(tmp_path, (), Asked())
    with pytest.raises(DataError, match="needs a database for every row"):
        judged(Path(file(eval_dataset="plain")), (), Asked())
    with pytest.raises(ConfigError, match="unknown eval task"):
        judged(Path(file(eval_tasks="speed")), (), Asked())
    for words, told in (
        (["--samples", "2", "eval_dataset=plain"], "--samples needs a model that writes"),
        (["stage=rloo", "eval_dataset=plain"], "does not measure stage rloo on rows without databases"),
        (["--data", "x", "--task", "ex"], "--task and --data are for files of predictions"),
    ):
        assert main(["eval", file(), *words]) == 2
        assert told in capsys.readouterr().err
    own = str(predictions(tmp_path / "own.jsonl", source=shop))
    for words, told in (
        ([file(), "nowhere"], "there is nothing to compare at nowhere"),
        ([own, "nowhere.jsonl"], "there is nothing to compare at nowhere.jsonl"),
        ([own, own, "a=1"], "takes no keys: a=1"),
    ):
        assert main(["eval", *words]) == 2
        assert told in capsys.readouterr().err


def test_an_entry_beside_a_set_says_how_it_is_read(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own entry alone: another that is broken does not matter, a file that is no JSON does."""
    folder = tmp_path / "built"
    shutil.copytree(shop.parent, folder)
    own = str(predictions(tmp_path / "own.jsonl"))
    info = folder / "dataset_info.json"
    entries = json.loads(info.read_text(encoding="utf-8"))
    info.write_text(json.dumps({"broken": {"formatting": 3}, "odd": [], **entries}), encoding="utf-8")
    words = ["eval", own, "--data", str(folder / shop.name), "--task", "ex"]
    assert main(words) == 0
    info.write_text("{", encoding="utf-8")
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "malformed JSON in dataset_info.json" in error and "Traceback" not in error


def test_weights_of_its_own(args: dict[str, Any], base: Path, shop: Path, tmp_path: Path) -> None:
    """A run whose weights were trained is the model of its folder."""
    run = tmp_path / "full"
    shutil.copytree(base, run)
    given = {
        **args,
        "dataset_dir": str(shop.parent),
        "dataset": ["shop"],
        "eval_dataset": ["shop"],
        "max_new_tokens": 4,
    }
    given |= {"do_train": True, "finetuning_type": "full", "adapter_name_or_path": [], "output_dir": str(run)}
    write_json(run / CONFIG, dump_resolved(load(given)))
    found = judged(run, ("eval_max_samples=3",), Asked())
    assert len(found.rows) == 3 and found.folder == run
