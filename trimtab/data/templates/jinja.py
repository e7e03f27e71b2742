"""The tokenizer's own chat template (Jinja), taken apart into segments.

How it is taken apart: the dialogue is rendered a second time with each content replaced by a mark, which shows where
every content stands; the text between the marks is the template's. The two renderings must agree; where a template
rewrites the contents of a dialogue (some drop the thoughts of earlier turns), only its last answer is told apart and
trained. The end of turn is the first special token after the answer of a dialogue that ends with one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.data.templates import thoughts
from trimtab.data.templates.template import ANSWERING, Segment, Template
from trimtab.data.templates.tools import tool_format
from trimtab.data.tokenizer import Tokenizer, encode_plain
from trimtab.errors import TemplateError
from trimtab.types import Message, Role

# Private-use characters: no template looks for them and no text holds them by accident.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
ROLES: dict[Role, str] = {"observation": "tool", "function": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JinjaTemplate(Template):
    """The chat template that came with a tokenizer."""

    tokenizer: Tokenizer

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        dialogue = self.with_system(messages)
        text = self._apply(dialogue, add_generation_prompt)
        marked = [
            Message(role=message.role, content=f"{OPEN}{number}{CLOSE}") for number, message in enumerate(dialogue)
        ]
        frames = re.split(f"{OPEN}(\\d+){CLOSE}", self._apply(marked, add_generation_prompt))
        between, order = frames[0::2], [int(number) for number in frames[1::2]]
        if order == list(range(len(dialogue))):
            contents = [message.content for message in dialogue]
            for used in (contents, [content.strip() for content in contents]):
                if text == "".join(part for pair in zip(between, [*used, ""], strict=True) for part in pair):
                    return self._segments(dialogue, between, used)
        return self._last_answer(dialogue, text, add_generation_prompt)

    def _segments(self, dialogue: list[Message], between: list[str], contents: list[str]) -> list[Segment]:
        segments: list[Segment] = []
        ending = self.end_marker + self.after_end
        for number, (message, frame, content) in enumerate(zip(dialogue, between, contents, strict=False)):
            previous = dialogue[number - 1].role if number else None
            segments += self._frame(frame, number, previous, message.role, ending)
            trained = message.role in ANSWERING
            role: Role = "assistant" if trained else message.role
            segments.append(Segment(text=content, role=role, trained=trained, content=True, message=number))
        last = dialogue[-1].role if dialogue else None
        segments += self._frame(between[-1], len(dialogue), last, "assistant", ending)
        return _join_inseparable(segments, ending)

    def _frame(self, text: str, number: int, previous: Role | None, role: Role, ending: str) -> list[Segment]:
        """The template's own text before message `number`: what ends the message before it, and what opens this one."""
        if previous is None:
            # A beginning-of-text token, then perhaps a whole system message that the template itself puts there.
            cut = text.rfind(ending) + len(ending) if ending in text else 0
            bos = self.tokenizer.bos_token
            if not cut and bos and text.startswith(bos):
                cut = len(bos)
            return [Segment(text=text[:cut], role="system"), Segment(text=text[cut:], role=role, message=number)]
        if role in ANSWERING and previous not in ANSWERING:
            return [Segment(text=text, role=previous, message=number - 1)]
        ends = next((end for end in (ending, self.end_marker) if text.startswith(end)), "")
        trained = previous in ANSWERING
        owner: Role = "assistant" if trained else previous
        return [
            Segment(text=ends, role=owner, trained=trained, message=number - 1),
            Segment(text=text[len(ends) :], role=role, message=number),
        ]

    def _last_answer(self, dialogue: list[Message], text: str, add_generation_prompt: bool) -> list[Segment]:
        if add_generation_prompt or not dialogue or dialogue[-1].role not in ANSWERING:
            return [Segment(text=text, role="user", message=0)]
        last = len(dialogue) - 1
        for content in (dialogue[-1].content, dialogue[-1].content.strip()):
            ending = content + self.end_marker + self.after_end
            if text.endswith(ending):
                end = Segment(text=self.end_marker + self.after_end, role="assistant", trained=True, message=last)
                answer = Segment(text=content, role="assistant", trained=True, content=True, message=last)
                return [Segment(text=text[: -len(ending)], role="user", message=0), answer, end]
        raise TemplateError(
            "the tokenizer's chat template changes answers in a way that cannot be followed",
            where=self.tokenizer.name_or_path,
            why=f"the rendered dialogue ends in {text[-60:]!r}, which is not the answer and the end of turn",
            remedy="name a template: qwen3, llama3, default ...",
        )

    def _apply(self, dialogue: Sequence[Message], add_generation_prompt: bool) -> str:
        return apply(self.tokenizer, dialogue, add_generation_prompt, self.enable_thinking)


