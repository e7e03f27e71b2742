"""`trimtab sql build` and `explain`: data files on one side, the databases of `trimtab.sql` on the other.

It stands above both floors: `sql` reads no data files, and `data` runs no SQL.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.config import load
from trimtab.data import info, source
from trimtab.data.clean import answers, question
from trimtab.data.dropped import Dropped
from trimtab.data.files import READERS, read_rows, read_text
from trimtab.data.info import DatasetSpec
from trimtab.data.write import write_text
from trimtab.errors import DataError
from trimtab.registry import nearest
from trimtab.rundir import write_json
from trimtab.sql.assign import Ask, assign
from trimtab.sql.build import Query, build, evaluator, statement
from trimtab.sql.canonical import canonical_sql
from trimtab.sql.dialects import DIALECTS
from trimtab.sql.gold_mutants import mutants
from trimtab.sql.judge import Database, Judge
from trimtab.sql.rows import check_driver
from trimtab.sql.schema import Schema, from_ddl, from_json, from_spider, from_sqlite
from trimtab.sql.statement import find_statement
from trimtab.sql.verdicts import Row, Verdict
from trimtab.types import Origin

COLUMNS = ("database", "dialect", "unverified", "mutants_killed", "mutants_total")
SHOWN = 5


# ---------------------------------------------------------------------------------------------------------------- build


def build_databases(
    name: str,
    *,
    output: Path | None,
    dialect: str | None,
    ddl: Path | None,
    spider: Path | None,
    schema_column: str | None,
    instances: int,
    seed: int,
    dataset_dir: str,
    formatting: str | None = None,
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """Write OUTPUT with the rows, their databases and the report; print the report in short.

    Returns:
        the report, as in report.json.

    Raises:
        DataError: nothing to read, no gold, a schema that cannot be found, or a folder in the way.
    """
    began = time.monotonic()
    specs = _specs(name, dataset_dir, formatting, columns, spider)
    dialect = _dialect(dialect, specs)
    target = output or Path(f"{specs[0].name if ',' in name else Path(name).stem}.databases")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(
            f"{target} is not empty" if target.is_dir() else f"{target} is a file",
            where=str(target.resolve()),
            why="nothing is overwritten",
            remedy="name a new folder with --output, or move this one away",
        )
    given = _given(ddl, spider, dialect)
    key_column = schema_column or ("db_id" if spider is not None else "schema")
    rows = [(spec, row) for spec in specs for row in _rows(spec)]
    asks: list[Ask | None] = []
    for spec, (origin, value) in rows:
        example = source.example(value, origin, spec)
        listed = answers(example) if not isinstance(example, Dropped) else ()
        if isinstance(example, Dropped) or not listed or not listed[0].content.strip():
            asks.append(None)
            continue
        text, key, told = question(example), "", None
        if given is not None:
            told = given.get("") or _told(given, value, key_column, str(origin))
        elif schema_column is not None:
            cell = _cell(value, schema_column, str(origin))
            text, key = (cell, "") if "(" in cell else (text, cell)
        asks.append(Ask(gold=listed[0].content, text=text, key=key, given=told))
    if not any(ask is not None for ask in asks):
        raise _no_gold(specs, [value for _, (_, value) in rows])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with Judge() as judge:
            queries, of_row, schemas = _build(judge, asks, dialect, temporary, instances, seed, spider is not None)
        start = 0
        entries: dict[str, Any] = {}
        numbered = []
        for spec in specs:
            own = [row for s, row in rows if s is spec]
            made = []
            for offset, (origin, value) in enumerate(own):
                query = of_row[start + offset]
                made.append(
                    {
                        **{k: v for k, v in value.items() if k not in COLUMNS},
                        **_columns(query, dialect, temporary, target),
                    }
                )
                numbered.append((f"{spec.name}: " if len(specs) > 1 else "", origin.row, query))
            start += len(own)
            text = json.dumps(made, ensure_ascii=False, indent=1, default=str) + "\n"
            write_text(temporary / f"{spec.name}.json", text)
            entries[spec.name] = _entry(spec, dialect)
        write_text(temporary / info.INFO, json.dumps(entries, ensure_ascii=False, indent=2) + "\n")
        report = _report(numbered, queries, schemas, dialect, seed, instances, time.monotonic() - began)
        write_json(temporary / "report.json", report)
        write_text(temporary / "report.md", markdown(report, ", ".join(s.name for s in specs)))
        with suppress(FileNotFoundError):
            target.rmdir()
        temporary.chmod(0o755)  # mkdtemp's are for the user alone
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _say(short(report))
    _say(f"rows, instances and report: {target}")
    return report


def _build(
    judge: Judge, asks: Sequence[Ask | None], dialect: str, folder: Path, instances: int, seed: int, quoted: bool
) -> tuple[list[Query], list[Query | None], dict[str, Schema]]:
    """The distinct queries, each row's query, and the schemas."""
    with tempfile.TemporaryDirectory(prefix="trimtab-sql-") as scratch:
        there = [ask for ask in asks if ask is not None]
        names, schemas = assign(there, dialect, evaluator(judge.sandbox, Path(scratch), dialect))
    queries: dict[tuple[str, str], Query] = {}
    name_of = iter(names)
    of_row: list[Query | None] = []
    for ask in asks:
        if ask is None:
            of_row.append(None)
            continue
        name = next(name_of)
        made = Query(gold=ask.gold, statement=statement(ask.gold), schema=name)
        of_row.append(queries.setdefault((ask.gold, name), made))
    listed = list(queries.values())
    build(
        listed, schemas, judge, dialect=dialect, folder=folder / "instances", instances=instances, seed=seed, quoted_values=quoted,
        say=_say,
    )  # fmt: skip
    return listed, of_row, schemas


