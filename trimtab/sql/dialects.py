"""A query of another dialect as SQLite's: parsed by sqlglot, what SQLite lacks rewritten or turned into a function of `functions.py`.

Gold and prediction take this same way. What has no faithful translation raises `Untranslatable`: a verdict of exec_error for a
prediction, of unverified for a gold query. Kept from the dialect: division, NULL order, the case rule of LIKE, CONCAT and NULL,
rounding casts, what ROWNUM counts. Not kept: collations other than LIKE's, Oracle's empty string that is NULL, checks of types.
"""

from __future__ import annotations

import datetime as dt
import logging
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from trimtab.sql import functions
from trimtab.sql.verdicts import Kind

DIALECTS = ("sqlite", "postgres", "mysql", "oracle", "tsql")


class Untranslatable(Exception):
    """A statement that this dialect cannot read, or SQLite cannot say; `kind` is the verdict."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


@lru_cache(maxsize=4096)
def translate(statement: str, dialect: str, engine: str = "sqlite") -> str:
    """The statement for an engine ("sqlite" or "postgres").

    Raises:
        Untranslatable: with the verdict.
    """
    import sqlglot
    from sqlglot.errors import SqlglotError

    logger = logging.getLogger("sqlglot")
    was, logger.disabled = logger.disabled, True
    try:
        trees = [t for t in sqlglot.parse(statement, read=dialect) if t is not None]
        if len(trees) != 1:
            raise Untranslatable("multi_statement" if trees else "parse_error", f"{len(trees)} statements")
        tree = trees[0]
        _reading_only(tree)
        if engine == "postgres":
            return str(_for_postgres(tree, dialect).sql(dialect="postgres", comments=False))
        return str(_to_sqlite(tree, dialect).sql(dialect="sqlite", comments=False))
    except SqlglotError as error:
        raise Untranslatable("parse_error", " ".join(str(error).split())[:200]) from None
    except (
        RecursionError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:  # sqlglot, on text that is not SQL
        raise Untranslatable("parse_error", f"{type(error).__name__}: {error}"[:200]) from None
    finally:
        logger.disabled = was


def _reading_only(tree: Any) -> None:
    from sqlglot import exp

    for node in tree.walk():
        if (isinstance(node, exp.DML | exp.DDL) and not isinstance(node, exp.Query)) or isinstance(
            node, exp.Into | exp.Lock | exp.Command | exp.Drop | exp.Alter
        ):
            raise Untranslatable("write_attempt", f"{type(node).__name__} in a query")
    if not isinstance(tree, exp.Query | exp.Values):
        raise Untranslatable("parse_error", "not a query")
    if isinstance(tree, exp.Select) and not tree.expressions:
        raise Untranslatable("parse_error", "a SELECT without columns")


def _for_postgres(tree: Any, dialect: str) -> Any:
    """What sqlglot leaves to be done on the way to a server: the frozen clock (now() cannot be stopped there), LIKE's case rule, and
    SQLite's date functions."""
    from sqlglot import exp

    dated: tuple[type, ...] = (exp.Cast, exp.Date, exp.TsOrDsToDate, exp.TsOrDsToTimestamp, exp.Timestamp)
    dated += (exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Between, exp.Add, exp.Sub)

    def word(node: Any) -> str:
        return node.name.strip().lower() if isinstance(node, exp.Literal) and node.is_string else ""

    def moment(kind: str, day: int = 0) -> Any:
        if kind == "date":
            when = dt.date.fromisoformat(functions.today()) + dt.timedelta(days=day)
            return exp.cast(exp.Literal.string(when.isoformat()), "date")
        if kind == "time":
            return exp.cast(exp.Literal.string(functions.CLOCK[11:]), "time")
        return exp.cast(exp.Literal.string(functions.CLOCK), "timestamp")

    def still(node: Any) -> Any:
        name = node.name.lower() if isinstance(node, exp.Anonymous) else ""
        if isinstance(node, exp.CurrentDate):
            return moment("date")
        if isinstance(node, exp.CurrentTime | exp.Localtime):
            return moment("time")
        if isinstance(node, exp.CurrentTimestamp | exp.CurrentDatetime | exp.Localtimestamp) or name in (
            "now", "transaction_timestamp", "statement_timestamp", "clock_timestamp",
        ):  # fmt: skip
            return moment("timestamp")
        if isinstance(node, exp.Like) and dialect in ("sqlite", "mysql", "tsql"):
            return exp.ILike(**node.args)
        if dialect == "sqlite" and name in ("date", "datetime", "time", "julianday", "unixepoch"):
            return sqlite_time(name, node.expressions)
        if dialect == "sqlite" and isinstance(node, exp.Date):
            return sqlite_time("date", [node.this])
        if word(node) in _DAYS and isinstance(node.parent, dated):
            # PostgreSQL reads these words as moments of its own clock.
            day = _DAYS[word(node)]
            return exp.Literal.string(functions.CLOCK) if day is None else moment("date", day).this
        return node

    def sqlite_time(name: str, arguments: list[Any]) -> Any:
        value: Any = moment("timestamp")
        if arguments and word(arguments[0]) != "now":
            value = exp.cast(arguments[0].copy(), "timestamp")
        for change in arguments[1:]:
            step = re.fullmatch(r"([+-]?\d+(?:\.\d+)?) (second|minute|hour|day|month|year)s?", word(change))
            start = re.fullmatch(r"start of (day|month|year)", word(change))
            if step:
                value = exp.Add(this=value, expression=exp.cast(exp.Literal.string(step.group()), "interval"))
            elif start:
                value = exp.Anonymous(this="DATE_TRUNC", expressions=[exp.Literal.string(start[1]), value])
            elif word(change) not in ("utc", "localtime"):
                raise Untranslatable("exec_error", f"no translation of {name}(..., {change.sql()})")
        if name in ("date", "time"):
            return exp.cast(exp.Paren(this=value), name)
        if name == "datetime":
            return exp.Paren(this=value)
        seconds = exp.Extract(this=exp.var("EPOCH"), expression=value)
        if name == "unixepoch":
            return exp.cast(seconds, "bigint")
        days = exp.Div(this=exp.cast(seconds, "double"), expression=exp.Literal.number("86400.0"))
        return exp.Paren(this=exp.Add(this=days, expression=exp.Literal.number("2440587.5")))

    return tree.transform(still)


