"""Rows for the tables of a schema, made so that its gold queries have answers and near misses.

Each gold query gives *scenes*: partial rows, one for each table it reads, in which all conditions hold, or all but one, by a hair; where
it joins, the rows meet. Scenes are packed into few rows: a partial row goes into a row that says nothing else about its columns.
What is left open is filled at random from the same values, with NULLs, repeated rows, parents without children and children
without parents. Everything is drawn from one seed.
"""

from __future__ import annotations

import datetime as dt
import random
import re
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.sql.infer import Facts, Having, Place
from trimtab.sql.probes import probes, written
from trimtab.sql.schema import Column, Link, Schema, Table

Cell = tuple[str, str]
"""A table and a column, both in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What kind of instance.

    Attributes:
        rows: most rows of a table.
        nulls: share of NULLs in columns that may have them; `loose`, in columns that are looked up elsewhere.
        twins: share of rows that repeat another up to the key.
        apart: no two rows have the same value in a column that is sorted by, and each parent one child at most.
    """

    name: str
    rows: int
    nulls: float
    loose: float
    twins: float
    apart: bool = False


PROFILES = (
    Profile(name="full", rows=36, nulls=0.03, loose=0.0, twins=0.25),
    Profile(name="distinct", rows=30, nulls=0.0, loose=0.0, twins=0.0, apart=True),
    Profile(name="few", rows=9, nulls=0.08, loose=0.0, twins=0.2, apart=True),
    Profile(name="nulls", rows=36, nulls=0.22, loose=0.12, twins=0.3),
)

_WORDS = ("alpha", "beta", "gamma", "delta", "Alpha", "omega", "kappa", "sigma")
_WORDS_ZH = ("甲", "乙", "丙", "丁", "戊", "己", "庚", "辛")
_EMPTY = object()


@dataclass(slots=True)
class _Scene:
    """Partial rows for the sources of one query, and the places in them that must be equal; `block` keeps its rows to itself."""

    parts: dict[int, dict[str, Any]]
    tables: dict[int, str]
    joined: list[tuple[Place, Place]]
    block: set[tuple[str, int]] | None = None


@dataclass(slots=True)
class Ideas:
    """What a set of gold queries makes of a schema: values worth having, scenes, columns that are sorted by.

    Made once for a group of queries, used for every instance.
    """

    values: dict[Cell, list[Any]]
    scenes: list[list[_Scene]]
    sorted_by: set[Cell]
    means: set[Cell]


def ideas(schema: Schema, facts: Sequence[Facts | None], fold: int) -> Ideas:
    """Values and scenes for every query, in its order (none for a query that could not be read)."""
    values: dict[Cell, list[Any]] = {}
    scenes: list[list[_Scene]] = []
    sorted_by: set[Cell] = set()
    means: set[Cell] = set()
    for one in facts:
        if one is None:
            scenes.append([])
            continue
        scenes.append(list(_scenes(schema, one, values, fold)))
        if one.limited or one.ordered:
            sorted_by |= {(one.table(p), p[1]) for p in one.ordered}
        means |= {(one.table(p), p[1]) for p in one.means}
    for table in schema.tables:
        for column in table.columns:
            if column.values:
                values.setdefault((table.name.lower(), column.name.lower()), []).extend(column.values)
    return Ideas(
        values={k: list(dict.fromkeys(v)) for k, v in values.items()}, scenes=scenes, sorted_by=sorted_by, means=means
    )


