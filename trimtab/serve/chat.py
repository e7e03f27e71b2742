"""A model to talk to from a program, and to ask for scores.

    model = ChatModel({"model_name_or_path": ..., "adapter_name_or_path": ..., "template": "qwen"})
    for response in model.chat([{"role": "user", "content": "..."}]):
        print(response.response_text)

Answers follow the fixed draw: the same messages, settings and seed give the same text, streamed or not, alone or in a batch.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

from trimtab.config import StageConfig, load
from trimtab.data.encode import encode_dialogue
from trimtab.data.formats.dialogue import ANSWERING, ASKING, check_order
from trimtab.data.formats.layout import UnusableCell
from trimtab.data.templates import Template
from trimtab.data.templates.tools import read_tools
from trimtab.data.tokenizer import encode_plain
from trimtab.engine.generator import Token
from trimtab.errors import ConfigError, DataError, ModelError, typed
from trimtab.registry import nearest
from trimtab.rewards import with_tail
from trimtab.rewards.model import score_rows_as
from trimtab.serve.answer import Text, answer, limits
from trimtab.serve.model import find_served, load_served
from trimtab.train.assemble import REWARD
from trimtab.train.progress import bar, say
from trimtab.types import Completion, Example, Message, Origin, Prompt, Role, Sampling, TokenRow

Messages = Sequence[Message | Mapping[str, Any]]

# Generation keywords that are also keys of the file, then those that only a call has.
SHARED = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
    "seed",
    "skip_special_tokens",
)
GENERATION = (*SHARED, "num_return_sequences", "stop")

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "observation": "observation",
    "tool": "observation",
    "function": "function",
}


@dataclass(frozen=True, slots=True)
class Response:
    """One answer; lengths in tokens, the end marker counted."""

    response_text: str
    response_length: int
    prompt_length: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The generation keywords of one call over those of the file."""

    sampling: Sampling
    max_length: int | None
    k: int
    skip_special_tokens: bool


