"""A query as a value: written as SQL, and spoilt in the ways that language models spoil queries."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from schemas import Schema, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A selected, ordered or counted expression: a column, perhaps inside an aggregate."""

    column: str
    agg: str = ""
    distinct: bool = False

    def __str__(self) -> str:
        inner = ("DISTINCT " if self.distinct else "") + self.column
        return f"{self.agg}({inner})" if self.agg else inner


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicate:
    """`left op right`; `right` is SQL text or a nested query. `choices` are other literals of the same column."""

    left: str
    op: str
    right: str | Query
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        right = f"({self.right.sql})" if isinstance(self.right, Query) else self.right
        return f"{self.left} {self.op} {right}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One SELECT. `joins` are (table, on) pairs; `tail` holds ORDER BY as (item, descending)."""

    select: tuple[Item, ...]
    table: str
    distinct: bool = False
    joins: tuple[tuple[str, str], ...] = ()
    where: tuple[Predicate, ...] = ()
    connective: str = "AND"
    group: str = ""
    having: Predicate | None = None
    order: tuple[Item, bool] | None = None
    limit: int = 0

    @property
    def sql(self) -> str:
        parts = [
            "SELECT " + ("DISTINCT " if self.distinct else "") + ", ".join(map(str, self.select)),
            f"FROM {self.table}",
        ]
        parts += [f"JOIN {table} ON {on}" for table, on in self.joins]
        if self.where:
            parts.append("WHERE " + f" {self.connective} ".join(map(str, self.where)))
        if self.group:
            parts.append(f"GROUP BY {self.group}")
        if self.having:
            parts.append(f"HAVING {self.having}")
        if self.order:
            parts.append(f"ORDER BY {self.order[0]}" + (" DESC" if self.order[1] else ""))
        if self.limit:
            parts.append(f"LIMIT {self.limit}")
        return " ".join(parts)


# ------------------------------------------------------------------------------------------------------------ mistakes
# Each takes (rng, query, schema) and gives the SQL of a wrong answer, or None where the mistake cannot be made.

Mistake = Callable[[random.Random, Query, Schema], "str | None"]


def _tables(query: Query, schema: Schema) -> list[Table]:
    return [schema.table(name) for name in (query.table, *(table for table, _ in query.joins))]


def _other_column(rng: random.Random, column: str, query: Query, schema: Schema) -> str | None:
    """Another column of the same table, written the same way (qualified or not)."""
    owner, _, name = column.rpartition(".")
    tables = [t for t in _tables(query, schema) if not owner or t.name == owner]
    others = [c.name for t in tables for c in t.columns if c.name != name] if name != "*" else []
    return (f"{owner}." if owner else "") + rng.choice(others) if others else None