def _specs(
    name: str, dataset_dir: str, formatting: str | None, columns: Sequence[str], spider: Path | None
) -> list[DatasetSpec]:
    """The data sets of a data file, of names with commas between them, or of a training YAML."""
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        config: Any = load(name)
        names = [*getattr(config, "dataset", ()), *getattr(config, "eval_dataset", ())]
        if not names:
            raise DataError(
                f"{name} names no data set", where=name, remedy="give it dataset: NAME, or name the data file itself"
            )
        return info.find(list(dict.fromkeys(names)), config.dataset_dir)
    if "," in name and not Path(name).exists():
        return info.find(list(dict.fromkeys(part.strip() for part in name.split(","))), dataset_dir)
    spec = source.find(name, dataset_dir=dataset_dir, formatting=formatting, ranking=None, columns=columns)
    if spider is not None and not columns and spec.formatting == "alpaca" and spec.path is not None:
        first = next((value for _, value in source.rows(spec) if isinstance(value, Mapping)), {})
        gold = next((c for c in ("query", "SQL", "sql") if c in first), None)
        if "instruction" not in first and "question" in first and gold is not None:
            layout = replace(spec.layout, columns={"prompt": "question", "response": gold, "query": "evidence"})
            spec = replace(spec, layout=layout)
    return [spec]


def _dialect(given: str | None, specs: Sequence[DatasetSpec]) -> str:
    named = [s for s in specs if s.sql_dialect]
    dialect = given or (named[0].sql_dialect if named else "sqlite")
    if dialect not in DIALECTS:
        guess = nearest(dialect, DIALECTS)
        raise DataError(
            f"unknown SQL dialect {dialect!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where="--dialect" if given else f"{named[0].where}: sql_dialect",
            remedy=f"choose one of: {', '.join(DIALECTS)}",
        )
    return dialect


