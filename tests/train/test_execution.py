"""Answers rewarded by running their SQL: which rows take part, what is logged, execution accuracy in every loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sql.built import GOLDS, built
from trimtab.config import load
from trimtab.config.stages import ONLINE
from trimtab.dry_run import dry_run
from trimtab.errors import ConfigError, DataError, RewardError
from trimtab.rewards import Answer
from trimtab.rewards.sql import GRADES, ExecutionReward, Worth
from trimtab.rundir import RunFolder
from trimtab.serve.execution import check_built
from trimtab.sql.cached import shared_judge
from trimtab.sql.sandbox import Sandbox
from trimtab.sql.verdicts import KINDS, Outcome, Verdict
from trimtab.train.execution import unjudged
from trimtab.types import Completion, Example, Message, Origin, Prompt, TokenRow

pytestmark = pytest.mark.unit

Run = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a built set `shop`, one of whose eight rows cannot be judged, and of a part of it, `held`."""
    folder = tmp_path_factory.mktemp("shop")
    built(folder)
    return built(folder, name="held", golds=GOLDS[4:]).parent


def answer(text: str, row: int = 1, folder: Path = Path(), **columns: Any) -> Answer:
    shown = {"database": ["databases/shop-0.sqlite", "databases/shop-1.sqlite"], **columns}
    example = Example(
        origin=Origin(file=str(folder / "shop.json"), row=row),
        prompt=(Message(role="user", content="q"),),
        response=Message(role="assistant", content=GOLDS[row - 1]),
        columns=shown,
    )
    return Answer(
        prompt=Prompt(index=0, token_ids=(1,), example=example),
        completion=Completion(prompt_index=0, sample_index=0, token_ids=(2,), logprobs=(0.0,), finish="stop"),
        row=TokenRow(token_ids=(1, 2), scored=(1,)),
        text=text,
    )


WRITTEN = [
    ("```sql\nSELECT name FROM t WHERE n >= 2\n```", "equal", 1.0),
    ("SELECT name FROM t WHERE n = 2", "wrong_rows", 0.1),
    ("SELECT name, n FROM t WHERE n > 1", "wrong_columns", 0.0),
    ("SELECT nme FROM t", "unknown_identifier", 0.0),
    ("DROP TABLE t", "write_attempt", 0.0),
    ("I do not know", "format_error", 0.0),
]


def test_the_worth_of_verdicts(shop: Path) -> None:
    reward = ExecutionReward(Worth(), judge=shared_judge())
    answers = [answer(text, folder=shop) for text, _, _ in WRITTEN]
    found = reward.judge([*answers, answers[0]])
    assert found.scores == [worth for _, _, worth in WRITTEN] + [1.0]
    assert found.parts["sql"] == found.scores
    assert set(found.parts) == {"sql", "sql/cached", *(f"sql/{kind}" for kind in KINDS if kind != "unverified")}
    for i, (_, kind, _) in enumerate(WRITTEN):
        assert [name for name in GRADES if found.parts[f"sql/{name}"][i]] == [kind]
    assert found.parts["sql/cached"][-1] == 1.0
    assert reward.score(answers) == found.scores[:-1]
    assert set(reward.judge(answers).parts["sql/cached"]) == {1.0}
    other = ExecutionReward(Worth(equal=2.0, executes=-1.0, other=-3.0), judge=shared_judge())
    assert other.score(answers) == [2.0, -1.0, -3.0, -3.0, -3.0, -3.0]
    graded = ExecutionReward(Worth(graded=True), judge=shared_judge())
    assert graded.score(answers) == [1.0, 0.3, 0.2, 0.1, 0.0, 0.0]
    assert [Worth().of(Verdict(kind=k)) for k in ("wrong_order", "wrong_multiplicity", "timeout")] == [0.1, 0.1, 0.0]


def test_a_row_that_cannot_be_judged_any_more_ends_the_run(shop: Path) -> None:
    reward = ExecutionReward(Worth(), judge=shared_judge())
    with pytest.raises(RewardError, match="cannot be judged by execution any more") as caught:
        reward.score([answer("SELECT name FROM t WHERE n > 100", row=8, folder=shop)])
    assert caught.value.where.endswith("shop.json:8") and "empty" in caught.value.why
    with pytest.raises(DataError, match="no database file"):
        reward.score([answer("SELECT 1", folder=shop / "elsewhere")])


def test_a_server_that_has_gone_is_no_reward(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = ExecutionReward(Worth(), judge=shared_judge())
    answers = [answer("SELECT name FROM t WHERE n >= 2 AND n = n", folder=shop)]
    assert reward.score([answer(GOLDS[0], folder=shop)]) == [1.0]  # gold is known
    lost = Outcome(error="exec_error", message="no server: connection refused", broken=True)
    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "run", lambda *_, **__: [lost])
        with pytest.raises(RewardError, match="the database server cannot be asked") as caught:
            reward.score(answers)
        assert "connection refused" in caught.value.why and "--resume" in caught.value.remedy
    assert reward.score(answers) == [1.0]


