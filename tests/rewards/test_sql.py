"""Ready-made rewards for text to SQL, by execution and by spelling, and those of the example."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import RewardError
from trimtab.rewards import Answer
from trimtab.rewards.lookup import REWARD_FUNCTIONS, load_functions
from trimtab.rewards.sql import GRADES, sql_execution, sql_graded, sql_match
from trimtab.sql.verdicts import KINDS
from trimtab.types import Completion, Example, Message, Origin, Prompt, TokenRow

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples" / "text2sql"
GOLD = "SELECT name FROM t WHERE n > 1 ORDER BY name;"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two instances of one table: on the first alone, n > 1 and n = 2 are the same."""
    paths = []
    for number, rows in enumerate(([("a", 1), ("b", 2), ("c", 2)], [("a", 3), ("b", 2), ("c", 1)])):
        path = tmp_path_factory.mktemp("shop") / f"{number}.sqlite"
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE t (name TEXT, n INTEGER)")
            database.executemany("INSERT INTO t VALUES (?, ?)", rows)
            database.commit()
        paths.append(str(path))
    return paths


@pytest.mark.parametrize(
    ("query", "right", "grade"),
    [
        ("```sql\nselect name from t where n >= 2 order by 1\n```", 1, 1.0),
        ("SELECT name FROM t WHERE n = 2 ORDER BY name", 0, 0.3),
        ("SELECT name FROM t WHERE n > 1 ORDER BY name DESC", 0, 0.6),
        ("SELECT name, n FROM t WHERE n > 1 ORDER BY name", 0, 0.2),
        ("SELECT nme FROM t", 0, 0.1),
        ("SELECT name FRM t", 0, 0.0),
        ("DROP TABLE t", 0, 0.0),
        ("I do not know", 0, 0.0),
    ],
)
def test_by_execution(query: str, right: float, grade: float, shop: list[str]) -> None:
    assert sql_execution(query, GOLD, shop) == right
    assert sql_graded(query, GOLD, shop) == grade


def test_one_instance_and_another_dialect(shop: list[str]) -> None:
    assert sql_execution("SELECT name FROM t WHERE n = 2 ORDER BY name", GOLD, shop[0]) == 1.0
    assert sql_execution("SELECT NVL(name, 'x') FROM t WHERE n > 1 ORDER BY name", GOLD, shop, "oracle") == 1.0


def test_where_execution_concludes_nothing_the_spelling_decides(shop: list[str]) -> None:
    nothing = "SELECT name FROM t WHERE n > 99"
    assert sql_execution("select name from t where n > 99;", nothing, shop) == 1.0
    assert sql_execution("SELECT name FROM t WHERE n > 98", nothing, shop) == 0.0
    assert sql_graded("SELECT name FROM t WHERE n > 98", nothing, shop) == GRADES["wrong_rows"]
    assert sql_execution("SELECT a FROM gone", "SELECT a FROM gone", shop) == 1.0  # gold does not run either


def test_text_in_double_quotes_is_text_where_the_row_says_so(shop: list[str]) -> None:
    """As Spider writes it: without that gold fails, and the spelling would decide."""
    gold, other = 'SELECT n FROM t WHERE name = "b"', "SELECT n FROM t WHERE name > 'a' AND name < 'c'"
    both = load_functions(["sql_execution", "sql_graded"], timeout=30)
    for cell in (True, "true"):
        assert [one.score([answer(other, gold=gold, database=shop, quoted_values=cell)]) for one in both] == [
            [1.0],
            [1.0],
        ]
    assert both[0].score([answer(other, gold=gold, database=shop)]) == [0.0]


def test_by_spelling() -> None:
    assert sql_match("select NAME from t", "SELECT name FROM t;") == 1.0
    assert sql_match("SELECT n FROM t", "SELECT name FROM t;") == 0.0
    assert sql_match("not  sql", "not sql") == 1.0


def test_every_verdict_has_a_grade_and_better_ones_are_worth_more() -> None:
    assert set(GRADES) == set(KINDS) - {"unverified"}
    assert [GRADES[kind] for kind in KINDS if kind in GRADES] == sorted(GRADES.values())


def answer(text: str, **columns: Any) -> Answer:
    gold = columns.pop("gold", GOLD)
    example = Example(
        origin=Origin(file="q.json", row=4),
        prompt=(Message(role="user", content="q"),),
        response=Message(role="assistant", content=gold) if gold else None,
        columns=columns,
    )
    completion = Completion(prompt_index=0, sample_index=0, token_ids=(2,), logprobs=(0.0,), finish="stop")
    return Answer(
        prompt=Prompt(index=0, token_ids=(1,), example=example),
        completion=completion,
        row=TokenRow(token_ids=(1, 2), scored=(1,)),
        text=text,
    )


def test_by_name_with_the_columns_of_the_row(shop: list[str]) -> None:
    for name in REWARD_FUNCTIONS.names():
        (one,) = load_functions([name], timeout=30)
        assert one.name == name
        assert one.score([answer(GOLD, database=shop), answer("SELECT n FROM t", database=shop)])[0] == 1.0


def test_what_is_missing_names_the_row(shop: list[str]) -> None:
    (one,) = load_functions(["sql_execution"], timeout=30)
    with pytest.raises(RewardError, match="asks for 'database'") as caught:
        one.check([answer(GOLD).prompt.example])
    assert "q.json:4" in caught.value.where
    with pytest.raises(RewardError, match="no database file") as caught:
        one.score([answer(GOLD, database="nowhere.sqlite")])
    assert caught.value.where.endswith("q.json:4")
    with pytest.raises(RewardError, match="no answer of its own"):
        one.score([answer(GOLD, gold=None, database=shop)])


def test_the_rewards_of_the_example_tell_right_from_wrong() -> None:
    """Every gold query is right; of the wrong answers of its pairs nearly all are found wrong."""
    right, graded = load_functions(
        [f"{EXAMPLE / 'rewards.py'}:execution", f"{EXAMPLE / 'rewards.py'}:graded"], timeout=60
    )
    rows = json.loads((EXAMPLE / "data" / "rw_data.json").read_text(encoding="utf-8"))[::20]
    given = [(row, {**row, "output": row["chosen"]}) for row in rows if row["mistake"] != "chatter"]
    good = [answer(row["chosen"], gold=None, **columns) for row, columns in given]
    bad = [answer(row["rejected"], gold=None, **columns) for row, columns in given]
    assert set(right.score(good)) == {1.0} and set(graded.score(good)) == {1.0}
    wrong = right.score(bad)
    assert sum(wrong) / len(wrong) < 0.1
    schemas = {row["schema"] for row in json.loads((EXAMPLE / "data" / "ppo_prompts.json").read_text(encoding="utf-8"))}
    assert right.score([answer("SELECT 1", gold=None, output="SELECT 1", schema=name) for name in sorted(schemas)])