def _scenes(schema: Schema, one: Facts, values: dict[Cell, list[Any]], fold: int) -> Iterator[_Scene]:
    options: dict[Place, list[tuple[Any, int]]] = {}
    for condition in one.conditions:
        table = schema.table(one.table(condition.place))
        column = table.column(condition.place[1]) if table is not None else None
        if column is None:
            continue
        options.setdefault(condition.place, [])
        if condition.op == "null":
            open_ = not (column.required or column.unique)
            options[condition.place] += [(None, int(not condition.negated))] * open_ + [
                (_EMPTY, int(condition.negated))
            ]
            continue
        found = probes(column, condition, fold)
        values.setdefault((one.table(condition.place), condition.place[1]), []).extend(v for v, _ in found)
        options[condition.place] += [(v, int(truth)) for v, truth in found]
    # A column with two conditions: what satisfies most of them comes first.
    ranked: dict[Place, list[tuple[Any, int]]] = {}
    for place, listed in options.items():
        score: dict[Any, int] = {}
        for value, truth in listed:
            score[value] = score.get(value, 0) + (truth or -1)
        ranked[place] = sorted(score.items(), key=lambda pair: -pair[1])
    tables = dict(enumerate(one.sources))
    joined = [*one.joined, *one.apart]

    def scene(chosen: dict[Place, Any], block: set[tuple[str, int]] | None = None) -> _Scene:
        parts: dict[int, dict[str, Any]] = {i: {} for i in tables}
        for (source, column), value in chosen.items():
            parts[source][column] = value
        return _Scene(parts, tables, joined, block)

    best = {place: listed[0][0] for place, listed in ranked.items() if listed}
    yield scene(best)
    other = {
        place: listed[1][0] if len(listed) > 1 and listed[1][1] > 0 else listed[0][0]
        for place, listed in ranked.items()
        if listed
    }
    yield scene(other)
    worst = {place: listed[-1][0] for place, listed in ranked.items() if listed}
    for place, listed in ranked.items():
        for value, _ in listed:
            yield scene({**best, place: value})
            if one.either:
                yield scene({**worst, place: value})
        if len(ranked) > 1 or one.joined:
            yield scene({**best, place: None})
    if not one.grouped:
        yield from _twice(schema, one, best, scene)
    if len(ranked) > 1:
        yield scene(worst)
    yield from _extremes(schema, one, best, worst, scene)
    for having in one.havings:
        if having.keys:
            yield from _groups(schema, one, having, best, scene)


def _twice(schema: Schema, one: Facts, best: dict[Place, Any], scene: Any) -> Iterator[_Scene]:
    """Two rows of the answer that show the same, for DISTINCT; two that show different numbers, for MIN, MAX and AVG."""
    fixed: dict[Place, Any] = {}
    numbers: list[Place] = []
    for place in one.shown:
        table = schema.table(one.table(place))
        column = table.column(place[1]) if table is not None else None
        if column is None or column.unique or place in best or place in fixed:
            continue
        if any(place in pair for pair in (*one.joined, *one.apart)):
            continue
        if column.kind in ("integer", "real"):
            numbers.append(place)
        fixed[place] = _own(column, len(fixed), column.name)
    if fixed:
        block: set[tuple[str, int]] = set()
        yield scene({**best, **fixed}, block)
        yield scene({**best, **fixed}, block)
    if numbers and best:
        block = set()
        yield scene({**best, numbers[0]: 11}, block)
        yield scene({**best, numbers[0]: 26}, block)
        yield scene({**best, numbers[0]: 17}, block)


def _extremes(
    schema: Schema, one: Facts, best: dict[Place, Any], worst: dict[Place, Any], scene: Any
) -> Iterator[_Scene]:
    """The least and the greatest number, in rows that are not in the answer: what fails the conditions, or has no partner."""
    for place in dict.fromkeys((*one.shown, *one.ordered)):
        table = schema.table(one.table(place))
        column = table.column(place[1]) if table is not None else None
        if column is None or column.unique or column.kind not in ("integer", "real"):
            continue
        if best != worst and place not in best:
            for value in (2, 9500):
                yield scene({**worst, place: value})
        if one.limited and place in one.ordered:
            for pair in one.joined:
                for source, name in pair:
                    if source == place[0]:
                        for value in (1, 9600):
                            yield _Scene({source: {place[1]: value, name: None}}, {source: one.sources[source]}, [])


