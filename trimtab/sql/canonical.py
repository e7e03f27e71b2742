"""One spelling for queries that differ in spelling only.

Two queries count as equal when `canonical_sql` gives the same string for both. The comparison is of syntax: equal means the
same query, different may still mean the same answer, so a rate of equal queries is a lower bound on the rate of right ones.

Equal:
- layout, comments, a final `;`, the case of keywords, of functions and of unquoted identifiers (Chinese ones included);
- `"title"`, `` `title` ``, `[title]` and `title`; a quoted identifier that needs its quotes or has capitals keeps them;
- `'Paris'` and, where a dialect takes it for a string or none is named, `"Paris"` alone on the right of a comparison;
- brackets that change nothing; `<>` and `!=`; `INNER JOIN` and `JOIN`; `LEFT OUTER JOIN` and `LEFT JOIN`; `ORDER BY a ASC` and
  `ORDER BY a`; `LIMIT 5, 10` and `LIMIT 10 OFFSET 5`; `NOT a IN (...)` and `a NOT IN (...)`;
- the order of the operands of AND, OR, `=` and `<>`; a literal on the left of a comparison and the comparison turned round;
- table aliases: dropped, or replaced by the table's name where that names one table only; and with a single table in FROM,
  `book.title` and `title`;
- names given to the columns of the answer (`COUNT(*) AS n`), put back where ORDER BY or HAVING uses them.

Different, among others: the order of selected columns, tables or joins; `COUNT(1)` and `COUNT(*)`; a join and a subquery or a
comma; IN and OR; BETWEEN and two comparisons; `20`, `20.0` and `'20'`; the case or the spaces of a string; `GROUP BY 1` and the
name; with several tables, `title` and `book.title`, which only the schema could tell.

The canonical form is made for comparing: it is not promised to run.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlglot import exp

_START = re.compile(r"^[ \t(]*(?=(?:select|with|insert|update|delete|create)\b)", re.IGNORECASE | re.MULTILINE)
_FENCE = re.compile(
    r"```(?:(?!select\b|with\b)\w+[ \t]*\n|(?:sql|sqlite|mysql|postgres|postgresql)\b)?(.*?)(?:```|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|;")


def extract_sql(text: str) -> str | None:
    """The first statement of a model's answer, without its `;`; None when no line starts one.

    The statement is looked for in the first ``` fence if there is one (closed or not), else in the text. It begins where a line
    begins with SELECT, WITH, INSERT, UPDATE, DELETE or CREATE, and ends at the first `;` outside quotes, or with the text:
    words before it on its own line, or after it without a `;`, are not cut away.
    """
    fence = _FENCE.search(text)
    body = fence.group(1) if fence else text
    start = _START.search(body)
    if start is None:
        return None
    body = body[start.start() :]
    end = next((match.start() for match in _QUOTED.finditer(body) if match.group() == ";"), len(body))
    return body[:end].strip()


def canonical_sql(text: str, dialect: str | None = None) -> str | None:
    """The canonical spelling of the first SQL statement in a model's answer, or None when there is none that parses.

    Args:
        text: a bare statement or an answer with a fenced one; see `extract_sql`.
        dialect: a sqlglot dialect name; None reads SQLite's, which takes every way of quoting a name.
    """
    statement = extract_sql(text)
    if statement is None:
        return None
    from sqlglot.errors import SqlglotError  # heavy, and only needed here

    logger = logging.getLogger("sqlglot")
    # Most of what comes here was written by a young model: not worth a line of log each.
    was, logger.disabled = logger.disabled, True
    try:
        return _canonical(statement, dialect or "sqlite")
    except (SqlglotError, RecursionError):
        return None
    finally:
        logger.disabled = was


def _canonical(statement: str, dialect: str) -> str | None:
    import sqlglot
    from sqlglot import TokenType, exp

    # sqlglot forgives a comma before FROM; no database does.
    clauses = {
        TokenType.FROM,
        TokenType.WHERE,
        TokenType.GROUP_BY,
        TokenType.HAVING,
        TokenType.ORDER_BY,
        TokenType.R_PAREN,
    }
    kinds = [token.token_type for token in sqlglot.tokenize(statement, read=dialect)]
    if any(kind == TokenType.COMMA and after in clauses for kind, after in itertools.pairwise(kinds)):
        return None
    tree: exp.Expr = sqlglot.parse_one(statement, read=dialect)
    while isinstance(tree, exp.Subquery) and not tree.alias:
        tree = tree.this
    if isinstance(tree, exp.Command) or (isinstance(tree, exp.Select) and not tree.expressions):
        return None
    if dialect == "sqlite":
        _quoted_strings(tree)
    _identifiers(tree)
    for paren in list(tree.find_all(exp.Paren)):
        paren.replace(paren.this)
    _column_aliases(tree)
    _table_aliases(tree)
    tree = _operands(tree)
    _defaults(tree)
    _brackets(tree)
    return tree.sql(dialect=dialect, comments=False)


def _quoted_strings(tree: exp.Expr) -> None:
    """SQLite reads "Paris" as a string where no column has that name: so do we on the right of a comparison and in IN lists."""
    from sqlglot import exp

    for column in list(tree.find_all(exp.Column)):
        name = column.this
        if not isinstance(name, exp.Identifier) or not name.args.get("quoted") or column.args.get("table"):
            continue
        parent = column.parent
        listed = isinstance(parent, exp.In) and column.arg_key == "expressions"
        right = isinstance(parent, exp.EQ | exp.NEQ | exp.GT | exp.GTE | exp.LT | exp.LTE | exp.Like)
        if (
            listed
            or (right and column.arg_key == "expression")
            or (isinstance(parent, exp.Between) and column.arg_key != "this")
        ):
            column.replace(exp.Literal.string(name.this))


def _identifiers(tree: exp.Expr) -> None:
    """Unquoted names in lower case; quotes that a name does not need are dropped."""
    from sqlglot import exp

    for name in tree.find_all(exp.Identifier):
        if not name.args.get("quoted"):
            name.set("this", name.this.lower())
        elif name.this == name.this.lower() and re.fullmatch(r"[^\W\d]\w*", name.this):
            name.set("quoted", False)


def _operands(tree: exp.Expr) -> exp.Expr:
    """Operands of AND, OR, = and <> in the order of their text; a literal never on the left alone."""
    from sqlglot import exp

    turned = {exp.GT: exp.LT, exp.LT: exp.GT, exp.GTE: exp.LTE, exp.LTE: exp.GTE}

    def ordered(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.And | exp.Or) and not isinstance(node.parent, type(node)):  # the top of a chain
            parts = sorted((part.copy() for part in node.flatten(unnest=False)), key=lambda part: part.sql())
            return functools.reduce(lambda left, right: type(node)(this=left, expression=right), parts)
        if not isinstance(node, exp.Binary):
            return node
        if isinstance(node, exp.EQ | exp.NEQ):
            left, right = ((isinstance(side, exp.Literal), side.sql()) for side in (node.left, node.right))
            return type(node)(this=node.right, expression=node.left) if right < left else node
        if type(node) in turned and isinstance(node.left, exp.Literal) and not isinstance(node.right, exp.Literal):
            return turned[type(node)](this=node.right, expression=node.left)
        return node

    # Bottom up, so that a chain sorts operands that are already in order.
    for node in reversed(list(tree.walk(bfs=True))):
        new = ordered(node)
        if node is tree:
            tree = new
        elif new is not node:
            node.replace(new)
    return tree


def _column_aliases(tree: exp.Expr) -> None:
    """Drop the names of the answer's columns; ORDER BY and HAVING get the expression back."""
    from sqlglot import exp

    if not isinstance(tree, exp.Select):
        return
    for item in [item for item in tree.expressions if isinstance(item, exp.Alias)]:
        name, expression = item.alias, item.this
        uses = [c for c in tree.find_all(exp.Column) if c.name == name and not c.table]
        places = {_clause(column, tree) for column in uses}
        if not places <= {"order", "having"}:
            continue
        for column in uses:
            column.replace(expression.copy())
        item.replace(expression)


def _clause(node: exp.Expr, top: exp.Expr) -> str:
    """The argument of `top` ("where", "order" ...) that holds this node."""
    while node.parent is not None and node.parent is not top:
        node = node.parent
    return node.arg_key or ""


def _table_aliases(tree: exp.Expr) -> None:
    """See the module's notes: qualifiers that say nothing go, and then the aliases that nothing uses."""
    from sqlglot import exp

    for scope in tree.find_all(exp.Select):
        source = scope.args.get("from_") or scope.args.get("from")
        if source is None or scope.args.get("joins") or scope.args.get("laterals"):
            continue
        name = source.this.alias_or_name
        for column in scope.find_all(exp.Column):
            if column.table == name and column.find_ancestor(exp.Select) is scope:
                column.set("table", None)
    tables = list(tree.find_all(exp.Table))
    times = Counter(table.name for table in tables)
    aliases = Counter(alias.name for alias in tree.find_all(exp.TableAlias))
    used = {column.table for column in tree.find_all(exp.Column)}
    number: Counter[str] = Counter()
    for table in tables:
        alias, select = table.alias, table.find_ancestor(exp.Select)
        if not alias or aliases[alias] > 1 or select is None:
            continue
        if alias not in used and not select.args.get("joins"):
            table.set("alias", None)
            continue
        if times[table.name] == 1 and (table.name not in aliases or alias == table.name):
            new = table.name
            table.set("alias", None)
        else:  # a table used twice: its aliases are numbered
            number[table.name] += 1
            new = f"{table.name}_{number[table.name]}"
            table.set("alias", exp.TableAlias(this=exp.to_identifier(new)))
        for column in tree.find_all(exp.Column):
            if column.table == alias:
                column.set("table", exp.to_identifier(new))


def _defaults(tree: exp.Expr) -> None:
    """Words that change nothing: ASC, INNER, OUTER."""
    from sqlglot import exp

    for ordered in tree.find_all(exp.Ordered):
        if not ordered.args.get("desc"):
            ordered.set("desc", None)
    for join in tree.find_all(exp.Join):
        if join.kind == "INNER" or (join.kind == "OUTER" and join.side):
            join.set("kind", None)


def _brackets(tree: exp.Expr) -> None:
    """Put back, by one rule, the brackets that the tree needs when written as text."""
    from sqlglot import exp

    # Bottom up: a node is replaced by a copy, which must hold the brackets inside it.
    for node in reversed(list(tree.find_all(exp.Binary, exp.Not, exp.Between, exp.In, exp.Neg))):
        parent = node.parent
        if not isinstance(parent, exp.Binary | exp.Not | exp.Between | exp.In | exp.Neg) or exp.Dot in (
            type(node),
            type(parent),
        ):
            continue
        if isinstance(parent, exp.Connector) and type(parent) is type(node):
            continue  # one chain
        if isinstance(parent, exp.Connector | exp.Not) and not isinstance(node, exp.Connector):
            continue  # a > 1 AND NOT b > 2 reads as it should
        node.replace(exp.Paren(this=node.copy()))
