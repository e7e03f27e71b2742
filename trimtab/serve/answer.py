"""Prompts to answers and answers to text, for every way of asking: chat, streams, predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trimtab.engine.generator import Engine
from trimtab.errors import DataError
from trimtab.types import Completion, Prompt, Sampling

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""


def limits(prompts: Sequence[Prompt], sampling: Sampling, *, max_length: int | None, window: int | None) -> list[int]:
    """Most new tokens of each prompt's answer.

    Args:
        max_length: most tokens of prompt and answer together, in place of `sampling.max_new_tokens`.
        window: most tokens that the model was made for.

    Raises:
        DataError: a prompt leaves no room.
    """
    found = []
    for prompt in prompts:
        length = len(prompt.token_ids)
        room = sampling.max_new_tokens if max_length is None else max_length - length
        if window is not None:
            room = min(room, window - length)
        if room < 1:
            ends = (
                f"max_length is {max_length}" if max_length is not None else f"the model reads at most {window} tokens"
            )
            raise DataError(
                f"a prompt of {length} tokens leaves no room for an answer",
                where=str(prompt.example.origin),
                why=ends,
                remedy="shorten it, or set max_new_tokens in place of max_length"
                if max_length is not None
                else "shorten it",
            )
        found.append(room)
    return found


def answer(
    generator: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    k: int = 1,
    max_length: int | None = None,
    window: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """k completions of every prompt, in order; prompts of one limit are decoded together."""
    rooms = limits(prompts, sampling, max_length=max_length, window=window)
    found: dict[int, list[Completion]] = {}
    for room in sorted(set(rooms)):
        chosen = [i for i, own in enumerate(rooms) if own == room]
        wanted = replace(sampling, max_new_tokens=room)
        completions = generator.generate([prompts[i] for i in chosen], wanted, k=k, progress=progress)
        for place, i in enumerate(chosen):
            found[i] = completions[place * k : (place + 1) * k]
    return [completion for i in range(len(prompts)) for completion in found[i]]


@dataclass(slots=True, kw_only=True)
class Text:
    """The text of one answer, whole or as it grows.

    Attributes:
        decode: text of token ids.
        stop_ids: tokens that end an answer and are no part of its text; empty to show them.
        stop: strings that end an answer; the text ends before the first.
    """

    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def whole(self, ids: Sequence[int]) -> str:
        """The text of all tokens; a character that the last of them leave unfinished is not shown."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        text = self.decode(ids)
        ends = [at for at in (text.find(word) for word in self.stop) if at >= 0]
        return text[: min(ends)] if ends else text.rstrip(BROKEN)

    def push(self, token: int, *, last: bool) -> str:
        """What this token adds to what has been shown.

        Held back until it is certain: bytes that do not make a character yet, and what may become a stop string. All pieces
        joined are `whole` of all tokens.
        """
        self.ids.append(token)
        text = self.whole(self.ids)
        if not last:
            text = text[: len(text) - _may_grow_into(text, self.stop)]
        if not text.startswith(self.shown):  # the decoder has changed its mind about what is shown already
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece


def _may_grow_into(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the stops."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
