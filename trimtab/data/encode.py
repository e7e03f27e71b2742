"""Examples to token ids: rows to learn from, pairs to compare, prompts to answer, and what is cut of long ones.

Lengths. A row has at most `cutoff_len` tokens. Each turn (source: all that stands before an answer; target: the
answer with its end marker) is fitted to what is left of that budget by `split_budget`; a target keeps its head, a
source its tail, since the end of a question and the assistant's header are there. Sources lose whole messages where
that is enough (`keep_tail`). Prompts for online stages are cut on the left only. Only SFT rows have (and learn) what
follows an end marker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from trimtab.data.dropped import Dropped
from trimtab.data.templates.template import Piece, Template
from trimtab.data.templates.tools import UnusableTools, read_tools
from trimtab.data.tokenizer import Tokenizer, encode_plain
from trimtab.types import Example, Message, Pair, Prompt, Ranking, Role, TokenRow

Ids = tuple[int, ...]

NOTHING_LEFT = "nothing to learn is left within cutoff_len"
ANSWER_TOO_LONG = "an answer does not fit within cutoff_len"
NO_ROOM = {NOTHING_LEFT, ANSWER_TOO_LONG}
"""Reasons that a greater cutoff_len would mend."""


def split_budget(source: int, target: int, budget: int) -> tuple[int, int]:
    """How many tokens of a source and of its target may stay within `budget` together.

    A short target (less than half the budget) stays whole and the source gives way; else a short source stays whole
    and the target gives way; else both shrink in proportion. `split_budget(3000, 2000, 1000) == (600, 400)`.
    """
    if source + target <= budget:
        return source, target
    if 2 * target < budget:
        return budget - target, target
    if 2 * source < budget:
        return source, budget - source
    kept = min(target, budget * target // (source + target))
    return min(source, budget - kept), kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The tokens of one message, template text included; message -1 is what the template puts before all messages."""

    token_ids: Ids
    role: Role
    message: int


def chunks(pieces: Iterable[Piece]) -> list[Chunk]:
    """Pieces joined by message: the units that a prompt may lose."""
    joined = []
    for message, group in groupby(pieces, key=lambda piece: piece.message):
        run = list(group)
        ids = tuple(token for piece in run for token in piece.token_ids)
        joined.append(Chunk(token_ids=ids, role=run[0].role, message=message))
    return joined


def keep_tail(source: Sequence[Chunk], budget: int) -> Ids:
    """The end of a source in at most `budget` tokens.

    In this order: all of it; the system message and the latest messages, from a user's on; the latest messages
    without the system message; the last tokens of the last message. What the template writes before everything stays
    in any case.
    """
    everything = join(source)
    if len(everything) <= budget:
        return everything
    if budget <= 0:
        return ()
    opening = [chunk for chunk in source if chunk.message < 0]
    messages = [chunk for chunk in source if chunk.message >= 0]
    system = messages[:1] if len(messages) > 1 and messages[0].role == "system" else []
    turns = messages[len(system) :]
    starts = [n for n, chunk in enumerate(turns) if chunk.role == "user" or n == len(turns) - 1]
    for head in (opening + system, opening):
        for start in starts:
            kept = join([*head, *turns[start:]])
            if len(kept) <= budget:
                return kept
    first = join(opening)
    return first + join(messages)[len(first) - budget :] if len(first) < budget else everything[-budget:]


def join(source: Iterable[Chunk]) -> Ids:
    """The tokens of chunks in a row."""
    return tuple(token for chunk in source for token in chunk.token_ids)


# ----------------------------------------------------------------------------------------------------------- SFT, text


def encode_sft(
    example: Example,
    template: Template,
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    mask_history: bool = False,
    train_on_prompt: bool = False,
) -> TokenRow | Dropped:
    """A row that learns every answer of the dialogue, each with its end marker and the newline after it.

    Args:
        mask_history: only the last answer is learnt, and it is given room first.
        train_on_prompt: every token is learnt.
    """
    fitted = fit_sft(
        example,
        template,
        tokenizer,
        cutoff_len=cutoff_len,
        mask_history=mask_history,
        train_on_prompt=train_on_prompt,
    )
    return fitted if isinstance(fitted, Dropped) else fitted[0]


