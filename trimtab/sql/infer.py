"""What gold queries tell about their database: which tables and columns, of which kinds, joined how, compared with what.

`analyse` reads one query into `Facts`. `complete` makes a schema of the facts of many: of nothing, or of tables whose types and keys
nobody has declared. Evidence for a kind, strongest first: a pattern in TO_DATE(column, pattern); a date function, or a comparison
with a date; a comparison with text, or LIKE; a number, SUM, AVG or arithmetic; the kind of a column it is joined with; its name.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.sql.dialects import strftime_of
from trimtab.sql.functions import moment, unit_name
from trimtab.sql.schema import Column, Kind, Link, Schema, Table, kind_of

Constant = Callable[[str], Any]
"""Evaluates an expression without columns, written in the dialect of the query; None where it cannot."""

Place = tuple[int, str]
"""A source of a query (its number in `Facts.sources`) and a column of it, in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A comparison of one column with constants.

    Attributes:
        op: = <> < <= > >= in between like null.
        negated: NOT stands before it.
        wrap: what was done to the column first: "", "year", "month", "day", "parse:PATTERN", "format:PATTERN", "left:N", "lower",
            "upper", "length", or "?" for anything else.
    """

    place: Place
    op: str
    values: tuple[Any, ...] = ()
    negated: bool = False
    wrap: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Having:
    """A comparison of an aggregate of a group with a number; `place` is None for COUNT(*)."""

    aggregate: str
    place: Place | None
    op: str
    value: float
    keys: tuple[Place, ...]


@dataclass(slots=True, kw_only=True)
class Facts:
    """One query, read.

    Attributes:
        sources: the table of each source, in lower case; a table that is read twice is two sources.
        joined: places that must be equal (an absent partner is asked for where `apart`).
        ordered, grouped: columns that ORDER BY or GROUP BY names.
        columns: every column with its table, as the query spells them.
        votes: kinds that a column (table, column) is used as.
        shown: columns of the answer; `means`: columns that are compared with their own mean.
        limited: it has LIMIT; `either`: it has OR.
    """

    sources: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    joined: list[tuple[Place, Place]] = field(default_factory=list)
    apart: list[tuple[Place, Place]] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    havings: list[Having] = field(default_factory=list)
    ordered: list[Place] = field(default_factory=list)
    grouped: list[Place] = field(default_factory=list)
    shown: list[Place] = field(default_factory=list)
    means: list[Place] = field(default_factory=list)
    starred: set[str] = field(default_factory=set)
    columns: list[tuple[str, str]] = field(default_factory=list)
    sure: list[tuple[str, str]] = field(default_factory=list)
    votes: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    limited: bool = False
    either: bool = False

    def table(self, place: Place) -> str:
        return self.sources[place[0]]


_DATE_PARTS = {"Year": "year", "Month": "month", "Day": "day", "DayOfMonth": "day"}
_FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "<>": "<>"}
_OPS = {"EQ": "=", "NullSafeEQ": "=", "NEQ": "<>", "LT": "<", "LTE": "<=", "GT": ">", "GTE": ">="}
_SUMS = ("Sum", "Avg", "Stddev", "StddevPop", "StddevSamp", "Variance", "VariancePop", "Median")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Mod", "Abs", "Round", "Ceil", "Floor", "Neg", "Sqrt", "Pow")
_DATES = frozenset(
    ["Extract", "TimestampTrunc", "DateTrunc", "TimeToStr", "TsOrDsToDate", "TsOrDsToTimestamp", "Date", "DateAdd", "DateSub", "DateDiff",
     "TimestampDiff", "AddMonths", "LastDay", "DayOfWeek", "Quarter", "Week", "MonthsBetween", "DatetimeAdd", "DatetimeSub", "DayOfYear",
     "Hour", "Minute"]
)  # fmt: skip
_TEXTS = frozenset(
    [
        "Like",
        "ILike",
        "Lower",
        "Upper",
        "Substring",
        "Length",
        "Trim",
        "Concat",
        "DPipe",
        "StrPosition",
        "Left",
        "Right",
        "RegexpLike",
    ]
)
_DATE_CALLS = frozenset(["julianday", "date", "datetime", "strftime", "trunc", "age", "months_between", "date_part"])
_PLAIN = frozenset(
    [
        "Paren",
        "TsOrDsToDate",
        "TsOrDsToTimestamp",
        "Date",
        "Cast",
        "Coalesce",
        "Trim",
        "Round",
        "TimestampTrunc",
        "DateTrunc",
    ]
)
_TIME = re.compile(r"\d{4}-\d{1,2}-\d{1,2}(?:[ T]\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?)?\Z")


def analyse(gold: str, dialect: str, known: Schema | None, constant: Constant) -> Facts | None:
    """The facts of a query; None where sqlglot cannot read it.

    Args:
        known: says which table an unqualified column belongs to; may be incomplete.
    """
    import sqlglot
    from sqlglot.errors import SqlglotError
    from sqlglot.optimizer.scope import traverse_scope

    try:
        return _Reader(known, dialect, constant).read(traverse_scope(sqlglot.parse_one(gold, read=dialect)))
    except (SqlglotError, RecursionError, ValueError, AttributeError, KeyError, TypeError):  # text that is not SQL
        return None


def owners(tree: Any, known: Schema) -> dict[int, str]:
    """The table (lower case) of every column node of a tree, by the node's id; computed columns are left out."""
    from sqlglot.errors import SqlglotError
    from sqlglot.optimizer.scope import traverse_scope

    try:
        return _Reader(known, "", lambda _: None).owners(traverse_scope(tree))
    except (SqlglotError, RecursionError):
        return {}


