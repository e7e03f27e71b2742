"""No template: contents one after the other, for base models; the last answer ends in end-of-text."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import end_of_text, special_id
from trimtab.data.tokenizer import Tokenizer


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it.

    Without the end-of-text token after the last answer a model would never learn to stop.
    """
    end = end_of_text(tokenizer, "empty")
    return SlotTemplate(
        name="empty",
        stop_ids=(special_id(tokenizer, end, "empty"),),
        default_system=default_system or "",
        slots={"system": ("", ""), "user": ("", ""), "observation": ("", "")},
        header="",
        efficient_eos=True,
        end_marker=end,
        after_end="",
    )
