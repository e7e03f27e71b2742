"""DeepSeek: `User: ...` and `Assistant:` in words (LLM, V2), or with tokens of their own (V3); answers end in end-of-text."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import end_of_text, special_id
from trimtab.data.tokenizer import Tokenizer

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template of DeepSeek LLM and V2; `enable_thinking` says nothing to it."""
    end = end_of_text(tokenizer, "deepseek")
    return SlotTemplate(
        name="deepseek",
        stop_ids=(special_id(tokenizer, end, "deepseek"),),
        default_system=default_system or "",
        prefix=tokenizer.bos_token or "",
        slots={
            "system": ("", "\n\n"),
            "user": ("User: ", "\n\n"),
            "observation": ("User: ", "\n\n"),
        },
        header="Assistant:",
        end_marker=end,
        after_end="",
    )


def build_v3(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template of DeepSeek V2.5 and V3; `enable_thinking` says nothing to it."""
    end = end_of_text(tokenizer, "deepseek3")
    for token in (USER, ASSISTANT):
        special_id(tokenizer, token, "deepseek3")
    return SlotTemplate(
        name="deepseek3",
        stop_ids=(special_id(tokenizer, end, "deepseek3"),),
        default_system=default_system or "",
        prefix=tokenizer.bos_token or "",
        slots={"system": ("", ""), "user": (USER, ""), "observation": (USER, "")},
        header=ASSISTANT,
        end_marker=end,
        after_end="",
    )
