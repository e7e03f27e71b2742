"""What a stage trains on and is measured on, and the arithmetic of how it came about."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

from trimtab.data.dropped import Dropped
from trimtab.data.stream import RowStream
from trimtab.types import Example, Pair, Prompt, Ranking, TokenRow

RowT = TypeVar("RowT", TokenRow, Pair, Ranking, Prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """What became of one data set: rows read, and rows that are examples."""

    name: str
    source: str
    read: int
    examples: int
    unread_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The arithmetic of a stage's data.

    Attributes:
        sets: each data set, those for evaluation included.
        dropped: every row that is not used.
        examples: rows after mixing, before encoding.
        train, eval: rows after encoding and splitting.
        cut: rows that did not fit within cutoff_len and lost tokens; `lost` of them in all.
        lengths: tokens of every row (of the longer answer's row for pairs), train and eval.
        scored: of those, the tokens that are learnt or scored.
        duplicates: rows whose tokens are those of an earlier row.
        overlap: held-out rows whose prompt is also trained on.
        notes: what the user should know.
        streaming: rows to train on are read later, so only held-out ones are counted here.
    """

    sets: tuple[SetReport, ...]
    dropped: tuple[Dropped, ...]
    examples: int
    train: int
    eval: int
    cut: int
    lost: int
    lengths: tuple[int, ...]
    scored: tuple[int, ...]
    duplicates: int
    overlap: int
    notes: tuple[str, ...] = ()
    streaming: bool = False

    def reasons(self) -> dict[str, list[Dropped]]:
        """Dropped rows by reason, the most frequent first."""
        counted = Counter(row.reason for row in self.dropped)
        return {reason: [row for row in self.dropped if row.reason == reason] for reason, _ in counted.most_common()}

    def lines(self) -> list[str]:
        """The report as a few lines for the start of a run."""
        read = sum(s.read for s in self.sets)
        held = f", {self.eval} held out" if self.eval else ""
        if self.streaming:
            lost = f" ({len(self.dropped)} dropped)" if self.dropped else ""
            lines = [f"data: rows to train on are read as they come{held}{lost}"]
        else:
            lines = [f"data: {read} rows read, {len(self.dropped)} dropped, {self.train} to train on{held}"]
        for reason, rows in self.reasons().items():
            shown = "; ".join(str(row.origin) + (f" ({row.detail})" if row.detail else "") for row in rows[:3])
            lines.append(f"  dropped {len(rows)}: {reason}: {shown}" + (" ..." if len(rows) > 3 else ""))
        if self.lengths:
            ordered = sorted(self.lengths)
            middle, high = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
            lines.append(f"  tokens a row: median {middle}, 95 % within {high}, longest {ordered[-1]}")
        if self.cut:
            lines.append(f"  {self.cut} rows cut to cutoff_len, {self.lost} tokens lost")
        if self.duplicates:
            lines.append(f"  {self.duplicates} rows repeat an earlier one")
        if self.overlap:
            lines.append(f"  {self.overlap} held-out rows have a prompt that is also trained on")
        return [*lines, *(f"  {note}" for note in self.notes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageData(Generic[RowT]):
    """The rows of a stage: token rows for pt, sft and kto, pairs for rm and its like, prompts for ppo.

    Attributes:
        train_examples, eval_examples: the example of each row, in the same order.
        eval_prompts: the held-out prompts, for evaluation by generating; the gold answer is `prompt.example.response`.
        packs: with neat_packing, the numbers of the training rows that are one item of a batch; else None.
        stream: with streaming, where training rows come from; then `train` is empty.
    """

    stage: str
    train: list[RowT]
    eval: list[RowT]
    train_examples: list[Example]
    eval_examples: list[Example]
    eval_prompts: list[Prompt]
    report: Report
    packs: list[list[int]] | None = None
    stream: RowStream | None = None
