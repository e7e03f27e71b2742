"""`trimtab data prefer`: which answers make a pair, and the data set that comes of it; what `rm report` says of such pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sql.built import GOLDS, built
from trimtab.cli import main
from trimtab.config import load
from trimtab.data.source import example, find, rows
from trimtab.errors import ConfigError, DataError
from trimtab.report.rewards import figures, read_pairs, write_report
from trimtab.rundir import PREDICTIONS, read_rows
from trimtab.serve import prefer as module
from trimtab.serve.prefer import best_pairs, prefer, rank
from trimtab.sql.verdicts import KINDS

pytestmark = pytest.mark.unit


def test_ranks() -> None:
    assert {kind: rank(kind) for kind in KINDS if rank(kind)} == {
        "wrong_rows": 1, "wrong_order": 1, "wrong_multiplicity": 1, "equal": 2, "unverified": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "most", "pairs"),
    [
        (["equal", "parse_error", "wrong_rows"], 1, [(0, 2)]),  # the near miss
        (["equal", "parse_error", "wrong_rows"], 5, [(0, 2), (0, 1)]),  # then right over the rest; each rejected once
        (["parse_error", "wrong_rows", "wrong_columns"], 5, [(1, 2), (1, 0)]),
        (["equal", "equal"], 5, []),
        (["wrong_rows", "wrong_order"], 5, []),  # one rank
        (["format_error", "parse_error", "timeout", "wrong_columns"], 5, []),
        (["wrong_order", "equal", "wrong_rows"], 5, [(1, 0), (1, 2)]),
        (["equal", "equal", "wrong_rows", "wrong_rows"], 5, [(0, 2), (1, 3)]),  # both right ones are used
        (["equal", "wrong_rows"], 0, []),
        ([], 3, []),
    ],
)
def test_pairs(kinds: list[Any], most: int, pairs: list[tuple[int, int]]) -> None:
    assert best_pairs(kinds, most) == pairs


ANSWERS = {
    GOLDS[0]: [
        "nothing",
        "SELECT name FROM t WHERE n = 2",
        "```sql\nselect name from t where n >= 2\n```",
        "SELECT  name FROM t WHERE n >= 2;",
    ],
    GOLDS[1]: ["SELECT 1, 2", "SELECT count(*) FROM t", "nothing", "SELECT count(*) FROM t"],
    GOLDS[2]: ["nothing", "nothing at all", "SELECT FROM", "DROP TABLE t"],
}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return built(tmp_path / "data", golds=(*list(ANSWERS), GOLDS[-1]))


@pytest.fixture
def file(args: dict[str, Any], shop: Path, tmp_path: Path) -> Callable[..., str]:
    def write(**more: Any) -> str:
        path = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml"
        keys = {**args, "dataset_dir": str(shop.parent), "dataset": "shop", "max_new_tokens": 4, **more}
        path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says what ANSWERS has it say."""

    def answers_of(session: Any, prompts: Any, **more: Any) -> tuple[list[str], list[list[str]]]:
        assert more == {"samples": 4, "seed": 1, "greedy": False}
        return [], [ANSWERS[prompt.example.response.content] for prompt in prompts]

    monkeypatch.setattr(module, "answers_of", answers_of)


