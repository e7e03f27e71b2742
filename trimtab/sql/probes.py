"""Values on both sides of a condition: 54, 55 and 56 for `price > 55`, a match and near misses for LIKE, both ends of a year.

A value is what a column holds: an int, a float, text, a date as ISO text, or text in the column's own pattern.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from typing import Any

from trimtab.sql.functions import format_time, iso, like, moment, now
from trimtab.sql.infer import Condition
from trimtab.sql.schema import Column

Value = int | float | str


def probes(column: Column, condition: Condition, fold: int) -> list[tuple[Value, bool]]:
    """Values for the column, each with whether the condition holds for it; nearest to the border first.

    Args:
        fold: the case rule of LIKE, as `functions.like` has it.
    """
    wrap, values = condition.wrap, [v for v in condition.values if v is not None]
    if condition.op == "null" or not values:
        return []
    if wrap == "?":
        return [(value, True) for value in _spread(column, values)]
    dated = column.kind in ("date", "timestamp") or bool(column.pattern)
    if wrap.startswith("parse:") or (wrap == "" and dated):
        found = _dates(column, condition, values)
    elif wrap in ("year", "month", "day"):
        found = _parts(column, condition, values, {"year": "%Y", "month": "%m", "day": "%d"}[wrap])
    elif wrap.startswith("format:"):
        found = _parts(column, condition, values, wrap.removeprefix("format:"))
    elif wrap.startswith("left:") and dated:
        found = _parts(column, condition, values, {"4": "%Y", "7": "%Y-%m"}.get(wrap[5:], "%Y-%m-%d"))
    elif wrap.startswith("left:"):
        listed = [str(v) + end for v in values for end in ("", "x", "xy")] + [str(v)[:-1] for v in values]
        size = int(wrap[5:])
        found = [(v, holds(condition, v[:size])) for v in listed if v]
    elif wrap == "length":
        numbers = [n for v in values if isinstance(v, int) for n in (v, v - 1, v + 1) if 0 < n < 200]
        found = [("x" * n, holds(condition, n)) for n in numbers]
    elif condition.op == "like":
        found = [(v, bool(like(p, v, None, fold)) != condition.negated) for p in values for v in _like(str(p))]
    elif column.kind in ("integer", "real", "boolean"):
        found = _numbers(column, condition, values)
    else:
        found = _texts(condition, [str(v) for v in values])
    return list(dict.fromkeys(found))


def _spread(column: Column, values: list[Any]) -> list[Value]:
    """Values far and near, for a column that is computed with in a way that is not followed: which of them holds is not known."""
    numbers = [v for v in values if isinstance(v, int | float)]
    if column.kind in ("date", "timestamp") or column.pattern:
        start = moment(now()) or dt.datetime(2025, 6, 15)
        days = sorted(
            {
                1,
                40,
                400,
                4000,
                9000,
                13000,
                *(abs(int(n)) * k + d for n in numbers for k in (1, 30, 365) for d in (-1, 0, 1)),
            }
        )
        return [written(column, start - dt.timedelta(days=n)) for n in days if n < 60_000]
    if column.kind in ("integer", "real"):
        spots = [x for n in numbers for x in (n, n - 1, n + 1, n / 2, n / 2 + 1, n * 2, n * 2 + 1, -n)]
        return list(dict.fromkeys(int(x) if column.kind == "integer" else float(x) for x in spots))
    return []


def holds(condition: Condition, value: Any) -> bool:
    """Whether the condition, its constants taken as they are, holds for what the wrapped column gives."""
    values = condition.values
    try:
        match condition.op:
            case "=" | "in":
                truth = value in values
            case "<>":
                truth = value not in values
            case "<":
                truth = value < values[0]
            case "<=":
                truth = value <= values[0]
            case ">":
                truth = value > values[0]
            case ">=":
                truth = value >= values[0]
            case "between":
                truth = values[0] <= value <= values[1]
            case _:
                truth = False
    except TypeError:
        return False
    return truth != condition.negated


def _with(condition: Condition, convert: Callable[[Any], Any]) -> Condition:
    return Condition(
        place=condition.place, op=condition.op, values=tuple(map(convert, condition.values)), negated=condition.negated
    )


def _numbers(column: Column, condition: Condition, values: list[Any]) -> list[tuple[Value, bool]]:
    listed: list[float] = []
    try:
        numbers = [float(v) for v in values]
    except ValueError:
        return []
    for v in numbers:
        if column.kind == "integer":
            listed += [v, v - 1, v + 1, v + 3, v - 4] if v.is_integer() else [v // 1, v // 1 + 1]
        elif column.kind == "boolean":
            listed += [v, 1 - v] if v in (0, 1) else []
        else:
            step = 1.0 if v.is_integer() else 10.0 ** -len(repr(v).partition(".")[2])
            listed += [round(x, 9) for x in (v, v - step, v + step, v + 7 * step, v - 0.5)]
    if condition.op == "between":
        listed.append((numbers[0] + numbers[1]) // 2)
    asked = _with(condition, float)
    found = [(x, holds(asked, x)) for x in listed if x >= 0 or min(numbers) < 1]
    return [(int(x) if column.kind != "real" else x, truth) for x, truth in found]


def _dates(column: Column, condition: Condition, values: list[Any]) -> list[tuple[Value, bool]]:
    whens = [moment(str(v)) for v in values]
    if any(w is None for w in whens):
        return []
    second, day = dt.timedelta(seconds=1), dt.timedelta(days=1)
    steps = [day * 0, -day, day, day * 33, -day * 33, day * 400, -day * 400]
    if column.kind == "timestamp":
        steps = [day * 0, -second, second, -day, day, day * 40, -day * 40]
    listed = []
    for when in whens:
        for step in steps:
            try:
                moved = (when or dt.datetime.min) + step
            except OverflowError:
                continue
            listed.append(
                moved if column.kind == "timestamp" else moved.replace(hour=0, minute=0, second=0, microsecond=0)
            )
    asked = Condition(place=condition.place, op=condition.op, values=tuple(whens), negated=condition.negated)
    return [(written(column, when), holds(asked, when)) for when in listed]


def _parts(column: Column, condition: Condition, values: list[Any], pattern: str) -> list[tuple[Value, bool]]:
    """Dates at both ends of the years, months or days that a part of the date is compared with."""
    listed: list[dt.datetime] = []
    for value in values:
        text = str(value)
        if pattern == "%Y" and re.fullmatch(r"\d{4}", text):
            year = int(text)
            spots = [(year, 1, 1), (year, 12, 31), (year - 1, 12, 31), (year + 1, 1, 1), (year, 6, 15)]
        elif pattern in ("%Y-%m", "%Y%m") and re.fullmatch(r"\d{4}-?\d{2}", text) and 1 <= int(text[-2:]) <= 12:
            year, month = int(text[:4]), int(text[-2:])
            spots = [
                (year, month, 1),
                (year, month, 28),
                (year - 1, month, 5),
                (year, month % 12 + 1, 1),
                (year, (month + 10) % 12 + 1, 28),
            ]
        elif pattern == "%m" and text.isdigit() and 1 <= int(text) <= 12:
            month = int(text)
            spots = [(2023, month, 1), (2024, month, 28), (2023, month % 12 + 1, 1), (2024, (month + 10) % 12 + 1, 28)]
        elif pattern == "%d" and text.isdigit() and 1 <= int(text) <= 31:
            number = int(text)
            spots = [(2023, 3, number), (2024, 1, number), (2023, 3, number % 28 + 1), (2023, 3, max(1, number - 1))]
        elif (when := moment(text)) is not None:
            spots = [(d.year, d.month, d.day) for d in (when, when - dt.timedelta(1), when + dt.timedelta(1))]
        else:
            continue
        listed += [dt.datetime(*spot) for spot in spots if 1 < spot[0] < 9999]
    number = all(isinstance(v, int | float) for v in values)

    def part(when: dt.datetime) -> Any:
        shown = format_time(iso(when), pattern)
        return int(shown) if number and shown is not None and shown.isdigit() else shown

    asked = _with(condition, (lambda v: v) if number else str)
    return [(written(column, when), holds(asked, part(when))) for when in listed]


def written(column: Column, when: dt.datetime) -> str:
    """A moment as the column holds it."""
    if column.pattern:
        return str(format_time(iso(when), column.pattern))
    return iso(when) if column.kind == "timestamp" else iso(when)[:10]


def _texts(condition: Condition, values: list[str]) -> list[tuple[Value, bool]]:
    listed = []
    for v in values:
        # Beside it: its mutants' literals, another case, something before and behind it.
        listed += [v, v + ("1" if v[-1:].isdigit() else "x"), v[:-1], v.swapcase(), "x" + v]
        if v.isdigit():
            listed += [str(int(v) + 1).zfill(len(v)), str(max(0, int(v) - 1)).zfill(len(v))]
    asked = _with(condition, str)
    wrap = {"lower": str.lower, "upper": str.upper}.get(condition.wrap, str)
    return [(v, holds(asked, wrap(v))) for v in listed if v]


def _like(pattern: str) -> list[str]:
    core = pattern.replace("_", "a")
    bare = core.replace("%", "")
    middle = core.strip("%").replace("%", "x")
    listed = [
        bare,
        middle,
        core.replace("%", "x"),
        middle + "x",
        "x" + middle,
        "x" + middle + "x",
        middle[:-1],
        middle[1:],
        middle.swapcase(),
    ]
    if "_" in pattern:
        listed += [pattern.replace("%", "").replace("_", ""), pattern.replace("%", "").replace("_", "aa")]
    return [v for v in dict.fromkeys(listed) if v]
