"""Mistral 7B v0.3 and its kin: `[INST] ...[/INST] ...</s>`, the system message inside the first turn."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import end_of_text, special_id
from trimtab.data.templates.tools import tool_format
from trimtab.data.tokenizer import Tokenizer


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it.

    `[INST]` became a token with v0.3; for earlier models it is text, and so the tokenizer is not asked for it.
    """
    end = end_of_text(tokenizer, "mistral")
    return SlotTemplate(
        name="mistral",
        stop_ids=(special_id(tokenizer, end, "mistral"),),
        default_system=default_system or "",
        prefix=tokenizer.bos_token or "",
        slots={
            "system": ("", "\n\n"),
            "user": ("[INST] ", "[/INST]"),
            "observation": ('[TOOL_RESULTS] {"content": ', "}[/TOOL_RESULTS]"),
        },
        fused_system=True,
        header="",
        lead=" ",
        call_lead="[TOOL_CALLS] ",
        end_marker=end,
        after_end="",
        tools=tool_format("mistral"),
    )
