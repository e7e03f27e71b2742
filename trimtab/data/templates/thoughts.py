"""Thoughts: what a reasoning model writes between `<think>` and `</think>` before it answers.

The rule of Qwen3's own template: an answer before the last question loses its thought; one after it (there are several
where tools are called) keeps it; the last answer always has one, an empty one where it has none. With `enable_thinking:
false` the empty thought stands in the prompt and the model never writes one.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
EMPTY = f"{OPEN}\n\n{CLOSE}\n\n"


def without(text: str) -> str:
    """An answer without its thought."""
    return text.rpartition(CLOSE)[2].lstrip("\n") if CLOSE in text else text


def kept(text: str) -> str:
    """An answer with its thought in the usual shape; unchanged where it has none."""
    if CLOSE not in text:
        return text
    thought = text.split(CLOSE)[0].rstrip("\n").split(OPEN)[-1].lstrip("\n")
    return f"{OPEN}\n{thought.strip(chr(10))}\n{CLOSE}\n\n{without(text)}"


def of_answer(text: str, enable_thinking: bool) -> str:
    """The last answer: with its thought or an empty one, or, not thinking, without any (the prompt holds the empty one)."""
    if not enable_thinking:
        return without(text)
    if CLOSE in text:
        return kept(text)
    return text if OPEN in text else EMPTY + text
