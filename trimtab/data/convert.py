"""`trimtab data convert`: the rows of one format as rows of another, with preferences, rankings, scores and unknown columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.data import source
from trimtab.data.dropped import Dropped
from trimtab.data.formats import openai, sharegpt
from trimtab.data.formats.dialogue import ANSWERING
from trimtab.data.info import DatasetSpec
from trimtab.types import Example, Message, Role

TARGETS = ("alpaca", "sharegpt", "openai")
DEFAULTS = {  # the columns that each format reads when an entry names none
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output",
        "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag",
    },
    "sharegpt": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"},
    "openai": {"messages": "messages", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"},
    "text": {"text": "text"},
}  # fmt: skip

NAMED = ("system", "history", "tools", "ranked", "margin", "score")
"""Columns that no format reads unless the entry names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """Rows in the new format, rows that it cannot hold, and the `dataset_info.json` entry that reads them."""

    rows: tuple[dict[str, Any], ...]
    dropped: tuple[Dropped, ...]
    entry: Mapping[str, Any]


def convert(spec: DatasetSpec, target: str) -> Converted:
    """Every row in the format `target`; columns that mean nothing to the source's format are carried along."""
    found: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
    dropped: list[Dropped] = []
    for origin, value in source.rows(spec):
        example = source.example(value, origin, spec)
        written = example if isinstance(example, Dropped) else _written(example, target)
        if isinstance(written, Dropped):
            dropped.append(written)
            continue
        found.append((written, value))
    # What the rows mean is told by the columns written here alone: a column that is carried along under one of their
    # names would be read as theirs, so it stays behind.
    named = {name for written, _ in found for name in written}
    left_out = _read(spec) | named
    rows = [written | {k: v for k, v in value.items() if k not in left_out} for written, value in found]
    columns = DEFAULTS[target] | {name: name for name in NAMED}
    entry: dict[str, Any] = {"formatting": target}
    if {"chosen", "rejected"} <= named or "ranked" in named:
        entry["ranking"] = True
    entry["columns"] = {meaning: name for meaning, name in columns.items() if name in named}
    return Converted(rows=tuple(rows), dropped=tuple(dropped), entry=entry)


def _read(spec: DatasetSpec) -> set[str]:
    """The columns that the source's format reads."""
    named = {**DEFAULTS.get(spec.formatting, {}), **spec.layout.columns}
    return set(named.values())


def _written(example: Example, target: str) -> dict[str, Any] | Dropped:
    if example.text is not None:
        return Dropped(origin=example.origin, reason="plain text", detail=f"{target} holds questions and answers")
    if target == "alpaca":
        return alpaca_row(example)
    tags = sharegpt.TAGS if target == "sharegpt" else openai.TAGS
    names: dict[Role, str] = {
        "user": tags["user_tag"],
        "assistant": tags["assistant_tag"],
        "observation": tags["observation_tag"],
        "function": tags["function_tag"],
        "system": tags["system_tag"],
    }

    def message(one: Message) -> dict[str, Any]:
        if target == "openai" and one.role == "function":
            return _calls(one)
        return {tags["role_tag"]: names[one.role], tags["content_tag"]: one.content}

    listed = [*example.prompt, *(() if example.response is None else (example.response,))]
    row: dict[str, Any] = {}
    if target == "sharegpt" and listed and listed[0].role == "system":
        row["system"] = listed.pop(0).content
    row = {DEFAULTS[target]["messages"]: [message(one) for one in listed], **row}
    return row | _preference(example, message) | _extras(example)


def _calls(one: Message) -> dict[str, Any]:
    """An answer that calls tools, as OpenAI writes it; what is not JSON stays in its own role."""
    try:
        calls = json.loads(one.content)
    except json.JSONDecodeError:
        return {"role": openai.TAGS["function_tag"], "content": one.content}
    listed = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": c} for c in listed]}


def alpaca_row(example: Example) -> dict[str, Any] | Dropped:
    """One example in the alpaca format, or why it has no place there."""
    listed = list(example.prompt)
    row: dict[str, Any] = {}
    system = listed.pop(0).content if listed and listed[0].role == "system" else None
    every = [
        *listed,
        *(a for a in (example.response, example.chosen, example.rejected) if a is not None),
        *example.ranked,
    ]
    odd = next((one.role for one in every if one.role not in ("user", "assistant")), None)
    if odd is not None or not listed:
        return Dropped(
            origin=example.origin, reason=f"a {odd} turn" if odd else "no question", detail="alpaca has no place for it"
        )
    *earlier, last = listed
    row = {"instruction": last.content, "input": ""}
    if example.response is not None:
        row["output"] = example.response.content
    row |= _preference(example, lambda answer: answer.content)
    if system is not None:
        row["system"] = system
    if earlier:
        row["history"] = [[earlier[i].content, earlier[i + 1].content] for i in range(0, len(earlier) - 1, 2)]
    assert all(one.role in ANSWERING for one in earlier[1::2])
    return row | _extras(example)


def _preference(example: Example, answer: Callable[[Message], Any]) -> dict[str, Any]:
    """The answers of a ranking or of a pair, each written by `answer`; a pair's margin where it has one."""
    if example.ranked:  # its first and last are chosen and rejected
        return {"ranked": [answer(one) for one in example.ranked]}
    if example.chosen is None or example.rejected is None:
        return {}
    row = {"chosen": answer(example.chosen), "rejected": answer(example.rejected)}
    return row | ({"margin": example.margin} if example.margin else {})


def _extras(example: Example) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if example.tools is not None:
        found["tools"] = example.tools
    if example.label is not None:
        found["kto_tag"] = example.label
    if example.score is not None:
        found["score"] = example.score
    return found