def _given(ddl: Path | None, spider: Path | None, dialect: str) -> dict[str, Schema] | None:
    """The schemas of --spider or --ddl by name; one for all rows stands under ""."""
    path = spider or ddl
    if path is None:
        return None
    if not path.exists():
        raise DataError(
            f"{path} does not exist",
            where="--spider" if spider else "--ddl",
            why=f"tried {path.resolve()}",
            remedy="relative paths start at the working directory",
        )
    try:
        if spider is not None:
            return from_spider(spider)
        text = read_text(path)
        if path.suffix.lower() == ".json":
            return from_json(json.loads(text), dialect)
    except ValueError as error:
        raise DataError(
            f"no schema can be read from {path}",
            where="--spider" if spider else "--ddl",
            why=str(error),
            remedy="--spider names a folder with tables.json and database/ID/ID.sqlite; --ddl a .sql file, or a .json list of "
            '{"name": ..., "ddl": [...]}',
        ) from None
    schema = from_ddl(text, dialect, path.stem)
    if schema is None:
        raise DataError(
            f"no CREATE TABLE can be read in {path}", where="--ddl", remedy="--ddl names a .sql file, or a .json list"
        )
    return {"": schema}


def _told(given: Mapping[str, Schema], value: Mapping[str, Any], column: str, origin: str) -> Schema:
    name = _cell(value, column, origin)
    if name not in given:
        guess = nearest(name, given)
        raise DataError(
            f"no schema is called {name!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where=f"{origin}: {column}",
            why=f"there are {', '.join(list(given)[:20])}",
            remedy="name the column that holds the schema's name with --schema-column",
        )
    return given[name]


def _cell(value: Mapping[str, Any], column: str, origin: str) -> str:
    cell = value.get(column)
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(
            f"this row has no text in column {column!r}",
            where=origin,
            why=f"it has {', '.join(map(str, value))}",
            remedy="name the column that tells a row's schema with --schema-column",
        )
    return cell


def _rows(spec: DatasetSpec) -> list[tuple[Any, Mapping[str, Any]]]:
    found = list(info.rows(spec))
    for origin, value in found:
        if not isinstance(value, Mapping):
            raise DataError(
                f"a row is not an object: {str(value)[:60]}",
                where=str(origin),
                why="columns are to be added to it",
                remedy="`trimtab data clean FILE` takes such rows out",
            )
    return found


def _no_gold(specs: Sequence[DatasetSpec], values: Sequence[Mapping[str, Any]]) -> DataError:
    columns = ", ".join(values[0]) if values else "no rows"
    return DataError(
        f"no row of {specs[0].name} has a gold query",
        where=specs[0].where,
        why=f"read as {specs[0].formatting}; the first row has {columns}" if values else "it holds no rows",
        remedy="name its columns: --column prompt=QUESTION --column response=QUERY",
    )


def _columns(query: Query | None, dialect: str, now: Path, later: Path) -> dict[str, Any]:
    """The columns of a row; paths are written as they will be when `now` is called `later`."""
    if query is None or query.database is None:
        return dict(zip(COLUMNS, ([], dialect, "no gold query", 0, 0), strict=True))
    paths = []
    for path in map(Path, query.database.paths):
        inside = path.is_relative_to(now)
        paths.append(
            (path.relative_to(now) if inside else Path(os.path.relpath(path.resolve(), later.resolve()))).as_posix()
        )
    found = dict(zip(COLUMNS, (paths, dialect, query.unverified or None, query.killed, query.total), strict=True))
    return {**found, "quoted_values": True} if query.quoted else found


def _entry(spec: DatasetSpec, dialect: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"file_name": f"{spec.name}.json", "sql_dialect": dialect}
    if spec.formatting != "alpaca":
        entry["formatting"] = spec.formatting
    if spec.layout.ranking:
        entry["ranking"] = True
    if spec.layout.columns:
        entry["columns"] = dict(spec.layout.columns)
    if spec.layout.tags:
        entry["tags"] = dict(spec.layout.tags)
    return entry


# --------------------------------------------------------------------------------------------------------------- report


