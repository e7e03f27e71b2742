"""What every template can do: messages to segments of text, and segments to token ids.

Text is encoded in pieces: everything up to an answer, the answer, its end marker, what follows. So the ids of a
prompt are the same whether it is answered by the engine or by a data row, and an answer's ids never merge with the
text around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from trimtab.data.templates import thoughts
from trimtab.data.templates.tools import DEFAULT_TOOLS, Tool, ToolFormat
from trimtab.data.tokenizer import Tokenizer, encode_plain, token_id
from trimtab.errors import TemplateError
from trimtab.types import Message, Role

ANSWERING: tuple[Role, ...] = ("assistant", "function")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of rendered text.

    Attributes:
        role: who it belongs to; the assistant's header belongs to the message before it.
        trained: an SFT row learns it: an answer, its end marker and the newline after that.
        content: it comes from a message, not from the template.
        message: the number of the message it belongs to, -1 for what the template puts before all messages. Text may be
            cut between two numbers and nowhere else.
    """

    text: str
    role: Role
    trained: bool = False
    content: bool = False
    message: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The token ids of neighbouring segments of one message that are all trained, or all not."""

    token_ids: tuple[int, ...]
    role: Role
    trained: bool
    message: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Template(ABC):
    """A way to write dialogues, bound to a tokenizer's special tokens.

    Attributes:
        stop_ids: tokens that end an answer, the end of turn first.
        end_marker: the text of the end of turn.
        after_end: what stands between the end of turn and the next message ("\\n" in many).
        default_system: the system message of dialogues without one; "" for none.
        lead: what an answer begins with: part of the answer, since the model writes it (a blank, a newline).
        call_lead: the same for an answer that calls tools.
        efficient_eos: only the last answer of a dialogue has an end marker; what follows an earlier one opens the next turn.
        thinks: answers begin with a thought, an empty one where they have none (`thoughts.py`).
        enable_thinking: the model learns and writes its thoughts; without, an empty one stands in the prompt.
        tools: how tools and calls are written.
    """

    name: str
    stop_ids: tuple[int, ...]
    end_marker: str
    after_end: str
    default_system: str
    lead: str = ""
    call_lead: str | None = None
    efficient_eos: bool = False
    thinks: bool = False
    enable_thinking: bool = True
    tools: ToolFormat = DEFAULT_TOOLS

    @property
    def end_of_turn_id(self) -> int:
        """The token that says the answer is finished, and at which a reward is read."""
        return self.stop_ids[0]

    @abstractmethod
    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """The dialogue as text in order; with `add_generation_prompt` it ends in the assistant's header."""

    def text(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Tool] | None = None
    ) -> str:
        """The dialogue as one string."""
        dialogue = self.with_tools(messages, tools)
        return "".join(s.text for s in self.render(dialogue, add_generation_prompt=add_generation_prompt))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Tool] | None = None,
    ) -> list[Piece]:
        """The dialogue as pieces of token ids; joined, they are the whole."""
        dialogue = self.with_tools(messages, tools)
        segments = [s for s in self.render(dialogue, add_generation_prompt=add_generation_prompt) if s.text]
        split = bool(getattr(tokenizer, "split_special_tokens", False))

        def kind(segment: Segment) -> tuple[int, bool, bool]:
            # An answer stands alone; so does every content when its special tokens are to be read as text.
            return segment.message, segment.trained, segment.content and (segment.trained or split)

        pieces = []
        for (message, trained, alone), group in groupby(segments, key=kind):
            run = list(group)
            ids = encode_plain(tokenizer, "".join(s.text for s in run), split_special_tokens=alone and split)
            pieces.append(Piece(token_ids=tuple(ids), role=run[0].role, trained=trained, message=message))
        return pieces

    def encode_prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None
    ) -> list[int]:
        """The ids of everything before an answer; they end with the assistant's header."""
        pieces = self.encode(tokenizer, messages, add_generation_prompt=True, tools=tools)
        return [token for piece in pieces for token in piece.token_ids]

    def encode_answer(self, tokenizer: Tokenizer, text: str, *, newline: bool, role: Role = "assistant") -> list[int]:
        """The ids of an answer and its end marker; with `newline`, also of what follows it (only SFT learns that).

        Args:
            text: what the answer says; of a `function` turn, the calls as JSON.
        """
        split = bool(getattr(tokenizer, "split_special_tokens", False))
        if role == "function":
            text = self.tools.written_calls(text)
        ids = encode_plain(tokenizer, self.answer_text(text, role=role), split_special_tokens=split)
        return [*ids, *encode_plain(tokenizer, self.end_marker + (self.after_end if newline else ""))]

    def answer_text(self, text: str, *, role: Role = "assistant") -> str:
        """The last answer of a dialogue as the template writes it, without its end marker."""
        if self.thinks:
            text = thoughts.of_answer(text, self.enable_thinking)
        lead = self.lead if role == "assistant" or self.call_lead is None else self.call_lead
        return lead + text

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, led by the default system message when they have none of their own."""
        if self.default_system and not (messages and messages[0].role == "system"):
            return [Message(role="system", content=self.default_system), *messages]
        return list(messages)

    def with_tools(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[Message]:
        """The messages with their calls written as this template writes calls, and the tools told to the system message."""
        dialogue = [
            Message(role=m.role, content=self.tools.written_calls(m.content)) if m.role == "function" else m
            for m in messages
        ]
        if not tools:
            return dialogue
        dialogue = self.with_system(dialogue)
        system = dialogue.pop(0).content if dialogue and dialogue[0].role == "system" else ""
        return [Message(role="system", content=self.tools.written_tools(system, tools)), *dialogue]


def special_id(tokenizer: Tokenizer, token: str, template: str) -> int:
    """The id of a special token that a template needs.

    Raises:
        TemplateError: the tokenizer has no such token.
    """
    found = token_id(tokenizer, token)
    if found is None:
        raise TemplateError(
            f"template {template!r} does not fit this tokenizer: {token} is not one of its tokens",
            where=tokenizer.name_or_path,
            why=f"the model would see {token} as several pieces of text and could never stop with it",
            remedy="use the template the model was made with: `template: auto` takes the tokenizer's own",
        )
    return found


def end_of_text(tokenizer: Tokenizer, template: str) -> str:
    """The tokenizer's end-of-text token, for templates whose answers end in it.

    Raises:
        TemplateError: it has none.
    """
    end = tokenizer.eos_token
    if end is None:
        raise TemplateError(
            f"template {template!r} does not fit this tokenizer: it has no end-of-text token",
            where=tokenizer.name_or_path,
            why="answers of this template end in that token",
            remedy="name the template the model was made with",
        )
    return end
