"""Python functions as rewards: what they are given, what they may give back, and every way in which one goes wrong."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import RewardError
from trimtab.rewards import Answer
from trimtab.rewards.function import FunctionReward, Worker
from trimtab.rewards.length import LengthPenalty, length_penalty
from trimtab.rewards.lookup import function_files, load_functions
from trimtab.rewards.mixture import Mixture
from trimtab.types import Completion, Example, Message, Origin, Prompt, TokenRow

pytestmark = pytest.mark.unit

ROWS: list[dict[str, Any]] = [{"question": "1 + 1", "output": "2"}, {"question": "2 + 2", "output": "4", "level": 3}]


def answer(number: int, text: str, *, tokens: int = 3) -> Answer:
    row = ROWS[number]
    example = Example(
        origin=Origin(file="sums.json", row=number + 1),
        prompt=(Message(role="system", content="Add."), Message(role="user", content=row["question"])),
        response=Message(role="assistant", content=row["output"]),
        columns=row,
    )
    completion = Completion(
        prompt_index=number, sample_index=0, token_ids=(9,) * tokens, logprobs=(0.0,) * tokens, finish="stop"
    )
    prompt = Prompt(index=number, token_ids=(1, 2), example=example)
    return Answer(prompt=prompt, completion=completion, row=TokenRow(token_ids=(1, 2, 9), scored=(2,)), text=text)


ANSWERS = [answer(0, "2"), answer(1, "5")]


def reward(function: Callable[..., Any], *, timeout: float = 20.0, name: str = "f") -> FunctionReward:
    return FunctionReward(function, name=name, worker=Worker(), timeout=timeout, where="c.yaml:3: reward_funcs")


def score(function: Callable[..., Any], answers: Sequence[Answer] = ANSWERS, **keys: Any) -> list[float]:
    return reward(function, **keys).score(answers)


def seen_by(function_of: Callable[[list[dict[str, Any]]], Callable[..., Any]]) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    score(function_of(seen))
    return seen


# ------------------------------------------------------------------------------------------------------ what it is given


def test_a_single_function_is_given_what_it_names() -> None:
    def of(seen: list[dict[str, Any]]) -> Callable[..., float]:
        def f(prompt: str, completion: str, messages: Any, output: str, gold: str, level: int = 7) -> float:
            seen.append({"prompt": prompt, "completion": completion, "messages": messages, "output": output})
            return level + (gold == output)

        return f

    first, second = seen_by(of)
    assert first == {
        "prompt": "1 + 1",
        "completion": "2",
        "messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}],
        "output": "2",
    }
    assert (second["prompt"], second["completion"], second["output"]) == ("2 + 2", "5", "4")
    assert score(of([])) == [8.0, 4.0]  # the second row has a level, the first falls back on the default


def test_kwargs_take_every_column() -> None:
    def of(seen: list[dict[str, Any]]) -> Callable[..., float]:
        return lambda completion, **more: seen.append(more) or 0.0

    first, second = seen_by(of)
    assert set(first) == {"prompt", "messages", "gold", "data_folder", "question", "output"}
    assert set(second) == {*first, "level"} and second["level"] == 3


def test_a_batched_function_is_given_lists() -> None:
    def of(seen: list[dict[str, Any]]) -> Callable[..., list[float]]:
        def f(prompts: list[str], completions: list[str], messages: Any, level: Any, **more: Any) -> list[float]:
            seen.append({"prompts": prompts, "completions": completions, "level": level, **more})
            return [float(len(m)) for m in messages]

        return f

    assert not reward(lambda completion: 0.0).batched
    one = reward(of([]))
    assert one.batched
    with pytest.raises(RewardError, match="asks for 'level'"):  # the first row has none, and there is no default
        one.score(ANSWERS)

    def g(completions: list[str], level: Any = None, **more: Any) -> list[float]:
        assert level == [None, 3] and more["gold"] == ["2", "4"] and more["question"] == ["1 + 1", "2 + 2"]
        return [1.5, -2.0]

    assert score(g) == [1.5, -2.0]


def test_a_column_that_is_named_as_ours_is_not_passed() -> None:
    row = {**ROWS[0], "prompt": "other", "completions": "third"}
    mine = answer(0, "2")
    mine = Answer(
        prompt=Prompt(
            index=0,
            token_ids=(1,),
            example=Example(origin=Origin(file="x", row=1), prompt=mine.prompt.example.prompt, columns=row),
        ),
        completion=mine.completion,
        row=mine.row,
        text=mine.text,
    )
    assert score(lambda prompt, gold: prompt == "1 + 1" and gold is None, [mine]) == [1.0]
    assert score(lambda prompts, completions: [completions == ["2"]], [mine]) == [1.0]


def test_async_single_functions_of_a_batch_run_at_the_same_time() -> None:
    running, most = [0], [0]

    async def f(completion: str, output: str) -> float:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.01)
        running[0] -= 1
        return float(completion == output)

    assert score(f) == [1.0, 0.0]
    assert most[0] == 2

    async def batched(completions: list[str]) -> list[int]:
        await asyncio.sleep(0)
        return [1, 2]

    assert score(batched) == [1.0, 2.0]


class Counter:
    """An object with state, as a program may give."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, completion: str) -> int:
        self.count += 1
        return self.count