class _Reader:
    """Reads the scopes of one query into `facts`."""

    def __init__(self, known: Schema | None, dialect: str, constant: Constant) -> None:
        self.known = known
        self.dialect = dialect
        self.constant = constant
        self.facts = Facts()
        self.numbers: dict[int, int] = {}  # id of a table in the tree -> its source

    def read(self, scopes: Sequence[Any]) -> Facts:
        self._number(scopes)
        for scope in scopes:
            self._scope(scope)
        return self.facts

    def owners(self, scopes: Sequence[Any]) -> dict[int, str]:
        from sqlglot import exp

        self._number(scopes)
        found: dict[int, str] = {}
        for scope in scopes:
            for column in scope.find_all(exp.Column):
                place = None if isinstance(column.this, exp.Star) else self.place(column, scope)
                if place is not None and place[0] >= 0:
                    found.setdefault(id(column), self.facts.table(place))
        return found

    def _number(self, scopes: Sequence[Any]) -> None:
        from sqlglot import exp

        for scope in scopes:
            for source in scope.sources.values():
                if isinstance(source, exp.Table) and id(source) not in self.numbers:
                    self.numbers[id(source)] = len(self.facts.sources)
                    self.facts.sources.append(source.name.lower())
                    self.facts.names.append(source.name)

    # ------------------------------------------------------------------------------------------------------- columns

    def place(self, column: Any, scope: Any) -> Place | None:
        """Where a column comes from; None where it is computed, or not to be told."""
        name, owner = column.name.lower(), column.table
        while scope is not None:
            if owner:
                source = scope.sources.get(owner) or next(
                    (s for a, s in scope.sources.items() if a.lower() == owner.lower()), None
                )
                if source is not None:
                    return self._in(source, name)
            else:
                found = self._unqualified(name, scope)
                if found is not None:
                    return found
            scope = scope.parent
        return None

    def _unqualified(self, name: str, scope: Any) -> Place | None:
        from sqlglot import exp

        tables = []
        for source in scope.sources.values():
            if isinstance(source, exp.Table):
                table = self.known.table(source.name) if self.known is not None else None
                if table is not None and table.column(name) is not None:
                    return self.numbers[id(source)], name
                tables.append((source, table))
            else:
                found = self._in(source, name, strict=True)
                if found is not None:
                    return found
        open_ones = [source for source, table in tables if table is None]
        if scope.parent is not None and not open_ones:
            return None
        if not tables:
            return None
        return self.numbers[id((open_ones or [tables[0][0]])[0])], name

    def _in(self, source: Any, name: str, strict: bool = False) -> Place | None:
        from sqlglot import exp

        if isinstance(source, exp.Table):
            return self.numbers.get(id(source), -1), name
        select = source.expression
        while isinstance(select, exp.SetOperation):
            select = select.left
        scope = next((s for s in source.traverse() if s.expression is select), source)
        for selected in select.selects if isinstance(select, exp.Select) else ():
            if selected.alias_or_name.lower() == name:
                inner = selected.unalias()
                return self.place(inner, scope) if isinstance(inner, exp.Column) else None
            if isinstance(selected, exp.Star):
                return self._unqualified(name, scope)
        return None

    def _note(self, place: Place | None, kind: str) -> None:
        if place is not None and place[0] >= 0:
            self.facts.votes[self.facts.table(place), place[1]].append(kind)

    # --------------------------------------------------------------------------------------------------------- scope

    def _scope(self, scope: Any) -> None:
        from sqlglot import exp

        select, facts = scope.expression, self.facts
        if not isinstance(select, exp.Select):
            return
        aliases = {s.alias.lower() for s in select.selects if isinstance(s, exp.Alias)}
        for column in scope.find_all(exp.Column):
            if column.find_ancestor(exp.Select) is not select:
                continue
            if isinstance(column.this, exp.Star):
                source = scope.sources.get(column.table)
                if isinstance(source, exp.Table):
                    facts.starred.add(source.name.lower())
                continue
            if (
                not column.table
                and column.name.lower() in aliases
                and column.find_ancestor(exp.Order, exp.Having, exp.Group)
            ):
                continue
            place = self.place(column, scope)
            if place is not None and place[0] >= 0:
                facts.columns.append((facts.names[place[0]], column.name))
                if column.table or len(scope.sources) == 1:
                    facts.sure.append((facts.names[place[0]], column.name))
                self._evidence(column, place)
        if any(isinstance(s, exp.Star) for s in select.selects):
            facts.starred |= {s.name.lower() for s in scope.sources.values() if isinstance(s, exp.Table)}
        for using in select.args.get("joins") or ():
            for identifier in using.args.get("using") or ():
                places = [
                    (self.numbers[id(s)], identifier.name.lower())
                    for s in scope.sources.values()
                    if isinstance(s, exp.Table)
                ]
                facts.columns += [(facts.names[p[0]], identifier.name) for p in places]
                facts.sure += [(facts.names[p[0]], identifier.name) for p in places]
                facts.joined += list(itertools.pairwise(places))
        grouped = [
            p
            for g in (select.args["group"].expressions if select.args.get("group") else ())
            for p in self._places(g, scope)
        ]
        facts.grouped += grouped
        for ordered in select.args["order"].expressions if select.args.get("order") else ():
            facts.ordered += self._places(ordered.this, scope)
        facts.limited = facts.limited or bool(select.args.get("limit"))
        facts.either = facts.either or scope.find(exp.Or) is not None
        for shown in select.selects:
            facts.shown += self._places(shown, scope)
        for node in scope.find_all(
            exp.EQ, exp.NullSafeEQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE, exp.Between, exp.In, exp.Like, exp.ILike, exp.Is, exp.Exists
        ):  # fmt: skip
            if node.find_ancestor(exp.Select) is select:
                self._predicate(node, scope, tuple(grouped))

    def _places(self, node: Any, scope: Any) -> list[Place]:
        from sqlglot import exp

        found = [self.place(c, scope) for c in node.find_all(exp.Column) if not isinstance(c.this, exp.Star)]
        if not found and isinstance(node, exp.Literal) and node.is_int and not isinstance(node.parent, exp.Select):
            selects = scope.expression.selects  # ORDER BY 2
            index = int(node.name) - 1
            if 0 <= index < len(selects):
                return self._places(selects[index], scope)
        if isinstance(node, exp.Column) and not node.table and found == [None]:
            return []
        return [p for p in found if p is not None and p[0] >= 0]

    def _evidence(self, column: Any, place: Place) -> None:
        node, name = column.parent, type(column.parent).__name__
        while name in ("Paren", "Distinct", "Coalesce", "Ordered"):
            node, name = node.parent, type(node.parent).__name__
        if name in _SUMS or name in _ARITHMETIC:
            interval = any(type(n).__name__ in ("Interval", "CurrentDate", "CurrentTimestamp") for n in node.walk())
            self._note(place, "date" if interval else "number")
        elif name in ("StrToDate", "StrToTime", "ToTimestamp") and node.args.get("format") is not None:
            self._note(place, f"pattern:{node.args['format'].name}")
        elif name in _DATE_PARTS or name in _DATES:
            self._note(place, "timestamp" if name in ("Hour", "Minute") else "date")
        elif name == "ToChar" and node.args.get("format") is not None:
            if re.search("(?i)y|mm|dd", node.args["format"].name):
                self._note(place, "date")
        elif name in _TEXTS:
            self._note(place, "text")
        elif name == "Cast":
            kind = kind_of(node.to.this.name)
            if kind in ("integer", "real"):
                self._note(place, "number")
            elif kind in ("date", "timestamp"):
                self._note(place, "date")
        elif name == "Anonymous" and node.name.lower() in _DATE_CALLS:
            self._note(place, "date")

    # ----------------------------------------------------------------------------------------------------- predicates

    def _side(self, node: Any, scope: Any) -> tuple[str, Any, str]:
        """("column", place, wrap), ("constant", value, ""), ("aggregate", (name, place), ""), ("query", select, "") or ("", None, "")."""
        from sqlglot import exp

        while isinstance(node, exp.Paren):
            node = node.this
        name = type(node).__name__
        if isinstance(node, exp.Subquery | exp.Select):
            return "query", node.this if isinstance(node, exp.Subquery) else node, ""
        if isinstance(node, exp.Column):
            place = self.place(node, scope)
            return ("column", place, "") if place is not None and place[0] >= 0 else ("", None, "")
        if isinstance(node, exp.AggFunc):
            inner = node.this.expressions[0] if isinstance(node.this, exp.Distinct) else node.this
            place = self.place(inner, scope) if isinstance(inner, exp.Column) else None
            return "aggregate", (name.lower() + ("-distinct" if isinstance(node.this, exp.Distinct) else ""), place), ""
        columns = list(node.find_all(exp.Column))
        if not columns:
            if node.find(exp.Select, exp.AggFunc) is not None:
                return "", None, ""
            return "constant", self._constant(node), ""
        place = self.place(columns[0], scope)
        if len(columns) > 1 or place is None or place[0] < 0 or node.find(exp.Select, exp.AggFunc) is not None:
            return "", None, ""
        return "column", place, self._wrap(node)

    def _wrap(self, node: Any) -> str:
        from sqlglot import exp

        name = type(node).__name__
        if isinstance(node, exp.Column):
            return ""
        if name in _PLAIN:
            return self._wrap(node.this)
        inner = node.expression if name == "Extract" else node.args.get("this")
        if not isinstance(inner, exp.Expression) or self._wrap(inner) != "":
            return "?"
        if name in _DATE_PARTS:
            return _DATE_PARTS[name]
        if name == "Extract":
            unit = str(unit_name(node.this.name))
            return unit if unit in ("year", "month", "day") else "?"
        pattern = node.args.get("format")
        if name in ("StrToDate", "StrToTime", "ToTimestamp") and pattern is not None:
            return f"parse:{pattern.name}"
        if name == "TimeToStr" and pattern is not None:
            return f"format:{pattern.name}"
        if name == "ToChar" and pattern is not None:
            return f"format:{strftime_of(pattern.name)}"
        if name == "Substring" and node.args.get("start") is not None and node.args["start"].name == "1":
            length = node.args.get("length")
            return f"left:{length.name}" if length is not None and length.is_int else "?"
        if name == "Left" and node.expression.is_int:
            return f"left:{node.expression.name}"
        return {"Lower": "lower", "Upper": "upper", "Length": "length"}.get(name, "?")

    def _constant(self, node: Any) -> Any:
        from sqlglot import exp

        if isinstance(node, exp.Literal):
            return node.name if node.is_string else _number(node.name)
        if isinstance(node, exp.Neg) and isinstance(node.this, exp.Literal):
            value = _number(node.this.name)
            return -value if value is not None else None
        if isinstance(node, exp.Boolean):
            return bool(node.this)
        if isinstance(node, exp.Null):
            return None
        return self.constant(node.sql(dialect=self.dialect))

    def _predicate(self, node: Any, scope: Any, keys: tuple[Place, ...]) -> None:
        from sqlglot import exp

        facts = self.facts
        negated = _negated(node)
        if isinstance(node, exp.Exists):
            return
        kind, left, wrap = self._side(node.this, scope)
        if isinstance(node, exp.Is):
            if kind == "column" and isinstance(node.expression, exp.Null):
                facts.conditions.append(Condition(place=left, op="null", negated=negated, wrap=wrap))
            elif kind == "column" and isinstance(node.expression, exp.Boolean):
                self._note(left, "boolean")
                facts.conditions.append(
                    Condition(place=left, op="=", values=(int(node.expression.this),), negated=negated, wrap=wrap)
                )
            return
        if isinstance(node, exp.In):
            query = node.args.get("query")
            if query is not None:
                select = query.this if isinstance(query, exp.Subquery) else query
                self._joined(left if kind == "column" else None, select, scope, negated)
            elif kind == "column":
                values = [self._side(e, scope) for e in node.expressions]
                self._compare(left, "in", [v for k, v, _ in values if k == "constant"], negated, wrap)
            return
        if isinstance(node, exp.Between):
            low, high = (self._side(node.args[n], scope) for n in ("low", "high"))
            if kind == "column" and low[0] == high[0] == "constant":
                self._compare(left, "between", [low[1], high[1]], negated, wrap)
            return
        if isinstance(node, exp.Like | exp.ILike):
            right = self._side(node.expression, scope)
            if kind == "column" and right[0] == "constant" and isinstance(right[1], str):
                self._compare(left, "like", [right[1]], negated, wrap)
            return
        op = _OPS[type(node).__name__]
        other, right, right_wrap = self._side(node.expression, scope)
        if kind in ("constant", "query") and other in ("column", "aggregate"):
            kind, left, wrap, other, right, right_wrap, op = other, right, right_wrap, kind, left, wrap, _FLIP[op]
        if kind == other == "column" and not wrap and not right_wrap:
            if op == "=" and not negated:
                facts.joined.append((left, right))
            return
        if kind == "column" and other == "constant":
            self._compare(left, op, [right], negated, wrap)
        elif kind == "column" and other == "query":
            self._joined(left, right, scope, negated or op == "<>", op)
        elif kind == "aggregate" and other == "constant" and isinstance(right, int | float):
            name, place = left
            if place is not None and name in ("sum", "avg"):
                self._note(place, "number")
            facts.havings.append(Having(aggregate=name, place=place, op=op, value=right, keys=keys))

    def _compare(self, place: Place, op: str, values: list[Any], negated: bool, wrap: str) -> None:
        values = [v for v in values if v is not None]
        if not values:
            return
        if wrap == "":
            for value in values:
                if isinstance(value, bool):
                    self._note(place, "boolean")
                elif isinstance(value, int | float):
                    self._note(place, "real" if isinstance(value, float) else "number")
                elif isinstance(value, str) and op != "like" and _TIME.match(value) and moment(value) is not None:
                    self._note(place, "timestamp" if len(value) > 10 else "date")
                else:
                    self._note(place, "text")
        values = [int(v) if isinstance(v, bool) else v for v in values]
        self.facts.conditions.append(Condition(place=place, op=op, values=tuple(values), negated=negated, wrap=wrap))

    def _joined(self, place: Place | None, select: Any, scope: Any, negated: bool, op: str = "=") -> None:
        """column IN (SELECT other ...), column = (SELECT other ...), column > (SELECT AVG(column) ...)."""
        from sqlglot import exp

        while isinstance(select, exp.SetOperation):
            select = select.left
        if place is None or not isinstance(select, exp.Select) or len(select.selects) != 1:
            return
        inner = select.selects[0].unalias()
        scopes = [s for s in scope.subquery_scopes if s.expression is select]
        if isinstance(inner, exp.Column) and scopes:
            other = self.place(inner, scopes[0])
            if other is not None and other[0] >= 0:
                (self.facts.apart if negated else self.facts.joined).append((place, other))
        elif isinstance(inner, exp.AggFunc):
            if op != "=":
                self._note(place, "number" if isinstance(inner, exp.Avg | exp.Sum) else "any")
            if isinstance(inner, exp.Avg):
                self.facts.means.append(place)