_DAYS: dict[str, int | None] = {"now": None, "today": 0, "tomorrow": 1, "yesterday": -1}


def _to_sqlite(tree: Any, dialect: str) -> Any:
    from sqlglot import exp, transforms

    if dialect == "sqlite":
        return tree
    if dialect == "oracle":
        for select in list(tree.find_all(exp.Select)):
            if any(c.args.get("join_mark") for c in select.find_all(exp.Column)):
                tree = transforms.eliminate_join_marks(tree)
                break
        tree = _rownum(tree)
        for table in list(tree.find_all(exp.Table)):
            if table.name.lower() == "dual" and isinstance(table.parent, exp.From):
                table.parent.pop()
    rewrite = _rewriter(dialect)
    # Bottom up, so that what is put in place of a node holds rewritten operands and is not visited again.
    for node in reversed(list(tree.walk(bfs=True))):
        new = rewrite(node)
        if new is node:
            continue
        if node is tree:
            tree = new
        else:
            node.replace(new)
    return tree


def _rownum(tree: Any) -> Any:
    """WHERE ROWNUM <= n as a LIMIT on the rows before they are grouped or ordered, as Oracle counts them."""
    from sqlglot import exp

    def is_rownum(node: Any) -> bool:
        return (
            isinstance(node, exp.Column)
            and node.name.upper() == "ROWNUM"
            and not node.table
            and not node.this.args.get("quoted")
        )

    for select in list(tree.find_all(exp.Select)):
        where = select.args.get("where")
        if where is not None:
            parts = list(where.this.flatten()) if isinstance(where.this, exp.And) else [where.this]
            kept, limit = [], None
            for part in parts:
                if isinstance(part, exp.LT | exp.LTE | exp.EQ) and is_rownum(part.this) and part.expression.is_int:
                    n = int(part.expression.name)
                    n = n - 1 if isinstance(part, exp.LT) else n if isinstance(part, exp.LTE) or n == 1 else 0
                    limit = n if limit is None else min(limit, n)
                elif isinstance(part, exp.GT | exp.GTE) and is_rownum(part.expression) and part.this.is_int:
                    n = int(part.this.name) - isinstance(part, exp.GT)
                    limit = n if limit is None else min(limit, n)
                else:
                    kept.append(part)
            if limit is not None:
                select.set("where", exp.Where(this=exp.and_(*kept, copy=False)) if kept else None)
                plain = not any(select.args.get(k) for k in ("order", "group", "having", "distinct"))
                if plain and not any(
                    isinstance(e.unalias(), exp.AggFunc) or e.find(exp.AggFunc) for e in select.expressions
                ):
                    select.limit(limit, copy=False)
                else:
                    _limit_source(select, limit)
        for column in [
            c for c in select.find_all(exp.Column) if is_rownum(c) and c.find_ancestor(exp.Select) is select
        ]:
            if column.find_ancestor(exp.Where, exp.Having, exp.Order, exp.Group) is not None:
                raise Untranslatable("exec_error", "ROWNUM in this place has no translation")
            number = exp.Window(this=exp.RowNumber())
            column.replace(number if column.parent is not select else exp.alias_(number, "ROWNUM"))
    return tree


