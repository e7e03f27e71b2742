"""Two answers compared: bags of rows, in gold's order where gold orders, ties in any order.

Values: integers and floats that are within a tolerance are one number, so are booleans; a date and the same date at midnight are one
moment; NULL equals NULL and nothing else; text is compared as it is, and a number never equals its text.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from trimtab.sql.functions import iso, moment
from trimtab.sql.verdicts import Kind, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """|a - b| <= absolute + relative * max(|a|, |b|), for two numbers of which one is a float."""

    relative: float = 1e-9
    absolute: float = 1e-9


@dataclass(frozen=True, slots=True)
class Difference:
    """What two answers differ in; `equal` has no message."""

    kind: Kind
    message: str = ""


def plain(value: Any) -> Any:
    """The one form of a value: numbers as int or float, moments as ISO text without midnight."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 2**53:
            return int(value)
        return value
    if isinstance(value, str):
        if 8 <= len(value) <= 32 and value[:4].isdigit() and "-" in value:
            when = moment(value)
            return iso(when) if when is not None and not value[-6:].startswith(("+", "-")) else value
        return value
    if hasattr(value, "isoformat"):
        return plain(value.isoformat())
    return value


def same(a: Any, b: Any, tolerance: Tolerance) -> bool:
    """Two plain values."""
    if isinstance(a, float) or isinstance(b, float):
        if not isinstance(a, int | float) or not isinstance(b, int | float):
            return False
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        if math.isinf(a) or math.isinf(b):
            return a == b
        return abs(a - b) <= tolerance.absolute + tolerance.relative * max(abs(a), abs(b))
    return type(a) is type(b) and bool(a == b)


def _rank(value: Any) -> tuple[int, Any]:
    """A total order over values, in which numbers stand by size."""
    if value is None:
        return (0, 0)
    if isinstance(value, int | float):
        return (1, -math.inf if value != value else value)
    return (
        (2, value)
        if isinstance(value, str)
        else (3, bytes(value) if isinstance(value, bytes | bytearray) else str(value).encode())
    )


def _key(row: Row) -> tuple[Any, ...]:
    """What must agree exactly: everything but floats, and the kinds of the rest."""
    return tuple(("number",) if isinstance(v, int | float) else (type(v).__name__, v) for v in row)


def same_bag(left: Sequence[Row], right: Sequence[Row], tolerance: Tolerance) -> bool:
    """The same rows, each as often, in any order."""
    if len(left) != len(right):
        return False
    if Counter(left) == Counter(right):
        return True
    if not any(isinstance(v, float) for row in itertools.chain(left, right) for v in row):
        return False
    groups: dict[tuple[Any, ...], tuple[list[Row], list[Row]]] = {}
    for side, rows in ((0, left), (1, right)):
        for row in rows:
            groups.setdefault(_key(row), ([], []))[side].append(row)
    return all(len(a) == len(b) and _match(a, b, tolerance) for a, b in groups.values())


def _match(left: list[Row], right: list[Row], tolerance: Tolerance) -> bool:
    """A perfect matching under the tolerance. Rows are sorted; a row looks for its partner only among neighbours in its first number."""

    def close(a: Row, b: Row) -> bool:
        return all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))

    left, right = (sorted(rows, key=lambda r: tuple(map(_rank, r))) for rows in (left, right))
    if all(close(a, b) for a, b in zip(left, right, strict=True)):
        return True
    # Noise in an early column can order two rows differently: search, for as many rows as that is affordable.
    if len(left) > 2000:
        return False
    free = list(right)
    for row in left:
        found = next((i for i, other in enumerate(free) if close(row, other)), None)
        if found is None:
            return False
        free.pop(found)
    return True


def _distinct(rows: Sequence[Row], tolerance: Tolerance) -> list[Row]:
    """Rows without those that another is the same as."""
    kept: list[Row] = []
    for row in sorted(set(rows), key=lambda r: tuple(map(_rank, r))):
        if not (kept and all(same(x, y, tolerance) for x, y in zip(kept[-1], row, strict=True))):
            kept.append(row)
    return kept