def _report(
    rows: Sequence[tuple[str, int, Query | None]],
    queries: Sequence[Query],
    schemas: Mapping[str, Schema],
    dialect: str,
    seed: int,
    instances: int,
    seconds: float,
) -> dict[str, Any]:
    good = [q for _, _, q in rows if q is not None and not q.unverified]
    unverified: dict[str, list[str | int]] = {}
    for file, number, query in rows:
        reason = "no gold query" if query is None else query.unverified
        if reason:
            unverified.setdefault(reason, []).append(f"{file}{number}" if file else number)
    bins = Counter(int(10 * q.killed / q.total) if q.total else -1 for q in good)
    histogram = {f"{10 * i}-{10 * i + 9} %": bins[i] for i in range(10)} | {"100 %": bins[10], "no mutants": bins[-1]}
    of_schema: dict[str, list[Query]] = {name: [] for name in schemas}
    for _, _, query in rows:
        if query is not None:
            of_schema[query.schema].append(query)
    return {
        "rows": len(rows),
        "queries": len(queries),
        "verifiable": len(good),
        "unverified": unverified,
        "kill_rate": _rate(good),
        "mutants": sum(q.total for q in good),
        "histogram": histogram,
        "alive": dict(Counter(m.change for q in queries for m in q.alive).most_common()),
        "schemas": [
            {
                "name": name,
                "origin": schemas[name].origin,
                "tables": len(schemas[name].tables),
                "rows": len(own),
                "groups": len({q.group for q in own}),
                "verifiable": sum(not q.unverified for q in own),
                "kill_rate": _rate([q for q in own if not q.unverified]),
            }
            for name, own in of_schema.items()
            if own
        ],
        "dialect": dialect,
        "instances": instances,
        "seed": seed,
        "seconds": round(seconds, 1),
    }


def _rate(queries: Sequence[Query]) -> float | None:
    total = sum(q.total for q in queries)
    return round(sum(q.killed for q in queries) / total, 4) if total else None


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def short(report: Mapping[str, Any]) -> str:
    """The report in a few lines."""
    share = report["verifiable"] / max(1, report["rows"])
    lines = [
        f"{report['rows']} rows, {report['queries']} queries, {len(report['schemas'])} schemas: {report['verifiable']} verifiable "
        f"({_percent(share)}), {_percent(report['kill_rate'])} of {report['mutants']} mutants told from gold, {report['seconds']:.0f} s"
    ]
    heads: dict[str, list[Any]] = {}
    for reason, listed in report["unverified"].items():
        heads.setdefault(reason.partition(":")[0], []).extend(listed)
    for reason, listed in heads.items():
        shown = ", ".join(map(str, listed[:SHOWN]))
        lines.append(f"  unverified, {reason}: {len(listed)}: row {shown}" + (" ..." if len(listed) > SHOWN else ""))
    return "\n".join(lines)


def markdown(report: Mapping[str, Any], name: str) -> str:
    """The whole report."""
    lines = [f"# Databases of {name}", "", short(report).split("\n")[0] + ".", ""]
    lines.append(
        f"Dialect {report['dialect']}, {report['instances']} instances for each group of queries, seed {report['seed']}."
    )
    lines += ["", "## Mutants told from gold, by row", "", "| share | rows |", "|---|---|"]
    lines += [f"| {bin_} | {count} |" for bin_, count in report["histogram"].items() if count]
    if report["alive"]:
        lines += ["", "## Mutants still alive", "", "| change | mutants |", "|---|---|"]
        lines += [f"| {change} | {count} |" for change, count in report["alive"].items()]
    if report["unverified"]:
        lines += ["", "## Rows that cannot be judged", "", "| reason | rows | which |", "|---|---|---|"]
        lines += [
            f"| {_inline(reason)} | {len(listed)} | {', '.join(map(str, listed))} |"
            for reason, listed in report["unverified"].items()
        ]
    lines += ["", "## Schemas", ""]
    lines += ["| schema | from | tables | rows | groups | verifiable | mutants told |", "|---|---|---|---|---|---|---|"]
    for s in report["schemas"]:
        counts = " | ".join(str(s[key]) for key in ("origin", "tables", "rows", "groups", "verifiable"))
        lines.append(f"| {_inline(s['name'])} | {counts} | {_percent(s['kill_rate'])} |")
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


