"""For models never taught a dialogue format: `Human: ...`, `Assistant:...`, each turn ended by end-of-text."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import end_of_text, special_id
from trimtab.data.tokenizer import Tokenizer


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    end = end_of_text(tokenizer, "default")
    return SlotTemplate(
        name="default",
        stop_ids=(special_id(tokenizer, end, "default"),),
        default_system=default_system or "",
        slots={
            "system": ("System: ", f"{end}\n"),
            "user": ("Human: ", f"{end}\n"),
            "observation": ("Human: ", f"{end}\n"),
        },
        header="Assistant:",
        end_marker=end,
        after_end="\n",
    )