def fit_sft(
    example: Example,
    template: Template,
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    mask_history: bool = False,
    train_on_prompt: bool = False,
) -> tuple[TokenRow, int] | Dropped:
    """`encode_sft`, with the number of tokens that did not fit."""
    answer = example.response or example.chosen  # a preference row teaches its chosen answer
    if answer is None:
        return Dropped(origin=example.origin, reason="no answer to learn from")
    if example.label is False:
        return Dropped(origin=example.origin, reason="the answer is marked as unwanted")
    if not answer.content.strip():
        return Dropped(origin=example.origin, reason="empty answer")
    try:
        turns = _turns(encode_source(example, template, tokenizer))
        learnt = template.encode_answer(tokenizer, answer.content, newline=True, role=answer.role)
    except UnusableTools as error:
        return Dropped(origin=example.origin, reason=error.what, detail=error.why)
    turns[-1] = (turns[-1][0], tuple(learnt))

    left = cutoff_len
    kept: list[tuple[Ids, Ids]] = []
    for source, target in reversed(turns) if mask_history else turns:
        source_room, target_room = split_budget(sum(len(c.token_ids) for c in source), len(target), left)
        kept.append((keep_tail(source, source_room), target[:target_room]))
        left -= len(kept[-1][0]) + len(kept[-1][1])
    if mask_history:
        kept.reverse()

    ids: list[int] = []
    scored: list[int] = []
    for number, (source_ids, target_ids) in enumerate(kept):
        learns = not mask_history or number == len(kept) - 1
        if train_on_prompt:
            scored += range(len(ids), len(ids) + len(source_ids))
        ids += source_ids
        if learns or train_on_prompt:
            scored += range(len(ids), len(ids) + len(target_ids))
        ids += target_ids
    scored = [index for index in scored if index > 0]  # nothing stands before the first token to predict it
    if not scored:
        return Dropped(origin=example.origin, reason=NOTHING_LEFT)
    whole = sum(len(chunk.token_ids) for source, _ in turns for chunk in source) + sum(len(t) for _, t in turns)
    return TokenRow(token_ids=tuple(ids), scored=tuple(scored)), whole - len(ids)