def _groups(schema: Schema, one: Facts, having: Having, best: dict[Place, Any], scene: Any) -> Iterator[_Scene]:
    """Groups just below, at and above the border of a HAVING."""
    key = having.keys[0]
    table = schema.table(one.table(key))
    column = table.column(key[1]) if table is not None else None
    if column is None or key in best:
        return
    size = int(having.value)
    if having.aggregate.startswith("count"):
        least = {">": 1, "<": -1}.get(having.op, 0)  # a group that is in the answer comes first
        sizes = [n for n in dict.fromkeys((size + least, size, size + 1, size - 1)) if 0 < n <= 12]
        sizes = sizes if sum(sizes) <= 24 else sizes[:2]
        amounts: list[list[float | None]] = [[None] * n for n in sizes]
    elif having.place is not None:
        v = having.value
        amounts = [[v - 9, v + 3], [v + 1], [v], [v - 1]]
        if having.aggregate == "sum":
            amounts = [[v // 2, v - v // 2], [v // 2 + 1, v - v // 2], [v // 2 - 1, v - v // 2], [v]]
        amounts.sort(key=lambda group: _answers(having, group), reverse=True)
    else:
        return
    for number, group in enumerate(amounts):
        name = _own(column, number, f"{having.aggregate} {having.value} {having.op}")
        block: set[tuple[str, int]] = set()
        for amount in group:
            chosen = {**best, key: name}
            if amount is not None and having.place is not None:
                part = schema.table(one.table(having.place))
                real = part.column(having.place[1]) if part is not None else None
                chosen[having.place] = amount if real is not None and real.kind == "real" else int(amount)
            yield scene(chosen, block)


def _answers(having: Having, group: list[Any]) -> bool:
    total = sum(group) if having.aggregate == "sum" else sum(group) / len(group)
    return bool({">": total > having.value, "<": total < having.value}.get(having.op, total == having.value))


def _own(column: Column, number: int, seed: str) -> Any:
    """A value for a group of its own, that nothing else uses."""
    n = zlib.crc32(seed.encode()) % 400 * 6 + number
    if column.kind in ("integer", "real"):
        return 7000 + n
    if column.kind in ("date", "timestamp") or column.pattern:
        return written(column, dt.datetime(2009, 1, 1) + dt.timedelta(days=n))
    if column.kind == "boolean":
        return number % 2
    return ("组" if re.search(r"[\u4e00-\u9fff]", column.name) else "group ") + str(n)


# ------------------------------------------------------------------------------------------------------------ one instance


@dataclass(slots=True)
class _Rows:
    """The rows of one table as far as they are decided."""

    table: Table
    most: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    used: dict[str, set[Any]] = field(default_factory=dict)  # values of columns that may have each once


def rows(
    schema: Schema, idea: Ideas, profile: Profile, seed: str, first: Sequence[int] = (), scale: float = 1.0
) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of every table, by its name.

    Args:
        first: queries (numbers in `idea.scenes`) whose scenes are placed before the others'.
        scale: factor on the number of rows.
    """
    return _Filler(schema, idea, profile, random.Random(seed), scale).fill(first)


class _Filler:
    """Fills the tables of one instance."""

    def __init__(self, schema: Schema, idea: Ideas, profile: Profile, rng: random.Random, scale: float) -> None:
        self.schema, self.idea, self.profile, self.rng = schema, idea, profile, rng
        most = max(4, round(profile.rows * scale))
        self.state = {t.name.lower(): _Rows(t, most) for t in schema.tables}
        self.links: dict[Cell, Link] = {(k.table.lower(), k.column.lower()): k for k in schema.links}
        self.columns = {(t.name.lower(), c.name.lower()): c for t in schema.tables for c in t.columns}
        self.once: set[Cell] = {(t.name.lower(), c.name.lower()) for t in schema.tables for c in t.columns if c.unique}
        if profile.apart:
            for cell in idea.sorted_by:
                if cell in self.columns and self.columns[cell].kind != "boolean":
                    self.once.add(cell)
            self.once |= set(self.links)

    def fill(self, first: Sequence[int]) -> dict[str, list[tuple[Any, ...]]]:
        rest = [i for i in range(len(self.idea.scenes)) if i not in set(first)]
        for numbers in (list(first), rest):
            # One scene of every query, then the next of each: no query takes all the room.
            self.rng.shuffle(numbers)
            decks = [self._deck(self.idea.scenes[i]) for i in numbers]
            for depth in range(max(map(len, decks), default=0)):
                for deck in decks:
                    for scene in deck[depth] if depth < len(deck) else ():
                        self._place(scene)
        self._spare_rows()
        self._keys()
        for late in (False, True):  # columns that look elsewhere after those they look into
            for low, state in self.state.items():
                for column in state.table.columns:
                    cell = (low, column.name.lower())
                    if (cell in self.links) == late:
                        self._column_values(state, cell, column)
        self._balance()
        self._twins()
        return {s.table.name: list(self._finished(s)) for s in self.state.values()}

    def _deck(self, scenes: list[_Scene]) -> list[list[_Scene]]:
        """What is placed at a time: the scene in which all conditions hold, the blocks, then the other scenes in any order."""
        blocks: dict[int, list[_Scene]] = {}
        for scene in scenes:
            if scene.block is not None:
                blocks.setdefault(id(scene.block), []).append(replace(scene, block=None))
        for block in blocks.values():
            fresh: set[tuple[str, int]] = set()
            for scene in block:
                scene.block = fresh
        single = [[s] for s in scenes[1:] if s.block is None]
        self.rng.shuffle(single)
        return [[s] for s in scenes[:1]] + list(blocks.values()) + single

    # -------------------------------------------------------------------------------------------------------- scenes

    def _place(self, scene: _Scene) -> None:
        """Put a scene's partial rows into rows; what has no room is left out."""
        parts = {i: dict(part) for i, part in scene.parts.items()}
        classes = _classes(scene.joined)
        order = sorted(
            parts, key=lambda i: (-sum((scene.tables[i], c) in self.once for s, c in _members(classes) if s == i), i)
        )
        for source in order:
            low = scene.tables[source]
            state = self.state.get(low)
            if state is None:
                continue
            part = {c: v for c, v in parts[source].items() if (low, c) in self.columns}
            linked = [
                (c, members) for members in classes for s, c in members if s == source and (low, c) in self.columns
            ]
            row = self._room(
                state, part, scene.block if not any((low, c) in self.once for c, _ in linked) or not linked else None
            )
            if row is None:
                return
            for column, members in linked:
                value = row.get(column)
                if value is None or value is _EMPTY:
                    value = self._new_key(state, column)
                    if value is None:
                        return
                    self._set(state, row, column, value)
                for other, name in members:
                    if other != source:
                        parts[other].setdefault(name, value)

    def _room(self, state: _Rows, part: dict[str, Any], block: set[tuple[str, int]] | None) -> dict[str, Any] | None:
        low = state.table.name.lower()
        for column, value in part.items():
            cell = self.columns[low, column]
            if value is None and (
                cell.required or (low, column) in self.once or (self.profile.loose == 0 and (low, column) in self.links)
            ):
                return None
        start = self.rng.randrange(len(state.rows)) if state.rows else 0
        for k in range(len(state.rows)):
            at = (start + k) % len(state.rows)
            row = state.rows[at]
            if block is not None and (low, at) in block:
                continue
            if all(self._fits(row, low, c, v) for c, v in part.items()):
                break
        else:
            if len(state.rows) >= round(state.most * 0.8) or not all(self._free(low, c, v) for c, v in part.items()):
                return None
            at, row = len(state.rows), {}
            state.rows.append(row)
        if block is not None:
            block.add((low, at))
        for column, value in part.items():
            if column not in row and value is not _EMPTY:
                self._set(state, row, column, value)
        return row

    def _fits(self, row: dict[str, Any], low: str, column: str, value: Any) -> bool:
        if column not in row:
            return self._free(low, column, value)
        return bool(row[column] == value or (value is _EMPTY and row[column] is not None))

    def _free(self, low: str, column: str, value: Any) -> bool:
        return (
            value is None
            or value is _EMPTY
            or (low, column) not in self.once
            or value not in self.state[low].used.get(column, ())
        )

    def _set(self, state: _Rows, row: dict[str, Any], column: str, value: Any) -> None:
        row[column] = value
        if value is not None and (state.table.name.lower(), column) in self.once:
            state.used.setdefault(column, set()).add(value)

    def _new_key(self, state: _Rows, column: str) -> Any:
        """A value that a key does not have yet; for a shared column that is no key any of its values."""
        low = state.table.name.lower()
        facts = self.columns[low, column]
        if (low, column) not in self.once:
            link = self.links.get((low, column))
            if link is not None and (target := self.state.get(link.to.lower())) is not None:
                there = [r[link.key.lower()] for r in target.rows if r.get(link.key.lower()) is not None]
                if there:
                    return self.rng.choice(there)
            return self._draw((low, column), facts)
        taken = state.used.get(column, set())
        for number in range(1, 4 * state.most + 100):
            value = self._numbered(facts, number)
            if value not in taken and (number > 2 * state.most or value not in self.idea.values.get((low, column), ())):
                return value
        return None

    @staticmethod
    def _numbered(column: Column, number: int) -> Any:
        if column.kind in ("date", "timestamp") or column.pattern:
            return written(column, dt.datetime(2022, 1, 3) + dt.timedelta(days=11 * number))
        if column.kind == "boolean":
            return number % 2
        if column.kind in ("integer", "real"):
            return number
        return f"k{number:03d}"

    # --------------------------------------------------------------------------------------------------- what is left

    def _spare_rows(self) -> None:
        """Rows of no scene: parents without children among them."""
        for state in self.state.values():
            if not self.profile.apart:
                least = round(state.most * 0.75)
            else:
                least = round(state.most * 0.6)
            spare = max(2, round(state.most * 0.15))
            state.rows += [{} for _ in range(max(least - len(state.rows), spare))]

    def _keys(self) -> None:
        for low, state in self.state.items():
            for column in state.table.columns:
                name = column.name.lower()
                if column.unique and (low, name) not in self.links:
                    for row in state.rows:
                        if row.get(name) is None:
                            self._set(state, row, name, self._new_key(state, name))

    def _column_values(self, state: _Rows, cell: Cell, column: Column) -> None:
        low, name = cell
        link = self.links.get(cell)
        null = self.profile.loose if link is not None else self.profile.nulls
        if column.required or column.unique:
            null = 0.0
        targets: list[Any] = []
        if link is not None and link.to.lower() in self.state:
            target = self.state[link.to.lower()]
            everyone = [r.get(link.key.lower()) for r in target.rows]
            # the last rows are those of no scene: they stay without children
            kept = everyone[: max(1, round(len(everyone) * 0.8))]
            targets = [v for v in kept if v is not None]
        weights = self._weights()
        for row in state.rows:
            if name in row:
                continue
            if self.rng.random() < null:
                row[name] = None
                continue
            if link is not None:
                loose = not link.declared and not self.profile.apart and self.rng.random() < 0.06
                free = [v for v in targets if self._free(low, name, v)] if cell in self.once else targets
                if free and not loose:
                    self._set(state, row, name, self.rng.choice(free))
                elif loose and column.kind in ("integer", "real"):
                    self._set(state, row, name, 9000 + self.rng.randrange(9))
                elif column.required or column.unique:
                    value = self._new_key(state, name) if not link.declared else None
                    self._set(
                        state,
                        row,
                        name,
                        value
                        if value is not None
                        else (self.rng.choice(targets) if targets else self._draw(cell, column)),
                    )
                else:
                    row[name] = None
                continue
            value = self._draw(cell, column, weights)
            if cell in self.once:
                for _ in range(40):
                    if self._free(low, name, value):
                        break
                    value = self._draw(cell, column, wide=True)
                else:
                    value = self._new_key(state, name)
            self._set(state, row, name, value)

    def _weights(self) -> float:
        """How strongly the first values of a column are preferred: groups should differ in size."""
        return self.rng.choice((0.55, 0.7, 1.0))

    def _draw(self, cell: Cell, column: Column, skew: float = 1.0, wide: bool = False) -> Any:
        """A value for an open place: one that a query asks for, or another like them."""
        rng, known = self.rng, self.idea.values.get(cell, [])
        if known and rng.random() < (0.2 if wide else 0.6):
            if skew < 1:
                return known[min(len(known) - 1, int(len(known) * rng.random() ** (1 / skew)))]
            return rng.choice(known)
        numbers = [v for v in known if isinstance(v, int | float) and not isinstance(v, bool)]
        if column.kind == "boolean":
            return rng.randrange(2)
        if column.kind in ("integer", "real"):
            low, high = (min(numbers), max(numbers)) if numbers else (1, 40)
            low, high = (low, high + 60) if wide else (low, high)
            value = rng.randint(int(low), max(int(low) + 3, int(high)))
            return value if column.kind == "integer" else value + rng.choice((0.0, 0.5, 0.25))
        if column.kind in ("date", "timestamp") or column.pattern:
            start = dt.datetime(2020, 1, 1) if not wide else dt.datetime(2018, 1, 1)
            when = start + dt.timedelta(days=rng.randrange(2400 if not wide else 3600))
            if column.kind == "timestamp":
                when += dt.timedelta(seconds=rng.randrange(86400) if rng.random() < 0.7 else 0)
            return written(column, when)
        words = _WORDS_ZH if re.search(r"[\u4e00-\u9fff]", column.name) else _WORDS
        word = (
            words[min(len(words) - 1, int(len(words) * rng.random() ** (1 / skew)))] if skew < 1 else rng.choice(words)
        )
        return f"{word}{rng.randrange(200)}" if wide else word

    def _balance(self) -> None:
        """Where a column is compared with its mean: one row is moved so that some row has the mean itself."""
        for low, name in sorted(self.idea.means):
            state, column = self.state.get(low), self.columns.get((low, name))
            if (
                state is None
                or column is None
                or column.kind != "integer"
                or column.unique
                or (low, name) in self.links
            ):
                continue
            known = [row for row in state.rows if row.get(name) is not None]
            if len(known) < 3:
                continue
            total = sum(row[name] for row in known[:-1])
            mean = min((row[name] for row in known[:-1]), key=lambda v: abs(v - total / (len(known) - 1)))
            known[-1][name] = mean * len(known) - total

    def _twins(self) -> None:
        """Rows that repeat another but for its key."""
        for low, state in self.state.items():
            once = {c for t, c in self.once if t == low}
            wanted = round(self.profile.twins * len(state.rows))
            for row in self.rng.sample(state.rows, min(wanted, len(state.rows))):
                if len(state.rows) >= state.most + 4:
                    break
                twin = {c: v for c, v in row.items() if c not in once}
                for column in sorted(once):
                    twin[column] = self._new_key(state, column)
                    self._set(state, twin, column, twin[column])
                state.rows.append(twin)

    def _finished(self, state: _Rows) -> Iterator[tuple[Any, ...]]:
        """Rows as tuples in the order of their primary key's first column or none; a second row with a key is left out."""
        names = [c.name.lower() for c in state.table.columns]
        primary = [p.lower() for p in state.table.primary]
        seen: set[tuple[Any, ...]] = set()
        self.rng.shuffle(state.rows)
        for row in state.rows:
            key = tuple(row.get(p) for p in primary)
            if primary and (key in seen or None in key):
                continue
            seen.add(key)
            if all(row.get(c.name.lower()) is not None for c in state.table.columns if c.required):
                yield tuple(row.get(name) for name in names)


def _classes(joined: Sequence[tuple[Place, Place]]) -> list[list[Place]]:
    """Places that must all be equal."""
    found: list[list[Place]] = []
    for a, b in joined:
        touched = [c for c in found if a in c or b in c]
        merged = sorted({a, b, *(p for c in touched for p in c)})
        found = [c for c in found if c not in touched] + [merged]
    return found


def _members(classes: Sequence[Sequence[Place]]) -> Iterator[Place]:
    for members in classes:
        yield from members


def write(path: Path, schema: Schema, filled: dict[str, list[tuple[Any, ...]]]) -> None:
    """A new SQLite file with the schema's tables and these rows."""
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA page_size = 1024")
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        for statement in schema.ddl():
            db.execute(statement)
        for table in schema.tables:
            listed = filled.get(table.name, [])
            if listed:
                marks = ", ".join("?" * len(table.columns))
                name = '"' + table.name.replace('"', '""') + '"'
                db.executemany(f"INSERT OR IGNORE INTO {name} VALUES ({marks})", listed)
        db.execute("COMMIT")
