"""GLM 4: `[gMASK]<sop><|user|>\\n...<|assistant|>\\n...`; the next role's token ends a turn, end-of-text the dialogue."""

from __future__ import annotations

from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import end_of_text, special_id
from trimtab.data.templates.tools import tool_format
from trimtab.data.tokenizer import Tokenizer

STOPS = ("<|user|>", "<|observation|>")


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> SlotTemplate:
    """The template for this tokenizer; `enable_thinking` says nothing to it.

    An answer begins with the newline after the assistant's token, which the model writes itself.
    """
    end = end_of_text(tokenizer, "glm4")
    for token in ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"):
        special_id(tokenizer, token, "glm4")
    return SlotTemplate(
        name="glm4",
        stop_ids=tuple(special_id(tokenizer, token, "glm4") for token in (end, *STOPS)),
        default_system=default_system or "",
        prefix="[gMASK]<sop>",
        slots={
            "system": ("<|system|>\n", ""),
            "user": ("<|user|>\n", ""),
            "observation": ("<|observation|>\n", ""),
        },
        header="<|assistant|>",
        lead="\n",
        call_lead="",
        efficient_eos=True,
        end_marker=end,
        after_end="",
        tools=tool_format("glm4"),
    )
