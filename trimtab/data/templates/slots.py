"""Templates that wrap each message in fixed strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.data.templates import thoughts
from trimtab.data.templates.template import ANSWERING, Segment, Template
from trimtab.types import Message, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTemplate(Template):
    """A template of fixed strings.

    Attributes:
        prefix: what stands before everything.
        slots: the strings before and after the content of a system, user or observation message.
        header: what opens an answer.
        fused_system: the system message stands inside the first turn, between the turn's opening and its content.
    """

    prefix: str = ""
    slots: Mapping[Role, tuple[str, str]]
    header: str
    fused_system: bool = False

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        segments = [Segment(text=self.prefix, role="system")] if self.prefix else []
        dialogue = self.with_system(messages)
        if self.fused_system and dialogue and dialogue[0].role == "system":
            dialogue = self._fused(dialogue)
        question = max((n for n, message in enumerate(dialogue) if message.role == "user"), default=-1)
        for number, message in enumerate(dialogue):
            if message.role in ANSWERING:
                last = number == len(dialogue) - 1 and not add_generation_prompt
                # The header belongs to the message before it: a prompt that keeps its last message keeps the header.
                header = Segment(text=self._header(last), role="assistant", message=max(number - 1, 0))
                answer = Segment(
                    text=self._answer(message, last=last, after_question=number > question),
                    role="assistant",
                    trained=True,
                    content=True,
                    message=number,
                )
                ending = self.end_marker + self.after_end if last or not self.efficient_eos else ""
                end = Segment(text=ending, role="assistant", trained=True, message=number)
                segments += [header, answer, end]
            else:
                before, after = self.slots[message.role]
                segments += [
                    Segment(text=before, role=message.role, message=number),
                    Segment(text=message.content, role=message.role, content=True, message=number),
                    Segment(text=after, role=message.role, message=number),
                ]
        if add_generation_prompt:
            segments.append(Segment(text=self._header(True), role="assistant", message=max(len(dialogue) - 1, 0)))
        return segments

    def _header(self, last: bool) -> str:
        return self.header + (thoughts.EMPTY if last and self.thinks and not self.enable_thinking else "")

    def _answer(self, message: Message, *, last: bool, after_question: bool) -> str:
        if last:
            return self.answer_text(message.content, role=message.role)
        lead = self.lead if message.role == "assistant" or self.call_lead is None else self.call_lead
        if not self.thinks:
            return lead + message.content
        keeps = after_question and self.enable_thinking
        return lead + (thoughts.kept(message.content) if keeps else thoughts.without(message.content))

    def _fused(self, dialogue: list[Message]) -> list[Message]:
        before, after = self.slots["system"]
        system, *turns = dialogue
        if not turns:  # a system message alone: a turn with nothing else in it
            turns = [Message(role="user", content="")]
        first = Message(role=turns[0].role, content=before + system.content + after + turns[0].content)
        return [first, *turns[1:]]