def build(tokenizer: Tokenizer, *, default_system: str | None, enable_thinking: bool) -> JinjaTemplate:
    """The tokenizer's own template, its end of turn worked out by rendering a small dialogue.

    Raises:
        TemplateError: it has none, or its answers end in no special token.
    """
    if not tokenizer.chat_template:
        raise TemplateError(
            "this tokenizer has no chat template of its own",
            where=tokenizer.name_or_path,
            why="template is null (or auto), which means the tokenizer's own",
            remedy="name one: `template: default` suits a base model, qwen, chatml and llama3 their families",
        )
    mark = f"{OPEN}1{CLOSE}"
    asked = Message(role="user", content=f"{OPEN}0{CLOSE}")
    answered = Message(role="assistant", content=mark)
    before, _, suffix = apply(tokenizer, [asked, answered], False, enable_thinking).rpartition(mark)
    ids = encode_plain(tokenizer, suffix)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((token for token in ids if token in special), None)
    if end is None:
        raise TemplateError(
            "the tokenizer's chat template ends answers without a special token",
            where=tokenizer.name_or_path,
            why=f"after an answer it writes {suffix!r}; a model could not say that it has finished",
            remedy="name a template: qwen3, llama3, default ...",
        )
    # The end marker is all text from the answer to the end-of-turn token, so that what is trained is what is rendered.
    token = tokenizer.convert_ids_to_tokens(end) or ""
    head, _, tail = suffix.partition(token)
    eos = tokenizer.eos_token_id
    return JinjaTemplate(
        name="auto",
        stop_ids=(end, *(() if eos is None or eos == end else (eos,))),
        default_system=default_system or "",
        end_marker=head + token,
        after_end=tail,
        tokenizer=tokenizer,
        thinks=before.endswith(thoughts.EMPTY),
        enable_thinking=enable_thinking,
        tools=tool_format("qwen" if "<tool_call>" in tokenizer.chat_template else "default"),
    )


def apply(tokenizer: Tokenizer, dialogue: Sequence[Message], add_generation_prompt: bool, enable_thinking: bool) -> str:
    """The dialogue rendered by the tokenizer's template."""
    import jinja2

    listed = [{"role": ROLES.get(message.role, message.role), "content": message.content} for message in dialogue]
    try:
        return tokenizer.apply_chat_template(
            listed, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the tokenizer's chat template is broken: {error}",
            where=tokenizer.name_or_path,
            why=f"line {error.lineno} of the template is not Jinja",
            remedy="copy the tokenizer's files again, or name a template: qwen3, llama3, default ...",
        ) from None
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError) as error:
        raise TemplateError(
            f"the tokenizer's chat template refuses this dialogue: {error}",
            where=tokenizer.name_or_path,
            why=f"its messages are {', '.join(message.role for message in dialogue)}",
            remedy="some templates take no system message or no tools: leave them out, or name another template",
        ) from None


def _join_inseparable(segments: list[Segment], ending: str) -> list[Segment]:
    """Segments with neighbouring messages made one where the template does not close the first before the second."""
    joined: list[Segment] = []
    alias: dict[int, int] = {}
    closed = True
    for segment in (s for s in segments if s.text):
        message = segment.message
        if joined and joined[-1].message != message and message not in alias:
            previous = joined[-1]
            closed = previous.message < 0 or previous.trained or segment.trained or previous.text.endswith(ending)
            alias[message] = message if closed else alias.get(previous.message, previous.message)
        joined.append(replace(segment, message=alias.get(message, message)))
    return joined