def test_objects_partials_and_positional_parameters() -> None:
    assert score(Counter()) == [1.0, 2.0]
    assert score(partial(lambda completion, by: len(completion) * by, by=3)) == [3.0, 3.0]

    def f(completion: str, output: str, /) -> bool:
        return completion == output

    assert score(f) == [1.0, 0.0]


def test_a_function_is_loaded_and_called_in_one_thread(tmp_path: Path) -> None:
    """What a file opens when it is loaded (here a connection that belongs to its thread) works in its functions."""
    file = tmp_path / "db.py"
    file.write_text(
        "import sqlite3, threading\nhome = threading.get_ident()\ndb = sqlite3.connect(':memory:')\n"
        "def f(completion):\n    return db.execute('select 1').fetchone()[0] + (threading.get_ident() != home)\n"
        "async def g(completion):\n    return f(completion)\n",
        encoding="utf-8",
    )
    f, g = load_functions([f"{file}:f", f"{file}:g"], timeout=10)
    assert f.score(ANSWERS) == g.score(ANSWERS) == [1.0, 1.0]


def test_the_thread_ends_with_its_functions() -> None:
    before = set(threading.enumerate())  # with the threads of other tests that have not ended yet
    one = reward(lambda completion: 1.0)
    one.score(ANSWERS)
    (thread,) = (t for t in threading.enumerate() if t not in before and t.name == "trimtab rewards")
    del one
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


# ------------------------------------------------------------------------------------------------------ what it gives back


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.int64(1), torch.tensor(1.0), np.array(1.0)])
def test_every_kind_of_number_is_a_score(value: Any) -> None:
    assert score(lambda completion: value) == [1.0, 1.0]


@pytest.mark.parametrize("values", [[1, 2.5], (1.0, 2.5), np.array([1.0, 2.5]), torch.tensor([1.0, 2.5])])
def test_every_kind_of_list_is_a_batch_of_scores(values: Any) -> None:
    assert score(lambda completions: values) == [1.0, 2.5]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None (NoneType)"),
        ("1.0", "'1.0' (str)"),
        (float("nan"), "nan (float)"),
        (float("inf"), "inf (float)"),
        ([1.0], "[1.0] (list)"),
        (1j, "1j (complex)"),
    ],
)
def test_what_is_no_score_names_row_and_function(value: Any, words: str) -> None:
    def f(completion: str) -> Any:
        return 1.0 if completion == "2" else value

    with pytest.raises(RewardError) as caught:
        score(f)
    assert words in caught.value.what
    assert "sums.json:2" in caught.value.where and "sums.json:1" not in caught.value.where
    assert f"{__file__}:{f.__code__.co_firstlineno}" in caught.value.where


def test_a_hint_where_a_list_is_given_for_one_answer() -> None:
    with pytest.raises(RewardError, match="completions"):
        score(lambda completion: [1.0, 2.0])
    with pytest.raises(RewardError, match="without a return statement"):
        score(lambda completion: None)


