"""Llama 3: `<|start_header_id|>ROLE<|end_header_id|>\\n\\n...<|eot_id|>`, and nothing between two turns."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.templates.tools import tool_format
from trimtab.data.tokenizer import Tokenizer, token_id

BEGIN = "<|begin_of_text|>"
END = "<|eot_id|>"
CALL_END = "<|eom_id|>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    for token in (BEGIN, "<|start_header_id|>", "<|end_header_id|>"):
        special_id(tokenizer, token, "llama3")
    # <|eom_id|> came with Llama 3.1; a 3.0 tokenizer has no such token and no use for that stop.
    call_end = token_id(tokenizer, CALL_END)
    return SlotTemplate(
        name="llama3",
        stop_ids=(special_id(tokenizer, END, "llama3"), *(() if call_end is None else (call_end,))),
        default_system=default_system or "",
        prefix=BEGIN,
        slots={
            "system": (_header("system"), END),
            "user": (_header("user"), END),
            "observation": (_header("ipython"), END),
        },
        header=_header("assistant"),
        end_marker=END,
        after_end="",
        tools=tool_format("llama3"),
    )


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
