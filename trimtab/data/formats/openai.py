"""The openai format: `messages`, a list of {role: system | user | assistant | tool, content, tool_calls}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimtab.data.dropped import Dropped
from trimtab.data.formats.dialogue import read_dialogue, tagged_message
from trimtab.data.formats.layout import Layout
from trimtab.types import Example, Message, Origin

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


def read(row: Mapping[str, Any], layout: Layout, origin: Origin) -> Example | Dropped:
    """One row as an example, or why not."""
    return read_dialogue(
        row, layout, origin, column="messages", tags=TAGS, read_message=_message, merge_observations=True
    )


def _message(item: Mapping[str, Any], tags: Mapping[str, str]) -> Message:
    calls = item.get("tool_calls")
    if calls and item.get(tags["role_tag"]) == tags["assistant_tag"]:
        # An answer that calls tools carries its text in the calls; `content` is null there.
        functions = [call.get("function", call) for call in calls]
        return Message(role="function", content=json.dumps(functions, ensure_ascii=False))
    return tagged_message(item, tags)
