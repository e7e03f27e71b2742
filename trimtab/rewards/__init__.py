"""Rewards: what an answer is worth. One file per source of reward; `shaping` is what happens to a score afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from trimtab.data.templates import Template
from trimtab.data.tokenizer import Tokenizer, encode_plain
from trimtab.types import Completion, Prompt, TokenRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A completion as a reward sees it.

    Attributes:
        row: prompt and completion as token ids, ending in the end marker whether or not the policy wrote one.
        text: the completion's text without its end marker.
    """

    prompt: Prompt
    completion: Completion
    row: TokenRow
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What answers are worth, in order.

    Attributes:
        scores: one number per answer.
        parts: what the scores are made of, by name, one number per answer each; for the log.
    """

    scores: list[float]
    parts: Mapping[str, list[float]] = field(default_factory=dict)


class Reward(Protocol):
    """A source of reward; its `name` labels its part in the logs."""

    @property
    def name(self) -> str: ...

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """One number per answer.

        Raises:
            RewardError: it failed; never a 0.0 in place of an answer.
        """
        ...


@runtime_checkable
class Composite(Reward, Protocol):
    """A source whose scores have parts of their own."""

    def judge(self, answers: Sequence[Answer]) -> Judged:
        """Scores and parts, the part of the source's own name among them."""
        ...


def finished_row(prompt: Prompt, completion: Completion, stop_ids: Sequence[int], tail: Sequence[int] = ()) -> TokenRow:
    """The row that a reward model reads: the completion as if it had ended by itself.

    A completion that was cut, or that ended otherwise, has its other stop token (if any) replaced by the end marker: a reward
    model has been trained at that marker only. The difference in worth is `missing_eos_penalty`, not an unknown read-out.
    """
    answer = list(completion.token_ids)
    if not completion.finished:
        if answer and answer[-1] in stop_ids:
            answer.pop()
        answer.append(stop_ids[0])
    start = len(prompt.token_ids)
    row = TokenRow(token_ids=(*prompt.token_ids, *answer), scored=tuple(range(start, start + len(answer))))
    return with_tail(row, tail)


def readout_tail(template: Template, tokenizer: Tokenizer, readout: str) -> tuple[int, ...]:
    """The tokens between the end marker and the place where a reward is read.

    None for `stop`. For `last`, whatever the template writes after the end marker: other tools train their reward models on the
    last token of the full template, which in many templates is a newline.
    """
    return tuple(encode_plain(tokenizer, template.after_end)) if readout == "last" and template.after_end else ()


def with_tail(row: TokenRow, tail: Sequence[int]) -> TokenRow:
    """The row with `tail` after it, so that its last scored token is where the reward is read."""
    if not tail:
        return row
    end = len(row.token_ids)
    return TokenRow(token_ids=(*row.token_ids, *tail), scored=(*row.scored, *range(end, end + len(tail))))