def encode_source(example: Example, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    """All that stands before a row's answer, its tools among it.

    Raises:
        UnusableTools: the tools or a call cannot be read.
    """
    return template.encode(tokenizer, example.prompt, add_generation_prompt=True, tools=read_tools(example.tools))


def _turns(pieces: Sequence[Piece]) -> list[tuple[list[Chunk], Ids]]:
    """(source, target) of each turn; the last target is empty when the dialogue ends in a question."""
    turns: list[tuple[list[Chunk], Ids]] = []
    source: list[Chunk] = []
    for trained, group in groupby(pieces, key=lambda piece: piece.trained):
        run = chunks(group)
        if trained:
            turns.append((source, join(run)))
            source = []
        else:
            source = run
    return [*turns, (source, ())]


def encode_text(example: Example, tokenizer: Tokenizer, *, cutoff_len: int) -> list[TokenRow]:
    """A document, ended by the end-of-text token, in chunks of at most `cutoff_len` tokens.

    Every token is a label but the first of a chunk, before which nothing stands; a chunk of one token is left out.
    """
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    ids = (*encode_plain(tokenizer, document(example), split_special_tokens=split), *end)
    parts = [ids[start : start + cutoff_len] for start in range(0, len(ids), cutoff_len)]
    return [TokenRow(token_ids=part, scored=tuple(range(1, len(part)))) for part in parts if len(part) > 1]


def document(example: Example) -> str:
    """The text of an example for pre-training; a dialogue is its contents, one after the other."""
    if example.text is not None:
        return example.text
    answer = example.response or example.chosen
    return "\n".join(m.content for m in (*example.prompt, *((answer,) if answer else ())))


# ------------------------------------------------------------------------------------------- pairs, prompts, scoring


def encode_pair(example: Example, template: Template, tokenizer: Tokenizer, *, cutoff_len: int) -> Pair | Dropped:
    """The chosen and the rejected answer after one prompt, each ending at its end marker."""
    fitted = fit_pair(example, template, tokenizer, cutoff_len=cutoff_len)
    return fitted if isinstance(fitted, Dropped) else fitted[0]


def fit_pair(
    example: Example, template: Template, tokenizer: Tokenizer, *, cutoff_len: int
) -> tuple[Pair, int] | Dropped:
    """`encode_pair`, with the number of prompt tokens that did not fit.

    A pair is dropped when an answer would lose its end marker: a reward is read there.
    """
    if example.chosen is None or example.rejected is None:
        return Dropped(origin=example.origin, reason="no chosen and rejected answers")
    if example.chosen.content == example.rejected.content:
        return Dropped(origin=example.origin, reason="chosen and rejected are the same")
    fitted = _fit_answers(example, (example.chosen, example.rejected), template, tokenizer, cutoff_len=cutoff_len)
    if isinstance(fitted, Dropped):
        return fitted
    (chosen, rejected), lost = fitted
    return Pair(chosen=chosen, rejected=rejected, example=example, margin=example.margin), lost


def fit_ranking(
    example: Example, template: Template, tokenizer: Tokenizer, *, cutoff_len: int
) -> tuple[Ranking, int] | Dropped:
    """The ranked answers of a row after one prompt (of a pair: both), and the number of prompt tokens that did not fit.

    Like a pair, it is dropped when an answer would lose its end marker.
    """
    answers = example.ranked or tuple(a for a in (example.chosen, example.rejected) if a is not None)
    if len(answers) < 2:
        return Dropped(origin=example.origin, reason="no ranked answers")
    if len({answer.content for answer in answers}) < len(answers):
        return Dropped(origin=example.origin, reason="two ranked answers are the same")
    fitted = _fit_answers(example, answers, template, tokenizer, cutoff_len=cutoff_len)
    return fitted if isinstance(fitted, Dropped) else (Ranking(answers=fitted[0], example=example), fitted[1])


def _fit_answers(
    example: Example, answers: Sequence[Message], template: Template, tokenizer: Tokenizer, *, cutoff_len: int
) -> tuple[tuple[TokenRow, ...], int] | Dropped:
    """Several answers after one prompt, which gives way to the longest of them; and how many tokens it lost."""
    try:
        source = chunks(encode_source(example, template, tokenizer))
        encoded = [template.encode_answer(tokenizer, a.content, newline=False, role=a.role) for a in answers]
    except UnusableTools as error:
        return Dropped(origin=example.origin, reason=error.what, detail=error.why)
    longest = max(map(len, encoded))
    whole = len(join(source))
    source_room, target_room = split_budget(whole, longest, cutoff_len)
    if target_room < longest:
        return Dropped(
            origin=example.origin,
            reason=ANSWER_TOO_LONG,
            detail=f"prompt {whole}, longer answer {longest}, cutoff_len {cutoff_len} tokens",
        )
    prompt = keep_tail(source, source_room)
    return tuple(scored_row(prompt, answer) for answer in encoded), whole - len(prompt)


def fit_labelled(
    example: Example, template: Template, tokenizer: Tokenizer, *, cutoff_len: int
) -> tuple[TokenRow, int] | Dropped:
    """A single answer with a label, ending at its end marker, and the number of prompt tokens that did not fit.

    Like a pair, it is dropped when the answer would lose its end marker.
    """
    if example.label is None:
        return Dropped(origin=example.origin, reason="no label (kto_tag)")
    return _fit_single(example, template, tokenizer, cutoff_len=cutoff_len)


def fit_scored(
    example: Example, template: Template, tokenizer: Tokenizer, *, cutoff_len: int
) -> tuple[TokenRow, int] | Dropped:
    """The same for a single answer with a score."""
    if example.score is None:
        return Dropped(origin=example.origin, reason="no score")
    return _fit_single(example, template, tokenizer, cutoff_len=cutoff_len)


def _fit_single(
    example: Example, template: Template, tokenizer: Tokenizer, *, cutoff_len: int
) -> tuple[TokenRow, int] | Dropped:
    if example.response is None:
        return Dropped(origin=example.origin, reason="no answer")
    try:
        source = chunks(encode_source(example, template, tokenizer))
        answer = template.encode_answer(tokenizer, example.response.content, newline=False, role=example.response.role)
    except UnusableTools as error:
        return Dropped(origin=example.origin, reason=error.what, detail=error.why)
    whole = len(join(source))
    source_room, target_room = split_budget(whole, len(answer), cutoff_len)
    if target_room < len(answer):
        return Dropped(
            origin=example.origin,
            reason=ANSWER_TOO_LONG,
            detail=f"prompt {whole}, answer {len(answer)}, cutoff_len {cutoff_len} tokens",
        )
    prompt = keep_tail(source, source_room)
    return scored_row(prompt, answer), whole - len(prompt)


def encode_prompt(
    example: Example, template: Template, tokenizer: Tokenizer, *, index: int, cutoff_len: int
) -> Prompt | Dropped:
    """A prompt to be answered; what is too long loses its beginning, whole messages where that is enough."""
    if not example.prompt:
        return Dropped(origin=example.origin, reason="no prompt")
    try:
        source = chunks(encode_source(example, template, tokenizer))
    except UnusableTools as error:
        return Dropped(origin=example.origin, reason=error.what, detail=error.why)
    kept = keep_tail(source, cutoff_len)
    return Prompt(index=index, token_ids=kept, example=example, cut=len(kept) < len(join(source)))


def encode_dialogue(
    messages: Sequence[Message],
    response: str,
    template: Template,
    tokenizer: Tokenizer,
    *,
    cutoff_len: int | None = None,
) -> TokenRow:
    """A prompt and a finished answer to be scored: the scored tokens are the answer's, end marker included.

    With `cutoff_len` the prompt gives way as in `encode_prompt`, never the answer.
    """
    source = chunks(template.encode(tokenizer, messages, add_generation_prompt=True))
    answer = template.encode_answer(tokenizer, response, newline=False)
    prompt = join(source) if cutoff_len is None else keep_tail(source, max(1, cutoff_len - len(answer)))
    return scored_row(prompt, answer)


def scored_row(prompt: Sequence[int], answer: Sequence[int]) -> TokenRow:
    """A prompt and its answer as one row whose scored tokens are the answer's."""
    return TokenRow(token_ids=(*prompt, *answer), scored=tuple(range(len(prompt), len(prompt) + len(answer))))
