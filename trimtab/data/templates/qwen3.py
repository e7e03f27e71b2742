"""Qwen 3: ChatML without a system message, and thoughts before answers; `qwen3_nothink` for the models without them."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.templates.tools import tool_format
from trimtab.data.tokenizer import Tokenizer

END = "<|im_end|>"
START = "<|im_start|>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template of the models that think, or may (Qwen3-8B); `enable_thinking: false` puts an empty thought in the prompt."""
    return _template("qwen3", tokenizer, default_system, thinks=True, enable_thinking=enable_thinking)


def build_nothink(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template of the models that never think (Qwen3-4B-Instruct-2507); `enable_thinking` says nothing to it."""
    return _template("qwen3_nothink", tokenizer, default_system, thinks=False, enable_thinking=True)


def _template(
    name: str, tokenizer: Tokenizer, default_system: str | None, *, thinks: bool, enable_thinking: bool
) -> SlotTemplate:
    special_id(tokenizer, START, name)
    return SlotTemplate(
        name=name,
        stop_ids=(special_id(tokenizer, END, name),),
        default_system=default_system or "",
        slots={
            "system": (f"{START}system\n", f"{END}\n"),
            "user": (f"{START}user\n", f"{END}\n"),
            "observation": (f"{START}user\n<tool_response>\n", f"\n</tool_response>{END}\n"),
        },
        header=f"{START}assistant\n",
        end_marker=END,
        after_end="\n",
        thinks=thinks,
        enable_thinking=enable_thinking,
        tools=tool_format("qwen"),
    )