def _negated(node: Any) -> bool:
    """Whether an odd number of NOT stands over a predicate, up to the next AND or OR."""
    from sqlglot import exp

    count, node = 0, node.parent
    while isinstance(node, exp.Not | exp.Paren):
        count += isinstance(node, exp.Not)
        node = node.parent
    return count % 2 == 1


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return None


# ------------------------------------------------------------------------------------------------------------- schemas

_ID = re.compile(r"(?:^|_)(?:id|ID|Id|uid)\Z|[a-z](?:Id|ID)\Z|(?:编号|序号|主键)\Z")
_NAMED: tuple[tuple[str, Kind], ...] = (
    (r"(?:^|_)(?:date|day|birthday)$|日期$|^日$|有效期$|生日$", "date"),
    (r"(?:^|_)(?:time|timestamp|datetime)$|_at$|时间$", "timestamp"),
    (r"(?:^|_)(?:is|has)_", "boolean"),
    (r"(?:^|_)(?:year|month|age|count|number|num|qty|quantity|price|amount|total|salary|score|points|stock|budget|population|area|size|weight|height|"
     r"length|duration|minutes|days|hours|pages|rank|rating|capacity|cost|fee|sales|credits|seats|level)$", "integer"),
    (r"(?:数|数量|价格|单价|金额|年龄|年份|人数|人口|面积|工资|成绩|分数|库存|销量|评分|长度|重量|高度|总数|次数|票价|率)$", "integer"),
)  # fmt: skip


