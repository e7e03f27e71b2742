"""Databases for gold queries: instances are drawn, tried and kept for what they can tell apart.

The queries of a schema are cut into groups of at most `GROUP`; each group has its own K instances, of the kinds of `fill.PROFILES`. For
each place several draws compete: the one on which most queries have a usable answer, and most of the mutants that are still alive give
another answer than their gold, is kept. What later places see first are the queries with something left to show. Nothing is decided by the
clock: the same queries and seed give the same instances.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.sql.canonical import canonical_sql
from trimtab.sql.fill import PROFILES, Ideas, ideas, rows, write
from trimtab.sql.gold_mutants import Mutant, mutants
from trimtab.sql.infer import Constant, Facts, analyse
from trimtab.sql.judge import Database, Judge
from trimtab.sql.sandbox import Sandbox
from trimtab.sql.schema import Schema
from trimtab.sql.statement import find_statement, without_end
from trimtab.sql.verdicts import Kind

GROUP = 40
TRIES = (2, 3, 3, 4)
"""Draws for the first, second ... place of a group."""

_STILLBORN: frozenset[Kind] = frozenset(
    {"format_error", "multi_statement", "write_attempt", "parse_error", "unknown_identifier", "exec_error"}
)
_HOPELESS = ("parse_error", "unknown_identifier", "multi_statement", "write_attempt", "format_error")


@dataclass(slots=True)
class Query:
    """One gold query of one schema, and what its databases are worth.

    Attributes:
        database: its instances, once they are built.
        unverified: why nothing can be judged; "" where it can.
        alive: mutants that no instance told from gold.
        quoted: gold has "x" for text.
    """

    gold: str
    statement: str
    schema: str
    facts: Facts | None = None
    database: Database | None = None
    unverified: str = ""
    killed: int = 0
    total: int = 0
    alive: list[Mutant] = field(default_factory=list)
    quoted: bool = False
    group: int = 0


def evaluator(sandbox: Sandbox, folder: Path, dialect: str) -> Constant:
    """Evaluates constant expressions of a dialect in the sandbox, on an empty database made in the folder."""
    empty = folder / "empty.sqlite"
    write(empty, Schema(name="empty", tables=()), {})
    known: dict[str, Any] = {}

    def constant(expression: str) -> Any:
        if expression not in known:
            found = sandbox.run(f"SELECT {expression}", (str(empty),), dialect)[0]
            known[expression] = found.rows[0][0] if found.error is None and found.rows else None
        return known[expression]

    return constant


def read(gold: str, dialect: str, known: Schema | None, constant: Constant) -> Facts | None:
    """`analyse`, for gold as it stands in a row."""
    return analyse(statement(gold), dialect, known, constant)


def statement(gold: str) -> str:
    """The statement alone."""
    return without_end(find_statement(gold) or gold.strip())


def build(
    queries: Sequence[Query],
    schemas: Mapping[str, Schema],
    judge: Judge,
    *,
    dialect: str,
    folder: Path,
    instances: int = 4,
    seed: int = 0,
    quoted_values: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Fill every query's `database`, verdict and mutant score; write the instances into the folder.

    Args:
        queries: with distinct (gold, schema); `facts` are made here.
        quoted_values: a gold query that fails may be tried with "x" as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = _file_names(list(schemas))
    by_schema: dict[str, list[Query]] = {}
    for query in queries:
        by_schema.setdefault(query.schema, []).append(query)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        constant = evaluator(judge.sandbox, Path(temporary), dialect)
        for number, (key, schema) in enumerate(schemas.items(), 1):
            own = by_schema.get(key, [])
            for query in own:
                query.facts = read(query.gold, dialect, schema, constant)
            count = -(-len(own) // GROUP)
            for group in range(count):
                part = own[group::count]
                for query in part:
                    query.group = group
                # Every file has a name of its own: the judge keeps gold's answers by it.
                stem = Path(temporary) / (names[key] + (f"-{group}" if count > 1 else ""))
                search = _Search(judge, schema, part, dialect, stem, f"{seed} {schema.name} {group}", quoted_values)
                search.run(instances)
                search.keep(folder)
            if number % max(1, len(schemas) // 50) == 0:
                good = sum(not q.unverified for q in own)
                say(f"{number}/{len(schemas)} {schema.name}: {len(own)} queries, {good} verifiable")


def _file_names(keys: Sequence[str]) -> dict[str, str]:
    """A file name for every schema, no two the same on a file system without case."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        stem = re.sub(r"\W+", "_", key)[:60].strip("_") or "schema"
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        found[key] = name
    return found


