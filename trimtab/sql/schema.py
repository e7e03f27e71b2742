"""Tables, columns and keys of a database, read from DDL, from the lines of a prompt, or from a Spider/BIRD folder.

A prompt may hold `CREATE TABLE` statements, or one line a table: `book(id, title, genre)`, `商品(编号, 名称)`, `t(a INTEGER, b TEXT)`.
What such a line does not say (types, keys) is left open (`kind` ""), for `infer.py` to settle from the queries.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["", "integer", "real", "text", "date", "timestamp", "boolean"]

TYPES: dict[Kind, str] = {
    "": "TEXT", "integer": "INTEGER", "real": "REAL", "text": "TEXT", "date": "DATE", "timestamp": "TIMESTAMP", "boolean": "BOOLEAN",
}  # fmt: skip

_CREATE = re.compile(r"\bcreate\s+(?:temp(?:orary)?\s+)?table\b", re.IGNORECASE)
_LINE = re.compile(
    r"^[ \t>*#-]*([^\s(（),，:：;；'\"`]+)\s*[(（]([^()（）]*(?:\([^()]*\)[^()（）]*)*)[)）]\s*[;；。]?\s*$"
)
_NAME = re.compile(r"[^\W\d]\w*\Z")
_QUOTES = '`"[]'


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        kind: what its values are; "" when nobody has said.
        pattern: of a text that holds dates: how they are written, as strftime has it.
        unique: no two rows have the same value (a key of one column).
        required: NOT NULL.
        values: values it is known to hold, from a database that came with the schema.
    """

    name: str
    kind: Kind = ""
    pattern: str = ""
    unique: bool = False
    required: bool = False
    values: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns in their order; `primary` names those of the primary key."""

    name: str
    columns: tuple[Column, ...]
    primary: tuple[str, ...] = ()

    def column(self, name: str) -> Column | None:
        low = name.lower()
        return next((c for c in self.columns if c.name.lower() == low), None)

    @property
    def signature(self) -> tuple[str, tuple[str, ...]]:
        """What makes it the same table as another."""
        return self.name.lower(), tuple(c.name.lower() for c in self.columns)


@dataclass(frozen=True, slots=True, order=True)
class Link:
    """Values of `table.column` are looked up in `to.key`; `declared` by a foreign key, else seen in a join."""

    table: str
    column: str
    to: str
    key: str
    declared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The tables of one database."""

    name: str
    tables: tuple[Table, ...]
    links: tuple[Link, ...] = ()
    origin: str = ""  # where it came from: "DDL", "prompt lines", "inferred" ...
    sample: str = ""  # a database that came with it

    def table(self, name: str) -> Table | None:
        low = name.lower()
        return next((t for t in self.tables if t.name.lower() == low), None)

    def ddl(self) -> Iterator[str]:
        """CREATE TABLE statements for SQLite, foreign keys left out: the rows are made to fit them."""
        for table in self.tables:
            parts = [
                f"{quoted(c.name)} {TYPES['text' if c.pattern else c.kind]}"
                + (" NOT NULL" if c.required else "")
                + (" UNIQUE" if c.unique and (c.name,) != table.primary else "")
                + (f" /* {c.pattern} */" if c.pattern else "")
                for c in table.columns
            ]
            if table.primary:
                parts.append(f"PRIMARY KEY ({', '.join(map(quoted, table.primary))})")
            yield f"CREATE TABLE {quoted(table.name)} ({', '.join(parts)})"