class ChatModel:
    """A policy that answers, or a reward model that scores.

    Calls from several threads, and the async forms, take turns on the one model.
    """

    def __init__(self, args: Mapping[str, Any] | str | PathLike[str] | StageConfig) -> None:
        """Load the model of a dict of keys, or of a YAML or JSON file.

        Raises:
            TrimtabError: a config, model or adapter that is the user's to mend.
        """
        with typed():
            config = args if isinstance(args, StageConfig) else load(args)
            for note in config.notes:
                say(note)
            self.served = load_served(find_served(config))
        self._lock = threading.Lock()

    # --------------------------------------------------------------------------------------------------------- answers

    def chat(
        self, messages: Messages, system: str | None = None, tools: str | None = None, **generation: Any
    ) -> list[Response]:
        """Answer a dialogue.

        Args:
            messages: {role, content} dicts or `Message`s. Several messages that are all the user's are answered one by one, each
                a dialogue of its own.
            system: a system message before them.
            tools: a JSON list of functions, told to the model as its template does; calls come back as text.
            generation: do_sample, temperature, top_p, top_k, min_p, num_return_sequences, repetition_penalty, max_new_tokens,
                max_length, stop, seed, skip_special_tokens; each wins over the file.

        Returns:
            `num_return_sequences` (1) responses for every dialogue, in order.

        Raises:
            ConfigError: an unknown keyword or a value that cannot be.
            DataError: messages that are not a dialogue.
            ModelError: this is a reward model.
        """
        generator = self.served.generator()
        settings = self._settings(generation)
        generator.decode = self._text(settings).decode
        prompts = self._prompts(messages, system, tools)
        total = len(prompts) * settings.k
        shown: AbstractContextManager[Any] = bar("answers", total) if total > 1 else nullcontext()
        with self._lock, shown as progress:
            completions = answer(
                generator,
                prompts,
                settings.sampling,
                k=settings.k,
                max_length=settings.max_length,
                window=self.served.window,
                progress=progress,
            )
        asked = [prompt for prompt in prompts for _ in range(settings.k)]
        return [self._response(p, c, settings) for p, c in zip(asked, completions, strict=True)]

    def stream_chat(
        self, messages: Messages, system: str | None = None, tools: str | None = None, **generation: Any
    ) -> Iterator[str]:
        """The answer to one dialogue, as `chat` would give it, in pieces as they are written; whole characters only."""
        generator = self.served.generator()
        settings = self._settings(generation)
        text = self._text(settings)
        generator.decode = text.decode
        prompts = self._prompts(messages, system, tools)
        if len(prompts) > 1 or settings.k > 1:
            raise ConfigError(
                f"a stream is one answer, and this asks for {len(prompts) * settings.k}",
                why="several messages of the user's are dialogues of their own"
                if len(prompts) > 1
                else "num_return_sequences is above 1",
                remedy="use chat, or stream them one after the other",
            )
        (room,) = limits(prompts, settings.sampling, max_length=settings.max_length, window=self.served.window)
        tokens = generator.stream(prompts[0], replace(settings.sampling, max_new_tokens=room))
        return self._pieces(tokens, text)

    def _pieces(self, tokens: Iterator[Token], text: Text) -> Iterator[str]:
        while True:
            with self._lock:  # a token at a time, so that streams take turns
                token = next(tokens, None)
            if token is None:
                return
            if piece := text.push(token.token_id, last=token.finish is not None):
                yield piece

    async def achat(
        self, messages: Messages, system: str | None = None, tools: str | None = None, **generation: Any
    ) -> list[Response]:
        """`chat`, off the event loop."""
        return await asyncio.to_thread(self.chat, messages, system, tools, **generation)

    async def astream_chat(
        self, messages: Messages, system: str | None = None, tools: str | None = None, **generation: Any
    ) -> AsyncIterator[str]:
        """`stream_chat`, off the event loop."""
        pieces = await asyncio.to_thread(self.stream_chat, messages, system, tools, **generation)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    # ---------------------------------------------------------------------------------------------------------- scores

    def get_scores(self, messages: Sequence[str] | Sequence[Messages]) -> list[float]:
        """What a reward model thinks of finished dialogues.

        Args:
            messages: whole rendered dialogues as strings, or lists of messages that end with the answer to be scored. A dialogue
                is read at its end marker. A string that does not end in it is read at its last token, with a warning; what a
                template writes after the marker may be there or not. A head that is read at the last token (`reward_readout`;
                those of other tools) is read there in both forms.

        Returns:
            one number per dialogue, whatever the company it is scored in.

        Raises:
            ModelError: this model has no value head.
            DataError: something that is not a finished dialogue.
        """
        if self.served.record is None:
            raise ModelError(
                "this model has no value head, so it has no scores to give",
                where=self.served.config.origin("adapter_name_or_path"),
                why="scores come from a reward model: an adapter with value_head.safetensors beside it",
                remedy="name the output_dir of a run with stage: rm in adapter_name_or_path, and write stage: rm",
            )
        listed: list[Any] = list(messages) if isinstance(messages, Iterable) else [messages]
        if isinstance(messages, str) or any(isinstance(item, Mapping | Message) for item in listed):
            raise DataError(
                "get_scores takes a list of dialogues, and this is a single one",
                remedy="put it in a list: get_scores([dialogue])",
            )
        for number, item in enumerate(listed, 1):
            if not isinstance(item, Iterable):
                raise DataError(
                    f"dialogue {number} is no dialogue but {type(item).__name__}: {str(item)[:60]}",
                    why="a dialogue is a whole rendered text, or a list of messages",
                    remedy='get_scores([[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]])',
                )
        rows = [
            self._string_row(item, number) if isinstance(item, str) else self._dialogue_row(item, number)
            for number, item in enumerate(listed, 1)
        ]
        with self._lock:
            return score_rows_as(self.served.roles, REWARD, rows, budget=self.served.budget)

    async def aget_scores(self, messages: Sequence[str] | Sequence[Messages]) -> list[float]:
        """`get_scores`, off the event loop."""
        return await asyncio.to_thread(self.get_scores, messages)

    def _dialogue_row(self, messages: Any, number: int) -> TokenRow:
        dialogue = read_messages(messages)
        if not dialogue or dialogue[-1].role not in ANSWERING:
            raise DataError(
                f"dialogue {number} does not end with an answer",
                why="what is scored is the assistant's last answer",
                remedy='end it with {"role": "assistant", "content": ...}',
            )
        *asked, last = dialogue
        _check(asked, f"dialogue {number}")
        served = self.served
        row = encode_dialogue(
            asked, last.content, served.template, served.tokenizer, cutoff_len=served.config.cutoff_len
        )
        return with_tail(row, served.tail)

    def _string_row(self, text: str, number: int) -> TokenRow:
        served, template = self.served, self.served.template
        if not served.tail and text.endswith(template.end_marker + template.after_end):
            text = text.removesuffix(template.after_end)
        ids = encode_rendered(text, template, served.tokenizer)
        if not ids:
            raise DataError(f"dialogue {number} is empty", remedy="give the whole rendered dialogue")
        if served.record is not None and served.record.readout == "stop" and ids[-1] != template.end_of_turn_id:
            warnings.warn(
                f"dialogue {number} does not end in {template.end_marker!r}, where this reward model is read; it is scored at "
                f"its last token, on {text[-20:]!r}",
                stacklevel=3,
            )
        return TokenRow(token_ids=tuple(ids), scored=(len(ids) - 1,))

    # ---------------------------------------------------------------------------------------------------------- inside

    def _prompts(self, messages: Messages, system: str | None, tools: str | None) -> list[Prompt]:
        offered = read_tools(tools)
        listed = read_messages(messages)
        alone = len(listed) > 1 and all(message.role == "user" for message in listed)
        prompts = []
        for index, dialogue in enumerate([[message] for message in listed] if alone else [listed]):
            if system is not None and dialogue and dialogue[0].role == "system":
                raise DataError(
                    "two system messages: the argument `system`, and the first message", remedy="give one of them"
                )
            dialogue = [*([Message(role="system", content=system)] if system else []), *dialogue]
            _check(dialogue, "messages")
            example = Example(origin=Origin(file="message", row=index + 1), prompt=tuple(dialogue))
            ids = self.served.template.encode_prompt(self.served.tokenizer, dialogue, tools=offered)
            prompts.append(Prompt(index=index, token_ids=tuple(ids), example=example))
        return prompts

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        for name in given:
            if name not in GENERATION:
                guess = nearest(name, GENERATION)
                raise ConfigError(
                    f"unknown generation keyword {name!r}" + (f"; did you mean {guess!r}?" if guess else ""),
                    where=f"argument: {name}",
                    why="a keyword that nobody reads would be a setting silently lost",
                    remedy=f"choose from: {', '.join(GENERATION)}",
                )
        given = {name: value for name, value in given.items() if value is not None}
        config = self.served.config
        values = {name: getattr(config, name) for name in SHARED if getattr(config, name) is not None}
        if "max_length" in given:  # the last word, whichever of the two says it
            values.pop("max_new_tokens", None)
        values |= {name: value for name, value in given.items() if name in SHARED}
        # the config's own types and ranges, with the config's own errors
        checked = load({"model_name_or_path": config.model_name_or_path, **values}, stage="infer")
        k = given.get("num_return_sequences", 1)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(
                f"num_return_sequences: {k!r} cannot be used",
                where="argument: num_return_sequences",
                remedy="a whole number from 1 on",
            )
        return Settings(
            sampling=replace(checked.chat_sampling, stop=_stops(given.get("stop", ()))),
            max_length=checked.max_length if checked.max_new_tokens is None else None,
            k=k,
            skip_special_tokens=checked.skip_special_tokens,
        )

    def _text(self, settings: Settings) -> Text:
        skip = settings.skip_special_tokens
        return Text(
            decode=lambda ids: self.served.decode(ids, skip_special_tokens=skip),
            stop_ids=self.served.template.stop_ids if skip else (),
            stop=settings.sampling.stop,
        )

    def _response(self, prompt: Prompt, completion: Completion, settings: Settings) -> Response:
        return Response(
            response_text=self._text(settings).whole(completion.token_ids),
            response_length=len(completion.token_ids),
            prompt_length=len(prompt.token_ids),
            finish_reason="length" if completion.finish == "length" else "stop",
        )


