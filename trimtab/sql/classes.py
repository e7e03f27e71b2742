"""What kind of question a gold query answers: join, group, nested, set, order, date. A query may be of several kinds, or of none."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

CLASSES = ("join", "group", "nested", "set", "order", "date")
"""Every class, in the order of reports."""
_ISO = re.compile(r"\d{4}-\d{1,2}(-\d{1,2})?([ T]\d{1,2}:\d{2}(:\d{2})?)?\Z")
_KINDS = re.compile(r"Date|Time|Year|Month|Day|Week|Quarter|Extract|Interval")  # in sqlglot's names of functions
_NAMES = re.compile(
    r"julianday|sysdate|now|age|getdate|.*(date|time|month|year)", re.IGNORECASE
)  # of those that it does not know
_FORMAT = re.compile(r"%|YY|MM|DD|HH|MON|DAY", re.IGNORECASE)


@lru_cache(maxsize=20_000)
def query_classes(gold: str, dialect: str = "sqlite") -> tuple[str, ...]:
    """The classes of a query, in the order of `CLASSES`; none of a query that sqlglot cannot read.

    join: two tables in one FROM. group: GROUP BY or HAVING. nested: a query inside another, WITH included. set: UNION, INTERSECT,
    EXCEPT. order: ORDER BY or LIMIT outside window functions. date: a function, type or literal of dates.
    """
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    logger = logging.getLogger("sqlglot")
    was, logger.disabled = logger.disabled, True
    try:
        tree: Any = sqlglot.parse_one(gold, read=dialect)
    except (SqlglotError, RecursionError):
        return ()
    finally:
        logger.disabled = was
    while isinstance(tree, exp.Subquery):  # brackets around the whole
        tree = tree.this.copy()
    found = {
        "join": tree.find(exp.Join) is not None,
        "group": tree.find(exp.Group, exp.Having) is not None,
        "nested": any(_nested(select) for select in tree.find_all(exp.Select)),
        "set": tree.find(exp.SetOperation) is not None,
        "order": any(node.find_ancestor(exp.Window) is None for node in tree.find_all(exp.Order, exp.Limit, exp.Fetch)),
        "date": any(_dated(node) for node in tree.walk()),
    }
    return tuple(name for name in CLASSES if found[name])


def _nested(select: Any) -> bool:
    """Is this SELECT inside another query, rather than a side of a set operation at the top?"""
    from sqlglot import exp

    node = select
    while isinstance(node.parent, exp.SetOperation) or (
        isinstance(node.parent, exp.Subquery) and isinstance(node.parent.parent, exp.SetOperation)
    ):
        node = node.parent
    return node.parent is not None


def _dated(node: Any) -> bool:
    from sqlglot import exp

    if isinstance(node, exp.Literal):
        return bool(node.is_string and _ISO.match(node.this))
    if isinstance(node, exp.DataType):
        return bool(node.is_type(*exp.DataType.TEMPORAL_TYPES))
    if isinstance(node, exp.Anonymous):
        return bool(_NAMES.match(str(node.this)))
    if isinstance(node, exp.ToChar | exp.TimeToStr):  # numbers are written by TO_CHAR, too
        pattern = node.args.get("format")
        return pattern is None or bool(_FORMAT.search(pattern.name))
    return isinstance(node, exp.Func | exp.Interval) and bool(_KINDS.search(type(node).__name__))