def complete(schema: Schema | None, facts: Iterable[Facts], name: str = "inferred") -> Schema:
    """A schema in which every column has a kind: tables and columns that no one has described are added, keys and links guessed.

    A declared kind, key or link stays. Columns are added only to tables that are inferred as a whole.
    """
    listed = list(facts)
    tables: dict[str, list[Column]] = {}
    titles: dict[str, str] = {}
    declared = {t.name.lower(): t for t in schema.tables} if schema is not None else {}
    for table in declared.values():
        titles[table.name.lower()] = table.name
        tables[table.name.lower()] = list(table.columns)
    for one in listed:
        for title in one.names:
            if title.lower() not in tables:
                titles[title.lower()] = title
                tables[title.lower()] = []
        for title, column in one.columns:
            low = title.lower()
            if low not in declared and column.lower() not in (c.name.lower() for c in tables[low]):
                tables[low].append(Column(name=column))
    starred = {t for one in listed for t in one.starred}
    for low, columns in tables.items():
        if (
            low not in declared
            and (low in starred or not columns)
            and not any(_is_key(c.name, titles[low]) for c in columns)
        ):
            columns.insert(
                0, Column(name="编号" if re.search(r"[\u4e00-\u9fff]", titles[low]) else "id", kind="integer")
            )
    votes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in listed:
        for voted, cast in one.votes.items():
            votes[voted].update(cast)
    kinds = {
        (low, c.name.lower()): _kind(c, votes[low, c.name.lower()]) for low, columns in tables.items() for c in columns
    }
    pairs = [(one.table(a), a[1], one.table(b), b[1]) for one in listed for a, b in (*one.joined, *one.apart)]
    for _ in range(2):
        for a, x, b, y in pairs:
            left, right = kinds.get((a, x)), kinds.get((b, y))
            if left is not None and right is not None:
                if not left[0] and right[0]:
                    kinds[a, x] = right
                elif left[0] and not right[0]:
                    kinds[b, y] = left
                elif not left[0] and (_ID.search(x) or _ID.search(y)):
                    kinds[a, x] = kinds[b, y] = ("integer", "")
    joined = {(a, x) for a, x, _, _ in pairs} | {(b, y) for _, _, b, y in pairs}
    made = {}
    for low, columns in tables.items():
        given = declared.get(low)
        settled = []
        known_keys = given is not None and (bool(given.primary) or any(c.unique or c.required for c in given.columns))
        for i, c in enumerate(columns):
            kind, pattern = kinds[low, c.name.lower()]
            key = c.unique
            if not known_keys and not key:
                key = _is_key(c.name, titles[low]) and (i == 0 or (low, c.name.lower()) in joined)
            if not kind:
                kind = "integer" if key or _ID.search(c.name) else _by_name(c.name)
            settled.append(replace(c, kind=kind, pattern=pattern, unique=key, required=c.required or key))
        keys = [c.name for c in settled if c.unique]
        primary = given.primary if given is not None and given.primary else tuple(keys[:1])
        if not known_keys:
            settled = [replace(c, unique=c.name in primary) if c.unique and given is None else c for c in settled]
        made[low] = Table(name=titles[low], columns=tuple(settled), primary=primary)
    links = list(schema.links) if schema is not None else []
    links += _links(made, pairs, links)
    origin = schema.origin if schema is not None else "inferred"
    if schema is not None and len(made) > len(declared):
        origin += ", inferred"
    return Schema(
        name=schema.name if schema is not None else name, tables=tuple(made.values()), links=tuple(links), origin=origin,
        sample=schema.sample if schema is not None else "",
    )  # fmt: skip


