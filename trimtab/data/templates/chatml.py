"""ChatML: `<|im_start|>ROLE\\n...<|im_end|>\\n`, no system message unless the dialogue has one."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.tokenizer import Tokenizer

END = "<|im_end|>"
START = "<|im_start|>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    return SlotTemplate(
        name="chatml",
        stop_ids=(special_id(tokenizer, END, "chatml"), special_id(tokenizer, START, "chatml")),
        default_system=default_system or "",
        slots={
            "system": (f"{START}system\n", f"{END}\n"),
            "user": (f"{START}user\n", f"{END}\n"),
            "observation": (f"{START}tool\n", f"{END}\n"),
        },
        header=f"{START}assistant\n",
        end_marker=END,
        after_end="\n",
    )