def wrong_column(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """A selected column is another column of the table."""
    i = rng.randrange(len(query.select))
    other = _other_column(rng, query.select[i].column, query, schema)
    if other is None or other in [item.column for item in query.select]:
        return None
    select = list(query.select)
    select[i] = replace(select[i], column=other)
    return replace(query, select=tuple(select)).sql


def wrong_filter_column(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """A condition is put on another column."""
    plain = [i for i, p in enumerate(query.where) if "(" not in p.left]
    if not plain:
        return None
    i = rng.choice(plain)
    other = _other_column(rng, query.where[i].left, query, schema)
    where = list(query.where)
    where[i] = replace(where[i], left=other or where[i].left)
    return replace(query, where=tuple(where)).sql if other else None


def wrong_aggregate(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """MAX for MIN, SUM for AVG, a bare column for COUNT."""
    for i, item in enumerate(query.select):
        if item.agg:
            others = ["SUM", "COUNT"] if item.agg == "AVG" else ["AVG", "MIN" if item.agg == "MAX" else "MAX"]
            wrong = replace(item, agg=rng.choice(others)) if item.column != "*" else replace(item, agg="")
            return replace(query, select=(*query.select[:i], wrong, *query.select[i + 1 :])).sql
    return None


def dropped_condition(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """One condition of WHERE, or HAVING, is forgotten."""
    if not query.where:
        return replace(query, having=None).sql if query.having else None
    i = rng.randrange(len(query.where))
    return replace(query, where=(*query.where[:i], *query.where[i + 1 :])).sql


def wrong_operator(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """A comparison is turned round, loosened or negated."""
    turned = {
        ">": ["<", ">=", "="],
        "<": [">", "<=", "="],
        ">=": [">", "<="],
        "<=": ["<", ">="],
        "=": ["!="],
        "IN": ["NOT IN"],
        "NOT IN": ["IN"],
        "BETWEEN": ["NOT BETWEEN"],
        "LIKE": ["NOT LIKE", "="],
        "IS NULL": ["IS NOT NULL"],
        "IS NOT NULL": ["IS NULL"],
    }
    if query.where:
        i = rng.randrange(len(query.where))
        wrong = replace(query.where[i], op=rng.choice(turned[query.where[i].op]))
        return replace(query, where=(*query.where[:i], wrong, *query.where[i + 1 :])).sql
    return (
        replace(query, having=replace(query.having, op=rng.choice(turned[query.having.op]))).sql
        if query.having
        else None
    )


def wrong_connective(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """OR for AND, or AND for OR."""
    if len(query.where) < 2:
        return None
    return replace(query, connective="OR" if query.connective == "AND" else "AND").sql


def wrong_literal(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """Another value than the question's."""
    able = [i for i, p in enumerate(query.where) if p.choices]
    if not able:
        return None
    i = rng.choice(able)
    others = [choice for choice in query.where[i].choices if choice != query.where[i].right]
    wrong = replace(query.where[i], right=rng.choice(others))
    return replace(query, where=(*query.where[:i], wrong, *query.where[i + 1 :])).sql


def missing_distinct(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """DISTINCT is forgotten."""
    if query.distinct:
        return replace(query, distinct=False).sql
    if any(item.distinct for item in query.select):
        return replace(query, select=tuple(replace(item, distinct=False) for item in query.select)).sql
    return None


def missing_order(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """ORDER BY is forgotten."""
    return replace(query, order=None).sql if query.order else None


def flipped_order(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """Ascending for descending, or the other way round."""
    return replace(query, order=(query.order[0], not query.order[1])).sql if query.order else None


def wrong_limit(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """LIMIT is forgotten or off."""
    return replace(query, limit=rng.choice([0, query.limit + 1, query.limit + 9])).sql if query.limit else None


def missing_group(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """GROUP BY is forgotten."""
    return replace(query, group="").sql if query.group else None


def wrong_table(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """A table that the prompt does not show: another of the database, or an invented plural or prefix."""
    shown = [table.name for table in _tables(query, schema)]
    invented = query.table + ("表" if schema.language == "zh" else "s")
    others = [table.name for table in schema.tables if table.name not in shown]
    return replace(query, table=rng.choice([invented, *others])).sql if not query.joins else None


def missing_join(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """The second table is used without being joined."""
    return replace(query, joins=()).sql if query.joins else None


def truncated(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """The answer stops too early."""
    words = query.sql.split()
    return " ".join(words[: rng.randrange(2, len(words))])


def extra_condition(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """A condition that nobody asked for."""
    table = _tables(query, schema)[0]
    column = rng.choice(table.columns[1:])
    if column.kind == "ref":
        return None
    name = f"{table.name}.{column.name}" if query.joins else column.name
    extra = Predicate(left=name, op="=", right=column.sql(rng.choice(column.literals(held_out=False))))
    return replace(query, where=(*query.where, extra)).sql


def broken_syntax(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """Something that no parser takes: a lost FROM, a stray comma, an open bracket or quote."""
    sql = query.sql
    broken = [
        sql.replace(" FROM ", " ", 1).replace("SELECT ", "SELECT FROM ", 1),
        sql.replace(" FROM", ", FROM", 1),
        sql.replace("SELECT ", "SELECT (", 1),
        sql + " AND",
    ]
    if "'" in sql:
        broken.append(sql[: sql.rindex("'")])
    return rng.choice(broken)


def repeated_clause(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """A clause is written twice, as a model does that loses its place."""
    sql = query.sql
    marks = [mark for mark in (" WHERE ", " GROUP BY ", " ORDER BY ", " LIMIT ", " FROM ") if mark in sql]
    return sql + sql[sql.rindex(marks[0]) :]


def chatter(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """The right query, wrapped in or followed by talk: no machine can run the answer as it stands."""
    sql = query.sql
    if schema.language == "zh":
        return rng.choice([f"{sql};\n这条语句查询{query.table}表。", f"答案是: {sql};", f"{sql};\n希望对你有帮助!"])
    after = [
        f"This query reads the {query.table} table.",
        "I hope this helps!",
        "Explanation: it selects what you asked for.",
    ]
    before = ["Sure! Here is the query: ", "You can use this query: "]
    return rng.choice([f"{sql};\n{rng.choice(after)}", f"{rng.choice(before)}{sql};"])


def swapped_comparison(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """Any other of < > <= >=."""
    signs = ("<", ">", "<=", ">=")
    able = [i for i, p in enumerate(query.where) if p.op in signs]
    if not able:
        return None
    i = rng.choice(able)
    wrong = replace(query.where[i], op=rng.choice([sign for sign in signs if sign != query.where[i].op]))
    return replace(query, where=(*query.where[:i], wrong, *query.where[i + 1 :])).sql


def counted(rng: random.Random, query: Query, schema: Schema) -> str | None:
    """COUNT(*) for the columns that are asked for, or a column for the count."""
    if query.group or query.order:
        return None
    if [item.agg for item in query.select] == ["COUNT"]:
        column = rng.choice([c.name for table in _tables(query, schema) for c in table.columns])
        return replace(query, select=(Item(column=column),)).sql
    if any(item.agg for item in query.select):
        return None
    return replace(query, select=(Item(column="*", agg="COUNT"),), distinct=False).sql


MISTAKES: tuple[tuple[Mistake, int], ...] = (
    (wrong_column, 3),
    (wrong_filter_column, 3),
    (wrong_aggregate, 3),
    (dropped_condition, 2),
    (wrong_operator, 3),
    (wrong_connective, 2),
    (wrong_literal, 2),
    (missing_distinct, 3),
    (missing_order, 2),
    (flipped_order, 2),
    (wrong_limit, 2),
    (missing_group, 2),
    (wrong_table, 2),
    (missing_join, 3),
    (truncated, 2),
    (extra_condition, 1),
    (broken_syntax, 2),
    (repeated_clause, 2),
    (chatter, 3),
)


# The demo's: what a policy that already writes clean SQL still gets wrong. They are made as often one way as the other, so
# that nothing about an answer alone says that it is wrong: a reward model has to read the question. (With the list above, half
# of whose mistakes are broken form, it learns to judge form and to like >= better than <; PPO then writes >= everywhere.)
DEMO_MISTAKES: tuple[tuple[Mistake, int], ...] = (
    (wrong_column, 4),
    (swapped_comparison, 14),
    (counted, 4),
    (wrong_aggregate, 2),
    (wrong_filter_column, 2),
    (flipped_order, 3),
    (wrong_literal, 2),
    (missing_distinct, 1),
    (missing_order, 1),
    (dropped_condition, 1),
    (extra_condition, 1),
    (repeated_clause, 1),
    (chatter, 1),
)


def spoil(
    rng: random.Random, query: Query, schema: Schema, kinds: tuple[tuple[Mistake, int], ...] = MISTAKES
) -> tuple[str, str]:
    """A wrong answer to the question of `query`, and the name of the mistake in it."""
    mistakes, weights = zip(*kinds, strict=True)
    while True:
        mistake = rng.choices(mistakes, weights)[0]
        wrong = mistake(rng, query, schema)
        if wrong is not None and wrong != query.sql:
            ends = "" if mistake in (chatter, truncated, broken_syntax) else ";"
            return wrong + ends, mistake.__name__