# ------------------------------------------------------------------------------------------------------------- messages


def read_messages(messages: Any) -> list[Message]:
    """{role, content} dicts or `Message`s as `Message`s.

    Raises:
        DataError: something else, or a role that does not exist.
    """
    if isinstance(messages, str | Mapping | Message) or not isinstance(messages, Iterable):
        kind = "text" if isinstance(messages, str) else "message"
        raise DataError(
            "messages must be a list of messages",
            why=f"it is a single {kind if isinstance(messages, Iterable | Message) else type(messages).__name__}",
            remedy='[{"role": "user", "content": "..."}]',
        )
    found = []
    for number, item in enumerate(messages, 1):
        if isinstance(item, Message):
            found.append(item)
            continue
        if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
            raise DataError(
                f"message {number} is not a message: {str(item)[:60]}",
                why="a message has a role and a content",
                remedy='{"role": "user", "content": "..."}',
            )
        role, content = item["role"], item["content"]
        if role not in ROLES:
            guess = nearest(str(role), ROLES)
            raise DataError(
                f"message {number} has the role {role!r}" + (f"; did you mean {guess!r}?" if guess else ""),
                why="nobody of that name speaks in a dialogue",
                remedy=f"choose one of: {', '.join(ROLES)}",
            )
        if not isinstance(content, str):
            raise DataError(
                f"the content of message {number} is not text but {type(content).__name__}",
                why="models of text read text",
                remedy="give a string",
            )
        found.append(Message(role=ROLES[role], content=content))
    return found


