"""Phi 4: `<|im_start|>ROLE<|im_sep|>...<|im_end|>`, nothing between two turns."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import special_id
from trimtab.data.tokenizer import Tokenizer

END = "<|im_end|>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it."""
    for token in ("<|im_start|>", "<|im_sep|>"):
        special_id(tokenizer, token, "phi4")
    return SlotTemplate(
        name="phi4",
        stop_ids=(special_id(tokenizer, END, "phi4"),),
        default_system=default_system or "",
        slots={
            "system": (_header("system"), END),
            "user": (_header("user"), END),
            "observation": (_header("user"), END),
        },
        header=_header("assistant"),
        end_marker=END,
        after_end="",
    )


def _header(role: str) -> str:
    return f"<|im_start|>{role}<|im_sep|>"
