"""Text of answers: whole characters, stop strings, room for an answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from trimtab.errors import DataError
from trimtab.serve.answer import Text, limits
from trimtab.types import Example, Origin, Prompt, Sampling

pytestmark = pytest.mark.unit


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def stream(text: Text, ids: Sequence[int]) -> list[str]:
    return [text.push(token, last=n == len(ids) - 1) for n, token in enumerate(ids)]


def test_a_character_of_three_bytes_comes_whole() -> None:
    ids = list("查a村".encode())
    assert stream(Text(decode=decode_bytes), ids) == ["", "", "查", "a", "", "", "村"]


def test_an_unfinished_character_at_the_end_is_not_shown() -> None:
    ids = list("a村".encode())[:-1]
    text = Text(decode=decode_bytes)
    assert text.whole(ids) == "a"
    assert "".join(stream(text, ids)) == "a"


def test_the_stop_token_is_no_text_unless_it_is_to_be_shown() -> None:
    assert Text(decode=decode_bytes, stop_ids=(33,)).whole([97, 33]) == "a"
    assert Text(decode=decode_bytes, stop_ids=(33,)).whole([33, 97]) == "!a"
    assert Text(decode=decode_bytes).whole([97, 33]) == "a!"


def test_a_stop_string_ends_the_text_and_its_beginning_is_held_back() -> None:
    pieces = stream(Text(decode=decode_bytes, stop=("END", "XX")), b"aEb ENDc")
    assert pieces == ["a", "", "Eb", " ", "", "", "", ""]
    # a beginning that never became the stop is shown at the end
    assert stream(Text(decode=decode_bytes, stop=("END",)), b"aEN") == ["a", "", "EN"]
    assert Text(decode=decode_bytes, stop=("END", "b")).whole(b"aEb END") == "aE"


def prompt(length: int) -> Prompt:
    return Prompt(index=0, token_ids=(1,) * length, example=Example(origin=Origin(file="f", row=7)))


def test_room_for_an_answer() -> None:
    sampling = Sampling(max_new_tokens=50)
    prompts = [prompt(10), prompt(30)]
    assert limits(prompts, sampling, max_length=None, window=None) == [50, 50]
    assert limits(prompts, sampling, max_length=40, window=None) == [30, 10]
    assert limits(prompts, sampling, max_length=None, window=64) == [50, 34]
    with pytest.raises(DataError, match="30 tokens leaves no room") as caught:
        limits(prompts, sampling, max_length=30, window=None)
    assert "max_length is 30" in str(caught.value)
    assert "f:7" in str(caught.value)