class _Search:
    """The instances of one group of queries."""

    def __init__(
        self, judge: Judge, schema: Schema, queries: list[Query], dialect: str, stem: Path, seed: str, quoted: bool
    ) -> None:
        self.judge, self.schema, self.queries, self.dialect = judge, schema, queries, dialect
        self.stem, self.seed = stem, seed
        fold = 1 if dialect in ("sqlite", "mysql", "tsql") else 0
        self.idea: Ideas = ideas(schema, [q.facts for q in queries], fold)
        self.open: list[list[Mutant]] = [mutants(q.statement, dialect, schema) for q in queries]
        self.verified = [False] * len(queries)
        self.dead = [False] * len(queries)
        self.kept: list[Path] = []
        self.sample = schema.sample
        if quoted:
            self._quotes()

    def _quotes(self) -> None:
        """Find the queries that need "x" as text: they name a column that is not there."""
        path = self.stem.with_name(f"{self.stem.name} names.sqlite")
        write(path, self.schema, {})
        for query in self.queries:
            if '"' in query.gold:
                plain, quoted = (
                    self.judge.gold(query.gold, Database(paths=(str(path),), dialect=self.dialect, quoted_values=q))
                    for q in (False, True)
                )
                query.quoted = bool(plain.outcome.error) and not quoted.outcome.error

    def run(self, instances: int) -> None:
        for place in range(instances):
            best: tuple[int, Path, list[set[int]], list[set[int]], list[bool]] | None = None
            tries = (
                TRIES[place % len(TRIES)] if place == 0 or any(self._open(i) for i in range(len(self.queries))) else 1
            )
            first = [i for i in range(len(self.queries)) if place and self._open(i)]
            for draw in range(tries):
                path = self.stem.with_name(f"{self.stem.name} {place} {draw}.sqlite")
                profile = PROFILES[place % len(PROFILES)]
                scale = 1.6 if first and draw % 2 else 1.0  # more rows, where something is left to show
                filled = rows(self.schema, self.idea, profile, f"{self.seed} {place} {draw}", first, scale)
                write(path, self.schema, filled)
                killed, stillborn, usable = self._try(path)
                new = sum(u and not v for u, v in zip(usable, self.verified, strict=True))
                score = 5 * new + sum(map(len, killed))
                if best is None or score > best[0]:
                    if best is not None:
                        best[1].unlink()
                    best = score, path, killed, stillborn, usable
                else:
                    path.unlink()
            assert best is not None
            self._commit(*best[1:])
        if self.sample:
            killed, stillborn, usable = self._try(Path(self.sample))
            self._commit(Path(self.sample), killed, stillborn, usable)
            self.kept.insert(0, self.kept.pop())

    def _open(self, i: int) -> bool:
        return not self.dead[i] and (not self.verified[i] or bool(self.open[i]))

    def _database(self, query: Query, *paths: Path) -> Database:
        return Database(paths=tuple(map(str, paths)), dialect=self.dialect, quoted_values=query.quoted)

    def _try(self, path: Path) -> tuple[list[set[int]], list[set[int]], list[bool]]:
        """For every query: which of its open mutants differ here, which do not run at all, and whether gold has a usable answer."""
        killed, stillborn, usable = [], [], []
        for i, query in enumerate(self.queries):
            dead: set[int] = set()
            unborn: set[int] = set()
            good = False
            if self._open(i):
                database = self._database(query, path)
                gold = self.judge.gold(query.gold, database)
                good = gold.verifiable
                if gold.outcome.error in _HOPELESS:
                    self.dead[i] = True
                elif not gold.reason:
                    tasks = [(m.sql, query.gold, database) for m in self.open[i]]
                    for k, verdict in enumerate(self.judge.judge_many(tasks)):
                        if verdict.kind in _STILLBORN:
                            unborn.add(k)
                        elif verdict.kind not in ("equal", "unverified"):
                            dead.add(k)
            killed.append(dead)
            stillborn.append(unborn)
            usable.append(good)
        return killed, stillborn, usable

    def _commit(self, path: Path, killed: list[set[int]], stillborn: list[set[int]], usable: list[bool]) -> None:
        self.kept.append(path)
        for i, query in enumerate(self.queries):
            query.killed += len(killed[i])
            gone = killed[i] | stillborn[i]
            self.open[i] = [m for k, m in enumerate(self.open[i]) if k not in gone]
            self.verified[i] = self.verified[i] or usable[i]

    def keep(self, folder: Path) -> None:
        """Move the instances to their folder and settle what each query is worth."""
        final = []
        for number, path in enumerate(p for p in self.kept if str(p) != self.sample):
            target = folder / f"{self.stem.name}-{number}.sqlite"
            path.replace(target)
            final.append(target)
        if self.sample:
            final.insert(0, Path(self.sample))
        for i, query in enumerate(self.queries):
            query.database = self._database(query, *final)
            if not self.verified[i]:
                query.unverified = self._why(query)
                query.killed = query.total = 0
                continue
            wanted = canonical_sql(query.statement, self.dialect)
            query.alive = [m for m in self.open[i] if wanted is None or canonical_sql(m.sql, self.dialect) != wanted]
            query.total = query.killed + len(query.alive)

    def _why(self, query: Query) -> str:
        assert query.database is not None
        golds = self.judge.golds(query.gold, query.database)
        reasons = [g.reason for g in golds if g.reason]
        if not reasons:
            return "empty gold result on all instances"
        worst = next((r for r in reasons if r.startswith("gold: ")), reasons[0])
        if worst.startswith("gold: "):
            return "gold cannot be executed: " + worst.removeprefix("gold: ")
        cut = "rownum" in query.gold.lower() or (query.facts is not None and query.facts.limited)
        if "LIMIT" in worst or cut:
            return "LIMIT without total order" + (": it cuts through a tie" if "tie" in worst else "")
        return "not deterministic: " + worst.removeprefix("gold is not determined: ")