def _kind(column: Column, votes: Counter[str]) -> tuple[Kind, str]:
    """A column's kind and pattern; declared text that queries use as dates holds dates."""
    if not column.kind:
        return _elect(votes)
    if column.kind != "text" or column.pattern:
        return column.kind, column.pattern
    kind, pattern = _elect(votes)
    return "text", pattern or {"date": "%Y-%m-%d", "timestamp": "%Y-%m-%d %H:%M:%S"}.get(kind, "")


def _elect(votes: Counter[str]) -> tuple[Kind, str]:
    patterns = sorted((v for v in votes if v.startswith("pattern:")), key=lambda v: (-votes[v], v))
    if patterns:
        return "text", patterns[0].removeprefix("pattern:")
    order: tuple[tuple[str, Kind], ...] = (
        ("timestamp", "timestamp"), ("date", "date"), ("boolean", "boolean"), ("text", "text"), ("real", "real"), ("number", "integer"),
    )  # fmt: skip
    return next((kind for word, kind in order if votes[word]), ""), ""


def _by_name(name: str) -> Kind:
    return next((kind for pattern, kind in _NAMED if re.search(pattern, name.lower())), "text")


def _is_key(column: str, table: str) -> bool:
    low, owner = column.lower(), table.lower()
    return low in ("id", "编号", "序号", "主键") or low in (
        f"{owner}_id",
        f"{owner}id",
        f"{owner}编号",
        f"{owner}_编号",
    )