@pytest.mark.parametrize(
    ("values", "words"), [([1.0], "1 numbers for 2 answers"), (3.0, "gives 3.0 (float)"), (None, "None")]
)
def test_a_wrong_number_of_scores(values: Any, words: str) -> None:
    with pytest.raises(RewardError) as caught:
        score(lambda completions: values)
    assert words in caught.value.what
    assert "sums.json:1 ... sums.json:2 (2 answers)" in caught.value.where


def test_one_bad_score_of_a_batch_names_its_row() -> None:
    with pytest.raises(RewardError) as caught:
        score(lambda completions: [1.0, float("nan")])
    assert "for sums.json:2" in caught.value.where


# ---------------------------------------------------------------------------------------------------------- what goes wrong


def failing(completion: str) -> float:
    if completion == "5":
        raise ValueError("five is right out")  # the line that errors name
    return 1.0


def test_an_exception_names_the_row_and_the_line() -> None:
    with pytest.raises(RewardError) as caught:
        score(failing, name="failing")
    error = caught.value
    assert error.what == "the reward function 'failing' raises ValueError: five is right out"
    assert error.where == f"{__file__}:{failing.__code__.co_firstlineno + 2}, for sums.json:2"
    assert "five is right out" in error.why
    assert "--resume" in error.remedy
    assert isinstance(error.__cause__, ValueError)


def test_an_exception_deep_in_a_library_names_the_users_line() -> None:
    def f(completion: str) -> float:
        import json

        return float(json.loads("{"))

    with pytest.raises(RewardError, match="JSONDecodeError") as caught:
        score(f)
    assert caught.value.where.startswith(f"{__file__}:{f.__code__.co_firstlineno + 3},")


def test_exceptions_of_async_functions_name_their_row() -> None:
    async def f(completion: str) -> float:
        await asyncio.sleep(0.001)
        return failing(completion)

    with pytest.raises(RewardError, match="five is right out") as caught:
        score(f)
    assert caught.value.where.endswith("for sums.json:2")


def test_sys_exit_is_a_failure_like_any_other() -> None:
    with pytest.raises(RewardError, match="SystemExit"):
        score(lambda completion: exit())


def test_a_slow_function_stops_the_run() -> None:
    begun = threading.Event()
    end = threading.Event()

    def f(completion: str) -> float:
        if completion == "2":
            return 1.0
        begun.set()
        end.wait(20)
        return 1.0

    slow = reward(f, timeout=0.05)
    with pytest.raises(RewardError, match=r"not done after 0.05 s \(reward_timeout\)") as caught:
        slow.score(ANSWERS)
    end.set()
    assert begun.is_set()
    assert caught.value.where.endswith("for sums.json:2")
    assert slow.score(ANSWERS[:1]) == [1.0]  # a new thread serves what comes after


def test_a_slow_async_function_names_the_row_that_is_late() -> None:
    async def f(completion: str) -> float:
        await asyncio.sleep(0 if completion == "2" else 30)
        return 1.0

    with pytest.raises(RewardError, match="not done after") as caught:
        score(f, timeout=0.05)
    assert caught.value.where.endswith("for sums.json:2")


def test_a_timeout_error_of_the_functions_own_is_not_ours() -> None:
    def f(completion: str) -> float:
        raise TimeoutError("the server sleeps")

    with pytest.raises(RewardError, match="raises TimeoutError: the server sleeps"):
        score(f)


def test_a_column_that_does_not_exist() -> None:
    def f(completion: str, levle: int) -> float:
        return 1.0

    with pytest.raises(RewardError, match="asks for 'levle'") as caught:
        reward(f).check([a.prompt.example for a in ANSWERS])
    assert "sums.json:1" in caught.value.where and f"{__file__}:" in caught.value.where
    assert "question, output" in caught.value.why
    with pytest.raises(RewardError, match="cannot be read"):
        reward(type)


# ------------------------------------------------------------------------------------------------------ where it comes from


