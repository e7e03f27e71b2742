"""`trimtab data split`: training, validation and test rows, with no group on both sides of a border.

Groups are, by choice, rows with the same question (`random`), rows of one template (`template`: the question with its
numbers and quoted values masked; where the answers are SQL, the statement without its values), or rows with the same value
in a column. Rows with the same question always stay together, whatever the groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data import order, source, sql_text
from trimtab.data.clean import answers, question
from trimtab.data.info import DatasetSpec
from trimtab.data.similar import CHINESE_NUMBERS, NUMBERS, normal
from trimtab.errors import DataError
from trimtab.types import Example, Origin

GROUPS = order.SPLIT + 7
QUOTED = re.compile("'[^']*'|\"[^\"]*\"|“[^”]*”|‘[^’]*’|「[^」]*」|《[^》]*》")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The rows of each part as read, in the order of the file; `groups` of them in all, `unreadable` left out."""

    rows: Mapping[str, tuple[tuple[Origin, Any], ...]]
    groups: int
    unreadable: tuple[Origin, ...]


def split(spec: DatasetSpec, *, sizes: Mapping[str, float], by: str = "random", seed: int = 42) -> Parts:
    """Draw whole groups, in a seeded order, for each part of `sizes`; what is left is `train`.

    Args:
        sizes: rows of each part: a number from 1 on, a share below. Groups are whole, so a part may hold fewer.
        by: random, template, or the name of a column.

    Raises:
        DataError: a column that is not there, or nothing left to train on.
    """
    read = [(origin, value, source.example(value, origin, spec)) for origin, value in source.rows(spec)]
    rows = [(origin, value, example) for origin, value, example in read if isinstance(example, Example)]
    groups = _groups(rows, by)
    wanted = {part: int(size) if size >= 1 else round(size * len(rows)) for part, size in sizes.items()}
    shuffled = [groups[i] for i in order.epoch_order(len(groups), seed, GROUPS)]
    parts: dict[str, list[int]] = {"train": [], **{part: [] for part in wanted}}
    for group in shuffled:
        # the part that lacks most rows of those that the group fits into
        open_parts = [part for part in wanted if len(parts[part]) + len(group) <= wanted[part]]
        part = max(open_parts, key=lambda p: wanted[p] - len(parts[p]), default="train")
        parts[part] += group
    empty = [part for part, listed in parts.items() if not listed]
    if empty:
        largest = max((len(group) for group in groups), default=0)
        raise DataError(
            f"no rows for {empty[0]}: {len(rows)} rows in {len(groups)} groups, the largest of {largest}",
            where=str(spec.path),
            why=f"groups by {by} stay whole, and {', '.join(f'{p} is to have {n}' for p, n in wanted.items())}",
            remedy="choose other sizes, or other groups with --by",
        )
    return Parts(
        rows={part: tuple(rows[i][:2] for i in sorted(listed)) for part, listed in parts.items()},
        groups=len(groups),
        unreadable=tuple(origin for origin, _, example in read if not isinstance(example, Example)),
    )


def _groups(rows: Sequence[tuple[Origin, Any, Example]], by: str) -> list[list[int]]:
    """Row numbers that may not be separated: linked by the group's key or by an equal question."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Any, int] = {}
    for i, (origin, value, example) in enumerate(rows):
        keys: list[Any] = [("question", normal(question(example)))]
        if by == "template":
            keys.append(("template", template(example)))
        elif by != "random":
            if not isinstance(value, Mapping) or by not in value:
                raise DataError(
                    f"no column {by!r}",
                    where=str(origin),
                    why=f"it has {', '.join(map(str, value))}",
                    remedy="--by is random, template or a column that every row has",
                )
            keys.append(("column", str(value[by])))
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    found: dict[int, list[int]] = {}
    for i in range(len(rows)):
        found.setdefault(root(i), []).append(i)
    return list(found.values())


def template(example: Example) -> str:
    """What rows made from one template have in common."""
    listed = answers(example)
    if listed and sql_text.looks_like_sql(listed[0].content):
        skeleton = sql_text.skeleton(listed[0].content)
        if skeleton is not None:
            return skeleton
    text = normal(question(example))
    for pattern in (QUOTED, NUMBERS, CHINESE_NUMBERS):
        text = pattern.sub("?", text)
    return text