def _limit_source(select: Any, limit: int) -> None:
    """FROM t WHERE c -> FROM (SELECT * FROM t WHERE c LIMIT n) AS t, for one source."""
    from sqlglot import exp

    source = select.args.get("from_") or select.args.get("from")
    if source is None or select.args.get("joins"):
        raise Untranslatable("exec_error", "ROWNUM with ORDER BY or GROUP BY over several tables has no translation")
    inner = exp.Select(expressions=[exp.Star()])
    inner.set(source.arg_key, source.copy())
    inner.set("where", select.args.get("where"))
    inner.limit(limit, copy=False)
    name = source.this.alias_or_name or "t"
    source.set("this", inner.subquery(name))
    select.set("where", None)


# Functions whose name sqlglot does not know, or keeps: name -> ours. `None`: the arguments as they are.
_NAMED = {
    "NOW": "tt_now", "SYSDATE": "tt_now", "GETDATE": "tt_now", "SYSDATETIME": "tt_now", "GETUTCDATE": "tt_now", "SYSTIMESTAMP": "tt_now",
    "CLOCK_TIMESTAMP": "tt_now", "STATEMENT_TIMESTAMP": "tt_now", "TRANSACTION_TIMESTAMP": "tt_now", "UTC_TIMESTAMP": "tt_now", "CURDATE": "tt_today",
    "LOCALTIMESTAMP": "tt_now", "LEFT": "tt_left", "RIGHT": "tt_right", "SPLIT_PART": "tt_split_part", "SUBSTRING_INDEX": "tt_substring_index",
    "REVERSE": "tt_reverse", "INITCAP": "tt_initcap", "TRANSLATE": "tt_translate", "ADD_MONTHS": "tt_add_months", "LAST_DAY": "tt_last_day",
    "MONTHS_BETWEEN": "tt_months_between", "UNIX_TIMESTAMP": "tt_unix", "WEEKDAY": "tt_weekday", "EOMONTH": "tt_last_day", "REPLICATE": "tt_repeat",
    "INSTR": "tt_position", "STRPOS": "tt_position", "BTRIM": "TRIM", "CHAR_LENGTH": "LENGTH", "MEDIAN": "tt_median", "ISNULL": "IFNULL",
    "BOOL_AND": "tt_bool_and", "EVERY": "tt_bool_and", "BOOL_OR": "tt_bool_or", "CONCAT_WS": "tt_concat_ws", "POW": "POWER", "TRUNC": "tt_trunc",
    "TRUNCATE": "tt_trunc", "TO_NUMBER": "tt_number", "LEN": "LENGTH", "CEIL": "CEIL", "CEILING": "CEIL", "UCASE": "UPPER", "LCASE": "LOWER",
    "TO_CHAR": "tt_format_time", "MID": "SUBSTR", "REGEXP_SUBSTR": "tt_regexp_substr", "FIELD": "tt_field", "MAKE_DATE": "tt_make_date",
}  # fmt: skip

_FORMAT = (  # Oracle's and PostgreSQL's date pattern, longest first, for the calls that sqlglot leaves alone
    ("YYYY", "%Y"), ("yyyy", "%Y"), ("RRRR", "%Y"), ("MONTH", "%B"), ("Month", "%B"), ("HH24", "%H"), ("hh24", "%H"), ("HH12", "%I"), ("MON", "%b"), ("Mon", "%b"),
    ("DAY", "%A"), ("Day", "%A"), ("DDD", "%j"), ("YY", "%y"), ("yy", "%y"), ("MM", "%m"), ("mm", "%m"), ("DD", "%d"), ("dd", "%d"), ("HH", "%I"),
    ("MI", "%M"), ("mi", "%M"), ("SS", "%S"), ("ss", "%S"), ("DY", "%a"), ("Dy", "%a"), ("IW", "%V"), ("WW", "%W"), ("Q", "%Q"), ("D", "%u"), ("AM", "%p"), ("PM", "%p"),
)  # fmt: skip