def test_a_server_needs_what_speaks_to_it(
    keys: Callable[..., dict[str, Any]], shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "postgresql://reader@host/db"
    rows = [answer("SELECT 1", database=address, unverified=None).prompt]
    monkeypatch.setattr("trimtab.sql.rows.find_spec", lambda _: None)
    given = keys("rloo", tmp_path / "run", dataset="shop", dataset_dir=str(shop), reward_model_type="sql")
    for check in (
        lambda: unjudged(rows[0].example, shared_judge()),
        lambda: check_built(rows),
        lambda: dry_run(load({**given, "sql_database": address})),
    ):
        with pytest.raises(ConfigError, match="needs psycopg") as caught:
            check()
        assert caught.value.remedy == "pip install 'trimtab[postgres]'"
    dry_run(load(given))  # files need nothing


@pytest.mark.parametrize("stage", ONLINE)
def test_every_online_stage_learns_from_execution_alone(
    stage: str, run: Run, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"dataset": "shop", "dataset_dir": str(shop), "reward_model_type": "sql", "max_steps": 1}
    folder = run(stage, tmp_path / "run", **more)
    (row,) = folder.metrics("train")
    shares = [row[f"reward/parts/sql/{kind}"] for kind in GRADES]
    assert sum(shares) == pytest.approx(1.0)
    assert row["reward/parts/sql/format_error"] > 0  # what a model without training writes
    assert 0 <= row["reward/parts/sql/cached"] <= 1
    assert row["reward/mean"] == pytest.approx(row["reward/parts/sql"])
    said = capsys.readouterr().out
    assert "1 dropped, 7 to train on" in said
    assert "its answer cannot be judged by execution" in said and "shop.json:8 (the query gives no rows)" in said


def test_beside_functions_and_held_out_rows(run: Run, shop: Path, tmp_path: Path) -> None:
    """Weights in the order sql, functions; held-out rows that cannot be judged are left out of the evaluation."""
    more: dict[str, Any] = {
        "dataset": "shop", "eval_dataset": "held", "dataset_dir": str(shop), "reward_model_type": "sql", "max_steps": 1,
        "reward_funcs": "sql_execution, sql_match", "reward_weights": [0.5, 2.0, 4.0], "sql_reward_else": -1.0,
        "sql_workers": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_tasks": "ex, exact_match",
    }  # fmt: skip
    folder = run("rloo", tmp_path / "run", **more)
    (row,) = folder.metrics("train")
    parts = [row[f"reward/parts/{name}"] for name in ("sql", "sql_execution", "sql_match")]
    assert parts == [-1.0, 0.0, 0.0] and row["reward/mean"] == -0.5
    (held,) = folder.metrics("eval")
    assert held["eval/execution_accuracy"] == 0.0 and "eval/execution_accuracy_unverified" not in held
    assert held["eval/reward_greedy"] == -0.5
    assert len([s for s in folder.samples() if s["kind"] == "eval"]) == 3
    again = run("rloo", tmp_path / "again", **more).metrics("train")[0]
    same = [name for name in row if not name.startswith(("seconds", "time")) and "memory" not in name]
    for name in (n for n in same if n.startswith(("reward", "loss", "score"))):
        if not name.endswith("cached"):
            assert row[name] == again[name], name


def test_ready_made_functions_leave_out_what_the_set_says_cannot_be_judged(
    run: Run, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("raft", tmp_path / "run", dataset="shop", dataset_dir=str(shop), reward_funcs="sql_execution", max_steps=1)
    assert "1 dropped, 7 to train on" in capsys.readouterr().out


def test_rows_that_nobody_has_tried_are_tried(
    run: Run, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((shop / "shop.json").read_text(encoding="utf-8"))
    address = str(shop / "databases" / "shop-0.sqlite")
    bare = [{k: v for k, v in row.items() if k in ("instruction", "output")} for row in rows]
    bare.append({"instruction": "x", "output": "SELECT gone FROM t"})
    (tmp_path / "bare.json").write_text(json.dumps(bare), encoding="utf-8")
    more = {"dataset": "bare", "dataset_dir": str(tmp_path), "reward_model_type": "sql", "max_steps": 1}
    run("rloo", tmp_path / "run", **more, sql_database=address, sql_dialect="sqlite")
    said = capsys.readouterr().out
    assert "2 dropped, 7 to train on" in said and "gives no rows" in said and "no such column" in said
    with pytest.raises(DataError, match="has no 'database'") as caught:
        run("rloo", tmp_path / "other", **more)
    assert "sql_database" in caught.value.remedy
    (tmp_path / "bare.json").write_text(json.dumps(bare[-2:]), encoding="utf-8")
    with pytest.raises(DataError, match="no rows left to train on: 2 read"):
        run("rloo", tmp_path / "other", **more, sql_database=address)
    (tmp_path / "bare.json").write_text(json.dumps([{"instruction": "x"}]), encoding="utf-8")
    with pytest.raises(DataError, match="without a query of its own"):
        run("rloo", tmp_path / "other", **more, sql_database=address)


def test_a_dry_run_looks_for_the_databases(
    keys: Callable[..., dict[str, Any]], shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = keys("rloo", tmp_path / "run", dataset="shop", dataset_dir=str(shop), reward_model_type="sql")
    dry_run(load(given))
    assert "nothing was trained" in capsys.readouterr().out
    rows = json.loads((shop / "shop.json").read_text(encoding="utf-8"))
    (tmp_path / "shop.json").write_text(json.dumps(rows), encoding="utf-8")  # away from its databases
    with pytest.raises(DataError, match="no database file"):
        dry_run(load({**given, "dataset_dir": str(tmp_path)}))
    dry_run(load({**given, "dataset_dir": str(tmp_path), "sql_database": "postgresql://host/db"}))
    (tmp_path / "shop.json").write_text("[7]", encoding="utf-8")
    with pytest.raises(DataError):  # there is no row at all: the run's own error
        dry_run(load({**given, "dataset_dir": str(tmp_path)}))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_execution_accuracy_while_training(
    stage: str, run: Run, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((shop / "held.json").read_text(encoding="utf-8"))
    pairs = [{**row, "chosen": row["output"], "rejected": "SELECT 1"} for row in rows]
    (shop / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    name = "held" if stage == "sft" else "pairs"
    more = {"dataset": name, "eval_dataset": name, "dataset_dir": str(shop), "eval_tasks": "execution_accuracy"}
    folder = run(stage, tmp_path / "run", **more, max_steps=1, eval_strategy="steps", eval_steps=1, max_new_tokens=4)
    (held,) = folder.metrics("eval")
    assert held["eval/execution_accuracy"] == 0.0
    assert held["eval/execution_accuracy_unverified"] == 1


def test_a_server_that_has_gone_in_an_evaluation_costs_no_steps(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = built(tmp_path / "data").parent  # databases of its own: nothing of them is kept
    lost = Outcome(error="exec_error", message="no server: connection refused", broken=True)
    monkeypatch.setattr(Sandbox, "run", lambda *_, **__: [lost])
    more = {"dataset": "shop", "eval_dataset": "shop", "dataset_dir": str(data), "eval_tasks": "execution_accuracy"}
    with pytest.raises(DataError, match="the database server cannot be asked"):
        run("sft", tmp_path / "run", **more, max_steps=2, eval_strategy="steps", eval_steps=1, max_new_tokens=4)
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("more", "key", "remedy"),
    [
        ({"reward_model": "some/rm"}, "reward_model", "reward_funcs: sql_execution"),
        ({"reward_model": "a, b"}, "reward_model", "reward_funcs: sql_execution"),
        ({"sql_partial_credit": True, "sql_reward_else": -1}, "sql_reward_else", "delete one"),
        ({"sql_reward_equal": 0.1}, "sql_reward_equal", "more than sql_reward_executes"),
        ({"sql_reward_else": 1.0}, "sql_reward_equal", "more than sql_reward_executes"),
        ({"reward_weights": [1, 2]}, "reward_weights", "one weight for each"),
        ({"reward_model_type": "lora", "reward_model": "r", "sql_reward_executes": 0}, "sql_reward_executes", "sql"),
        ({"reward_model_type": "lora", "reward_funcs": "f", "sql_partial_credit": True}, "sql_partial_credit", "sql"),
        ({"reward_model_type": "lora"}, "reward_model is missing", "reward_model_type: sql"),
        ({"sql_dialect": "klingon"}, "sql_dialect", "correct it"),
    ],
)
def test_what_does_not_fit_together(more: dict[str, Any], key: str, remedy: str) -> None:
    given = {"model_name_or_path": "m", "stage": "ppo", "do_train": True, "dataset": "d", "output_dir": "o"}
    with pytest.raises(ConfigError) as caught:
        load({**given, "reward_model_type": "sql", **more})
    assert caught.value.what.startswith(key) and remedy in caught.value.remedy


def test_partial_credit_is_warned_of() -> None:
    given = {"model_name_or_path": "m", "stage": "ppo", "do_train": True, "dataset": "d", "output_dir": "o"}

    def warned(**more: Any) -> list[str]:
        return [note for note in load({**given, **more}).notes if note.startswith("warning")]

    assert warned(reward_model_type="sql") == [] and warned(reward_funcs="sql_execution") == []
    for more in ({"reward_model_type": "sql", "sql_partial_credit": True}, {"reward_funcs": "a, sql_graded"}):
        (line,) = warned(**more)
        assert "learnt to collect" in line
