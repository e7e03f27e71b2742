"""BLEU, ROUGE and the normalised match on texts whose figures can be worked out on paper."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trimtab.errors import ConfigError, DataError
from trimtab.evals import EVALS
from trimtab.evals.bleu import bleu4
from trimtab.evals.normalised_match import normalise
from trimtab.evals.predictions import evaluate, labelled, summary
from trimtab.evals.rouge import words
from trimtab.types import Example, Message, Origin

pytestmark = pytest.mark.unit


def example(answer: str) -> Example:
    return Example(origin=Origin(file="rows.json", row=1), response=Message(role="assistant", content=answer))


@pytest.mark.parametrize(
    ("prediction", "gold", "share"),
    [
        ("abcde", "abcde", 1.0),
        ("abcdf", "abcde", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        ("abcd", "abcde", math.exp(1 - 5 / 4)),  # all its n-grams are right, but it is short
        ("abcdee", "abcde", (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4)),  # a repeated letter is counted once
        (
            "abxy",
            "abcd",
            (2 / 4 * 1 / 3 * 1 / (2 * 2) * 1 / (4 * 1)) ** (1 / 4),
        ),  # the zeros of orders 3 and 4, smoothed
        ("查询书名", "查询书号", (3 / 4 * 2 / 3 * 1 / 2 * 1 / (2 * 1)) ** (1 / 4)),
        ("是", "是", 1.0),
        ("是的", "是否", (1 / 2 * 1 / (2 * 1)) ** (1 / 2)),
        ("", "abc", 0.0),
        ("abc", "", 0.0),
    ],
)
def test_bleu(prediction: str, gold: str, share: float) -> None:
    assert bleu4(prediction, gold) == pytest.approx(100 * share, abs=1e-9)


def test_words() -> None:
    assert words("我爱北京天安门") == ["我", "爱", "北京", "天安门"]
    assert words("SELECT  title\nFROM book") == ["SELECT", "title", "FROM", "book"]


@pytest.mark.parametrize(
    ("prediction", "gold", "one", "two", "longest"),
    [
        # words 我 爱 上海 against 我 爱 北京 天安门: P = 2/3, R = 2/4; pairs P = 1/2, R = 1/3
        ("我爱上海", "我爱北京天安门", 4 / 7, 2 / 5, 4 / 7),
        # the same words in another order: the longest common subsequence is two of three
        ("title book price", "price title book", 1.0, 1 / 2, 2 / 3),
        # SELECT 书名 FROM 图书 against the same and one word more: P = 1, R = 4/5; pairs P = 1, R = 3/4
        ("SELECT 书名 FROM 图书", "SELECT 书名 FROM 图书 LIMIT", 8 / 9, 6 / 7, 8 / 9),
        ("", "我爱北京", 0.0, 0.0, 0.0),
    ],
)
def test_rouge(prediction: str, gold: str, one: float, two: float, longest: float) -> None:
    for task, share in (("rouge-1", one), ("rouge-2", two), ("rouge-l", longest)):
        assert EVALS.load(task)([prediction], [example(gold)]) == [pytest.approx(100 * share)]


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("SELECT 书名;", "select 书名", True),
        ("ＳＥＬＥＣＴ　１", "select 1", True),
        ("图书 的 价格。", "图书的价格", True),
        ("“高”", '"高"', True),
        ("he said: yes!", "He said: yes", True),
        ("a b", "ab", False),  # a space between letters tells words apart
        ("价格 > 20", "价格 > 21", False),
        ("1.5", "15", False),
    ],
)
def test_normalised_match(a: str, b: str, equal: bool) -> None:
    assert (normalise(a) == normalise(b)) is equal
    assert EVALS.load("normalised_match")([a], [example(b)]) == [float(equal)]


def test_a_task_answers_to_its_usual_spellings() -> None:
    assert EVALS.row("bleu").name == "bleu-4"
    assert EVALS.row("rougel").name == "rouge-l"


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_predictions_of_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "predict": "x", "label": "x"},
        {"prompt": "b", "predict": "y", "label": "x"},
        "",
        {"prompt": "c", "predict": "z", "label": ""},
    )
    texts, examples, without = labelled(path)
    assert texts == ["x", "y"] and without == 1
    assert [str(e.origin) for e in examples] == [f"{path}:1", f"{path}:2"]
    assert evaluate(texts, examples, ["exact_match"]) == {"exact_match": [1.0, 0.0]}
    with pytest.raises(ConfigError, match="did you mean"):
        evaluate(texts, examples, ["exact_macht"])


def test_the_mean_and_its_error() -> None:
    # 1, 0, 1, 0: variance 1/3 with n - 1, error sqrt(1/3 / 4)
    assert summary([1, 0, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 12)))
    assert summary([0.25]) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("rows", "said", "where"),
    [
        (['{"predict": "a", "label": "b"}', '{"predict": '], "not JSON", ":2"),
        (["[1]"], "no JSON object", ":1"),
        ([{"label": "b"}], "without 'predict'", ":1"),
        ([{"chosen": 1.0, "rejected": 0.0}], "trimtab rm report", ":1"),
        ([{"predict": 3, "label": "b"}], "'predict' is no text", ":1"),
        ([{"predict": "a", "label": None}], "no prediction has a reference", ""),
        ([""], "empty", ""),
    ],
)
def test_files_that_are_no_predictions(tmp_path: Path, rows: list[object], said: str, where: str) -> None:
    path = write(tmp_path / "p.jsonl", *rows)
    with pytest.raises(DataError, match=said) as caught:
        labelled(path)
    assert f"{path}{where}" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the predictions"):
        labelled(tmp_path / "no.jsonl")
