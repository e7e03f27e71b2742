"""Llama 2: `<s>[INST] ... [/INST]`, the system message between `<<SYS>>` tags inside the first turn."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import end_of_text, special_id
from trimtab.data.tokenizer import Tokenizer


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    end = end_of_text(tokenizer, "llama2")
    turn = (f"{tokenizer.bos_token or ''}[INST] ", " [/INST]")
    return SlotTemplate(
        name="llama2",
        stop_ids=(special_id(tokenizer, end, "llama2"),),
        default_system=default_system or "",
        slots={"system": ("<<SYS>>\n", "\n<</SYS>>\n\n"), "user": turn, "observation": turn},
        fused_system=True,
        header="",
        end_marker=end,
        after_end="",
    )
