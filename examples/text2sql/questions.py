"""The question templates: how each is asked in two languages, and the query that answers it.

Phrasings are lists; the last of each list is kept for the held-out questions. Templates in `HELD_OUT_TEMPLATES` are never
trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from queries import Item, Predicate, Query
from schemas import HELD_OUT_YEARS, YEARS, Column, Schema, Table, plural

HELD_OUT_TEMPLATES = ("where_or", "group_top", "join_aggregate", "max_in_group", "latest", "sum_per_group")

COMPARE = {
    "en": {
        ">": ["above", "over", "more than"],
        "<": ["below", "under", "less than"],
        ">=": ["at least"],
        "<=": ["at most"],
    },
    "zh": {">": ["大于", "高于", "超过"], "<": ["小于", "低于"], ">=": ["不小于"], "<=": ["不大于"]},
}
AGGREGATES = {
    "en": {"MAX": ["highest", "maximum"], "MIN": ["lowest", "minimum"], "AVG": ["average", "mean"], "SUM": ["total"]},
    "zh": {"MAX": ["最高", "最大"], "MIN": ["最低", "最小"], "AVG": ["平均"], "SUM": ["总"]},
}


T = TypeVar("T")


class Cannot(Exception):
    """This template has no question to ask of this schema."""


@dataclass(slots=True)
class Draw:
    """Random choices for one question: which tables, columns and literals. `held_out` picks the literals of the other side."""

    rng: random.Random
    schema: Schema
    tables: tuple[Table, ...]
    held_out: bool = False

    def pick(self, items: list[T]) -> T:
        if not items:
            raise Cannot
        return self.rng.choice(items)

    def table(self, *kinds: str) -> Table:
        """A table that has columns of all these kinds."""
        return self.pick([t for t in self.tables if all(any(c.kind == kind for c in t.columns) for kind in kinds)])

    def column(self, table: Table, *kinds: str, but: tuple[Column, ...] = ()) -> Column:
        return self.pick([c for c in table.columns if c.kind in kinds and c not in but])

    def shown(self, table: Table, *but: Column) -> Column:
        """A column worth asking for: the row's name more often than not."""
        names = [c for c in table.columns if c.kind == "name" and c not in but]
        return (
            names[0]
            if names and self.rng.random() < 0.5
            else self.column(table, "name", "text", "num", "date", but=but)
        )

    def literal(self, column: Column) -> str:
        return self.pick(column.literals(held_out=self.held_out))

    def equal(self, column: Column, prefix: str = "") -> tuple[str, Predicate]:
        """A value and `column = value`."""
        value = self.literal(column)
        choices = tuple(column.sql(v) for v in column.literals(held_out=self.held_out))
        return value, Predicate(left=prefix + column.name, op="=", right=column.sql(value), choices=choices)

    def compare(self, column: Column, prefix: str = "") -> tuple[str, Predicate]:
        """A comparison in words ("above 20") and as a predicate."""
        op = self.pick(list(COMPARE["en"]))
        value, equal = self.equal(column, prefix)
        words = self.pick(COMPARE[self.schema.language][op])
        space = " " if self.schema.language == "en" else ""
        return f"{words}{space}{value}", Predicate(left=equal.left, op=op, right=equal.right, choices=equal.choices)

    def aggregate(self, *names: str) -> tuple[str, str]:
        """An aggregate's words and its SQL name."""
        name = self.pick(list(names))
        return self.pick(AGGREGATES[self.schema.language][name]), name

    def count(self) -> int:
        """A small number, for LIMIT and HAVING."""
        return self.pick([4, 7] if self.held_out else [2, 3, 5, 6, 10])

    def year(self) -> int:
        return self.pick([y for y in YEARS if (y in HELD_OUT_YEARS) == self.held_out])

    def child(self) -> tuple[Table, Table, str]:
        """A table with a reference, the table it names, and the ON condition of their join."""
        table = self.table("ref")
        reference = self.column(table, "ref")
        parent = self.schema.table(reference.to)
        return table, parent, f"{table.name}.{reference.name} = {parent.name}.{parent.columns[0].name}"


