"""The alpaca format: `instruction`, `input`, `output`; optional history, system, tools; chosen and rejected; kto_tag.

A ranking (`ranked`, from best to worst), a `margin` and a `score` are read from columns that the entry names.

The prompt is the instruction, a newline and the input; without an input, the instruction alone. `history` is a list of
[question, answer] pairs. History, system and tools are read only from columns that the entry names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.data.dropped import Dropped
from trimtab.data.formats.layout import (
    Layout,
    UnusableCell,
    as_flag,
    as_json,
    as_number,
    as_ranked,
    as_text,
    as_tools,
    system_message,
)
from trimtab.types import Example, Message, Origin


def read(row: Mapping[str, Any], layout: Layout, origin: Origin) -> Example | Dropped:
    """One row as an example, or why not."""
    try:
        return _read(row, layout, origin)
    except UnusableCell as error:
        return Dropped(origin=origin, reason=error.reason, detail=error.detail)


def _read(row: Mapping[str, Any], layout: Layout, origin: Origin) -> Example:
    instruction = as_text(layout.cell(row, "prompt", "instruction"), "prompt")
    query = as_text(layout.cell(row, "query", "input"), "query")
    question = "\n".join(part for part in (instruction, query) if part)
    if not question.strip():
        wanted = layout.columns.get("prompt", "instruction")
        raise UnusableCell("empty prompt", "" if wanted in row else f"no column {wanted!r}; it has {', '.join(row)}")
    prompt = (
        *system_message(as_text(layout.cell(row, "system"), "system")),
        *_history(layout.cell(row, "history")),
        Message(role="user", content=question),
    )
    tools = as_tools(layout.cell(row, "tools"))
    output = layout.cell(row, "response", "output")
    if layout.ranking and "ranked" in layout.columns:
        ranked = tuple(_answer(cell, "ranked") for cell in as_ranked(layout.cell(row, "ranked")))
        return Example(
            origin=origin,
            prompt=prompt,
            ranked=ranked,
            chosen=ranked[0],
            rejected=ranked[-1],
            tools=tools,
            columns=row,
        )
    if layout.ranking:
        chosen, rejected = layout.cell(row, "chosen", "chosen"), layout.cell(row, "rejected", "rejected")
        if chosen is None and rejected is None and isinstance(output, list) and len(output) == 2:
            chosen, rejected = output  # the older way to write a preference: output: [chosen, rejected]
        return Example(
            origin=origin,
            prompt=prompt,
            chosen=_answer(chosen, "chosen"),
            rejected=_answer(rejected, "rejected"),
            margin=as_number(layout.cell(row, "margin"), "margin") or 0.0,
            tools=tools,
            columns=row,
        )
    return Example(
        origin=origin,
        prompt=prompt,
        response=None if output is None else Message(role="assistant", content=as_text(output, "response")),
        label=as_flag(layout.cell(row, "kto_tag", "kto_tag"), "kto_tag"),
        score=as_number(layout.cell(row, "score"), "score"),
        tools=tools,
        columns=row,
    )


def _answer(value: Any, column: str) -> Message:
    if value is None:
        raise UnusableCell(f"no {column} answer")
    return Message(role="assistant", content=as_text(value, column))


def _history(value: Any) -> list[Message]:
    if value is None or value == "":
        return []
    turns = as_json(value, "history")
    messages: list[Message] = []
    if not isinstance(turns, list):
        raise UnusableCell("history is not a list of [question, answer]", f"it is a {type(turns).__name__}")
    for turn in turns:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UnusableCell("history is not a list of [question, answer]", f"it holds {str(turn)[:60]}")
        messages.append(Message(role="user", content=as_text(turn[0], "history")))
        messages.append(Message(role="assistant", content=as_text(turn[1], "history")))
    return messages
