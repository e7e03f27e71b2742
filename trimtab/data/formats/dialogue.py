"""What the two message-list formats share: tags to roles, the order of speakers, and the answers of a preference.

After an optional system message, odd places hold the user or an observation and even places the assistant or a function
call. A list that ends with an answer is (prompt, response); one that ends with a question is a prompt without one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
from trimtab.types import Example, Message, Origin, Role

ASKING: tuple[Role, ...] = ("user", "observation")
ANSWERING: tuple[Role, ...] = ("assistant", "function")

ReadMessage = Callable[[Mapping[str, Any], Mapping[str, str]], Message]


def read_dialogue(
    row: Mapping[str, Any],
    layout: Layout,
    origin: Origin,
    *,
    column: str,
    tags: Mapping[str, str],
    read_message: ReadMessage,
    merge_observations: bool = False,
) -> Example | Dropped:
    """One row of a message-list format.

    Args:
        column: the default name of the messages column.
        tags: the format's tags, the entry's own laid over them.
        read_message: one message object and the tags to a `Message`.
        merge_observations: neighbouring observations are one (several tool results in a row).
    """
    tags = {**tags, **layout.tags}
    name = layout.columns.get("messages", column)
    try:
        if name not in row:
            raise UnusableCell("no messages", f"no column {name!r}; it has {', '.join(row)}")
        listed = as_json(row[name], "messages")
        if not isinstance(listed, Sequence) or not listed:
            raise UnusableCell("messages is not a list of messages", f"it is {str(listed)[:60]}")
        messages = [_message(item, tags, read_message) for item in listed]
        if merge_observations:
            messages = _merge(messages)
        system = system_message(as_text(layout.cell(row, "system"), "system"))
        if messages[0].role == "system":
            system = (messages[0],)
            messages = messages[1:]
        check_order(messages)
        tools = as_tools(layout.cell(row, "tools"))
        if layout.ranking:
            if messages[-1].role in ANSWERING:
                raise UnusableCell(
                    "the messages of a preference must end with a question", f"the last is {messages[-1].role}"
                )
            if "ranked" in layout.columns:
                ranked = tuple(
                    _answer(cell, "ranked", tags, read_message) for cell in as_ranked(layout.cell(row, "ranked"))
                )
                return Example(
                    origin=origin,
                    prompt=(*system, *messages),
                    ranked=ranked,
                    chosen=ranked[0],
                    rejected=ranked[-1],
                    tools=tools,
                    columns=row,
                )
            return Example(
                origin=origin,
                prompt=(*system, *messages),
                chosen=_answer(layout.cell(row, "chosen", "chosen"), "chosen", tags, read_message),
                rejected=_answer(layout.cell(row, "rejected", "rejected"), "rejected", tags, read_message),
                margin=as_number(layout.cell(row, "margin"), "margin") or 0.0,
                tools=tools,
                columns=row,
            )
        response = messages.pop() if messages[-1].role in ANSWERING else None
        return Example(
            origin=origin,
            prompt=(*system, *messages),
            response=response,
            label=as_flag(layout.cell(row, "kto_tag", "kto_tag"), "kto_tag"),
            score=as_number(layout.cell(row, "score"), "score"),
            tools=tools,
            columns=row,
        )
    except UnusableCell as error:
        return Dropped(origin=origin, reason=error.reason, detail=error.detail)


def roles(tags: Mapping[str, str]) -> dict[str, Role]:
    """What each tag of a message means."""
    return {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "observation",
        tags["function_tag"]: "function",
        tags["system_tag"]: "system",
    }


def tagged_message(item: Mapping[str, Any], tags: Mapping[str, str]) -> Message:
    """A message object with a role tag and a content tag."""
    tag = item.get(tags["role_tag"])
    role = roles(tags).get(str(tag))
    if role is None:
        known = ", ".join(roles(tags))
        raise UnusableCell("unknown role", f"{tags['role_tag']!r} is {tag!r}, known are {known}")
    if tags["content_tag"] not in item:
        raise UnusableCell("a message without content", f"no {tags['content_tag']!r} in {str(item)[:60]}")
    return Message(role=role, content=as_text(item[tags["content_tag"]], "content"))


def check_order(messages: Sequence[Message]) -> None:
    """Odd places ask, even places answer (places counted from 1, the system message not among them)."""
    if not messages:
        raise UnusableCell("no message besides the system message")
    for place, message in enumerate(messages, 1):
        allowed = ASKING if place % 2 else ANSWERING
        if message.role not in allowed:
            raise UnusableCell(
                "speakers out of order", f"message {place} is {message.role}, it should be {' or '.join(allowed)}"
            )
    if not any(message.content.strip() for message in messages if message.role in ASKING):
        raise UnusableCell("empty prompt")


def _message(item: Any, tags: Mapping[str, str], read_message: ReadMessage) -> Message:
    if not isinstance(item, Mapping):
        raise UnusableCell("a message is not an object", str(item)[:60])
    return read_message(item, tags)


def _merge(messages: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        if message.role == "observation" and merged and merged[-1].role == "observation":
            message = Message(role="observation", content=f"{merged.pop().content}\n{message.content}")
        merged.append(message)
    return merged


def _message_text(text: str, tags: Mapping[str, str]) -> Any:
    """The message (or list of one) that a text is the JSON of; None for any other text."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    # An answer may be JSON of its own: only a known speaker and what it says make a message.
    if not isinstance(one, dict) or str(one.get(tags["role_tag"])) not in roles(tags):
        return None
    return value if tags["content_tag"] in one or "tool_calls" in one else None


def _answer(value: Any, column: str, tags: Mapping[str, str], read_message: ReadMessage) -> Message:
    """The chosen or rejected answer: a message object; a plain string and a list of one message are taken too.

    A string that is the JSON of a message is that message, as in a csv cell; any other JSON is an answer in itself.
    """
    if value is None:
        raise UnusableCell(f"no {column} answer")
    if isinstance(value, str):
        decoded = _message_text(value, tags)
        if decoded is None:
            return Message(role="assistant", content=value)
        value = decoded
    if isinstance(value, Sequence) and len(value) == 1:
        value = value[0]
    message = _message(value, tags, read_message)
    if message.role not in ANSWERING:
        raise UnusableCell(f"the {column} answer is not the assistant's", f"its role is {message.role}")
    return message
