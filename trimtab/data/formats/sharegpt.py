"""The sharegpt format: `conversations`, a list of {from: human | gpt | observation | function_call | system, value}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.data.dropped import Dropped
from trimtab.data.formats.dialogue import read_dialogue, tagged_message
from trimtab.data.formats.layout import Layout
from trimtab.types import Example, Origin

TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def read(row: Mapping[str, Any], layout: Layout, origin: Origin) -> Example | Dropped:
    """One row as an example, or why not."""
    return read_dialogue(row, layout, origin, column="conversations", tags=TAGS, read_message=tagged_message)