# -------------------------------------------------------------------------------------------------------------- explain


def explain_row(file: Path, number: int, *, predictions: Path | None, answer: str | None) -> Verdict | None:
    """Print what is known of one row of a built file, and of a prediction for it.

    Args:
        number: the row, from 1.
        predictions: a generated_predictions.jsonl with one line for each row of the file.

    Returns:
        the verdict on the prediction; None without one.

    Raises:
        DataError: no such row, a row without databases, or predictions of another file.
    """
    if file.suffix.lower() not in READERS:
        raise DataError(
            f"cannot read {file.name}: unknown kind of file {file.suffix!r}",
            where=str(file),
            remedy="name the .json file that `trimtab sql build` wrote",
        )
    rows = [value for _, value in read_rows(file)]
    value = _numbered(rows, number, file)
    paths = value.get("database") if isinstance(value, Mapping) else None
    paths = [paths] if isinstance(paths, str) else paths
    if not paths or not isinstance(paths, list):
        raise DataError(
            f"row {number} has no databases",
            where=f"{file}: row {number}",
            why="its column `database` is empty"
            if isinstance(value, Mapping) and "database" in value
            else "it has no column `database`",
            remedy="`trimtab sql build FILE` makes a file whose rows have them",
        )
    spec = source.beside(file)
    example = source.example(value, Origin(file=str(file), row=number), spec)
    listed = answers(example) if not isinstance(example, Dropped) else ()
    gold = listed[0].content if listed else ""
    if answer is None and predictions is not None:
        answer = _predicted(predictions, number, len(rows), gold)
    dialect = str(value.get("dialect") or "sqlite")
    database = Database(
        paths=tuple(p if "://" in p else str(file.parent / p) for p in map(str, paths)),
        dialect=dialect,
        quoted_values=bool(value.get("quoted_values")),
    )
    missing = next((p for p in database.paths if "://" not in p and not Path(p).is_file()), None)
    if missing is not None:
        raise DataError(
            f"the database {missing} is not there",
            where=f"{file}: row {number}: database",
            why="its path is relative to the folder of the file",
            remedy="move the file and its instances together, or build them again",
        )
    check_driver(database.paths, where=f"{file}: row {number}: database")
    if not isinstance(example, Dropped):
        _say(f"question:   {question(example)}")
    _say(f"gold:       {gold}")
    with Judge() as judge:
        verdict = None if answer is None else _explain_answer(judge, answer, gold, database, paths)
        if verdict is None:
            _show_gold(judge, gold, database, paths)
        _explain_mutants(judge, value, gold, database)
    return verdict


def _numbered(rows: Sequence[Any], number: int, file: Path) -> Any:
    if not 1 <= number <= len(rows):
        raise DataError(
            f"{file.name} has no row {number}",
            where=str(file),
            why=f"its rows are 1 to {len(rows)}",
            remedy="name one of them",
        )
    return rows[number - 1]


def _predicted(path: Path, number: int, rows: int, gold: str) -> str:
    lines = [value for _, value in read_rows(path)]
    if len(lines) != rows:
        raise DataError(
            f"{path.name} has {len(lines)} predictions for {rows} rows",
            where=str(path),
            why="prediction and row are matched by their number",
            remedy="name the predictions of this file, or give the answer itself with --answer",
        )
    line = lines[number - 1]
    if not isinstance(line, Mapping) or not isinstance(line.get("predict"), str):
        raise DataError(
            "this line has no text under predict",
            where=f"{path}: row {number}",
            remedy="name a generated_predictions.jsonl",
        )
    label = line.get("label")
    if isinstance(label, str) and label.strip() and " ".join(label.split()) != " ".join(gold.split()):
        raise DataError(
            f"line {number} answers another row",
            where=f"{path}: row {number}",
            why=f"its label is {label[:80]!r}, the row's gold {gold[:80]!r}",
            remedy="name the predictions of this file",
        )
    return str(line["predict"])


