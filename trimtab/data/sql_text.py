"""SQL as data: does an answer parse, do two answers say the same, what is left without their values."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

WORDS = re.compile(
    r"^\s*(?:```(?:sql)?\s*)?(select|with|insert|update|delete|create|drop|alter|replace)\b", re.IGNORECASE
)
FENCE = re.compile(r"^\s*```(?:sql)?\s*\n?(.*?)\n?\s*```\s*$", re.DOTALL | re.IGNORECASE)
QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
FULL_WIDTH = re.compile("[，；（）＝＊＜＞！“”‘’、。：]")


def looks_like_sql(text: str) -> bool:
    """Does it begin as a statement does?"""
    return bool(WORDS.match(text))


def fault(text: str, dialect: str | None = None) -> str | None:
    """Why a text is no SQL statement; None when it is one (or several)."""
    trees, problem = _parsed(text, dialect)
    if problem:
        return problem
    from sqlglot import exp

    statements = (exp.Query, exp.DML, exp.DDL, exp.Create, exp.Drop, exp.Alter)
    if not trees or not all(isinstance(tree, statements) for tree in trees):
        return "it is not a statement"
    strange = FULL_WIDTH.search(QUOTED.sub("''", _unfenced(text)))
    return f"full-width {strange[0]} outside of quotes" if strange else None


def canonical(text: str, dialect: str | None = None) -> str | None:
    """The statement without what does not matter (blanks, comments, case of keywords, last semicolon); None: no SQL."""
    trees, problem = _parsed(text, dialect)
    return None if problem or not trees else "; ".join(tree.sql(dialect=dialect, comments=False) for tree in trees)


def skeleton(text: str, dialect: str | None = None) -> str | None:
    """The statement with every value replaced by `?`; None when it does not parse."""
    from sqlglot import exp

    trees, problem = _parsed(text, dialect)
    if problem or not trees:
        return None
    masked = [
        tree.transform(lambda node: exp.Placeholder() if isinstance(node, exp.Literal) else node) for tree in trees
    ]
    return "; ".join(tree.sql(dialect=dialect) for tree in masked)


def _unfenced(text: str) -> str:
    fenced = FENCE.match(text)
    return fenced[1] if fenced else text


@lru_cache(maxsize=4096)
def _parsed(text: str, dialect: str | None) -> tuple[tuple[Any, ...], str | None]:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        return tuple(tree for tree in sqlglot.parse(_unfenced(text), dialect=dialect) if tree is not None), None
    except SqlglotError as error:
        return (), str(error).strip().split("\n")[0][:120]
    except RecursionError:
        return (), "it is nested too deeply"


def check_dialect(dialect: str | None) -> str | None:
    """The name itself; a ValueError when sqlglot has no such dialect."""
    from sqlglot import Dialect

    Dialect.get_or_raise(dialect)
    return dialect
