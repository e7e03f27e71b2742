"""`trimtab chat` through a pipe, its commands, and Ctrl-C."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from trimtab.config import load
from trimtab.errors import ModelError
from trimtab.serve.chat import ChatModel
from trimtab.serve.terminal import chat

pytestmark = pytest.mark.unit


def talk(
    args: dict[str, Any], lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    chat(load(args))
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str | None]]:
    """What the model was asked, in place of a model's answers: the answer is the number of messages."""
    calls: list[tuple[list[str], str | None]] = []

    def stream(self: ChatModel, messages: Any, system: str | None = None, **generation: Any) -> Iterator[str]:
        calls.append(([message.content for message in messages], system))
        yield "answer "
        if messages[-1].content == "stop me":
            raise KeyboardInterrupt
        yield str(len(messages))

    monkeypatch.setattr(ChatModel, "stream_chat", stream)
    return calls


def test_one_line_in_one_answer_out(
    args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args["do_sample"] = False
    out = talk(args, "哪些镇名\n", monkeypatch, capsys)
    (response,) = ChatModel(args).chat([{"role": "user", "content": "哪些镇名"}])
    assert "\n".join(out).rstrip() == "\n".join(response.response_text.splitlines()).rstrip()


def test_a_conversation_and_its_commands(
    args: dict[str, Any], asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "one\n\ntwo\n/history\n/clear\nthree\n/system be short\nfour\n/histroy\n/exit\nfive\n"
    out = talk(args, lines, monkeypatch, capsys)
    assert asked == [
        (["one"], None),
        (["one", "answer 1", "two"], None),
        (["three"], None),
        (["four"], "be short"),
    ]
    assert out == [
        "answer 1",
        "answer 3",
        "user: one",
        "assistant: answer 1",
        "user: two",
        "assistant: answer 3",
        "answer 1",
        "system: be short",
        "answer 1",
        "no command /histroy; did you mean /history?",
    ]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    args: dict[str, Any], asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = talk(args, "stop me\ngo on\n", monkeypatch, capsys)
    assert out == ["answer  [stopped]", "answer 3"]
    assert asked[1][0] == ["stop me", "answer ", "go on"]


def test_a_question_that_cannot_be_answered_is_forgotten(
    args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args |= {"max_length": 20, "do_sample": False}
    del args["max_new_tokens"]
    out = talk(args, f"{'too long ' * 20}\n/history\n", monkeypatch, capsys)
    assert out[0].startswith("error: a prompt of ")
    assert not any(line.startswith("user:") for line in out)


def test_a_reward_model_is_refused_before_the_first_question(reward_args: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="reward model"):
        chat(load(reward_args))
