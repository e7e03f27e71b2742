"""Rows put together into sequences of at most `cutoff_len` tokens (`packing`, `neat_packing`).

neat_packing   rows stay rows: a pack is a list of them that fits into cutoff_len, and a batch counts packs in place of
               rows. No row sees another, so the loss is that of the same rows unpacked.
packing        the rows of a pack are joined into one row: later ones see earlier ones, and positions run on. In
               pre-training all documents are one text, cut every cutoff_len tokens.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence

from trimtab.types import TokenRow


def packs(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Row numbers in packs of at most `room` tokens: the longest row left, then the longest that still fits, and so on.

    Every row is in one pack; a row longer than `room` has one to itself. Packs are in the order of their first rows.
    """
    left = sorted((length, -number) for number, length in enumerate(lengths))  # of equal lengths the earlier row first
    found: list[list[int]] = []
    while left:
        length, number = left.pop()
        pack, free = [-number], room - length
        while left and (place := bisect_right(left, (free, 1))):
            length, number = left.pop(place - 1)
            pack.append(-number)
            free -= length
        insort(found, sorted(pack))
    return found


def joined(rows: Sequence[TokenRow]) -> TokenRow:
    """Rows as one row; each keeps its scored tokens."""
    ids: list[int] = []
    scored: list[int] = []
    for row in rows:
        scored += [len(ids) + index for index in row.scored]
        ids += row.token_ids
    return TokenRow(token_ids=tuple(ids), scored=tuple(scored))


def recut(rows: Sequence[TokenRow], length: int) -> tuple[list[TokenRow], list[int]]:
    """Documents as one text, cut every `length` tokens; every token but the first of a piece is a label.

    Returns:
        The pieces, and for each the number of the row that it begins in. A last piece of one token is left out.
    """
    ids: list[int] = []
    owner: list[int] = []
    for number, row in enumerate(rows):
        ids += row.token_ids
        owner += [number] * len(row.token_ids)
    starts = [start for start in range(0, len(ids), length) if len(ids) - start > 1]
    pieces = [tuple(ids[start : start + length]) for start in starts]
    return [TokenRow(token_ids=p, scored=tuple(range(1, len(p)))) for p in pieces], [owner[start] for start in starts]
