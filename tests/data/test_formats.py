"""Rows of each format to examples, and the reasons for dropping one."""

from __future__ import annotations

import pytest

from trimtab.data.dropped import Dropped
from trimtab.data.formats import FORMATS
from trimtab.data.formats.layout import Layout
from trimtab.types import Example, Message, Origin

pytestmark = pytest.mark.unit

ORIGIN = Origin(file="a.json", row=7)


def read(formatting, row, **layout):
    return FORMATS.load(formatting)(row, Layout(**layout), ORIGIN)


def said(messages):
    return [(m.role, m.content) for m in messages]


# ------------------------------------------------------------------------------------------------------------- alpaca


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "db": "x"}
    example = read("alpaca", row)
    assert said(example.prompt) == [("user", "Add\n1 2")]
    assert example.response == Message(role="assistant", content="3")
    assert example.columns == row
    assert example.origin == ORIGIN


@pytest.mark.parametrize(
    "row", [{"instruction": "Add", "input": ""}, {"instruction": "Add"}, {"instruction": "", "input": "Add"}]
)
def test_alpaca_without_input_or_output(row):
    example = read("alpaca", row)
    assert said(example.prompt) == [("user", "Add")]
    assert example.response is None


def test_alpaca_named_columns_keep_other_defaults():
    row = {"问题": "几个?", "output": "3", "系统": "s", "旧": [["q", "a"]], "工具": [{"name": "f"}]}
    columns = {"prompt": "问题", "system": "系统", "history": "旧", "tools": "工具"}
    example = read("alpaca", row, columns=columns)
    assert said(example.prompt) == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "几个?")]
    assert example.response.content == "3"
    assert example.tools == '[{"name": "f"}]'


def test_alpaca_history_system_tools_only_when_named():
    example = read("alpaca", {"instruction": "x", "system": "s", "history": [["q", "a"]], "tools": "t"})
    assert said(example.prompt) == [("user", "x")]
    assert example.tools is None


def test_alpaca_history_as_json_text():
    example = read("alpaca", {"instruction": "x", "h": '[["q", "a"]]'}, columns={"history": "h"})
    assert said(example.prompt) == [("user", "q"), ("assistant", "a"), ("user", "x")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "output": ["good", "bad"]},
    ],
)
def test_alpaca_ranking(row):
    example = read("alpaca", row, ranking=True)
    assert (example.chosen.content, example.rejected.content) == ("good", "bad")
    assert example.response is None


@pytest.mark.parametrize(("tag", "label"), [(True, True), ("false", False), (1, True), ("", None), (None, None)])
def test_alpaca_kto_tag(tag, label):
    example = read("alpaca", {"instruction": "q", "output": "a", "ok": tag}, columns={"kto_tag": "ok"})
    assert example.label is label


@pytest.mark.parametrize(
    ("row", "layout", "reason"),
    [
        ({"instruction": " ", "output": "a"}, {}, "empty prompt"),
        ({"question": "q", "output": "a"}, {}, "empty prompt"),
        ({"instruction": ["q"], "output": "a"}, {}, "prompt is not text"),
        ({"instruction": "q", "output": {"a": 1}}, {}, "response is not text"),
        ({"instruction": "q", "chosen": "a"}, {"ranking": True}, "no rejected answer"),
        ({"instruction": "q", "output": "a", "kto_tag": "maybe"}, {}, "kto_tag is neither true nor false"),
        (
            {"instruction": "q", "h": [["q"]]},
            {"columns": {"history": "h"}},
            "history is not a list of [question, answer]",
        ),
    ],
)
def test_alpaca_dropped(row, layout, reason):
    dropped = read("alpaca", row, **layout)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason
    assert dropped.origin == ORIGIN


def test_alpaca_names_the_missing_column():
    assert "no column 'instruction'; it has question" in str(read("alpaca", {"question": "q"}))


# ------------------------------------------------------------------------------------------------------------ sharegpt


def turns(*pairs):
    return [{"from": role, "value": value} for role, value in pairs]