def strftime_of(pattern: str) -> str:
    out, i = "", 0
    while i < len(pattern):
        for name, code in _FORMAT:
            if pattern.startswith(name, i):
                out, i = out + code, i + len(name)
                break
        else:
            if pattern.startswith("FM", i):
                i += 2
                continue
            out, i = out + pattern[i], i + 1
    return out.replace('"', "")


def _rewriter(dialect: str) -> Callable[[Any], Any]:
    """One node of the tree, its operands already rewritten, as SQLite can say it."""
    from sqlglot import exp

    strict = dialect in ("mysql", "oracle")  # GREATEST and LEAST with a NULL give NULL

    def call(name: str, *arguments: Any) -> Any:
        return exp.Anonymous(this=name, expressions=[a if a is not None else exp.Null() for a in arguments])

    def text(value: Any) -> Any:
        return exp.Literal.string(str(value))

    def unit(node: Any, default: str = "day") -> Any:
        found = node.args.get("unit")
        if isinstance(found, exp.WeekStart):
            found = exp.Var(this="week")
        return text(functions.unit_name(found.name if found is not None else default))

    def plain_number(node: Any) -> bool:
        node = node.unnest() if isinstance(node, exp.Paren) else node
        return (isinstance(node, exp.Literal) and not node.is_string) or isinstance(
            node, exp.AggFunc | exp.Mul | exp.Div | exp.Mod | exp.Neg | exp.Length | exp.Round
        )

    def arithmetic(node: Any) -> Any:
        if plain_number(node.this) and plain_number(node.expression):
            return node
        if isinstance(node, exp.Add):
            return call("tt_add", node.this, node.expression)
        return call("tt_subtract_days" if dialect == "oracle" else "tt_subtract", node.this, node.expression)

    def cast(node: Any) -> Any:
        kind, kinds = node.to.this, exp.DataType.Type
        if kind in (kinds.DATE, kinds.DATE32):
            # Oracle's DATE has a time of day, but only CAST loses it elsewhere.
            return call("tt_date", node.this)
        if kind in (kinds.TIME, kinds.TIMETZ):
            return call("tt_time", node.this)
        if kind in exp.DataType.TEMPORAL_TYPES:
            return call("tt_timestamp", node.this)
        if kind in exp.DataType.INTEGER_TYPES:
            return call("tt_cut_integer" if dialect == "tsql" else "tt_integer", node.this)
        if kind == kinds.INTERVAL:
            return call("tt_interval", node.this, None)
        if kind == kinds.BOOLEAN or (kind == kinds.BIT and dialect == "tsql"):
            return call("tt_boolean", node.this)
        if kind in exp.DataType.TEXT_TYPES:
            size = next((p.name for p in node.to.expressions if p.name.isdigit()), "")
            inner = call("tt_text", node.this)
            return call("tt_left", inner, exp.Literal.number(size)) if size else inner
        if kind in exp.DataType.NUMERIC_TYPES or kind in (kinds.DECIMAL, kinds.BIGDECIMAL):
            sizes = [p.name for p in node.to.expressions]
            if kind in (kinds.FLOAT, kinds.DOUBLE) or (not sizes and dialect in ("postgres", "oracle")):
                return exp.cast(call("tt_number", node.this), "double", copy=False)  # 3::numeric / 2 is 1.5
            return call("tt_decimal", node.this, exp.Literal.number(sizes[1] if len(sizes) > 1 else 0))
        raise Untranslatable("exec_error", f"no translation of a cast to {node.to.sql()}")

    def fields(name: str) -> Callable[[Any], Any]:
        return lambda node: call("tt_extract", text(name), node.this)

    def limit(node: Any) -> Any:
        options = node.args.get("limit_options")
        if options is not None and (options.args.get("with_ties") or options.args.get("percent")):
            raise Untranslatable("exec_error", "WITH TIES and PERCENT have no translation")
        if isinstance(node, exp.Fetch):
            return exp.Limit(expression=node.args.get("count") or exp.Literal.number(1))
        return node

    def format_time(node: Any) -> Any:
        pattern = node.args.get("format")
        if isinstance(node, exp.ToChar) and pattern is None:
            return call("tt_text", node.this)
        if isinstance(node, exp.ToChar) and pattern.is_string and not set(pattern.name) <= set("90,.FM$L"):
            pattern = text(strftime_of(pattern.name))
        if dialect in ("postgres", "oracle") and pattern is not None and pattern.is_string:
            pattern = text(pattern.name.replace('"', ""))  # TO_CHAR(d, 'YYYY"-"MM')
        return call("tt_format_time", node.this, pattern)

    def string_agg(node: Any) -> Any:
        what, order = node.this, None
        if isinstance(what, exp.Order):
            what, order = what.this, what
        distinct = isinstance(what, exp.Distinct)
        separator = node.args.get("separator") or text("," if dialect in ("mysql", "postgres") else "")
        keys = [
            part
            for o in (order.expressions if order is not None else ())
            for part in (o.this, exp.Literal.number(int(bool(o.args.get("desc")))))
        ]
        if distinct:
            return call("tt_string_agg_distinct", what.expressions[0], separator, *keys)
        return call("tt_string_agg", what, separator, *keys)

    def like(node: Any) -> Any:
        if not isinstance(node, exp.ILike) or isinstance(node.parent, exp.Escape):  # ESCAPE: done one level up
            return node
        return folded(node, None)

    def escape(node: Any) -> Any:
        return folded(node.this, node.expression) if isinstance(node.this, exp.ILike) else node

    def folded(node: Any, mark: Any) -> Any:
        found = call("tt_like", node.expression, node.this, mark, exp.Literal.number(2))
        return exp.Not(this=found) if node.args.get("negate") else found  # x NOT ILIKE y ESCAPE z is one node

    def anonymous(node: Any) -> Any:
        name = node.name.upper()
        if name in ("TRUNC", "TRUNCATE"):
            return call(
                "tt_truncate_time",
                node.expressions[1] if len(node.expressions) > 1 else text("day"),
                node.expressions[0],
            )
        if name == "AGE":
            return call("tt_age" if len(node.expressions) > 1 else "tt_age_today", *node.expressions)
        if name in ("TO_CHAR",) and len(node.expressions) == 1:
            return call("tt_text", *node.expressions)
        return call(_NAMED[name], *node.expressions) if name in _NAMED else node

    def literal(node: Any) -> Any:
        # '2024-01-01 00:00:00' compared with a column: midnight has one spelling here.
        if (
            node.is_string
            and isinstance(node.parent, exp.Predicate | exp.Between | exp.In)
            and not isinstance(node.parent, exp.Like | exp.ILike)
        ):
            when = functions.moment(node.name)
            if when is not None and len(node.name) > 10 and "-" in node.name:
                return text(functions.iso(when))
        return node

    def extract(node: Any) -> Any:
        return call("tt_extract", text(functions.unit_name(node.this.name)), node.expression)

    def concat(node: Any) -> Any:
        if len(node.expressions) < 1:
            return node
        return call("tt_concat_strict" if dialect == "mysql" else "tt_concat", *node.expressions)

    def convert(node: Any) -> Any:
        style = node.args.get("style")
        to, value = node.this, node.expression
        if style is not None and to.this in exp.DataType.TEXT_TYPES:
            patterns = {"120": "%Y-%m-%d %H:%M:%S", "20": "%Y-%m-%d %H:%M:%S", "121": "%Y-%m-%d %H:%M:%S", "23": "%Y-%m-%d", "112": "%Y%m%d", "111": "%Y/%m/%d",
                        "101": "%m/%d/%Y", "103": "%d/%m/%Y", "102": "%Y.%m.%d", "104": "%d.%m.%Y", "108": "%H:%M:%S", "126": "%Y-%m-%dT%H:%M:%S"}  # fmt: skip
            if style.name not in patterns:
                raise Untranslatable("exec_error", f"no translation of CONVERT's style {style.name}")
            made = call("tt_format_time", value, text(patterns[style.name]))
            size = next((p.name for p in to.expressions if p.name.isdigit()), "")
            return call("tt_left", made, exp.Literal.number(size)) if size else made
        return cast(exp.Cast(this=value, to=to))

    def date_diff(node: Any) -> Any:
        if dialect == "oracle":
            return call("tt_subtract_days", node.this, node.expression)
        if node.expression.sql().find("'0000-01-01'") >= 0:  # TO_DAYS, which no Python date can say
            return call("tt_days", node.this)
        return call("tt_boundaries", node.this, node.expression, unit(node))

    def pick(ours: str) -> Callable[[Any], Any]:
        return lambda node: call(ours + ("_strict" if strict else ""), node.this, *node.expressions)

    def to_date(node: Any) -> Any:
        # The lone argument of DATE(x), or TO_DATE with no pattern.
        pattern = node.args.get("format")
        return call("tt_parse_time", node.this, pattern) if pattern is not None else call("tt_date", node.this)

    def parse_time(node: Any) -> Any:
        return call("tt_parse_time", node.this, node.args.get("format") or text("%Y-%m-%d"))

    def pad(node: Any) -> Any:
        return call(
            "tt_pad",
            node.this,
            node.expression,
            node.args.get("fill_pattern") or text(" "),
            exp.Literal.number(int(bool(node.args.get("is_left")))),
        )

    def equals(node: Any) -> Any:
        array = node.expression.this if isinstance(node.expression, exp.Any) else None
        if isinstance(array, exp.Paren):
            array = array.this
        return exp.In(this=node.this, expressions=array.expressions) if isinstance(array, exp.Array) else node

    def table(node: Any) -> Any:
        for name in ("db", "catalog"):  # dbo.t, public.t: an instance is one schema
            node.set(name, None)
        return node

    def stuff(node: Any) -> Any:
        return call("tt_stuff", node.this, node.args.get("start"), node.args.get("length"), node.expression)

    rules: dict[str, Callable[[Any], Any]] = {
        "EQ": equals, "Table": table, "Stuff": stuff, "National": lambda n: text(n.name),
        "Length": lambda n: exp.Length(this=exp.Anonymous(this="RTRIM", expressions=[n.this])) if dialect == "tsql" else n,
        "Add": arithmetic, "Sub": arithmetic, "Cast": cast, "TryCast": cast, "Convert": convert, "Extract": extract, "Interval": lambda n: call(
            "tt_interval", n.this, text(functions.unit_name(n.unit.name)) if n.args.get("unit") is not None else None),
        "CurrentTimestamp": lambda n: call("tt_now"), "CurrentDatetime": lambda n: call("tt_now"), "Localtimestamp": lambda n: call("tt_now"),
        "CurrentTimestampLTZ": lambda n: call("tt_now"), "UtcTimestamp": lambda n: call("tt_now"), "Systimestamp": lambda n: call("tt_now"),
        "CurrentDate": lambda n: call("tt_today"), "CurrentTime": lambda n: call("tt_time", call("tt_now")), "UtcDate": lambda n: call("tt_today"),
        "Year": fields("year"), "Month": fields("month"), "Day": fields("day"), "DayOfMonth": fields("day"), "Quarter": fields("quarter"),
        "Hour": fields("hour"), "Minute": fields("minute"), "Second": fields("second"), "Week": fields("week"), "WeekOfYear": fields("week"),
        "DayOfWeek": fields("weekday"), "DayOfYear": fields("dayofyear"), "DayOfWeekIso": fields("isodow"),
        "TimestampTrunc": lambda n: call("tt_truncate_time", unit(n), n.this), "DateTrunc": lambda n: call("tt_truncate_time", unit(n), n.this),
        "Trunc": lambda n: call("tt_truncate_time", n.args.get("decimals") or text("day"), n.this),
        "DateAdd": lambda n: call("tt_date_add", n.this, n.expression, unit(n)), "TsOrDsAdd": lambda n: call("tt_date_add", n.this, n.expression, unit(n)),
        "TimestampAdd": lambda n: call("tt_date_add", n.this, n.expression, unit(n)), "DatetimeAdd": lambda n: call("tt_date_add", n.this, n.expression, unit(n)),
        "DateSub": lambda n: call("tt_date_sub", n.this, n.expression, unit(n)), "TimestampSub": lambda n: call("tt_date_sub", n.this, n.expression, unit(n)),
        "DatetimeSub": lambda n: call("tt_date_sub", n.this, n.expression, unit(n)), "AddMonths": lambda n: call("tt_add_months", n.this, n.expression),
        "DateDiff": date_diff, "TsOrDsDiff": date_diff, "TimestampDiff": lambda n: call("tt_whole_units", n.this, n.expression, unit(n)),
        "MonthsBetween": lambda n: call("tt_months_between", n.this, n.expression), "LastDay": lambda n: call("tt_last_day", n.this),
        "TsOrDsToDate": to_date, "Date": to_date, "TsOrDsToTimestamp": lambda n: call("tt_timestamp", n.this), "TimeStrToTime": lambda n: n.this,
        "Timestamp": lambda n: call("tt_timestamp", n.this), "StrToDate": parse_time, "StrToTime": parse_time, "ToTimestamp": parse_time,
        "TimeToStr": format_time, "ToChar": format_time, "UnixToTime": lambda n: call("tt_timestamp", n.this), "UnixSeconds": lambda n: call("tt_unix", n.this),
        "TimeToUnix": lambda n: call("tt_unix", n.this), "StrToUnix": lambda n: call("tt_unix", n.this or call("tt_now")),
        "Monthname": lambda n: call("tt_format_time", n.this, text("%B")), "Dayname": lambda n: call("tt_format_time", n.this, text("%A")),
        "Limit": limit, "Fetch": limit, "ILike": like, "Like": like, "Escape": escape, "RegexpLike": lambda n: call("regexp", n.expression, n.this),
        "RegexpILike": lambda n: call("tt_regexp_i", n.expression, n.this), "RegexpExtract": lambda n: call("tt_regexp_substr", n.this, n.expression),
        "RegexpSubstr": lambda n: call("tt_regexp_substr", n.this, n.expression),
        "RegexpReplace": lambda n: call("tt_regexp_replace", n.this, n.expression, n.args.get("replacement") or text(""), exp.Literal.number(
            0 if dialect == "postgres" and "g" not in (n.args["modifiers"].name if n.args.get("modifiers") else "") and n.args.get("single_replace") is not False else 1)),
        "Greatest": pick("tt_greatest"), "Least": pick("tt_least"), "Concat": concat, "ConcatWs": lambda n: call("tt_concat_ws", *n.expressions),
        "Repeat": lambda n: call("tt_repeat", n.this, n.args.get("times")), "Space": lambda n: call("tt_repeat", text(" "), n.this), "Pad": pad,
        "Left": lambda n: call("tt_left", n.this, n.expression), "Right": lambda n: call("tt_right", n.this, n.expression),
        "SplitPart": lambda n: call("tt_split_part", n.this, n.args.get("delimiter"), n.args.get("part_index")),
        "SubstringIndex": lambda n: call("tt_substring_index", n.this, n.args.get("delimiter"), n.args.get("count")),
        "StrPosition": lambda n: call("tt_position", n.this, n.args.get("substr"), *([n.args["position"]] if n.args.get("position") is not None else [])),
        "Reverse": lambda n: call("tt_reverse", n.this), "Initcap": lambda n: call("tt_initcap", n.this),
        "Translate": lambda n: call("tt_translate", n.this, n.args.get("from_") or n.args.get("from"), n.args.get("to")),
        "Round": lambda n: call("tt_round", n.this, n.args.get("decimals") or exp.Literal.number(0)), "ToNumber": lambda n: call("tt_number", n.this),
        "Stddev": lambda n: call("tt_stddev_pop" if dialect == "mysql" else "tt_stddev", n.this), "StddevSamp": lambda n: call("tt_stddev", n.this),
        "StddevPop": lambda n: call("tt_stddev_pop", n.this), "Variance": lambda n: call("tt_variance_pop" if dialect == "mysql" else "tt_variance", n.this),
        "VariancePop": lambda n: call("tt_variance_pop", n.this), "Median": lambda n: call("tt_median", n.this), "LogicalAnd": lambda n: call("tt_bool_and", n.this),
        "LogicalOr": lambda n: call("tt_bool_or", n.this), "GroupConcat": string_agg, "Anonymous": anonymous, "Literal": literal,
        "Unicode": lambda n: exp.Anonymous(this="UNICODE", expressions=[n.this]), "CharLength": lambda n: exp.Length(this=n.this),
    }  # fmt: skip

    def rewrite(node: Any) -> Any:
        rule = rules.get(type(node).__name__)
        return rule(node) if rule is not None else node

    return rewrite
