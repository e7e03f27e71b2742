"""For models never taught a dialogue format: `Human: ...`, `Assistant:...`, each turn ended by end-of-text."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.tokenizer import Tokenizer
from trimtab.errors import TemplateError


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    end = tokenizer.eos_token
    if end is None:
        raise TemplateError(
            "template 'default' does not fit this tokenizer: it has no end-of-text token",
            where=tokenizer.name_or_path,
            why="each turn of this template ends in that token",
            remedy="name the template the model was made with",
        )
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