def _explain_answer(judge: Judge, answer: str, gold: str, database: Database, names: Sequence[str]) -> Verdict:
    verdict = judge.judge(answer, gold, database)
    found = find_statement(answer)
    _say(f"prediction: {(found or answer).strip()}")
    at = f" on {names[verdict.instance]}" if verdict.instance >= 0 else ""
    _say(f"verdict:    {verdict.kind}{at}" + (f": {verdict.message}" if verdict.message else ""))
    i = max(0, verdict.instance)
    wanted = judge.gold(gold, database, i)
    tables = [("gold", wanted.outcome.columns, wanted.outcome.rows, wanted.outcome.error)]
    if found is not None and verdict.instance >= 0:
        mine = judge.sandbox.run(found, (database.paths[i],), database.dialect, quoted_values=database.quoted_values)[0]
        tables.append(("prediction", mine.columns, mine.rows, mine.error))
        if mine.error is None and wanted.outcome.error is None:
            _say(f"differs:    {_first_difference(wanted.outcome.rows, mine.rows, wanted.groups is not None)}")
    for title, columns, rows, error in tables:
        _table(f"{title}, {names[i]}", columns, rows, error)
    return verdict


def _show_gold(judge: Judge, gold: str, database: Database, names: Sequence[str]) -> None:
    for i, one in enumerate(judge.golds(gold, database)):
        if one.verifiable or i == len(names) - 1:
            _table(f"gold, {names[i]}", one.outcome.columns, one.outcome.rows, one.outcome.error)
            return


def _first_difference(gold: Sequence[Row], other: Sequence[Row], ordered: bool) -> str:
    """The first row of one that the other lacks; where both have the same rows and gold orders, the first in another place."""
    missing, surplus = (
        next(iter((Counter(a) - Counter(b)).elements()), None) for a, b in ((gold, other), (other, gold))
    )
    if missing is not None or surplus is not None:
        parts = [f"gold's {missing} is missing"] * (missing is not None) + [f"{surplus} is not gold's"] * (
            surplus is not None
        )
        return "; ".join(parts)
    if ordered:
        for number, (a, b) in enumerate(zip(gold, other, strict=True), 1):
            if a != b:
                return f"row {number}: gold has {a}, the prediction {b}"
    return "nothing"


def _explain_mutants(judge: Judge, value: Mapping[str, Any], gold: str, database: Database) -> None:
    if value.get("unverified"):
        _say(f"unverified: {value['unverified']}")
        return
    _say(f"mutants:    {value.get('mutants_killed', '?')} of {value.get('mutants_total', '?')} told from gold")
    local = next((p for p in reversed(database.paths) if "://" not in p), None)
    if local is None:
        return
    schema = from_sqlite(Path(local), Schema(name="row", tables=()), most=0)
    wanted = canonical_sql(statement(gold), database.dialect)
    for mutant in mutants(statement(gold), database.dialect, schema):
        if judge.judge(mutant.sql, gold, database).kind in ("equal", "unverified"):
            same = canonical_sql(mutant.sql, database.dialect)
            if wanted is None or same != wanted:
                _say(f"  alive: {mutant.sql}   ({mutant.change})")


def _table(title: str, columns: Sequence[str], rows: Sequence[Row], error: str | None, most: int = 10) -> None:
    from rich.console import Console
    from rich.table import Table as Drawn

    if error is not None:
        _say(f"{title}: {error}")
        return
    _say(f"{title}: {len(rows)} rows")
    drawn = Drawn(*(str(c) for c in columns), box=None, header_style="bold")
    for row in rows[:most]:
        drawn.add_row(*("NULL" if v is None else str(v)[:60] for v in row))
    console = Console(highlight=False, markup=False)
    console.print(drawn)
    if len(rows) > most:
        _say(f"  ... {len(rows) - most} more")


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(text, markup=False, soft_wrap=True)
