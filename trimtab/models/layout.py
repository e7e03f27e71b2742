"""Which rows come together in a forward pass, and what they have in common: token ids in, row numbers out. No tensor is made here.

`forward.pack` lays the rows of a micro-batch out; `plan` cuts a batch into micro-batches of at most so many tokens, counted as they will
lie there (a few more where a pass leaves out the last token of rows, with which a multiple of `GRAIN` may end). In the shared layout rows
lie in the order of their tokens, so those with most in common are neighbours, and what a row has in common with the one before it is
there once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from trimtab.types import TokenRow

Layout = Literal["padded", "packed", "shared"]

GRAIN = 8
"""Neighbours share what they have in common up to a multiple of this many tokens: every parting costs a block of attention of its own. The
whole prompt is shared where it is the same, whatever its length."""


def prefix(row: TokenRow) -> tuple[int, ...]:
    """What comes before the first scored token: the part that rows of one prompt have in common."""
    return row.token_ids[: row.scored[0]]


def in_common(a: TokenRow, b: TokenRow) -> int:
    """How many tokens from the first one on are computed once for these two rows, where they lie side by side.

    All, if they are the same. Of one prompt the prompt and what the answers begin with, else what the rows begin with: both in steps of
    `GRAIN`.
    """
    x, y = a.token_ids, b.token_ids
    if x == y:
        return len(x)
    low, high = 0, min(len(x), len(y))
    while low < high:  # halving: comparing slices is cheap
        middle = (low + high + 1) // 2
        low, high = (middle, high) if x[low:middle] == y[low:middle] else (low, middle - 1)
    start = a.scored[0] if a.scored[0] == b.scored[0] <= low else 0
    return start + (low - start) // GRAIN * GRAIN


def order(row: TokenRow) -> tuple[tuple[int, ...], int]:
    """In this order rows lie in a shared sequence: those with most in common are neighbours."""
    return row.token_ids, row.scored[0]


def spared(rows: Sequence[TokenRow]) -> int:
    """How many tokens the shared layout does not compute, of rows in one micro-batch."""
    return sum(in_common(a, b) for a, b in pairwise(sorted(rows, key=order)))


def plan(
    rows: Sequence[TokenRow], budget: int, *, layout: Layout = "padded", unit: int | Sequence[int] = 1
) -> list[list[int]]:
    """Cut rows into micro-batches of at most `budget` tokens, padding counted; a unit longer than that goes alone.

    Padded rows of like length come together, and a micro-batch is closed when its padding would cost more than another pass does (taken
    as a sixteenth of the budget, at least 64 tokens). Others are filled to the budget, shared ones with rows that begin alike, to at most
    as many scored tokens. Losses do not depend on the cut: weights are fixed before it.

    Args:
        unit: rows that belong together are consecutive, this many at a time (2 for pairs; for groups of
            unlike size, their sizes), and are never separated.

    Returns:
        Row numbers of each micro-batch; every row once.
    """
    sizes = [unit] * -(-len(rows) // unit) if isinstance(unit, int) else unit
    ends = list(accumulate(sizes))
    blocks = [list(range(end - size, min(end, len(rows)))) for size, end in zip(sizes, ends, strict=True)]
    if layout == "padded":
        return _plan_padded(rows, blocks, budget)
    if layout == "shared":
        return _plan_shared(rows, _blocks(rows, budget) if unit == 1 else blocks, budget)
    cut: list[list[int]] = []
    room = 0
    for size, block in sorted(
        ((sum(len(rows[i].token_ids) for i in block), block) for block in blocks), key=lambda item: -item[0]
    ):
        if size > room:
            cut.append([])
            room = budget
        cut[-1].extend(block)
        room -= size
    return cut


def _blocks(rows: Sequence[TokenRow], budget: int) -> list[list[int]]:
    """Rows of one prompt together, in parts of at most `budget` tokens (one answer at least): a data set with a single prompt is cut."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(prefix(row), []).append(i)
    parts: list[list[int]] = []
    for group in groups.values():
        shared, room = rows[group[0]].scored[0], 0
        for i in group:
            own = len(rows[i].token_ids) - shared
            if own > room or i == group[0]:
                parts.append([])
                room = budget - shared
            parts[-1].append(i)
            room -= own
    return parts


def _plan_shared(rows: Sequence[TokenRow], blocks: list[list[int]], budget: int) -> list[list[int]]:
    """Blocks in the order of their tokens, so that those which begin alike come together."""
    cut: list[list[int]] = []
    held: list[TokenRow] = []
    size = scored = 0
    for block in sorted(blocks, key=lambda block: min(order(rows[i]) for i in block)):
        grown, more = list(held), size
        for i in block:
            more += _insert(grown, rows[i])
        own = sum(len(rows[i].scored) for i in block)
        # what is read of the rows takes memory too, and equal rows add no tokens
        if not cut or max(more, scored + own) > budget:
            cut.append([])
            grown, more, scored = [], 0, 0
            for i in block:
                more += _insert(grown, rows[i])
        cut[-1].extend(block)
        held, size, scored = grown, more, scored + own
    return cut


def _insert(held: list[TokenRow], row: TokenRow) -> int:
    """Put a row in its place among others; how many tokens more they are together."""
    at = bisect_left(held, order(row), key=order)
    before, after = held[at - 1 : at], held[at : at + 1]
    more = len(row.token_ids) - sum(in_common(one, row) for one in before + after)
    if before and after:
        more += in_common(before[0], after[0])
    held.insert(at, row)
    return more


def _plan_padded(rows: Sequence[TokenRow], blocks: list[list[int]], budget: int) -> list[list[int]]:
    lengths = [[len(rows[i].token_ids) for i in block] for block in blocks]
    cut: list[list[int]] = []
    real = count = longest = 0
    for block, own in sorted(zip(blocks, lengths, strict=True), key=lambda item: -max(item[1])):
        area = max(longest, *own) * (count + len(own))
        if cut and area <= budget and area - real - sum(own) <= max(64, budget // 16):
            cut[-1].extend(block)
            real, count = real + sum(own), count + len(own)
        else:
            cut.append(list(block))
            real, count, longest = sum(own), len(own), max(own)
    return cut