def test_sharegpt_dialogue():
    row = {"conversations": turns(("system", "s"), ("human", "1"), ("gpt", "2"), ("human", "3"), ("gpt", "4"))}
    example = read("sharegpt", row)
    assert said(example.prompt) == [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3")]
    assert example.response.content == "4"


def test_sharegpt_tool_turns():
    row = {
        "conversations": turns(("human", "1"), ("function_call", "{}"), ("observation", "r"), ("gpt", "4")),
        "t": "[]",
    }
    example = read("sharegpt", row, columns={"tools": "t"})
    assert said(example.prompt) == [("user", "1"), ("function", "{}"), ("observation", "r")]
    assert example.tools == "[]"


def test_sharegpt_own_columns_and_tags_keep_other_defaults():
    row = {"chat": [{"role": "用户", "value": "1"}, {"role": "gpt", "value": "2"}], "sys": "s"}
    example = read(
        "sharegpt",
        row,
        columns={"messages": "chat", "system": "sys"},
        tags={"role_tag": "role", "user_tag": "用户"},
    )
    assert said(example.prompt) == [("system", "s"), ("user", "1")]
    assert example.response.content == "2"


def test_sharegpt_ending_in_a_question_is_a_prompt():
    example = read("sharegpt", {"conversations": turns(("human", "1"))})
    assert isinstance(example, Example)
    assert example.response is None


@pytest.mark.parametrize("length", [1, 3, 5, 7])
def test_sharegpt_ranking(length):
    talk = [("human" if place % 2 == 0 else "gpt", str(place)) for place in range(length)]
    row = {
        "conversations": turns(*talk),
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    example = read("sharegpt", row, ranking=True)
    assert len(example.prompt) == length
    assert (example.chosen.content, example.rejected.content) == ("good", "bad")


@pytest.mark.parametrize(
    ("talk", "layout", "reason"),
    [
        ([("gpt", "1"), ("human", "2")], {}, "speakers out of order"),
        ([("human", "1"), ("human", "2")], {}, "speakers out of order"),
        ([("human", "1"), ("gpt", "2"), ("gpt", "3")], {}, "speakers out of order"),
        ([("human", "1"), ("system", "2")], {}, "speakers out of order"),
        ([("robot", "1")], {}, "unknown role"),
        ([("system", "s")], {}, "no message besides the system message"),
        ([("human", "1"), ("gpt", "2")], {"ranking": True}, "the messages of a preference must end with a question"),
        ([("human", "1")], {"ranking": True}, "no chosen answer"),
        ([], {}, "messages is not a list of messages"),
    ],
)
def test_sharegpt_dropped(talk, layout, reason):
    dropped = read("sharegpt", {"conversations": turns(*talk)}, **layout)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason


def test_sharegpt_chosen_must_be_the_assistants():
    row = {"conversations": turns(("human", "1")), "chosen": turns(("human", "x"))[0], "rejected": "y"}
    assert read("sharegpt", row, ranking=True).reason == "the chosen answer is not the assistant's"


# -------------------------------------------------------------------------------------------------------------- openai


def test_openai_dialogue_with_tools():
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "r1"},
            {"role": "tool", "content": "r2"},
            {"role": "assistant", "content": "4"},
        ]
    }
    example = read("openai", row)
    assert said(example.prompt) == [
        ("system", "s"),
        ("user", "1"),
        ("function", '[{"name": "f", "arguments": "{}"}]'),
        ("observation", "r1\nr2"),
    ]
    assert example.response.content == "4"


def test_openai_ranking_and_label():
    messages = [{"role": "user", "content": "1"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    example = read("openai", {"messages": messages, "chosen": good, "rejected": [bad]}, ranking=True)
    assert (example.chosen.content, example.rejected.content) == ("good", "bad")
    labelled = read("openai", {"messages": [*messages, bad], "label": False}, columns={"kto_tag": "label"})
    assert labelled.label is False
    assert labelled.response.content == "bad"


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(("row", "columns"), [({"text": "abc"}, {}), ({"body": "abc"}, {"prompt": "body"})])
def test_text(row, columns):
    assert read("text", row, columns=columns).text == "abc"


def test_text_dropped():
    assert read("text", {"text": "  "}).reason == "empty text"
    assert "no column 'text'" in read("text", {"body": "x"}).detail
