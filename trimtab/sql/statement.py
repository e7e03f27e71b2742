"""A statement as text: found in an answer, cut into tokens, refused before any database sees it. Linear time, no parser.

Everything here reads untrusted text in the trainer's own process, so it is one regular expression without backtracking.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from trimtab.sql.verdicts import Kind

#: Longer answers are no queries (the article's longest is under 500 characters).
MAX_CHARACTERS = 20_000

_FENCE = re.compile(r"```[ \t]*(?:(?!select\b|with\b)[\w+-]+[ \t]*\r?\n|\b(?:sql|sqlite|mysql|postgresql|postgres|tsql|oracle)\b)?(.*?)(?:```|\Z)",
                    re.IGNORECASE | re.DOTALL)  # fmt: skip
# Words that begin prose as well as statements need what follows them in SQL.
_KEYWORDS = (
    r"select\b|with\s+(?:recursive\s+)?[^\s,;.(]{1,100}\s*(?:\([^)]{0,1000}\)\s*)?as\b|values\s*\(|insert\s+(?:into|or)\b|replace\s+into\b"
    r"|update\s+\S+\s+set\b|delete\s+from\b|merge\s+into\b"
    r"|create\s+(?:or\s+replace\s+)?(?:temp(?:orary)?\s+|unique\s+|virtual\s+)*(?:table|view|index|trigger|function|database|schema|extension|role|user)\b"
    r"|drop\s+(?:table|view|index|trigger|database|schema|function|role|user)\b|alter\s+(?:table|database|role|user|system)\b"
    r"|truncate\s+\S+|pragma\s+\w+|attach\s+\S+|detach\s+\S+|vacuum\b|reindex\b|analyze\b|grant\s+\w+|revoke\s+\w+"
    r"|copy\s+\S+|call\s+\w+\s*\(|exec(?:ute)?\s+\w+|explain\s+\w+|show\s+(?:tables|databases|columns|create)\b|describe\s+\w+"
    r"|begin\s*(?:;|transaction\b|immediate\b|exclusive\b|\Z)|commit\s*(?:;|\Z)|rollback\b|savepoint\s+\w+|release\s+\w+"
    r"|set\s+\w+\s*(?:=|to\b)|lock\s+table\b|do\s+\$\$|load\s+data\b|declare\s+@?\w+|use\s+\w+\s*(?:;|\Z)"
)
# A few short comments may stand before the first word. Both bounds, and that a comment ends at its first */, keep the search linear.
_COMMENTS = r"(?:--[^\n]{0,500}+\n\s*+|/\*(?:(?!\*/)[^\n]){0,500}+\*/\s*+){0,8}+"
_START = re.compile(rf"(?:^|[:：`])[ \t(]*(?={_COMMENTS}(?:{_KEYWORDS}))", re.IGNORECASE | re.MULTILINE)
_THINK = re.compile(r"\A.*</think>", re.DOTALL | re.IGNORECASE)
_AFTER = re.compile(rf"\s*(?:{_KEYWORDS})", re.IGNORECASE)

_READING = frozenset({"SELECT", "WITH", "VALUES"})
_NOT_READING = frozenset(
    [
        "INSERT",
        "REPLACE",
        "UPDATE",
        "DELETE",
        "MERGE",
        "UPSERT",
        "CREATE",
        "DROP",
        "ALTER",
        "TRUNCATE",
        "RENAME",
        "COMMENT",
        "GRANT",
        "REVOKE",
        "PRAGMA",
        "ATTACH",
        "DETACH",
        "VACUUM",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "START",
        "COMMIT",
        "END",
        "ROLLBACK",
        "ABORT",
        "SAVEPOINT",
        "RELEASE",
        "COPY",
        "CALL",
        "EXEC",
        "EXECUTE",
        "PREPARE",
        "DEALLOCATE",
        "DO",
        "DECLARE",
        "FETCH",
        "CLOSE",
        "SET",
        "RESET",
        "USE",
        "LOCK",
        "UNLOCK",
        "LOAD",
        "IMPORT",
        "EXPORT",
        "LISTEN",
        "NOTIFY",
        "CLUSTER",
        "REFRESH",
        "SECURITY",
        "REASSIGN",
        "DISCARD",
        "CHECKPOINT",
        "INSTALL",
        "FLUSH",
        "KILL",
        "SHUTDOWN",
        "BACKUP",
        "RESTORE",
        "HANDLER",
    ]
)
_WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "INTO"})


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of SQL text. `kind`: space, comment, string, double, back, bracket, word, number, semicolon, other."""

    kind: str
    text: str


