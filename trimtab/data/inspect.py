"""What `trimtab data FILE` shows: counts, dropped rows, lengths, cuts, repeats, and rows with the trained tokens marked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from trimtab.data.loader import StageData, load_data
from trimtab.data.templates import Template
from trimtab.data.tokenizer import Tokenizer
from trimtab.types import Pair, Prompt, Ranking, TokenRow

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 5  # dropped rows shown for each reason
BINS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of a stage's data.

    Attributes:
        reasons: (reason, how many rows, the first few as `file:row (detail)`), the most frequent first.
        histogram: (lowest length, highest length, rows), every length in one bin.
        scored_share: tokens that are learnt or scored, as a share of all tokens.
    """

    read: int
    dropped: int
    train: int
    eval: int
    cut: int
    lost: int
    duplicates: int
    overlap: int
    tokens: int
    scored_share: float
    reasons: tuple[tuple[str, int, tuple[str, ...]], ...]
    histogram: tuple[tuple[int, int, int], ...]


def summary(data: StageData[Any]) -> Summary:
    """The figures of loaded data."""
    report = data.report
    tokens = sum(report.lengths)
    several = [row for row in (*data.train, *data.eval) if isinstance(row, Pair | Ranking)]
    if several:  # their length is that of the longest answer's row; what is scored lies in all
        tokens = sum(len(answer.token_ids) for row in several for answer in row.answers)
    return Summary(
        read=sum(s.read for s in report.sets),
        dropped=len(report.dropped),
        train=report.train,
        eval=report.eval,
        cut=report.cut,
        lost=report.lost,
        duplicates=report.duplicates,
        overlap=report.overlap,
        tokens=tokens,
        scored_share=sum(report.scored) / tokens if tokens else 0.0,
        reasons=tuple(
            (
                reason,
                len(rows),
                tuple(str(row.origin) + (f" ({row.detail})" if row.detail else "") for row in rows[:SHOWN]),
            )
            for reason, rows in report.reasons().items()
        ),
        histogram=histogram(report.lengths),
    )


def histogram(lengths: tuple[int, ...], bins: int = BINS) -> tuple[tuple[int, int, int], ...]:
    """(lowest, highest, rows) for at most `bins` neighbouring ranges of one round width (1, 2, 5, 10, 20 ...)."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    widths = (step * 10**power for power in range(12) for step in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < bins)
    return tuple(
        (start * width, (start + 1) * width - 1, sum(length // width == start for length in lengths))
        for start in range(low // width, high // width + 1)
    )


def spans(row: TokenRow | Prompt, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """A row as text in pieces, each with whether it is learnt or scored."""
    scored = set(row.scored) if isinstance(row, TokenRow) else set()
    return [
        (tokenizer.decode([row.token_ids[index] for index in run]), trained)
        for trained, group in groupby(range(len(row.token_ids)), key=lambda index: index in scored)
        if (run := list(group))
    ]


def inspect(
    config: Any, tokenizer: Tokenizer, template: Template, *, rows: int = 3, console: Console | None = None
) -> None:
    """Load the data of a config and print what became of it.

    Args:
        config: as for `load_data`.
        rows: how many rows to show in full.

    Raises:
        DataError: as `load_data` does.
    """
    from rich.console import Console as RichConsole

    show(load_data(config, tokenizer, template), tokenizer, rows=rows, console=console or RichConsole())


def show(data: StageData[Any], tokenizer: Tokenizer, *, rows: int, console: Console) -> None:
    """Print loaded data."""
    from rich.table import Table
    from rich.text import Text

    figures = summary(data)
    sets = Table("data set", "from", "rows read", "examples", title=f"stage {data.stage}", title_justify="left")
    for s in data.report.sets:
        sets.add_row(Text(s.name), Text(s.source), str(s.read), str(s.examples))
    console.print(sets)
    for note in data.report.notes:
        console.print(Text(note))
    counts = f"{figures.read} read, {figures.dropped} dropped, {figures.train} to train on"
    if data.report.streaming:
        counts = "rows to train on are read as they come"
    console.print(
        f"{counts}, {figures.eval} held out; "
        f"{figures.tokens} tokens, {figures.scored_share:.0%} of them trained or scored"
    )

    if figures.reasons:
        dropped = Table("dropped", "rows", "which", title="not used", title_justify="left")
        for reason, count, first in figures.reasons:
            dropped.add_row(Text(reason), str(count), Text("\n".join(first) + ("\n..." if count > len(first) else "")))
        console.print(dropped)

    lengths = Table("tokens", "rows", "", title="lengths", title_justify="left")
    most = max((count for _, _, count in figures.histogram), default=1)
    for low, high, count in figures.histogram:
        lengths.add_row(f"{low}" if low == high else f"{low}-{high}", str(count), "█" * round(40 * count / most))
    console.print(lengths)
    console.print(f"cut to cutoff_len: {figures.cut} rows, {figures.lost} tokens lost")
    console.print(f"repeated rows: {figures.duplicates}; held-out prompts that are also trained on: {figures.overlap}")

    for row, example in list(zip(data.train, data.train_examples, strict=True))[:rows]:
        parts = [("", row)]
        if isinstance(row, Pair):
            parts = [("chosen", row.chosen), ("rejected", row.rejected)]
        elif isinstance(row, Ranking):
            parts = [(f"ranked {place}", answer) for place, answer in enumerate(row.answers, 1)]
        for name, part in parts:
            console.rule(Text(f"{example.origin} {name}".strip()), align="left")
            text = Text()
            for piece, trained in spans(part, tokenizer):
                text.append(piece, style="bold green" if trained else "dim")
            console.print(text)
    console.print(Text.assemble(("green", "bold green"), ": trained or scored; ", ("dim", "dim"), ": only read"))