def test_files_modules_and_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_rewards.py").write_text("WORTH = 2.0\n", encoding="utf-8")
    file = tmp_path / "rewards.py"
    file.write_text(
        "from helper_of_rewards import WORTH\ndef right(completion):\n    return WORTH\ndef other(completion): return 3\n",
        encoding="utf-8",
    )
    found = load_functions([f"{file}:right", f"{file}:other", Counter(), failing, "math:fsum"], timeout=1)
    assert [f.name for f in found] == ["right", "other", "Counter", "failing", "fsum"]
    assert [f.score(ANSWERS[:1]) for f in found[:4]] == [[2.0], [3.0], [1.0], [1.0]]
    monkeypatch.chdir(tmp_path)
    (again,) = load_functions(["rewards.py:right"], timeout=1)
    assert again.place.endswith("rewards.py:2")
    file.write_text("def right(completion):\n    return 9\n", encoding="utf-8")
    (changed,) = load_functions(["rewards.py:right"], timeout=1)
    assert changed.score(ANSWERS[:1]) == [9.0]  # a file that has changed is read anew
    (digest,) = function_files(["rewards.py:right", "math:fsum", "rewards.py:right"]).values()
    assert len(digest) == 64


def test_names_that_are_taken_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def right(completion): return 1\ndef model(completion): return 1\n")
    entries = [f"{tmp_path / 'a.py'}:right", f"{tmp_path / 'b.py'}:right", f"{tmp_path / 'a.py'}:model"]
    found = load_functions([*entries, entries[0]], timeout=1)
    assert [f.name for f in found] == ["right", "b.right", "a.model", "a.right"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("nowhere.py:f", ("no file 'nowhere.py'", "working directory", "correct the path")),
        ("rewards.py:rigth", ("no function 'rigth'", "did you mean 'right'?", "its functions are right")),
        ("rewards.py:NUMBER", ("'NUMBER' in", "is not a function", "it is 3 (int)")),
        ("rewards.py", ("names a file, and no function", "rewards.py:right")),
        ("no_such_module:f", ("no module 'no_such_module'", "write its path")),
        ("no_such_package.part:f", ("no module 'no_such_package.part'",)),
        ("sql_exection", ("no ready-made reward function 'sql_exection'",)),
        ("broken.py:f", ("cannot be loaded: SyntaxError", "broken.py:2", "def f(:")),
        ("raising.py:f", ("cannot be loaded: ZeroDivisionError: division by zero", "raising.py:1", "1 / 0")),
        ("importing.py:f", ("cannot be loaded: ModuleNotFoundError", "importing.py:2", "import no_such_thing")),
    ],
)
def test_what_cannot_be_found_or_loaded(
    entry: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards.py").write_text("NUMBER = 3\ndef right(completion): return 1\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n", encoding="utf-8")
    (tmp_path / "raising.py").write_text("x = 1 / 0\n", encoding="utf-8")
    (tmp_path / "importing.py").write_text("x = 1\nimport no_such_thing\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError) as caught:
        load_functions([entry], timeout=1, where="c.yaml:3: reward_funcs")
    for word in words:
        assert word in str(caught.value)
    assert "c.yaml:3: reward_funcs" in caught.value.where


# ------------------------------------------------------------------------------------------------------ sums, price of length


def test_a_mixture_by_hand() -> None:
    mixture = Mixture(
        [
            (2.0, reward(lambda completion: len(completion), name="a")),
            (-0.5, reward(lambda completion, output: completion == output, name="b")),
            (1.0, LengthPenalty(coef=0.1, free=1)),
        ]
    )
    judged = mixture.judge([answer(0, "2", tokens=1), answer(1, "555", tokens=4)])
    assert judged.parts["a"] == [1.0, 3.0] and judged.parts["b"] == [1.0, 0.0]
    assert judged.parts["length"] == [0.0, pytest.approx(-0.3)]
    assert judged.scores == [pytest.approx(2 - 0.5), pytest.approx(6 - 0.3)]


def test_the_price_of_length_by_hand() -> None:
    assert length_penalty(7, 0.25) == -1.75
    assert length_penalty(7, 0.25, 5) == -0.5
    assert length_penalty(5, 0.25, 5) == 0.0
    assert length_penalty(3, 0.25, 5) == 0.0