@cache
def _tokens(backslash: bool, bracket: bool, dollar: bool, hash_comment: bool) -> re.Pattern[str]:
    string = r"'(?:[^'\\]|''|\\.)*'?" if backslash else r"'(?:[^']|'')*'?"
    double = r'"(?:[^"\\]|""|\\.)*"?' if backslash else r'"(?:[^"]|"")*"?'
    parts = [
        r"(?P<space>\s+)",
        r"(?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z)" + (r"|#[^\n]*" if hash_comment else "") + ")",
        rf"(?P<string>{string}" + (r"|\$\$.*?(?:\$\$|\Z)" if dollar else "") + ")",
        rf"(?P<double>{double})",
        r"(?P<back>`(?:[^`]|``)*`?)",
        *([r"(?P<bracket>\[[^\]]*\]?)"] if bracket else []),
        r"(?P<word>[^\W\d][\w$]*)",
        r"(?P<number>\d[\w.]*|\.\d\w*)",
        r"(?P<semicolon>;)",
        r"(?P<other>.)",
    ]
    return re.compile("|".join(parts), re.DOTALL)


def tokens(text: str, dialect: str = "sqlite") -> Iterator[Token]:
    """The pieces of a text, in order; joined again they are the text."""
    pattern = _tokens(dialect == "mysql", dialect in ("sqlite", "tsql"), dialect == "postgres", dialect == "mysql")
    for match in pattern.finditer(text):
        yield Token(match.lastgroup or "other", match.group())


