"""Yi: ChatML without a system message of its own; tool results come back in a user turn."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.tokenizer import Tokenizer

END = "<|im_end|>"
START = "<|im_start|>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    special_id(tokenizer, START, "yi")
    end, eos = special_id(tokenizer, END, "yi"), tokenizer.eos_token_id
    return SlotTemplate(
        name="yi",
        stop_ids=(end, *(() if eos is None or eos == end else (eos,))),
        default_system=default_system or "",
        slots={
            "system": (f"{START}system\n", f"{END}\n"),
            "user": (f"{START}user\n", f"{END}\n"),
            "observation": (f"{START}user\n", f"{END}\n"),
        },
        header=f"{START}assistant\n",
        end_marker=END,
        after_end="\n",
    )