def quoted(name: str) -> str:
    """An SQL name in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def kind_of(declared: str) -> Kind:
    """The kind that a declared SQL type means."""
    low = declared.lower()
    if re.search(r"timestamp|datetime", low):
        return "timestamp"
    if re.search(r"\bdate\b|\bdate\(", low):
        return "date"
    if "bool" in low:
        return "boolean"
    if re.search(r"int|serial|^year", low) and "interval" not in low and "point" not in low:
        return "integer"
    scale = re.search(r"(?:number|numeric|decimal|dec)\s*(?:\(\s*\d+\s*(?:,\s*(\d+)\s*)?\))?", low)
    if scale is not None:
        return "integer" if (scale[1] == "0" or (scale[1] is None and "(" in scale[0])) else "real"
    if re.search(r"real|floa|doub|money", low):
        return "real"
    return "text" if low else ""


# ----------------------------------------------------------------------------------------------------------------- DDL


def has_ddl(text: str) -> bool:
    return _CREATE.search(text) is not None


def create_statements(text: str) -> list[str]:
    """Every CREATE TABLE ... (...) of a text, prose around them or not."""
    found = []
    for match in _CREATE.finditer(text):
        level, quote, i = 0, "", match.end()
        while i < len(text):
            c = text[i]
            if quote:
                quote = "" if c == quote else quote
            elif c in "'\"`":
                quote = c
            elif c == "-" and text.startswith("--", i):
                i = text.find("\n", i) if "\n" in text[i:] else len(text)
                continue
            elif c == "(":
                level += 1
            elif c == ")":
                level -= 1
                if level == 0:
                    found.append(text[match.start() : i + 1])
                    break
            elif c == ";" and not level:
                break
            i += 1
    return found


def from_ddl(text: str, dialect: str, name: str = "ddl") -> Schema | None:
    """The schema that CREATE TABLE statements declare; None where there are none that can be read."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    tables: dict[str, Table] = {}
    links: list[Link] = []
    for statement in create_statements(text):
        tree: Any = None
        for reader in dict.fromkeys((dialect, "sqlite", "mysql", "postgres", "oracle", "tsql")):
            try:
                tree = sqlglot.parse_one(statement, read=reader)
            except (SqlglotError, RecursionError):
                continue
            if isinstance(tree, exp.Create) and isinstance(tree.this, exp.Schema):
                break
            tree = None
        if tree is None:
            continue
        title = tree.this.this.name
        columns, primary, unique = [], [], []
        for part in tree.this.expressions:
            if isinstance(part, exp.ColumnDef):
                kinds = [c.kind for c in part.constraints]
                key = any(isinstance(k, exp.PrimaryKeyColumnConstraint) for k in kinds)
                required = any(
                    isinstance(k, exp.NotNullColumnConstraint) and not k.args.get("allow_null") for k in kinds
                )
                primary += [part.name] if key else []
                unique += [[part.name]] if any(isinstance(k, exp.UniqueColumnConstraint) for k in kinds) else []
                for k in kinds:
                    if isinstance(k, exp.Reference):
                        links.append(_reference(title, part.name, k, 0))
                kind = kind_of(part.kind.sql() if part.kind is not None else "")
                columns.append(Column(name=part.name, kind=kind or "text", required=required or key))
                continue
            inner = part.expressions if isinstance(part, exp.Constraint) else [part]
            for constraint in inner:
                names = [e.name for e in constraint.expressions]
                if isinstance(constraint, exp.PrimaryKey):
                    primary += names
                elif isinstance(constraint, exp.UniqueColumnConstraint):
                    listed = constraint.this.expressions if constraint.this is not None else []
                    unique.append([e.name for e in listed])
                elif isinstance(constraint, exp.ForeignKey):
                    target = constraint.args.get("reference")
                    links += [_reference(title, n, target, i) for i, n in enumerate(names) if target is not None]
        singles = {u[0].lower() for u in [*unique, primary] if len(u) == 1}
        inside = {p.lower() for p in primary}
        tables.setdefault(
            title.lower(),
            Table(
                name=title,
                columns=tuple(
                    replace(c, unique=c.name.lower() in singles, required=c.required or c.name.lower() in inside)
                    for c in columns
                ),
                primary=tuple(primary),
            ),
        )
    if not tables:
        return None
    return Schema(name=name, tables=tuple(tables.values()), links=_whole(links, tables), origin="DDL")


def _reference(table: str, column: str, reference: Any, index: int) -> Link:
    target = reference.this
    listed = target.expressions if target.__class__.__name__ == "Schema" else []
    name = target.this.name if target.__class__.__name__ == "Schema" else target.name
    return Link(table, column, name, listed[index].name if index < len(listed) else "", True)


def _whole(links: Iterable[Link], tables: Mapping[str, Table]) -> tuple[Link, ...]:
    """Links to tables that are there; where none is named the key is the primary key."""
    found = []
    for link in links:
        to = tables.get(link.to.lower())
        key = link.key or (to.primary[0] if to is not None and to.primary else "")
        if to is not None and to.column(key) is not None:
            found.append(replace(link, to=to.name, key=key))
    return tuple(dict.fromkeys(found))


# -------------------------------------------------------------------------------------------------------- prompt lines


def from_lines(text: str, name: str = "prompt") -> Schema | None:
    """The schema that lines such as `book(id, title, genre)` show; None where no line reads so."""
    tables: dict[str, Table] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        title = match[1].strip(_QUOTES)
        columns = [_listed(part) for part in re.split(r"[,，、](?![^()]*\))", match[2])]
        if _NAME.match(title) and all(columns):
            whole = tuple(c for c in columns if c is not None)
            if len({c.name.lower() for c in whole}) == len(whole):
                tables.setdefault(title.lower(), Table(name=title, columns=whole))
    if not tables:
        return None
    return Schema(name=name, tables=tuple(tables.values()), origin="prompt lines")


def _listed(part: str) -> Column | None:
    """`title`, `title TEXT`, `title: text`."""
    title, _, rest = re.sub(r"\s*[:：]\s*", " ", part.strip()).partition(" ")
    title = title.strip(_QUOTES)
    if not _NAME.match(title):
        return None
    if rest and not re.match(r"[A-Za-z]\w*", rest):
        return None
    kind: Kind = (
        kind_of(rest)
        if re.match(r"(?i)(var)?char|text|int|big|small|num|dec|real|floa|doub|date|time|bool|serial|str", rest)
        else ""
    )
    if rest and not kind:
        return None
    return Column(name=title, kind=kind, unique="primary key" in rest.lower())


# ----------------------------------------------------------------------------------------------- files and folders