def _links(
    tables: Mapping[str, Table], pairs: Sequence[tuple[str, str, str, str]], known: Sequence[Link]
) -> Iterator[Link]:
    """Links of joins, from the column that looks less like a key; then of names (author_id, 作者编号)."""
    seen = {frozenset({(k.table.lower(), k.column.lower()), (k.to.lower(), k.key.lower())}) for k in known}
    for a, x, b, y in pairs:
        if a not in tables or b not in tables or (a, x) == (b, y) or frozenset({(a, x), (b, y)}) in seen:
            continue
        left, right = tables[a].column(x), tables[b].column(y)
        if left is None or right is None:
            continue
        seen.add(frozenset({(a, x), (b, y)}))
        if left.unique and not right.unique:
            a, left, b, right = b, right, a, left
        yield Link(tables[a].name, left.name, tables[b].name, right.name)
    for low, table in tables.items():
        for column in table.columns:
            name = column.name.lower()
            if column.unique or any((low, name) in pair for pair in seen):
                continue
            for other_low, other in tables.items():
                forms = (f"{other_low}_id", f"{other_low}id", f"{other_low}编号", f"{other_low}_编号")
                key = next((c for c in other.columns if c.unique), None)
                if other_low != low and name in forms and key is not None and key.kind == column.kind:
                    yield Link(table.name, column.name, other.name, key.name)
