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
    """

    name: str
    stop_ids: tuple[int, ...]
    end_marker: str
    after_end: str
    default_system: str

    @property
    def end_of_turn_id(self) -> int:
        """The token that says the answer is finished, and at which a reward is read."""
        return self.stop_ids[0]

    @abstractmethod
    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """The dialogue as text in order; with `add_generation_prompt` it ends in the assistant's header."""

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The dialogue as one string."""
        return "".join(s.text for s in self.render(messages, add_generation_prompt=add_generation_prompt))

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[Piece]:
        """The dialogue as pieces of token ids; joined, they are the whole."""
        segments = [s for s in self.render(messages, add_generation_prompt=add_generation_prompt) if s.text]
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

    def encode_prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids of everything before an answer; they end with the assistant's header."""
        pieces = self.encode(tokenizer, messages, add_generation_prompt=True)
        return [token for piece in pieces for token in piece.token_ids]

    def encode_answer(self, tokenizer: Tokenizer, text: str, *, newline: bool) -> list[int]:
        """The ids of an answer and its end marker; with `newline`, also of what follows it (only SFT learns that)."""
        split = bool(getattr(tokenizer, "split_special_tokens", False))
        ids = encode_plain(tokenizer, text, split_special_tokens=split)
        return [*ids, *encode_plain(tokenizer, self.end_marker + (self.after_end if newline else ""))]

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, led by the default system message when they have none of their own."""
        if self.default_system and not (messages and messages[0].role == "system"):
            return [Message(role="system", content=self.default_system), *messages]
        return list(messages)


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