def from_json(value: Any, dialect: str) -> dict[str, Schema]:
    """Schemas by name, of a list of `{"name": ..., "ddl": [...]}`.

    Raises:
        ValueError: it is something else; the text says what.
    """
    if not isinstance(value, list) or not all(isinstance(v, Mapping) and "name" in v and "ddl" in v for v in value):
        raise ValueError('it is not a list of {"name": ..., "ddl": [...]}')
    found = {}
    for entry in value:
        ddl = entry["ddl"]
        schema = from_ddl(ddl if isinstance(ddl, str) else ";\n".join(map(str, ddl)), dialect, str(entry["name"]))
        if schema is None:
            raise ValueError(f"no CREATE TABLE can be read in the ddl of {entry['name']!r}")
        found[schema.name] = schema
    return found


def from_spider(folder: Path) -> dict[str, Schema]:
    """Schemas by `db_id`, of `tables.json` and the `database` folder beside it; a database's own declarations come first.

    Raises:
        ValueError: there is no tables.json that can be read; the text says what.
    """
    try:
        entries = json.loads((folder / "tables.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"tables.json: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"tables.json: {error}") from None
    if not isinstance(entries, list):
        raise ValueError("tables.json is not a list of databases")
    found = {}
    for entry in entries:
        try:
            found[str(entry["db_id"])] = _spider(entry, folder)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"tables.json: an entry lacks what one must have ({error!r})") from None
    return found


_SPIDER: dict[str, Kind] = {
    "number": "real", "integer": "integer", "real": "real", "time": "date", "date": "date", "datetime": "timestamp", "boolean": "boolean",
}  # fmt: skip


def _spider(entry: Mapping[str, Any], folder: Path) -> Schema:
    name = str(entry["db_id"])
    path = next(
        (
            p
            for p in (folder / "database", folder, *sorted(folder.glob("*databases")))
            if (p / name / f"{name}.sqlite").is_file()
        ),
        None,
    )
    file = path / name / f"{name}.sqlite" if path is not None else None
    titles: Sequence[str] = entry["table_names_original"]
    listed: Sequence[tuple[int, str]] = entry["column_names_original"]
    keys = [k for key in entry.get("primary_keys", ()) for k in (key if isinstance(key, list) else [key])]
    tables = []
    for number, title in enumerate(titles):
        own = [(i, column) for i, (t, column) in enumerate(listed) if t == number]
        primary = tuple(column for i, column in own if i in keys)
        columns = tuple(
            Column(
                name=column, kind=_SPIDER.get(entry["column_types"][i], "text"), unique=(column,) == primary,
                required=column in primary,
            )
            for i, column in own
        )  # fmt: skip
        tables.append(Table(name=title, columns=columns, primary=primary))
    links = [
        Link(titles[listed[a][0]], listed[a][1], titles[listed[b][0]], listed[b][1], True)
        for a, b in entry.get("foreign_keys", ())
    ]
    schema = Schema(name=name, tables=tuple(tables), links=tuple(dict.fromkeys(links)), origin="Spider folder")
    return from_sqlite(file, schema) if file is not None else schema


def from_sqlite(file: Path, schema: Schema, most: int = 60) -> Schema:
    """A schema with the types, keys and some of the values of a database; the patterns, too, where `ddl` made it."""
    tables = []
    links = list(schema.links)
    with closing(sqlite3.connect(f"file:{file.resolve().as_posix()}?mode=ro", uri=True)) as db:
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")
        listed = list(
            db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND substr(name, 1, 7) <> 'sqlite_'")
        )
        for title, sql in listed:
            facts = list(db.execute(f"PRAGMA table_info({quoted(title)})"))
            primary = tuple(f[1] for f in sorted(facts, key=lambda f: int(f[5])) if f[5])
            columns = []
            for _, column, declared, required, _, key in facts:
                values = tuple(
                    row[0]
                    for row in db.execute(
                        f"SELECT DISTINCT {quoted(column)} FROM (SELECT {quoted(column)} FROM {quoted(title)} LIMIT 2000) "
                        f"WHERE {quoted(column)} IS NOT NULL LIMIT {most}"
                    )
                )
                kind = kind_of(declared)
                if values and all(isinstance(v, str) for v in values) and kind in ("integer", "real"):
                    kind = "text"
                own = re.search(
                    rf"{re.escape(quoted(column))} \w+(?: NOT NULL)?( UNIQUE)?(?: /\* (\S+) \*/)?", sql or ""
                )
                columns.append(
                    Column(
                        name=column, kind=kind or "text", pattern=(own[2] or "") if own else "", values=values,
                        unique=(column,) == primary or bool(own and own[1]), required=bool(required or key),
                    )
                )  # fmt: skip
            for fact in db.execute(f"PRAGMA foreign_key_list({quoted(title)})"):
                links.append(Link(title, fact[3], fact[2], fact[4] or "", True))
            tables.append(Table(name=title, columns=tuple(columns), primary=primary))
    by_name = {t.name.lower(): t for t in tables}
    return replace(schema, tables=tuple(tables), links=_whole(links, by_name), sample=str(file))
