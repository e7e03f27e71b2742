"""Rewards: what an answer is worth. One file per source of reward; `shaping` is what happens to a score afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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


class Reward(Protocol):
    """A source of reward; its `name` labels its part in the logs."""

    name: str

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """One number per answer.

        Raises:
            RewardError: it failed; never a 0.0 in place of an answer.
        """
        ...


def finished_row(prompt: Prompt, completion: Completion, end_of_turn: int, stop_ids: Sequence[int]) -> TokenRow:
    """The row that a reward model reads: the completion as if it had ended by itself.

    A completion that was cut, or that ended otherwise, has its other stop token (if any) replaced by the end marker: a reward
    model has been trained at that marker only. The difference in worth is `missing_eos_penalty`, not an unknown read-out.
    """
    answer = list(completion.token_ids)
    if not completion.finished:
        if answer and answer[-1] in stop_ids:
            answer.pop()
        answer.append(end_of_turn)
    start = len(prompt.token_ids)
    return TokenRow(token_ids=(*prompt.token_ids, *answer), scored=tuple(range(start, start + len(answer))))