def _check(dialogue: Sequence[Message], where: str) -> None:
    """Speakers in order, and the last of them asks.

    Raises:
        DataError: they are not.
    """
    spoken = dialogue[1:] if dialogue and dialogue[0].role == "system" else dialogue
    try:
        check_order(list(spoken))
        if spoken[-1].role not in ASKING:
            raise UnusableCell("there is nothing to answer", f"the last message is the {spoken[-1].role}'s")
    except UnusableCell as error:
        raise DataError(
            f"{where}: {error.reason}",
            why=getattr(error, "detail", "") or f"the roles are: {', '.join(m.role for m in dialogue) or 'none'}",
            remedy="an optional system message, then user and assistant by turns, the user last",
        ) from None


def _stops(value: Any) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(word, str) and word for word in words):
        raise ConfigError(
            f"stop: {value!r} cannot be used", where="argument: stop", remedy="a text, or a list of texts, none empty"
        )
    return words


def encode_rendered(text: str, template: Template, tokenizer: Any) -> list[int]:
    """A dialogue that is text already, as the ids that its template gives: answers are encoded apart from what is around them."""
    asked = [Message(role="user", content="?")]
    bare = template.text(asked, add_generation_prompt=False)
    header = template.text(asked, add_generation_prompt=True).removeprefix(bare)
    if not header or header not in text:
        return encode_plain(tokenizer, text)
    before, *answered = text.split(header)
    pieces = [before + header]
    for number, part in enumerate(answered, 1):
        content, end, after = part.partition(template.end_marker)
        follows = template.after_end if end and after.startswith(template.after_end) else ""
        rest = after.removeprefix(follows)
        pieces += [content, end + follows, rest + header if number < len(answered) else rest]
    return [token for piece in pieces for token in encode_plain(tokenizer, piece)]