@pytest.mark.usefixtures("answered")
def test_a_set_of_preferences(
    file: Callable[..., str], shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prefer", file(), "--samples", "4", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 prompts: 1 cannot be judged, 2 give 4 pairs, 1 give none" in said
    assert "12 answers: format_error 33.3 %" in said and "equal over wrong_rows: 1" in said
    assert "trained on" not in said  # nothing is measured here
    made = json.loads((shop.parent / "prefer.json").read_text(encoding="utf-8"))
    told = [(row["instruction"], row["chosen_verdict"], row["rejected_verdict"]) for row in made]
    assert told == [
        ("question 1", "equal", "wrong_rows"),
        ("question 1", "equal", "format_error"),
        ("question 2", "wrong_rows", "wrong_columns"),
        ("question 2", "wrong_rows", "format_error"),
    ]
    assert made[0] == {
        "instruction": "question 1", "input": "", "chosen": ANSWERS[GOLDS[0]][2], "rejected": ANSWERS[GOLDS[0]][1],
        "gold": GOLDS[0], "chosen_verdict": "equal", "rejected_verdict": "wrong_rows", "topic": "shop", "dialect": "sqlite",
        "database": [f"databases/shop-{i}.sqlite" for i in range(2)], "unverified": None, "mutants_killed": 1, "mutants_total": 4,
    }  # fmt: skip
    entries = json.loads((shop.parent / "dataset_info.json").read_text(encoding="utf-8"))
    assert entries["shop"] == {"file_name": "shop.json"} and entries["prefer"]["ranking"] is True
    spec = find("prefer", dataset_dir=str(shop.parent), formatting=None, ranking=None, columns=())
    first = next(example(value, origin, spec) for origin, value in rows(spec))
    assert first.chosen and first.chosen.content == ANSWERS[GOLDS[0]][2]  # type: ignore[union-attr]
    assert main(["data", "prefer", file()]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.usefixtures("answered")
def test_in_another_folder_with_what_is_before_a_question(file: Callable[..., str], shop: Path, tmp_path: Path) -> None:
    listed = json.loads(shop.read_text(encoding="utf-8"))
    for row in listed:
        row |= {"instruction": "Write SQL.", "input": row["instruction"], "setting": "A database."}
    shop.write_text(json.dumps(listed), encoding="utf-8")
    entry = {"file_name": "shop.json", "columns": {"system": "setting"}}
    (shop.parent / "dataset_info.json").write_text(json.dumps({"shop": entry}), encoding="utf-8")
    target = tmp_path / "new" / "deep" / "pairs.jsonl"
    made = prefer(load(file(dataset=None, eval_dataset="shop")), target, samples=4, most=1, seed=1)
    assert (made.prompts, made.unjudged, made.paired) == (4, 1, 2) and sum(made.pairs.values()) == 2
    first = read_rows(target)[0]
    assert (first["instruction"], first["input"], first["system"]) == ("Write SQL.", "question 1", "A database.")
    assert first["database"][0] == "../../data/databases/shop-0.sqlite"
    entries = json.loads((target.parent / "dataset_info.json").read_text(encoding="utf-8"))
    assert entries["pairs"]["columns"]["system"] == "system"


def test_what_gives_no_preferences(
    file: Callable[..., str], shop: Path, reward: Path, base: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.json"
    with pytest.raises(DataError, match="not one pair from 4 prompts x 2 answers") as caught:
        prefer(load(file()), target, samples=2)  # a model that knows no SQL
    assert "1 cannot be judged" in caught.value.why
    with pytest.raises(ConfigError, match="this file is of stage rm"):
        prefer(load(file(stage="rm")), target)
    with pytest.raises(ConfigError, match="no prompts to answer"):
        prefer(load(file(dataset=None)), target)
    (shop.parent / "plain.json").write_text(json.dumps([{"instruction": "q", "output": "SELECT 1"}]), encoding="utf-8")
    with pytest.raises(DataError, match="needs a database for every row"):
        prefer(load(file(dataset="plain")), target)
    for text, why in (("[]", "it holds a list"), ("{", "")):
        (tmp_path / "dataset_info.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="cannot be added to") as refused:
            prefer(load(file()), target)
        assert why in refused.value.why
    entries = {"out": {"file_name": "another.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(DataError, match="a data set called 'out' already"):
        prefer(load(file(model_name_or_path="nowhere")), target)  # told before a model is looked for
    assert json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8")) == entries
    assert not target.exists()


@pytest.mark.usefixtures("answered")
def test_a_dialogue_with_tools_has_no_place(file: Callable[..., str], shop: Path, tmp_path: Path) -> None:
    listed = json.loads(shop.read_text(encoding="utf-8"))
    for row in listed:
        turns = [
            ("human", row["instruction"]),
            ("function_call", '{"name": "f", "arguments": {}}'),
            ("observation", "1"),
            ("gpt", row["output"]),
        ]
        row["conversations"] = [{"from": who, "value": text} for who, text in turns]
    shop.write_text(json.dumps(listed), encoding="utf-8")
    entry = {"file_name": "shop.json", "formatting": "sharegpt"}
    (shop.parent / "dataset_info.json").write_text(json.dumps({"shop": entry}), encoding="utf-8")
    with pytest.raises(DataError, match="cannot be written as a row of preferences"):
        prefer(load(file()), tmp_path / "out.json", samples=4, seed=1)


def test_a_reward_model_is_told_apart_by_verdicts(
    reward_args: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"instruction": "q", "chosen": "a", "rejected": "b" * n, "chosen_verdict": "equal", "rejected_verdict": kind}
        for n, kind in ((1, "wrong_rows"), (2, "wrong_rows"), (3, "parse_error"))
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    out = tmp_path / "out"
    keys = {**reward_args, "dataset_dir": str(tmp_path), "eval_dataset": "pairs", "output_dir": str(out)}
    config = tmp_path / "rm.yaml"
    config.write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert main(["rm", "report", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "accuracy by verdicts" in shown and "equal over wrong_rows" in shown
    scored = read_rows(out / PREDICTIONS)
    assert [row["rejected_verdict"] for row in scored] == ["wrong_rows", "wrong_rows", "parse_error"]
    parts = figures(read_pairs(out / PREDICTIONS))["by_verdicts"]
    assert [(part["name"], part["count"]) for part in parts] == [
        ("equal over wrong_rows", 2),
        ("equal over parse_error", 1),
    ]
    right = [row["chosen"] > row["rejected"] for row in scored]
    assert [part["accuracy"] for part in parts] == [sum(right[:2]) / 2, float(right[2])]
    for row in scored:
        del row["chosen_verdict"], row["rejected_verdict"]
    (out / PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in scored), encoding="utf-8")
    assert "by_verdicts" not in write_report(out / PREDICTIONS)[0]
