"""Qwen 1.5 to 2.5: ChatML with a system message of its own; tool results come back in a user turn."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.templates.tools import tool_format
from trimtab.data.tokenizer import Tokenizer

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
END = "<|im_end|>"
START = "<|im_start|>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    special_id(tokenizer, START, "qwen")
    return SlotTemplate(
        name="qwen",
        stop_ids=(special_id(tokenizer, END, "qwen"),),
        default_system=SYSTEM if default_system is None else default_system,
        slots={
            "system": (f"{START}system\n", f"{END}\n"),
            "user": (f"{START}user\n", f"{END}\n"),
            "observation": (f"{START}user\n<tool_response>\n", f"\n</tool_response>{END}\n"),
        },
        header=f"{START}assistant\n",
        end_marker=END,
        after_end="\n",
        tools=tool_format("qwen"),
    )
