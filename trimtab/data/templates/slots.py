"""Templates that wrap each message in fixed strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.data.templates.template import ANSWERING, Segment, Template
from trimtab.types import Message, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTemplate(Template):
    """A template of fixed strings.

    Attributes:
        prefix: what stands before everything.
        slots: the strings before and after the content of a system, user or observation message.
        header: what opens an answer.
    """

    prefix: str = ""
    slots: Mapping[Role, tuple[str, str]]
    header: str

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        segments = [Segment(text=self.prefix, role="system")] if self.prefix else []
        dialogue = self.with_system(messages)
        for number, message in enumerate(dialogue):
            if message.role in ANSWERING:
                # The header belongs to the message before it: a prompt that keeps its last message keeps the header.
                header = Segment(text=self.header, role="assistant", message=max(number - 1, 0))
                end = Segment(text=self.end_marker + self.after_end, role="assistant", trained=True, message=number)
                answer = Segment(text=message.content, role="assistant", trained=True, content=True, message=number)
                segments += [header, answer, end]
            else:
                before, after = self.slots[message.role]
                segments += [
                    Segment(text=before, role=message.role, message=number),
                    Segment(text=message.content, role=message.role, content=True, message=number),
                    Segment(text=after, role=message.role, message=number),
                ]
        if add_generation_prompt:
            segments.append(Segment(text=self.header, role="assistant", message=max(len(dialogue) - 1, 0)))
        return segments
