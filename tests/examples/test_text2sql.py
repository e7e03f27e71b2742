"""The example data: what the generator promises, checked on the committed files."""

from __future__ import annotations

import functools
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab import config
from trimtab.sql.canonical import canonical_sql

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples" / "text2sql"
DATA = EXAMPLE / "data"
Row = dict[str, Any]
canonical = functools.cache(canonical_sql)  # many sets share a query


def read(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


INFO = read("dataset_info")
SCHEMAS = {schema["name"]: schema for schema in read("schemas")}
ROWS: dict[str, list[Row]] = {name: read(name) for name in INFO}
GENERATED = [name for name in INFO if name != "article"]
TRAINING = ["train_clean", "rw_data", "ppo_prompts", "tuning_sample", "demo_sft", "demo_rw", "demo_ppo"]
HELD_OUT = [name for name in GENERATED if name not in TRAINING]


def prompts(*names: str) -> list[str]:
    return [row["instruction"] for name in names for row in ROWS[name]]


def gold(row: Row) -> str:
    return row["output"] if "output" in row else row["chosen"]


def column(name: str, *sets: str) -> set[str]:
    return {row[name] for one in sets for row in ROWS[one]}


def test_the_generator_writes_the_committed_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(EXAMPLE / "make_data.py"), str(tmp_path)], check=True)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in DATA.iterdir())
    for name in made:
        # text, not bytes: a checkout on Windows may turn line ends
        assert (tmp_path / name).read_text(encoding="utf-8") == (DATA / name).read_text(encoding="utf-8"), name
        assert (DATA / name).stat().st_size < 1_000_000
        assert b"\r" not in (tmp_path / name).read_bytes()


def test_counts() -> None:
    counts = {name: len(rows) for name, rows in ROWS.items()}
    assert counts == {
        "train_clean": 2200, "rw_data": 1400, "ppo_prompts": 1000, "tuning_sample": 20, "article": 2,
        "heldout_questions": 240, "heldout_templates": 240, "heldout_schemas": 240, "heldout_rw": 240,
        "demo_sft": 1200, "demo_rw": 600, "demo_ppo": 600, "demo_eval": 120, "demo_rw_eval": 100, "demo_heldout": 1000,
    }  # fmt: skip
    assert len(SCHEMAS) >= 10
    assert column("level", "train_clean") == {"easy", "medium", "hard"}
    ids = [row["id"] for rows in ROWS.values() for row in rows]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", GENERATED)
def test_languages(name: str) -> None:
    share = sum(row["language"] == "zh" for row in ROWS[name]) / len(ROWS[name])
    assert 0.25 <= share <= 0.5 or (name.startswith("demo") and 0.15 <= share <= 0.25)
    for row in ROWS[name]:
        has_chinese = any("\u4e00" <= character <= "\u9fff" for character in row["instruction"] + gold(row))
        assert has_chinese == (row["language"] == "zh")
        assert SCHEMAS[row["schema"]]["language"] == row["language"]


def test_dataset_info_describes_the_rows() -> None:
    for name, entry in INFO.items():
        assert entry["file_name"] == f"{name}.json"
        assert entry.get("ranking", False) == ("chosen" in ROWS[name][0])
        wanted = {"instruction", "input"} | ({"chosen", "rejected"} if entry.get("ranking") else {"output"})
        assert all(wanted <= row.keys() for row in ROWS[name])


def test_prompts_are_held_out() -> None:
    assert not set(prompts(*TRAINING)) & set(prompts(*HELD_OUT))
    held_out = prompts(*HELD_OUT)
    assert len(held_out) == len(set(held_out))
    for stages in (["train_clean", "rw_data", "ppo_prompts", "tuning_sample"], ["demo_sft", "demo_rw", "demo_ppo"]):
        assert len(prompts(*stages)) == len(set(prompts(*stages)))


def test_split_by_schema() -> None:
    unseen = {name for name, schema in SCHEMAS.items() if schema["held_out"]}
    assert len(unseen) == 3
    assert column("schema", "heldout_schemas") == unseen
    assert not column("schema", *TRAINING, "heldout_questions", "heldout_templates") & unseen


def test_split_by_template() -> None:
    unseen = column("template", "heldout_templates")
    assert len(unseen) == 6
    assert not column("template", *TRAINING, "heldout_questions", "heldout_schemas") & unseen


def test_unseen_literals_make_unseen_queries() -> None:
    trained = {gold(row) for name in TRAINING for row in ROWS[name]}
    literal = [row for row in ROWS["heldout_questions"] if row["unseen"] == "literal"]
    assert 60 < len(literal) < 180
    assert not {gold(row) for row in literal} & trained


def test_one_prompt_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for name in GENERATED:
        for row in ROWS[name]:
            assert answers.setdefault(row["instruction"], gold(row)) == gold(row)


def test_prompts_are_short_and_show_the_tables() -> None:
    for name in GENERATED:
        for row in ROWS[name]:
            *lines, question = row["instruction"].split("\n")
            assert 1 <= len(lines) <= 3
            assert set(lines) <= set(SCHEMAS[row["schema"]]["lines"])
            assert question
            assert len(row["instruction"]) <= 250


@pytest.fixture(scope="module")
def databases() -> dict[str, sqlite3.Connection]:
    """An empty database per schema, made from its DDL."""
    made = {}
    for name, schema in SCHEMAS.items():
        made[name] = sqlite3.connect(":memory:")
        made[name].executescript("\n".join(schema["ddl"]))
    return made


@pytest.mark.parametrize("name", GENERATED)
def test_gold_queries_parse_and_run(name: str, databases: dict[str, sqlite3.Connection]) -> None:
    for row in ROWS[name]:
        assert canonical(gold(row)) is not None, row
        databases[row["schema"]].execute(gold(row))


@pytest.mark.parametrize("name", [name for name in GENERATED if INFO[name].get("ranking")])
def test_rejected_answers_are_wrong(name: str) -> None:
    for row in ROWS[name]:
        if row["mistake"] == "chatter":  # the right query, but not the query alone
            assert row["chosen"] in row["rejected"]
            assert row["chosen"] != row["rejected"]
        else:
            assert canonical(row["rejected"]) != canonical(row["chosen"]), row


def test_all_mistakes_occur() -> None:
    assert len(column("mistake", "rw_data")) == 19


@pytest.mark.parametrize("path", sorted(EXAMPLE.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLE)))
def test_config_files_resolve(path: Path) -> None:
    loaded = config.load(path)
    named = [*(loaded.dataset or []), *(loaded.eval_dataset or [])]
    assert set(named) <= INFO.keys()
    assert named or path.name == "chat.yaml"