Fields = dict[str, str]
Build = Callable[[Draw], tuple[Fields, Query]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    name: str
    level: str
    build: Build
    en: tuple[str, ...]
    zh: tuple[str, ...]
    literal: bool  # has it a value that a held-out question can vary?

    def phrasings(self, language: str, *, held_out: bool) -> tuple[str, ...]:
        """What one side of the split may say; a held-out template has but one side."""
        phrases = self.en if language == "en" else self.zh
        if self.name in HELD_OUT_TEMPLATES:
            return phrases
        return phrases[-1:] if held_out else phrases[:-1]


TEMPLATES: dict[str, Template] = {}


def template(level: str, en: list[str], zh: list[str], literal: bool = True) -> Callable[[Build], Build]:
    """Enter the decorated builder under its own name, with its phrasings."""

    def enter(build: Build) -> Build:
        name = build.__name__
        TEMPLATES[name] = Template(name=name, level=level, build=build, en=tuple(en), zh=tuple(zh), literal=literal)
        return build

    return enter


def fields(table: Table, **more: Column | str | int) -> Fields:
    """What a phrasing may mention: `t`, `ts` the table in singular and plural, `c` and `cs` a column, and so on."""
    made = {"t": table.noun, "ts": table.plural}
    for key, value in more.items():
        if isinstance(value, Column):
            made |= {key: value.noun, key + "s": plural(value.noun)}
        else:
            made[key] = str(value)
    return made


def select(*columns: str) -> tuple[Item, ...]:
    return tuple(Item(column=column) for column in columns)


COUNT = Item(column="*", agg="COUNT")


# ---------------------------------------------------------------------------------------------------------------- easy


@template(
    "easy",
    [
        "What is the {c} of the {t} called {v}?",
        "Show the {c} of the {t} whose {k} is {v}.",
        "Give me {c} for {t} {v}.",
        "Look up {v} among the {ts} and tell me its {c}.",
    ],
    ["{k}为{v}的{t}的{c}是什么?", "查询{t}{v}的{c}。", "请告诉我{t}中{v}对应的{c}。"],
)
def lookup(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("name")
    key = draw.column(table, "name")
    column = draw.column(table, "text", "num", "date", but=(key,))
    value, predicate = draw.equal(key)
    return fields(table, c=column, k=key, v=value), Query(
        select=select(column.name), table=table.name, where=(predicate,)
    )


@template(
    "easy",
    [
        "Show the {c} of {ts} whose {k} is {v}.",
        "List the {c} of every {t} with {k} {v}.",
        "{c} of {ts} where {k} is {v}",
        "Which {ts} have {k} {v}? Give the {c}.",
        "Find each {t} that has {v} as its {k} and return the {c}.",
    ],
    [
        "查询{k}为{v}的{t}的{c}。",
        "列出{k}是{v}的{t}的{c}。",
        "{k}等于{v}的{t}有哪些{c}?",
        "把{t}里{k}属于{v}的{c}都找出来。",
    ],
)
def where_text(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key = draw.column(table, "text")
    column = draw.shown(table, key)
    value, predicate = draw.equal(key)
    return fields(table, c=column, k=key, v=value), Query(
        select=select(column.name), table=table.name, where=(predicate,)
    )


@template(
    "easy",
    [
        "Show the {c} of {ts} with {n} {v}.",
        "List the {c} of {ts} whose {n} is {v}.",
        "Which {ts} have {n} {v}? Give the {c}.",
        "For {n} {v}, return the {c} of the {ts}.",
    ],
    ["查询{n}{v}的{t}的{c}。", "列出{n}{v}的{t}的{c}。", "{n}{v}的{t}有哪些?给出{c}。", "找出{t}中{n}{v}者,返回{c}。"],
)
def where_number(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num")
    key = draw.column(table, "num")
    column = draw.shown(table, key)
    words, predicate = draw.compare(key)
    return fields(table, c=column, n=key, v=words), Query(
        select=select(column.name), table=table.name, where=(predicate,)
    )


@template(
    "easy",
    [
        "Show the {c} and {d} of {ts} whose {k} is {v}.",
        "List {c} and {d} for {ts} with {k} {v}.",
        "Give both the {c} and the {d} of each {t} where {k} is {v}.",
        "Which {c} and {d} belong to {ts} with {v} as {k}?",
    ],
    ["查询{k}为{v}的{t}的{c}和{d}。", "列出{k}是{v}的{t}的{c}与{d}。", "{t}中{k}属于{v}的,给出{c}及{d}。"],
)
def two_columns(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key = draw.column(table, "text")
    first = draw.shown(table, key)
    second = draw.column(table, "name", "text", "num", "date", but=(key, first))
    value, predicate = draw.equal(key)
    query = Query(select=select(first.name, second.name), table=table.name, where=(predicate,))
    return fields(table, c=first, d=second, k=key, v=value), query


@template(
    "easy",
    [
        "How many {ts} have {k} {v}?",
        "Count the {ts} whose {k} is {v}.",
        "Number of {ts} with {k} {v}",
        "Tell me how many of the {ts} are {v} by {k}.",
    ],
    ["{k}为{v}的{t}有多少?", "统计{k}是{v}的{t}数量。", "有几个{t}的{k}属于{v}?"],
)
def count_text(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key = draw.column(table, "text")
    value, predicate = draw.equal(key)
    return fields(table, k=key, v=value), Query(select=(COUNT,), table=table.name, where=(predicate,))


@template(
    "easy",
    [
        "How many {ts} have {n} {v}?",
        "Count the {ts} whose {n} is {v}.",
        "Number of {ts} with {n} {v}",
        "With {n} {v}, how many {ts} are there?",
    ],
    ["{n}{v}的{t}有多少?", "统计{n}{v}的{t}数量。", "有几个{t}的{n}{v}?"],
)
def count_number(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num")
    key = draw.column(table, "num")
    words, predicate = draw.compare(key)
    return fields(table, n=key, v=words), Query(select=(COUNT,), table=table.name, where=(predicate,))


@template(
    "easy",
    [
        "What is the {a} {n} of all {ts}?",
        "Find the {a} {n} among the {ts}.",
        "{a} {n} of the {ts}",
        "Across every {t}, which is the {a} {n}?",
    ],
    ["{t}的{a}{n}是多少?", "查询{t}的{a}{n}。", "所有{t}里{a}{n}为多少?"],
    literal=False,
)
def aggregate(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num")
    key = draw.column(table, "num")
    words, name = draw.aggregate("MAX", "MIN", "AVG", "SUM")
    return fields(table, n=key, a=words), Query(select=(Item(column=key.name, agg=name),), table=table.name)


@template(
    "easy",
    [
        "What is the {a} {n} of {ts} whose {k} is {v}?",
        "Find the {a} {n} of {ts} with {k} {v}.",
        "{a} {n} where {k} is {v}, over all {ts}",
        "Among the {v} {ts} by {k}, what is the {a} {n}?",
    ],
    ["{k}为{v}的{t}的{a}{n}是多少?", "查询{k}是{v}的{t}的{a}{n}。", "在{k}属于{v}的{t}里,{a}{n}为多少?"],
)
def aggregate_where(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num", "text")
    key, number = draw.column(table, "text"), draw.column(table, "num")
    value, predicate = draw.equal(key)
    words, name = draw.aggregate("MAX", "MIN", "AVG", "SUM")
    query = Query(select=(Item(column=number.name, agg=name),), table=table.name, where=(predicate,))
    return fields(table, k=key, v=value, n=number, a=words), query


@template(
    "easy",
    [
        "Which {t} has the {a} {n}? Give the {c}.",
        "Show the {c} of the {t} with the {a} {n}.",
        "What is the {c} of the {t} that has the {a} {n}?",
        "Order by {n} and return only the {c} of the {t} with the {a} one.",
    ],
    ["{n}{a}的{t}的{c}是什么?", "查询{n}{a}的{t}的{c}。", "哪个{t}的{n}{a}?给出{c}。"],
    literal=False,
)
def top_one(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num", "name")
    key = draw.column(table, "num")
    column = draw.shown(table, key)
    words, name = draw.aggregate("MAX", "MIN")
    query = Query(select=select(column.name), table=table.name, order=(Item(column=key.name), name == "MAX"), limit=1)
    return fields(table, c=column, n=key, a=words), query


@template(
    "easy",
    [
        "Show the {c} of the {x} {ts} with the {a} {n}.",
        "List the {c} of the top {x} {ts} by {a} {n}.",
        "Which {x} {ts} have the {a} {n}? Give the {c}.",
        "Return {x} {ts} by {c}, those of {a} {n} first.",
    ],
    ["查询{n}{a}的{x}个{t}的{c}。", "列出{n}{a}的前{x}个{t}的{c}。", "按{n}取{a}的{x}个{t},给出{c}。"],
)
def top_few(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num", "name")
    key = draw.column(table, "num")
    column, limit = draw.shown(table, key), draw.count()
    words, name = draw.aggregate("MAX", "MIN")
    query = Query(
        select=select(column.name), table=table.name, order=(Item(column=key.name), name == "MAX"), limit=limit
    )
    return fields(table, c=column, n=key, a=words, x=limit), query


@template(
    "easy",
    [
        "List the {c} of all {ts} sorted by {k} {way}.",
        "Show every {c} of the {ts} ordered by {k} {way}.",
        "{c} of all {ts}, by {k} {way}",
        "Sort the {ts} by {k} {way} and show the {c}.",
    ],
    ["列出所有{t}的{c},按{k}{way}排列。", "查询{t}的{c},按{k}{way}排序。", "请把{t}以{k}{way}排好,返回{c}。"],
    literal=False,
)
def ordered(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num")
    key = draw.column(table, "num", "date")
    column, down = draw.shown(table, key), draw.pick([True, False])
    way = ("descending" if down else "ascending") if draw.schema.language == "en" else ("降序" if down else "升序")
    query = Query(select=select(column.name), table=table.name, order=(Item(column=key.name), down))
    return fields(table, c=column, k=key, way=way), query


@template(
    "easy",
    [
        "What different {ks} are there among the {ts}?",
        "List the distinct {ks} of the {ts}.",
        "Show all unique {ks} of {ts}.",
        "Name every {k} that occurs among the {ts}, once each.",
    ],
    ["{t}有哪些不同的{k}?", "列出{t}的所有{k},不要重复。", "把{t}里出现过的{k}去重后列出。"],
    literal=False,
)
def distinct(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key = draw.column(table, "text", "date", "num")
    return fields(table, k=key), Query(select=select(key.name), table=table.name, distinct=True)


@template(
    "easy",
    [
        "How many {ts} are there for each {k}?",
        "Count the {ts} by {k}.",
        "Show each {k} with its number of {ts}.",
        "Per {k}, tell me the count of {ts}.",
    ],
    ["每个{k}有多少{t}?", "按{k}统计{t}数量。", "各{k}分别有几个{t}?"],
    literal=False,
)
def group_count(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key = draw.column(table, "text")
    return fields(table, k=key), Query(select=(*select(key.name), COUNT), table=table.name, group=key.name)


# -------------------------------------------------------------------------------------------------------------- medium


@template(
    "medium",
    [
        "What is the {a} {n} of {ts} for each {k}?",
        "Show the {a} {n} of the {ts} by {k}.",
        "{a} {n} per {k} of the {ts}",
        "Group the {ts} by {k} and give the {a} {n} of each group.",
    ],
    ["每个{k}的{t}的{a}{n}是多少?", "按{k}查询{t}的{a}{n}。", "将{t}按{k}分组,求{a}{n}。"],
    literal=False,
)
def group_aggregate(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text", "num")
    key, number = draw.column(table, "text"), draw.column(table, "num")
    words, name = draw.aggregate("MAX", "MIN", "AVG")
    query = Query(select=(*select(key.name), Item(column=number.name, agg=name)), table=table.name, group=key.name)
    return fields(table, k=key, n=number, a=words), query


@template(
    "medium",
    [
        "Show the total {n} of {ts} per {k}, only where {m} is {v}.",
        "For each {k}, what is the total {n} of {ts} with {m} {v}?",
    ],
    ["按{k}统计{m}{v}的{t}的总{n}。", "在{m}{v}的{t}中,每个{k}的总{n}是多少?"],
)
def sum_per_group(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text", "num")
    key, number = draw.column(table, "text"), draw.column(table, "num")
    other = draw.column(table, "num", but=(number,))
    words, predicate = draw.compare(other)
    chosen = (*select(key.name), Item(column=number.name, agg="SUM"))
    query = Query(select=chosen, table=table.name, where=(predicate,), group=key.name)
    return fields(table, k=key, n=number, m=other, v=words), query


@template(
    "medium",
    [
        "Show the {c} of {ts} with {k} {v} and {n} {w}.",
        "List the {c} of {ts} whose {k} is {v} and whose {n} is {w}.",
        "Which {v} {ts} by {k} have {n} {w}? Give the {c}.",
        "Return {c} for {ts} meeting both: {k} {v}, {n} {w}.",
    ],
    [
        "查询{k}为{v}且{n}{w}的{t}的{c}。",
        "列出{k}是{v}并且{n}{w}的{t}的{c}。",
        "{t}里同时满足{k}属于{v}、{n}{w}的,给出{c}。",
    ],
)
def where_and(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text", "num")
    key, number = draw.column(table, "text"), draw.column(table, "num")
    column = draw.shown(table, key, number)
    value, equal = draw.equal(key)
    words, compared = draw.compare(number)
    query = Query(select=select(column.name), table=table.name, where=(equal, compared))
    return fields(table, c=column, k=key, v=value, n=number, w=words), query


@template(
    "medium",
    ["Show the {c} of {ts} with {k} {v} or {n} {w}.", "List the {c} of {ts} whose {k} is {v} or whose {n} is {w}."],
    ["查询{k}为{v}或者{n}{w}的{t}的{c}。", "列出{k}是{v}或{n}{w}的{t}的{c}。"],
)
def where_or(draw: Draw) -> tuple[Fields, Query]:
    made, query = where_and(draw)
    return made, Query(select=query.select, table=query.table, where=query.where, connective="OR")


@template(
    "medium",
    [
        "Show the {c} of {ts} whose {k} is {v} or {w}.",
        "List the {c} of {ts} with {k} in {v} and {w}.",
        "For the {ks} {v} and {w}, return the {c} of the {ts}.",
    ],
    ["查询{k}为{v}或{w}的{t}的{c}。", "列出{k}是{v}、{w}之一的{t}的{c}。", "{t}中{k}在{v}和{w}之内的{c}有哪些?"],
)
def where_in(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key = draw.column(table, "text")
    column = draw.shown(table, key)
    first, second = draw.rng.sample(key.literals(held_out=draw.held_out), 2)
    predicate = Predicate(left=key.name, op="IN", right=f"({key.sql(first)}, {key.sql(second)})")
    return fields(table, c=column, k=key, v=first, w=second), Query(
        select=select(column.name), table=table.name, where=(predicate,)
    )


@template(
    "medium",
    [
        "Show the {c} of {ts} with {n} between {v} and {w}.",
        "List the {c} of {ts} whose {n} is from {v} to {w}.",
        "Which {ts} have {n} between {v} and {w}? Give the {c}.",
        "Return the {c} of {ts} having {n} in the range {v} to {w}.",
    ],
    ["查询{n}在{v}到{w}之间的{t}的{c}。", "列出{n}介于{v}和{w}之间的{t}的{c}。", "{n}从{v}至{w}的{t}有哪些{c}?"],
)
def where_between(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num")
    key = draw.column(table, "num")
    column = draw.shown(table, key)
    low, high = sorted(int(v) for v in draw.rng.sample(key.literals(held_out=draw.held_out), 2))
    predicate = Predicate(left=key.name, op="BETWEEN", right=f"{low} AND {high}")
    return fields(table, c=column, n=key, v=low, w=high), Query(
        select=select(column.name), table=table.name, where=(predicate,)
    )


@template(
    "medium",
    [
        "Show the {c} of {ts} whose {k} starts with {v}.",
        "List the {c} of {ts} with a {k} beginning with {v}.",
        "Return the {c} where the {t} {k} has the prefix {v}.",
    ],
    ["查询{k}以{v}开头的{t}的{c}。", "列出{k}开头是{v}的{t}的{c}。", "{t}中{k}的第一个字为{v}的,给出{c}。"],
)
def where_like(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("name")
    key = draw.column(table, "name")
    column = draw.shown(table, key)
    start = draw.literal(key)[0]
    predicate = Predicate(left=key.name, op="LIKE", right=f"'{start}%'")
    return fields(table, c=column, k=key, v=start), Query(
        select=select(column.name), table=table.name, where=(predicate,)
    )


@template(
    "medium",
    [
        "Show the {c} of {ts} that have no {k}.",
        "List the {c} of {ts} whose {k} is missing.",
        "Which {ts} lack a {k}? Give the {c}.",
        "Return the {c} of {ts} with the {k} left empty.",
    ],
    ["查询没有{k}的{t}的{c}。", "列出{k}为空的{t}的{c}。", "{t}中缺少{k}的{c}有哪些?"],
    literal=False,
)
def where_null(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("name")
    key = draw.column(table, "text", "num", "date")
    column = draw.shown(table, key)
    predicate = Predicate(left=key.name, op="IS NULL", right="")
    return fields(table, c=column, k=key), Query(select=select(column.name), table=table.name, where=(predicate,))


@template(
    "medium",
    [
        "Which {ks} have more than {x} {ts}?",
        "List each {k} with more than {x} {ts}.",
        "Show the {ks} that have over {x} {ts}.",
        "Find the {ks} shared by more than {x} {ts}.",
    ],
    ["哪些{k}的{t}超过{x}个?", "列出{t}数量大于{x}的{k}。", "有{x}个以上{t}的{k}是哪些?"],
)
def having_count(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key, count = draw.column(table, "text"), draw.count()
    having = Predicate(left=str(COUNT), op=">", right=str(count))
    return fields(table, k=key, x=count), Query(
        select=select(key.name), table=table.name, group=key.name, having=having
    )


@template(
    "medium",
    [
        "Which {ks} have an average {n} {v} among the {ts}?",
        "List each {k} of {ts} whose average {n} is {v}.",
        "Show the {ks} where the {ts} have a mean {n} {v}.",
    ],
    ["{t}的平均{n}{v}的{k}有哪些?", "列出平均{n}{v}的{t}{k}。", "哪些{k}的{t}平均{n}{v}?"],
)
def having_average(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text", "num")
    key, number = draw.column(table, "text"), draw.column(table, "num")
    words, compared = draw.compare(number)
    having = Predicate(left=f"AVG({number.name})", op=compared.op, right=compared.right)
    query = Query(select=select(key.name), table=table.name, group=key.name, having=having)
    return fields(table, k=key, n=number, v=words), query


@template(
    "medium",
    ["Which {k} has the most {ts}?", "Show the {k} with the largest number of {ts}."],
    ["哪个{k}的{t}最多?", "查询{t}数量最多的{k}。"],
    literal=False,
)
def group_top(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text")
    key = draw.column(table, "text")
    query = Query(select=select(key.name), table=table.name, group=key.name, order=(COUNT, True), limit=1)
    return fields(table, k=key), query


@template(
    "medium",
    [
        "How many different {ks} do {ts} with {n} {v} have?",
        "Count the distinct {ks} of {ts} with {n} {v}.",
        "Among {ts} whose {n} is {v}, how many unique {ks} occur?",
    ],
    ["{n}{v}的{t}有多少种不同的{k}?", "统计{n}{v}的{t}的不同{k}数。", "在{n}{v}的{t}里,共出现几种{k}?"],
)
def count_distinct(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("text", "num")
    key, number = draw.column(table, "text"), draw.column(table, "num")
    words, predicate = draw.compare(number)
    item = Item(column=key.name, agg="COUNT", distinct=True)
    return fields(table, k=key, n=number, v=words), Query(select=(item,), table=table.name, where=(predicate,))


# --------------------------------------------------------------------------------------------------------------- dates


@template(
    "medium",
    [
        "Show the {c} of {ts} with {d} after {v}.",
        "List the {c} of {ts} whose {d} is later than {v}.",
        "Which {ts} have a {d} after {v}? Give the {c}.",
        "From {v} on, that day excluded, which {c} do the {ts} by {d} have?",
    ],
    ["查询{d}在{v}之后的{t}的{c}。", "列出{d}晚于{v}的{t}的{c}。", "{t}中{d}比{v}更晚的,给出{c}。"],
)
def date_after(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("date")
    key = draw.column(table, "date")
    column = draw.shown(table, key)
    value, equal = draw.equal(key)
    predicate = Predicate(left=key.name, op=">", right=equal.right, choices=equal.choices)
    return fields(table, c=column, d=key, v=value), Query(
        select=select(column.name), table=table.name, where=(predicate,)
    )


@template(
    "medium",
    [
        "How many {ts} have a {d} before {v}?",
        "Count the {ts} whose {d} is earlier than {v}.",
        "Number of {ts} with {d} before {v}",
        "Until {v}, that day excluded, how many {ts} by {d} were there?",
    ],
    ["{d}在{v}之前的{t}有多少?", "统计{d}早于{v}的{t}数量。", "有几个{t}的{d}比{v}更早?"],
)
def count_before(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("date")
    key = draw.column(table, "date")
    value, equal = draw.equal(key)
    predicate = Predicate(left=key.name, op="<", right=equal.right, choices=equal.choices)
    return fields(table, d=key, v=value), Query(select=(COUNT,), table=table.name, where=(predicate,))


@template(
    "hard",
    [
        "How many {ts} have a {d} in {y}?",
        "Count the {ts} whose {d} is in the year {y}.",
        "In {y}, how many {ts} by {d}?",
    ],
    ["{d}在{y}年的{t}有多少?", "统计{y}年{d}的{t}数量。", "{y}年之内按{d}有几个{t}?"],
)
def count_in_year(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("date")
    key, year = draw.column(table, "date"), draw.year()
    choices = tuple(f"'{y}'" for y in YEARS)
    predicate = Predicate(left=f"strftime('%Y', {key.name})", op="=", right=f"'{year}'", choices=choices)
    return fields(table, d=key, y=year), Query(select=(COUNT,), table=table.name, where=(predicate,))


@template(
    "hard",
    ["How many {ts} are there for each year of {d}?", "Count the {ts} by year of {d}.", "Per {d} year, how many {ts}?"],
    ["按{d}的年份统计{t}数量。", "{d}的每一年有多少{t}?", "各年份(按{d})分别有几个{t}?"],
    literal=False,
)
def count_per_year(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("date")
    key = draw.column(table, "date")
    year = f"strftime('%Y', {key.name})"
    return fields(table, d=key), Query(select=(*select(year), COUNT), table=table.name, group=year)


@template(
    "medium",
    [
        "Show the {c} of {ts} whose {d} is after today.",
        "Which {ts} have a {d} in the future? Give the {c}.",
        "Return the {c} of {ts} with a {d} that is still to come.",
    ],
    ["查询{d}在今天之后的{t}的{c}。", "列出{d}晚于今天的{t}的{c}。", "{t}中{d}还没到的,给出{c}。"],
    literal=False,
)
def after_today(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("date")
    key = draw.column(table, "date")
    column = draw.shown(table, key)
    predicate = Predicate(left=key.name, op=">", right="DATE('now')")
    return fields(table, c=column, d=key), Query(select=select(column.name), table=table.name, where=(predicate,))


@template(
    "medium",
    ["Show the {c} of the {x} {ts} with the latest {d}.", "List the {c} of the {x} most recent {ts} by {d}."],
    ["查询{d}最晚的{x}个{t}的{c}。", "列出{d}最近的{x}个{t}的{c}。"],
)
def latest(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("date")
    key, limit = draw.column(table, "date"), draw.count()
    column = draw.shown(table, key)
    query = Query(select=select(column.name), table=table.name, order=(Item(column=key.name), True), limit=limit)
    return fields(table, c=column, d=key, x=limit), query


# ------------------------------------------------------------------------------------------------------ joins and nests


@template(
    "hard",
    [
        "Show the {c} of {ts} whose {p} has {k} {v}.",
        "List the {c} of {ts} of a {p} with {k} {v}.",
        "For {ps} with {k} {v}, return the {c} of their {ts}.",
    ],
    ["查询{p}的{k}为{v}的{t}的{c}。", "列出所属{p}{k}是{v}的{t}的{c}。", "{k}属于{v}的{p}有哪些{t}?给出{c}。"],
)
def join_where(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    column = draw.shown(table)
    key = draw.column(parent, "name", "text")
    value, predicate = draw.equal(key, f"{parent.name}.")
    query = Query(
        select=select(f"{table.name}.{column.name}"), table=table.name, joins=((parent.name, on),), where=(predicate,)
    )
    return fields(table, c=column, p=parent.noun, ps=parent.plural, k=key, v=value), query


@template(
    "hard",
    [
        "Show the {c} of each {t} together with the {k} of its {p}.",
        "List {t} {c} and {p} {k} for all {ts}.",
        "For every {t}, return its {c} and its {p}'s {k}.",
    ],
    ["查询每个{t}的{c}及其{p}的{k}。", "列出所有{t}的{c}和所属{p}的{k}。", "把{t}的{c}与对应{p}的{k}一起给出。"],
    literal=False,
)
def join_columns(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    column, key = draw.shown(table), draw.column(parent, "name", "text", "num")
    chosen = select(f"{table.name}.{column.name}", f"{parent.name}.{key.name}")
    return fields(table, c=column, p=parent.noun, k=key), Query(
        select=chosen, table=table.name, joins=((parent.name, on),)
    )


@template(
    "hard",
    [
        "How many {ts} have a {p} with {k} {v}?",
        "Count the {ts} whose {p} has {k} {v}.",
        "For {ps} of {k} {v}, what is the number of {ts}?",
    ],
    ["{p}的{k}为{v}的{t}有多少?", "统计所属{p}{k}是{v}的{t}数量。", "{k}属于{v}的{p}共有几个{t}?"],
)
def join_count(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    key = draw.column(parent, "name", "text")
    value, predicate = draw.equal(key, f"{parent.name}.")
    query = Query(select=(COUNT,), table=table.name, joins=((parent.name, on),), where=(predicate,))
    return fields(table, p=parent.noun, ps=parent.plural, k=key, v=value), query


@template(
    "hard",
    [
        "Show each {p} {k} with its number of {ts}.",
        "How many {ts} are there for each {p} {k}?",
        "Per {p} {k}, count the {ts}.",
    ],
    ["查询每个{p}{k}的{t}数量。", "按{p}的{k}统计{t}数量。", "各{p}{k}分别有几个{t}?"],
    literal=False,
)
def join_group(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    key = draw.column(parent, "name", "text")
    name = f"{parent.name}.{key.name}"
    query = Query(select=(*select(name), COUNT), table=table.name, joins=((parent.name, on),), group=name)
    return fields(table, p=parent.noun, k=key), query


@template(
    "hard",
    ["What is the {a} {n} of {ts} whose {p} has {k} {v}?", "Find the {a} {n} of the {ts} of {ps} with {k} {v}."],
    ["{p}的{k}为{v}的{t}的{a}{n}是多少?", "查询所属{p}{k}是{v}的{t}的{a}{n}。"],
)
def join_aggregate(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    number, key = draw.column(table, "num"), draw.column(parent, "name", "text")
    value, predicate = draw.equal(key, f"{parent.name}.")
    words, name = draw.aggregate("MAX", "MIN", "AVG", "SUM")
    item = Item(column=f"{table.name}.{number.name}", agg=name)
    query = Query(select=(item,), table=table.name, joins=((parent.name, on),), where=(predicate,))
    return fields(table, p=parent.noun, ps=parent.plural, k=key, v=value, n=number, a=words), query


@template(
    "hard",
    [
        "Show the {k} of the {p} whose {t} has the {a} {n}.",
        "Which {p} has the {t} with the {a} {n}? Give the {k}.",
        "Take the {t} of {a} {n} and return the {k} of its {p}.",
    ],
    ["查询{n}{a}的{t}所属{p}的{k}。", "{n}{a}的{t}属于哪个{p}?给出{k}。", "先找{n}{a}的{t},再返回其{p}的{k}。"],
    literal=False,
)
def join_top(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    number, key = draw.column(table, "num"), draw.column(parent, "name", "text")
    words, name = draw.aggregate("MAX", "MIN")
    query = Query(
        select=select(f"{parent.name}.{key.name}"),
        table=table.name,
        joins=((parent.name, on),),
        order=(Item(column=f"{table.name}.{number.name}"), name == "MAX"),
        limit=1,
    )
    return fields(table, p=parent.noun, k=key, n=number, a=words), query


@template(
    "hard",
    [
        "Show the {c} of {ts} with {n} above the average.",
        "Which {ts} have a {n} higher than the average? Give the {c}.",
        "Return the {c} of {ts} whose {n} exceeds the mean {n}.",
    ],
    ["查询{n}高于平均值的{t}的{c}。", "列出{n}超过平均{n}的{t}的{c}。", "{t}中{n}比平均水平高的,给出{c}。"],
    literal=False,
)
def above_average(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num")
    number = draw.column(table, "num")
    column = draw.shown(table, number)
    inner = Query(select=(Item(column=number.name, agg="AVG"),), table=table.name)
    predicate = Predicate(left=number.name, op=">", right=inner)
    return fields(table, c=column, n=number), Query(select=select(column.name), table=table.name, where=(predicate,))


@template(
    "hard",
    [
        "Show the {c} of {ps} that have no {t}.",
        "Which {ps} have no {ts}? Give the {c}.",
        "Return the {c} of each {p} without a single {t}.",
    ],
    ["查询没有{t}的{p}的{c}。", "哪些{p}没有{t}?给出{c}。", "一个{t}都没有的{p},返回{c}。"],
    literal=False,
)
def without_child(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    reference, key = on.split(" = ")[0].split(".")[1], parent.columns[0].name
    column = draw.shown(parent)
    predicate = Predicate(left=key, op="NOT IN", right=Query(select=select(reference), table=table.name))
    query = Query(select=select(column.name), table=parent.name, where=(predicate,))
    return fields(table, p=parent.noun, ps=parent.plural, c=column), query


@template(
    "hard",
    [
        "Show the {c} of {ps} that have a {t} with {n} {v}.",
        "Which {ps} have {ts} with {n} {v}? Give the {c}.",
        "Return the {c} of each {p} owning some {t} whose {n} is {v}.",
    ],
    ["查询有{n}{v}的{t}的{p}的{c}。", "哪些{p}有{n}{v}的{t}?给出{c}。", "至少有一个{t}{n}{v}的{p},返回{c}。"],
)
def with_child(draw: Draw) -> tuple[Fields, Query]:
    table, parent, on = draw.child()
    reference, key = on.split(" = ")[0].split(".")[1], parent.columns[0].name
    column, number = draw.shown(parent), draw.column(table, "num")
    words, compared = draw.compare(number)
    inner = Query(select=select(reference), table=table.name, where=(compared,))
    query = Query(select=select(column.name), table=parent.name, where=(Predicate(left=key, op="IN", right=inner),))
    return fields(table, p=parent.noun, ps=parent.plural, c=column, n=number, v=words), query


@template(
    "hard",
    [
        "Show the {c} of {ts} whose {n} equals the highest {n} of {ts} with {k} {v}.",
        "Which {ts} have the same {n} as the highest one with {k} {v}? Give the {c}.",
    ],
    ["查询{n}等于{k}为{v}的{t}的最高{n}的{t}的{c}。", "{n}达到{k}是{v}的{t}中最高值的{t},给出{c}。"],
)
def max_in_group(draw: Draw) -> tuple[Fields, Query]:
    table = draw.table("num", "text")
    number, key = draw.column(table, "num"), draw.column(table, "text")
    column = draw.shown(table, number, key)
    value, equal = draw.equal(key)
    inner = Query(select=(Item(column=number.name, agg="MAX"),), table=table.name, where=(equal,))
    query = Query(
        select=select(column.name), table=table.name, where=(Predicate(left=number.name, op="=", right=inner),)
    )
    return fields(table, c=column, n=number, k=key, v=value), query