def find_statement(answer: str) -> str | None:
    """The SQL in a model's answer, with everything that follows it in the same place; None when there is none.

    What stands before `</think>` is skipped. In the first ``` fence that holds a statement (closed or not) all of the fence
    counts. In bare text the statement begins where a line, or what follows a colon or a backtick, begins like one; it ends with
    the text, at a backtick that closes it, or at a `;` that prose and not another statement follows.
    """
    answer = _THINK.sub("", answer[: 4 * MAX_CHARACTERS])
    for fence in _FENCE.finditer(answer):
        start = _START.search(fence.group(1))
        if start is not None:
            return fence.group(1)[start.end() if start.group().strip("( \t") else start.start() :].strip()
    if "```" in answer:
        body = next((f.group(1).strip() for f in _FENCE.finditer(answer) if f.group(1).strip()), "")
        if body and re.search(
            r"```[ \t]*(?:sql|sqlite|mysql|postgres|postgresql|tsql|oracle)\b", answer, re.IGNORECASE
        ):
            return body  # said to be SQL: let the parser say what is wrong with it
        answer = answer.replace("```", "")
    start = _START.search(answer)
    if start is None:
        first = re.match(r"\s*([A-Za-z]{4,8})\s+\S", answer)
        misspelt = first is not None and difflib.SequenceMatcher(None, first[1].lower(), "select").ratio() > 0.7
        return answer.strip() if misspelt else None
    opened = start.group()[:1] == "`"
    begin = start.end() if start.group().strip("( \t") else start.start()
    body = answer[begin:]
    if opened and "`" in body:
        body = body[: body.rindex("`")] if body.rstrip().endswith("`") else body[: body.index("`")]
    at = 0
    for token in tokens(body):
        at += len(token.text)
        if token.kind == "semicolon":
            rest = "".join(t.text for t in tokens(body[at:]) if t.kind not in ("comment", "semicolon"))
            if not _AFTER.match(rest):
                return body[:at].strip()
            break
    return body.strip()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a statement is not run at all."""

    kind: Kind
    message: str


def refuse(statement: str, dialect: str = "sqlite") -> Refusal | None:
    """The reason not to run a statement that its text alone gives; None when a database may look at it."""
    if len(statement) > MAX_CHARACTERS:
        return Refusal("parse_error", f"{len(statement)} characters; at most {MAX_CHARACTERS} are read")
    if "\x00" in statement:
        return Refusal("parse_error", "a NUL character")
    pieces = [t for t in tokens(statement, dialect) if t.kind not in ("space", "comment")]
    ended = next((i for i, t in enumerate(pieces) if t.kind == "semicolon"), len(pieces))
    if any(t.kind != "semicolon" for t in pieces[ended:]):
        return Refusal("multi_statement", f"a second statement: {''.join(t.text for t in pieces[ended + 1 :])[:60]}")
    pieces = pieces[:ended]
    first = next((t for t in pieces if t.text != "("), None)
    if first is None:
        return Refusal("format_error", "no statement")
    word = first.text.upper() if first.kind == "word" else ""
    if word in _NOT_READING:
        return Refusal("write_attempt", f"{word} is not reading")
    if word not in _READING:
        return Refusal(
            "exec_error" if word == "EXPLAIN" else "parse_error",
            f"a query begins with SELECT or WITH, not with {first.text[:30]}",
        )
    for before, token, after in zip([None, *pieces], pieces, [*pieces[1:], None], strict=False):
        if token.kind != "word" or token.text.upper() not in _WRITES:
            continue
        named = (before is not None and (before.text == "." or before.text.upper() == "AS")) or (
            after is not None and after.text in "(."
        )
        if not named and (
            token.text.upper() == "INTO" or after is not None or (before is not None and before.text.upper() == "FOR")
        ):
            return Refusal("write_attempt", f"{token.text.upper()} in a query")
    return None


def without_end(statement: str, dialect: str = "sqlite") -> str:
    """The statement before its first `;`, comments replaced by a space, double-quoted names in backticks where SQLite reads it.

    SQLite takes "x" for a string when no column is called x: a misspelt name would pass. It does so for double quotes only
    (SQLITE_DBCONFIG_DQS_* would say the same, but Python offers it from 3.12 on), so names go into backticks.
    """
    parts = []
    for token in tokens(statement, dialect):
        if token.kind == "semicolon":
            break
        if token.kind == "double" and dialect == "sqlite" and len(token.text) > 1 and token.text.endswith('"'):
            name = token.text[1:-1].replace('""', '"')
            parts.append("`" + name.replace("`", "``") + "`")
        else:
            parts.append(" " if token.kind == "comment" else token.text)
    return "".join(parts).strip()


_VALUE_BEFORE = frozenset({"=", ">", "<", "LIKE", "GLOB", "BETWEEN", "AND"})


def double_quoted_values(statement: str, columns: frozenset[str]) -> str:
    """SQLite text with "x" rewritten to 'x' where a value is due: right of a comparison, in IN (...), in BETWEEN.

    Old data sets (Spider among them) write strings so. A name of `columns` (lower case) stays a name.
    """
    pieces = list(tokens(statement))
    meaningful = [i for i, t in enumerate(pieces) if t.kind not in ("space", "comment")]
    out = [t.text for t in pieces]
    in_list = 0
    depth: list[bool] = []
    for k, i in enumerate(meaningful):
        token, before = pieces[i], pieces[meaningful[k - 1]] if k else None
        if token.text == "(":
            depth.append(before is not None and before.text.upper() == "IN")
            in_list += depth[-1]
        elif token.text == ")" and depth:
            in_list -= depth.pop()
        if token.kind != "double" or before is None or len(token.text) < 2:
            continue
        after = pieces[meaningful[k + 1]].text if k + 1 < len(meaningful) else ""
        value = before.text.upper() in _VALUE_BEFORE or (depth and depth[-1] and before.text in ("(", ","))
        name = token.text[1:-1].replace('""', '"')
        if value and after != "." and name.lower() not in columns:
            out[i] = "'" + name.replace("'", "''") + "'"
    return "".join(out)


def is_ordered(statement: str, dialect: str = "sqlite") -> bool:
    """Whether ORDER BY stands at the top level: outside every bracket, or inside brackets around the whole statement."""
    pieces = [t for t in tokens(statement, dialect) if t.kind not in ("space", "comment", "semicolon")]
    while len(pieces) > 2 and pieces[0].text == "(" and _closes(pieces) == len(pieces) - 1:
        pieces = pieces[1:-1]
    level = 0
    for token, after in itertools.pairwise(pieces):
        level += (token.text == "(") - (token.text == ")")
        if level == 0 and token.text.upper() == "ORDER" and after.text.upper() == "BY":
            return True
    return False


def _closes(pieces: list[Token]) -> int:
    """Index of the bracket that closes the first one."""
    level = 0
    for i, token in enumerate(pieces):
        level += (token.text == "(") - (token.text == ")")
        if level == 0:
            return i
    return -1
