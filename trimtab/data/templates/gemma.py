"""Gemma 1 to 3: `<start_of_turn>ROLE\\n...<end_of_turn>\\n`; there is no system turn, its text opens the first question."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.tokenizer import Tokenizer

END = "<end_of_turn>"
START = "<start_of_turn>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    special_id(tokenizer, START, "gemma")
    return SlotTemplate(
        name="gemma",
        stop_ids=(special_id(tokenizer, END, "gemma"),),
        default_system=default_system or "",
        prefix=tokenizer.bos_token or "",
        slots={
            "system": ("", "\n\n"),
            "user": (f"{START}user\n", f"{END}\n"),
            "observation": (f"{START}tool\n", f"{END}\n"),
        },
        fused_system=True,
        header=f"{START}model\n",
        end_marker=END,
        after_end="\n",
    )
