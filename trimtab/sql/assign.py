"""Which schema each row of a data set is asked on.

What a prompt shows is often a part of its database: rows whose tables agree (and share one) are asked on one schema, that of all
their tables together. Rows that show nothing are put together by the tables that their gold queries name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.sql.build import read
from trimtab.sql.infer import Constant, Facts, complete
from trimtab.sql.schema import Column, Link, Schema, Table, from_ddl, from_lines, has_ddl

NONE = "none"
"""The schema of rows whose gold query cannot be read: it has no tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A row as far as its schema is concerned.

    Attributes:
        gold: the query.
        text: where a schema may be shown: the prompt, or a column with DDL.
        key: rows with another key have another schema.
        given: the schema that it has been told, or None.
    """

    gold: str
    text: str = ""
    key: str = ""
    given: Schema | None = None


@dataclass(slots=True)
class _Pool:
    """A schema that grows while rows are read."""

    tables: dict[str, Table] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    origin: str = ""
    facts: list[Facts] = field(default_factory=list)
    merged: int | None = None


def assign(asks: Sequence[Ask], dialect: str, constant: Constant) -> tuple[list[str], dict[str, Schema]]:
    """The name of each row's schema, and the schemas, in the order of their first row."""
    names: list[str] = [""] * len(asks)
    schemas: dict[str, Schema] = {}
    shown: dict[str, Schema | None] = {}
    pools: list[_Pool] = []
    by_table: dict[tuple[str, object], list[int]] = {}
    placed: dict[int, int] = {}
    bare: dict[str, list[int]] = {}
    known: dict[tuple[str, str], Facts | None] = {}
    for i, ask in enumerate(asks):
        if ask.given is not None:
            names[i] = ask.given.name
            continue
        text = ask.text
        if text not in shown:
            shown[text] = from_ddl(text, dialect) if has_ddl(text) else from_lines(text)
        schema = shown[text]
        if schema is not None:
            both = (ask.gold, text)
            if both not in known:
                known[both] = read(ask.gold, dialect, schema, constant)
            facts = known[both]
            if schema.origin == "DDL" or (
                facts is not None and any(schema.table(t) is not None for t in facts.sources)
            ):
                placed[i] = _pool(pools, by_table, ask.key, schema)
                if facts is not None:
                    pools[placed[i]].facts.append(facts)
                continue
        bare.setdefault(ask.key, []).append(i)
    facts_of: dict[int, list[Facts]] = {}
    for number, pool in enumerate(pools):
        facts_of.setdefault(_root(pools, number), []).extend(pool.facts)
    finished: dict[int, str] = {}
    for i, ask in enumerate(asks):
        if ask.given is not None:
            if ask.given.name not in schemas:
                schemas[ask.given.name] = _settled(
                    ask.given, [a for a in asks if a.given is ask.given], dialect, constant
                )
        elif i in placed:
            root = _root(pools, placed[i])
            if root not in finished:
                pool = pools[root]
                name = _fresh(ask.key or next(iter(pool.tables.values())).name, schemas)
                finished[root] = name
                raw = Schema(
                    name=name,
                    tables=tuple(pool.tables.values()),
                    links=tuple(dict.fromkeys(pool.links)),
                    origin=pool.origin,
                )
                schemas[name] = complete(raw, facts_of[root])
            names[i] = finished[root]
    for key, numbers in bare.items():
        for name, (schema, own) in _inferred(asks, numbers, key, dialect, constant).items():
            fresh = NONE if name == NONE else _fresh(name, schemas)
            schemas.setdefault(
                fresh, Schema(name=fresh, tables=schema.tables, links=schema.links, origin=schema.origin)
            )
            for i in own:
                names[i] = fresh
    return names, schemas


def _fresh(name: str, taken: dict[str, Schema]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} {number}"
    return found


def _settled(schema: Schema, asks: Sequence[Ask], dialect: str, constant: Constant) -> Schema:
    """A schema that was given: its columns stay, joins of the queries add links, and no table is added."""
    facts = [f for f in (read(a.gold, dialect, schema, constant) for a in asks) if f is not None]
    whole = complete(schema, facts)
    there = {t.name.lower() for t in schema.tables}
    tables = tuple(t for t in whole.tables if t.name.lower() in there)
    links = tuple(k for k in whole.links if {k.table.lower(), k.to.lower()} <= there)
    return Schema(name=schema.name, tables=tables, links=links, origin=schema.origin, sample=schema.sample)


def _root(pools: list[_Pool], i: int) -> int:
    while (up := pools[i].merged) is not None:
        i = up
    return i


def _pool(pools: list[_Pool], by_table: dict[tuple[str, object], list[int]], key: str, schema: Schema) -> int:
    """The pool that a row's tables go into: all that share one of them and agree in the rest are one."""
    near: list[int] = []
    for table in schema.tables:
        for i in by_table.get((key, table.signature), []):
            if (root := _root(pools, i)) not in near:
                near.append(root)
    target: int | None = None
    tables = {t.name.lower(): t for t in schema.tables}
    for i in near:
        there = pools[i].tables
        if all(there[name].signature == tables[name].signature for name in there.keys() & tables.keys()):
            if target is None:
                target = i
            elif all(
                there[n].signature == pools[target].tables[n].signature
                for n in there.keys() & pools[target].tables.keys()
            ):
                pools[target].tables.update({n: t for n, t in there.items() if n not in pools[target].tables})
                pools[target].links += pools[i].links
                pools[i].merged = target
    if target is None:
        target = len(pools)
        pools.append(_Pool(origin=schema.origin))
    pool = pools[target]
    for name, table in tables.items():
        pool.tables.setdefault(name, table)
        listed = by_table.setdefault((key, table.signature), [])
        if target not in listed:
            listed.append(target)
    pool.links += schema.links
    return target


def _inferred(
    asks: Sequence[Ask], numbers: Sequence[int], key: str, dialect: str, constant: Constant
) -> dict[str, tuple[Schema, list[int]]]:
    """Schemas of rows that show none, by name, with their rows: tables that a query names together are in one."""
    first = {i: read(asks[i].gold, dialect, None, constant) for i in numbers}
    columns: dict[str, dict[str, Column]] = {}
    for facts in first.values():
        for table, column in facts.sure if facts is not None else ():
            columns.setdefault(table, {}).setdefault(column.lower(), Column(name=column))
    rough = Schema(name="rough", tables=tuple(Table(name=t, columns=tuple(c.values())) for t, c in columns.items()))
    second = {i: read(asks[i].gold, dialect, rough, constant) if first[i] is not None else None for i in numbers}
    groups: list[tuple[set[str], list[int]]] = []
    found: dict[str, tuple[Schema, list[int]]] = {}
    for i, facts in second.items():
        if facts is None or not facts.sources:
            found.setdefault(NONE, (Schema(name=NONE, tables=(), origin="none"), []))[1].append(i)
            continue
        tables = set(facts.sources)
        touched = [g for g in groups if g[0] & tables]
        merged = (tables.union(*(g[0] for g in touched)), sorted([i, *(n for g in touched for n in g[1])]))
        groups = [g for g in groups if g not in touched] + [merged]
    for _, own in sorted(groups, key=lambda g: g[1][0]):
        facts_of = [f for i in own if (f := second[i]) is not None]
        name = key or facts_of[0].names[0]
        while name in found:
            name += "'"
        found[name] = complete(None, facts_of, name), own
    return found
