"""SQL as data: does an answer parse, do two answers say the same, what is left without their values."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

WORDS = re.compile(
    r"^\s*(?:```(?:sql)?\s*)?(select|with|insert|update|delete|create|drop|alter|replace)\b", re.IGNORECASE
)
FENCE = re.compile(r"^\s*```(?:sql)?\s*\n?(.*?)\n?\s*```\s*$", re.DOTALL | re.IGNORECASE)
QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
STATEMENTS = (
    "Query", "DML", "DDL", "Create", "Drop", "Alter", "TruncateTable", "Show", "Describe", "Use", "Set", "Pragma",
    "Transaction", "Commit", "Rollback", "Grant", "Revoke", "Analyze", "Kill", "Comment", "Attach", "Detach",
)  # fmt: skip
"""The kinds of tree that sqlglot makes of a statement; not every version of it has all of them."""
EXPLAINED = re.compile(
    r"^\s*(?:(?:query\s+plan|analyze|verbose|extended|format\s*=\s*\w+|\([^()]*\))\s+)*", re.IGNORECASE
)
CALLED = re.compile(r"^\s*[\w.`\"]+\s*\(.*\)\s*;?\s*$", re.DOTALL)
FULL_WIDTH = re.compile("[，；（）＝＊＜＞！“”‘’、。：]")


def looks_like_sql(text: str) -> bool:
    """Does it begin as a statement does?"""
    return bool(WORDS.match(text))


def fault(text: str, dialect: str | None = None) -> str | None:
    """Why a text is no SQL statement; None when it is one (or several)."""
    trees, problem = _parsed(text, dialect)
    if problem:
        return problem
    if not trees or not all(_is_statement(tree, dialect) for tree in trees):
        return "it is not a statement"
    strange = FULL_WIDTH.search(QUOTED.sub("''", _unfenced(text)))
    return f"full-width {strange[0]} outside of quotes" if strange else None


def _is_statement(tree: Any, dialect: str | None) -> bool:
    from sqlglot import exp

    if isinstance(tree, exp.Command):
        return _is_command(tree, dialect)
    if isinstance(tree, exp.Use | exp.Describe) and isinstance(tree.this, exp.Table) and tree.this.alias:
        return False  # two words in a row, as in "use the table"
    return isinstance(tree, tuple(getattr(exp, name) for name in STATEMENTS if hasattr(exp, name)))


def _is_command(tree: Any, dialect: str | None) -> bool:
    """A command is what sqlglot takes for a statement by its first word alone: is the rest one, too?"""
    rest = tree.args.get("expression") or ""
    rest = rest if isinstance(rest, str) else rest.name
    match str(tree.this).upper():
        case "EXPLAIN":
            return fault(EXPLAINED.sub("", rest), dialect) is None
        case "REPLACE":  # as INSERT is written
            return fault(f"INSERT {rest}", dialect) is None
        case "SHOW":  # MySQL's, which other dialects do not read
            return dialect is None and fault(f"SHOW {rest}", "mysql") is None
        case "CALL":
            return bool(CALLED.match(rest))
    return False


def canonical(text: str, dialect: str | None = None) -> str | None:
    """The statement without what does not matter (blanks, comments, case of keywords, last semicolon); None: no SQL."""
    trees, problem = _parsed(text, dialect)
    if problem or not trees:
        return None
    with _quiet():
        return "; ".join(tree.sql(dialect=dialect, comments=False) for tree in trees)


def skeleton(text: str, dialect: str | None = None) -> str | None:
    """The statement with every value replaced by `?`; None when it does not parse."""
    from sqlglot import exp

    trees, problem = _parsed(text, dialect)
    if problem or not trees:
        return None
    masked = [
        tree.transform(lambda node: exp.Placeholder() if isinstance(node, exp.Literal) else node) for tree in trees
    ]
    with _quiet():
        return "; ".join(tree.sql(dialect=dialect) for tree in masked)


def _unfenced(text: str) -> str:
    fenced = FENCE.match(text)
    return fenced[1] if fenced else text


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what sqlglot logs: what it could not read is in the report, with its row."""
    log = logging.getLogger("sqlglot")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@lru_cache(maxsize=4096)
def _parsed(text: str, dialect: str | None) -> tuple[tuple[Any, ...], str | None]:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        with _quiet():
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