def compare(
    predicted: Sequence[Row],
    gold: Sequence[Row],
    *,
    columns: tuple[int, int],
    groups: Sequence[int] | None = None,
    permuted: bool = False,
    tolerance: Tolerance | None = None,
) -> Difference:
    """The verdict on two answers that ran.

    Args:
        columns: number of columns of the prediction and of gold (an empty answer has columns, too).
        groups: where gold orders: the sizes of its runs of rows with equal sort keys, in order; None where it does not.
        permuted: accept gold's columns in another order.

    Returns:
        equal, unverified (both empty), wrong_columns, wrong_rows, wrong_order or wrong_multiplicity.
    """
    tolerance = tolerance or Tolerance()
    if columns[0] != columns[1]:
        return Difference("wrong_columns", f"{columns[0]} columns, gold has {columns[1]}")
    if not predicted and not gold:
        return Difference("unverified", "both answers are empty")
    left, right = ([tuple(map(plain, row)) for row in rows] for rows in (predicted, gold))
    best = _positional(left, right, groups, tolerance)
    if permuted and best.kind != "equal":
        for order in _orders(left, right):
            other = _positional([tuple(row[i] for i in order) for row in left], right, groups, tolerance)
            if other.kind == "equal":
                return other
            if best.kind == "wrong_rows":
                best = other
    return best


def _positional(left: list[Row], right: list[Row], groups: Sequence[int] | None, tolerance: Tolerance) -> Difference:
    if same_bag(left, right, tolerance):
        if groups is None:
            return Difference("equal")
        start = 0
        for size in groups:
            if not same_bag(left[start : start + size], right[start : start + size], tolerance):
                return Difference(
                    "wrong_order", f"from row {start + 1} on: {_show(left[start])}, gold {_show(right[start])}"
                )
            start += size
        return Difference("equal")
    if left and right and same_bag(_distinct(left, tolerance), _distinct(right, tolerance), tolerance):
        return Difference("wrong_multiplicity", f"{len(left)} rows, gold {len(right)}, the same ones")
    surplus = next(iter((Counter(left) - Counter(right)).elements()), None)
    missing = next(iter((Counter(right) - Counter(left)).elements()), None)
    parts = [f"{len(left)} rows, gold {len(right)}"]
    parts += [f"not in gold: {_show(surplus)}"] if surplus is not None else []
    parts += [f"missing: {_show(missing)}"] if missing is not None else []
    return Difference("wrong_rows", "; ".join(parts))


def _show(row: Row) -> str:
    text = ", ".join("NULL" if v is None else repr(v) for v in row)
    return f"({text})" if len(text) <= 100 else f"({text[:97]}...)"


def _orders(left: list[Row], right: list[Row], most: int = 200) -> list[tuple[int, ...]]:
    """Column orders worth a try: each column goes where gold's column holds the same bag of (roughly) the same values."""
    if not left or not right:
        return []
    width = len(right[0])

    def sketch(rows: list[Row], i: int) -> Counter[Any]:
        return Counter(f"{row[i]:.6g}" if isinstance(row[i], float | int) else row[i] for row in rows)

    ours, theirs = ([sketch(rows, i) for i in range(width)] for rows in (left, right))
    if any(theirs.count(one) != ours.count(one) for one in theirs):
        return []  # and where the counts agree no choice below leads to a dead end
    fits = [[j for j in range(width) if ours[j] == theirs[i]] for i in range(width)]
    found: list[tuple[int, ...]] = []

    def extend(chosen: tuple[int, ...]) -> None:
        if len(found) >= most:
            return
        if len(chosen) == width:
            found.append(chosen)
            return
        for j in fits[len(chosen)]:
            if j not in chosen:
                extend((*chosen, j))

    extend(())
    return found
