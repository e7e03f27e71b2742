"""Queries that are nearly the gold query: what a database must be able to tell from it.

Each mutant has one change: a predicate dropped; a literal moved by one, cut or replaced; an operator turned, or with and without its
equality; AND for OR; NOT put in or taken away; DISTINCT put in or taken away; another aggregate; a sort direction turned, a sort key or
ORDER BY dropped; LIMIT dropped or one more; another type of join; another column of the same kind; another set operator; HAVING or a group
key dropped. Changes that can never matter (DISTINCT on one row, or beside all group keys) are not made.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trimtab.sql.functions import iso, moment
from trimtab.sql.infer import owners
from trimtab.sql.schema import Schema

MOST = 40


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed query, and what was changed."""

    sql: str
    change: str


def mutants(gold: str, dialect: str, schema: Schema, most: int = MOST) -> list[Mutant]:
    """Every mutant of a query, no text twice; none where sqlglot cannot read it.

    Args:
        schema: for the other columns of a table.
        most: where there are more, an even selection over all kinds of change.
    """
    import sqlglot
    from sqlglot.errors import SqlglotError

    logger = logging.getLogger("sqlglot")
    was, logger.disabled = logger.disabled, True
    try:
        tree = sqlglot.parse_one(gold, read=dialect)
        plain = tree.sql(dialect=dialect, comments=False)
        found: dict[str, Mutant] = {}
        for change in _changes(tree, schema):
            text = tree.sql(dialect=dialect, comments=False)
            if text != plain:
                found.setdefault(text, Mutant(text, change))
    except (SqlglotError, RecursionError, ValueError, AttributeError, KeyError, TypeError):
        return []
    finally:
        logger.disabled = was
    listed = list(found.values())
    return listed if len(listed) <= most else [listed[i * len(listed) // most] for i in range(most)]


@contextmanager
def _swapped(node: Any, new: Any) -> Iterator[None]:
    node.replace(new)
    try:
        yield
    finally:
        new.replace(node)


@contextmanager
def _set(node: Any, **changes: Any) -> Iterator[None]:
    before = {name: node.args.get(name) for name in changes}
    for name, value in changes.items():
        node.set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            node.set(name, value)


def _changes(tree: Any, schema: Schema) -> Iterator[str]:
    """Changes the tree, names the change, and changes it back when asked for the next."""
    from sqlglot import exp

    nodes = list(tree.walk(bfs=False))
    tables = owners(tree, schema)
    for node in nodes:
        if isinstance(node, exp.Where | exp.Having):
            yield from _clause(node)
        elif isinstance(node, exp.And | exp.Or):
            yield from _connective(node)
        elif isinstance(node, exp.EQ | exp.NEQ | exp.LT | exp.LTE | exp.GT | exp.GTE):
            yield from _comparison(node)
        elif isinstance(node, exp.Between | exp.In | exp.Like | exp.ILike | exp.Is | exp.Exists):
            yield from _predicate(node)
        elif isinstance(node, exp.Literal):
            yield from _literal(node)
        elif isinstance(node, exp.Select):
            yield from _select(node, schema)
        elif isinstance(node, exp.AggFunc):
            yield from _aggregate(node, schema, tables)
        elif isinstance(node, exp.Join):
            yield from _join(node)
        elif isinstance(node, exp.SetOperation):
            yield from _set_operation(node)
        elif isinstance(node, exp.Add | exp.Sub | exp.Mul | exp.Div) and node.find(exp.Column):
            kind = {"Add": exp.Sub, "Sub": exp.Add, "Mul": exp.Div, "Div": exp.Mul}[type(node).__name__]
            with _swapped(node, kind(this=node.this.copy(), expression=node.expression.copy())):
                yield "another arithmetic operator"
        elif isinstance(node, exp.Column):
            yield from _column(node, schema, tables)


def _clause(node: Any) -> Iterator[str]:
    owner, name = node.parent, node.arg_key
    with _set(owner, **{name: None}):
        yield f"{name.upper()} dropped"


def _connective(node: Any) -> Iterator[str]:
    from sqlglot import exp

    if isinstance(node.parent, exp.Join):  # a join without its keys is a cross join: always another size
        kept = [side for side in (node.this, node.expression) if not _links(side)]
    else:
        kept = [node.this, node.expression]
    for dropped in kept:
        other = node.expression if dropped is node.this else node.this
        with _swapped(node, other.copy()):
            yield "predicate dropped"
    turned = exp.Or if isinstance(node, exp.And) else exp.And
    new = turned(this=node.this.copy(), expression=node.expression.copy())
    with _swapped(node, exp.Paren(this=new) if isinstance(node.parent, exp.And | exp.Or | exp.Not) else new):
        yield f"{turned.__name__.upper()} for {type(node).__name__.upper()}"


def _links(node: Any) -> bool:
    from sqlglot import exp

    return isinstance(node, exp.EQ) and isinstance(node.this, exp.Column) and isinstance(node.expression, exp.Column)


def _comparison(node: Any) -> Iterator[str]:
    from sqlglot import exp

    if node.find_ancestor(exp.Join, exp.Where, exp.Having, exp.If) is None or (
        _links(node) and isinstance(node, exp.EQ)
    ):
        return
    turned: dict[Any, tuple[Any, ...]] = {
        exp.EQ: (exp.NEQ,), exp.NEQ: (exp.EQ,), exp.LT: (exp.LTE, exp.GT), exp.LTE: (exp.LT, exp.GTE),
        exp.GT: (exp.GTE, exp.LT), exp.GTE: (exp.GT, exp.LTE),
    }  # fmt: skip
    kinds = list(turned[type(node)])
    if any(_now(side) for side in (node.this, node.expression)):
        kinds = kinds[1:]  # nothing happens in the very second that it is
    number = isinstance(node.expression, exp.Literal) and not node.expression.is_string
    if isinstance(node, exp.EQ) and number:
        kinds.append(exp.GTE)
    for kind in kinds:
        with _swapped(node, kind(this=node.this.copy(), expression=node.expression.copy())):
            yield f"{kind.__name__} for {type(node).__name__}"


def _now(node: Any) -> bool:
    from sqlglot import exp

    return isinstance(node, exp.CurrentTimestamp | exp.CurrentDatetime) or (
        isinstance(node, exp.Anonymous) and node.name.lower() in ("now", "sysdate", "getdate")
    )


def _predicate(node: Any) -> Iterator[str]:
    from sqlglot import exp

    if isinstance(node.parent, exp.Not):
        with _swapped(node.parent, node.copy()):
            yield "NOT taken away"
    else:
        with _swapped(node, exp.Not(this=node.copy())):
            yield "NOT put in"
    if isinstance(node, exp.Between):
        low, high = (
            kind(this=node.this.copy(), expression=node.args[end].copy())
            for kind, end in ((exp.GT, "low"), (exp.LT, "high"))
        )
        with _swapped(node, exp.Paren(this=exp.And(this=low, expression=high))):
            yield "BETWEEN without its ends"
    if isinstance(node, exp.In) and len(node.expressions) > 1:
        for i in range(min(3, len(node.expressions))):
            kept = [e.copy() for j, e in enumerate(node.expressions) if j != i]
            with _swapped(node, exp.In(this=node.this.copy(), expressions=kept)):
                yield "a value of IN dropped"
    if isinstance(node, exp.Like | exp.ILike) and isinstance(node.expression, exp.Literal):
        with _swapped(
            node, exp.EQ(this=node.this.copy(), expression=exp.Literal.string(node.expression.name.strip("%")))
        ):
            yield "= for LIKE"


def _literal(node: Any) -> Iterator[str]:
    from sqlglot import exp

    parent = node.parent
    while isinstance(parent, exp.Neg | exp.Paren):
        parent = parent.parent
    if isinstance(
        parent,
        exp.Limit | exp.Offset | exp.Fetch | exp.Order | exp.Ordered | exp.Group | exp.DataTypeParam | exp.DataType,
    ):
        return  # their own changes, or no value
    if not isinstance(
        parent,
        exp.Predicate
        | exp.Between
        | exp.In
        | exp.Add
        | exp.Sub
        | exp.Mul
        | exp.Div
        | exp.Interval
        | exp.If
        | exp.Coalesce,
    ):
        return
    if not node.is_string:
        try:
            value = float(node.name)
        except ValueError:
            return
        step = 1.0 if value.is_integer() else 10.0 ** -len(node.name.partition(".")[2])
        digits = len(node.name.partition(".")[2])
        for other in (value + step, value - step):
            if other >= 0:
                with _swapped(node, exp.Literal.number(f"{other:.{digits}f}")):
                    yield "literal moved by one"
        return
    text = node.name
    if isinstance(parent, exp.Interval):
        if text.isdigit():
            with _swapped(node, exp.Literal.string(str(int(text) + 1))):
                yield "literal moved by one"
        return
    when = moment(text) if len(text) >= 8 and "-" in text else None
    if when is not None:
        for days in (1, -1):
            other_text = iso(when + dt.timedelta(days=days))
            with _swapped(node, exp.Literal.string(other_text)):
                yield "literal moved by one day"
        return
    if isinstance(parent, exp.Like | exp.ILike):
        forms = {
            text.removeprefix("%"),
            text.removesuffix("%"),
            "%" + text.removeprefix("%"),
            text.removesuffix("%") + "%",
        }
        for form in sorted(forms - {text}):
            with _swapped(node, exp.Literal.string(form)):
                yield "LIKE with another pattern"
        return
    others = [text[:-1], text + ("1" if text[-1:].isdigit() else "x")] if len(text) > 1 else [text + "x"]
    if text.isdigit():
        others = [str(int(text) + 1).zfill(len(text)), str(max(0, int(text) - 1)).zfill(len(text))]
    elif text.swapcase() != text:
        others.append(text.swapcase())
    for other in others:
        with _swapped(node, exp.Literal.string(other)):
            yield "another literal"


def _select(node: Any, schema: Schema) -> Iterator[str]:
    from sqlglot import exp

    distinct, group, order = (node.args.get(name) for name in ("distinct", "group", "order"))
    inside = isinstance(node.parent, exp.In | exp.Exists) or (
        isinstance(node.parent, exp.Subquery) and isinstance(node.parent.parent, exp.In)
    )
    inside = inside or (isinstance(node.parent, exp.SetOperation) and bool(node.parent.args.get("distinct")))
    if distinct is not None:
        with _set(node, distinct=None):
            yield "DISTINCT taken away"
    elif not inside and not _one_row(node) and not _keyed(node, group, schema):
        with _set(node, distinct=exp.Distinct()):
            yield "DISTINCT put in"
    if group is not None and len(group.expressions) > 1:
        for i in range(len(group.expressions)):
            kept = [e.copy() for j, e in enumerate(group.expressions) if j != i]
            with _set(node, group=exp.Group(expressions=kept)):
                yield "a group key dropped"
    yield from _order(node, order)


def _order(node: Any, order: Any) -> Iterator[str]:
    from sqlglot import exp

    if order is not None:
        with _set(node, order=None):
            yield "ORDER BY dropped"
        for i, ordered in enumerate(order.expressions):
            nulls = not ordered.args.get("nulls_first")  # what the dialect does with NULLs turns, too
            with _set(ordered, desc=None if ordered.args.get("desc") else True, nulls_first=nulls):
                yield "sort direction turned"
            if len(order.expressions) > 1:
                kept = [e.copy() for j, e in enumerate(order.expressions) if j != i]
                with _set(node, order=exp.Order(expressions=kept)):
                    yield "a sort key dropped"
    for name in ("limit", "offset"):
        part = node.args.get(name)
        if part is None:
            continue
        count = part.args.get("expression") or part.args.get("count")
        with _set(node, **{name: None}):
            yield f"{name.upper()} dropped"
        if isinstance(count, exp.Literal) and count.is_int:
            with _swapped(count, exp.Literal.number(int(count.name) + 1)):
                yield f"{name.upper()} one more"


def _one_row(node: Any) -> bool:
    from sqlglot import exp

    return node.args.get("group") is None and all(
        e.find(exp.AggFunc) is not None and e.find(exp.Window) is None for e in node.selects
    )


def _keyed(node: Any, group: Any, schema: Schema) -> bool:
    """No row is there twice: every group key is shown, or the primary key of every table."""
    from sqlglot import exp

    if group is None or not group.expressions:
        source = node.args.get("from_") or node.args.get("from")
        read = [part.this for part in (source, *(node.args.get("joins") or ())) if part is not None]
        tables = [schema.table(t.name) if isinstance(t, exp.Table) else None for t in read]
        names = {e.unalias().name.lower() for e in node.selects if isinstance(e.unalias(), exp.Column)}
        star = any(isinstance(e, exp.Star) for e in node.selects)
        return bool(tables) and all(
            t is not None and t.primary and (star or (len(tables) == 1 and {p.lower() for p in t.primary} <= names))
            for t in tables
        )
    shown = {e.unalias().sql() for e in node.selects} | {e.alias for e in node.selects if e.alias}
    numbers = {str(i + 1) for i in range(len(node.selects))}
    return all(e.sql() in shown or e.sql() in numbers for e in group.expressions)


def _aggregate(node: Any, schema: Schema, tables: dict[int, str]) -> Iterator[str]:
    from sqlglot import exp

    inner = node.this
    kinds = {
        "Sum": (exp.Avg, exp.Max), "Avg": (exp.Sum, exp.Max), "Min": (exp.Max,), "Max": (exp.Min,), "Count": (),
    }.get(type(node).__name__, ())  # fmt: skip
    for kind in kinds:
        with _swapped(node, kind(this=inner.copy())):
            yield f"{kind.__name__.upper()} for {type(node).__name__.upper()}"
    if not isinstance(node, exp.Count | exp.Sum | exp.Avg) or isinstance(inner, exp.Star) or inner is None:
        return
    if isinstance(inner, exp.Distinct):
        with _set(node, this=inner.expressions[0].copy()):
            yield "DISTINCT taken away"
    elif isinstance(inner, exp.Column):
        table = schema.table(tables.get(id(inner), ""))
        column = table.column(inner.name) if table is not None else None
        if isinstance(node, exp.Count) and column is not None and not column.unique:
            with _set(node, this=exp.Distinct(expressions=[inner.copy()])):
                yield "DISTINCT put in"


def _join(node: Any) -> Iterator[str]:
    side, kind = str(node.args.get("side") or "").upper(), str(node.args.get("kind") or "").upper()
    if (kind in ("CROSS", "OUTER") and not side) or (not node.args.get("on") and not node.args.get("using")):
        return
    if side in ("", "LEFT") and _asked_for(node):
        return
    if side:
        with _set(node, side=None, kind=None):
            yield "an inner join"
    else:
        with _set(node, side="LEFT", kind=None):
            yield "a left join"


def _asked_for(join: Any) -> bool:
    """A condition of WHERE fails where the joined table has no row: inner and left join are the same."""
    from sqlglot import exp

    where = join.parent.args.get("where") if join.parent is not None else None
    name = join.this.alias_or_name.lower()
    parts = [] if where is None else list(where.this.flatten()) if isinstance(where.this, exp.And) else [where.this]
    return any(
        isinstance(part, exp.EQ | exp.NEQ | exp.LT | exp.LTE | exp.GT | exp.GTE | exp.Like | exp.In | exp.Between)
        and isinstance(part.this, exp.Column)
        and part.this.table.lower() == name
        for part in parts
    )


def _set_operation(node: Any) -> Iterator[str]:
    from sqlglot import exp

    if isinstance(node, exp.Union):
        with _set(node, distinct=not node.args.get("distinct")):
            yield "UNION with or without ALL"
    for kind in (exp.Union, exp.Except, exp.Intersect):
        if not isinstance(node, kind):
            args = {name: value.copy() if hasattr(value, "copy") else value for name, value in node.args.items()}
            if node.parent is None:  # nothing to be replaced in: its sides are enough
                continue
            with _swapped(node, kind(**{**args, "distinct": True})):
                yield f"{kind.__name__.upper()} for {type(node).__name__.upper()}"
    for side in ("this", "expression"):
        if node.parent is not None:
            with _swapped(node, node.args[side].copy()):
                yield "a side of a set operation dropped"
    yield from _order(node, node.args.get("order"))


def _column(node: Any, schema: Schema, tables: dict[int, str]) -> Iterator[str]:
    """The next two columns of the same kind in the same table."""
    from sqlglot import exp

    table = schema.table(tables.get(id(node), ""))
    column = table.column(node.name) if table is not None else None
    if table is None or column is None:
        return
    if isinstance(node.parent, exp.EQ) and _links(node.parent):
        return
    listed = [
        c for c in table.columns if c.kind == column.kind and c.name != column.name and c.pattern == column.pattern
    ]
    at = [c.name for c in table.columns].index(column.name)
    listed.sort(key=lambda c: ([x.name for x in table.columns].index(c.name) - at) % len(table.columns))
    for other in listed[:2]:
        new = exp.to_identifier(other.name, quoted=node.this.args.get("quoted") or None)
        with _set(node, this=new):
            yield "another column"
