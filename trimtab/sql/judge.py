"""A prediction judged by execution: `judge(answer, gold, database) -> Verdict`.

Gold is run first, and distrusted: where it fails, where SQLite gives other rows when it scans backwards, or where a LIMIT cuts
through a tie, nothing can be concluded on that instance. Where gold orders, its sort keys are fetched beside its rows, so that ties
are known; a prediction that orders nothing must still be right when the scan goes backwards.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from trimtab.errors import DataError
from trimtab.sql import official
from trimtab.sql.compare import Tolerance, compare, plain, same, same_bag
from trimtab.sql.execute import Limits
from trimtab.sql.sandbox import Sandbox
from trimtab.sql.statement import find_statement, is_ordered, refuse
from trimtab.sql.verdicts import Kind, Outcome, Row, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """The instances of one schema.

    Attributes:
        paths: SQLite files, or `postgresql://` addresses (an instance is a schema: `...?options=-csearch_path%3DNAME`).
        dialect: what gold and predictions are written in: sqlite, postgres, mysql, oracle, tsql.
        quoted_values: "x" may be a string where a value is due (old SQLite data such as Spider).
    """

    paths: tuple[str, ...]
    dialect: str = "sqlite"
    quoted_values: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """Gold's answer on one instance. `reason` says why nothing can be concluded from it ("" where something can)."""

    outcome: Outcome
    groups: tuple[int, ...] | None = None
    reason: str = ""

    @property
    def verifiable(self) -> bool:
        """It ran, is determined, and has rows."""
        return not self.reason and bool(self.outcome.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Official:
    """Two public evaluators on the same prediction."""

    test_suite: bool
    bird: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to ask gold for its sort keys: a statement without LIMIT, and where each key stands in its rows (from the end)."""

    statement: str
    extra: int  # columns behind gold's own
    keys: tuple[int, ...]
    limit: int | None
    offset: int


@lru_cache(maxsize=8192)
def _plan(gold: str, dialect: str) -> _Plan | None:
    """None where the keys cannot be had: ORDER BY in a way not understood, LIMIT by an expression, or neither of both."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        tree: Any = sqlglot.parse_one(gold, read=dialect)
        while isinstance(tree, exp.Subquery) and not tree.alias and not tree.args.get("order"):
            tree = tree.this
        if not isinstance(tree, exp.Select | exp.SetOperation):
            return None
        order, limit, offset = (tree.args.get(name) for name in ("order", "limit", "offset"))
        if order is None and limit is None:
            return None
        count = limit.args.get("expression") or limit.args.get("count") if limit is not None else None
        start = offset.expression if offset is not None else None
        if limit is not None and (
            not (isinstance(count, exp.Literal) and count.is_int) or limit.args.get("limit_options")
        ):
            return None
        if start is not None and not (isinstance(start, exp.Literal) and start.is_int):
            return None
        for name in ("limit", "offset"):
            tree.set(name, None)
        outputs = tree.selects
        star = any(e.is_star for e in outputs)
        simple = isinstance(tree, exp.Select) and not tree.args.get("distinct")
        names = [e.alias_or_name.lower() for e in outputs]
        texts = [e.unalias().sql() for e in outputs]
        keys: list[int] = []
        added: list[Any] = []
        for ordered in order.expressions if order is not None else ():
            key = ordered.this
            if isinstance(key, exp.Literal) and key.is_int and not star and 0 < int(key.name) <= len(outputs):
                keys.append(int(key.name) - 1)
            elif isinstance(key, exp.Column) and not key.table and key.name.lower() in names and not star:
                keys.append(names.index(key.name.lower()))
            elif key.sql() in texts and not star:
                keys.append(texts.index(key.sql()))
            elif simple and not isinstance(key, exp.Literal):
                keys.append(-1 - len(added))  # from the end, in the order they will stand there, turned round below
                added.append(exp.alias_(key.copy(), f"tt_key_{len(added)}"))
            else:
                return None
        if added:
            tree.set("expressions", [*tree.expressions, *added])
        places = tuple(k if k >= 0 else -len(added) - 1 - k for k in keys)
        return _Plan(
            tree.sql(dialect=dialect),
            len(added),
            places,
            int(count.name) if count is not None else None,
            int(start.name) if start is not None else 0,
        )
    except (SqlglotError, RecursionError, ValueError, AttributeError):
        return None


@dataclass(slots=True)
class Judge:
    """Judges predictions; keeps gold's answers. One for a run: it owns its worker processes (`close`, or a `with` block).

    Args:
        workers: processes.
        limits: of one statement on one database.
        tolerance: of numbers.
        permuted: accept gold's columns in another order.
    """

    workers: int = 1
    limits: Limits = field(default_factory=Limits)
    tolerance: Tolerance = field(default_factory=Tolerance)
    permuted: bool = False
    sandbox: Sandbox = field(init=False)
    _golds: dict[tuple[str, Database], Gold] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.sandbox = Sandbox(self.workers, self.limits)

    def close(self) -> None:
        self.sandbox.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------ gold

    def gold(self, gold: str, database: Database, instance: int = 0) -> Gold:
        """Gold's answer on one instance, and what it is worth."""
        key = (gold, replace(database, paths=(database.paths[instance],)))  # an instance alone is the same instance
        if key not in self._golds:
            if len(self._golds) >= 20_000:
                self._golds.clear()
            self._golds[key] = self._ask_gold(_statement(gold), database, database.paths[instance])
        return self._golds[key]

    def golds(self, gold: str, database: Database) -> list[Gold]:
        """On every instance."""
        return [self.gold(gold, database, i) for i in range(len(database.paths))]

    def verifiable(self, gold: str, database: Database) -> bool:
        """Whether some instance can tell right from wrong: gold runs there, is determined, and has rows."""
        return any(g.verifiable for g in self.golds(gold, database))

    def _outcomes(
        self, statement: str, database: Database, paths: Sequence[str], backwards: bool = False
    ) -> list[Outcome]:
        """`Sandbox.run`, where it says something of the statement.

        Raises:
            DataError: a server is gone. It is raised before anything is kept, so that no verdict and no gold rests on it.
        """
        outcomes = self.sandbox.run(
            statement, paths, database.dialect, quoted_values=database.quoted_values, backwards=backwards
        )
        if outcomes[-1].broken:
            raise DataError(
                "the database server cannot be asked",
                where=paths[len(outcomes) - 1],
                why=outcomes[-1].message,
                remedy="mend that, or start the server; then run the command again, a training run with --resume",
            )
        return outcomes

    def _run(self, statement: str, database: Database, path: str, backwards: bool = False) -> Outcome:
        return self._outcomes(statement, database, (path,), backwards)[0]

    def _ask_gold(self, gold: str, database: Database, path: str) -> Gold:
        outcome = self._run(gold, database, path)
        if outcome.error is not None:
            return Gold(outcome=outcome, reason=f"gold: {outcome.error}: {outcome.message}")
        rows = _plain_rows(outcome.rows)
        ordered = is_ordered(gold, database.dialect)
        again = outcome
        if "://" not in path:
            again = self._run(gold, database, path, backwards=True)
            if again.error is not None or not same_bag(rows, _plain_rows(again.rows), self.tolerance):
                return Gold(
                    outcome=outcome, reason="gold is not determined: another order of scanning gives other rows"
                )
        plan = _plan(gold, database.dialect)
        if plan is None:
            if not ordered:
                return Gold(outcome=outcome)
            # Keys unknown. What both scans leave in place is taken as ordered.
            fixed = all(_same_row(a, b, self.tolerance) for a, b in zip(rows, _plain_rows(again.rows), strict=True))
            return Gold(outcome=outcome, groups=(1,) * len(rows) if fixed else None)
        whole = self._run(plan.statement, database, path)
        if whole.error is not None:
            if whole.error == "too_many_rows" and plan.limit is not None and not ordered:
                return Gold(outcome=outcome, reason="gold is not determined: LIMIT without ORDER BY")
            return Gold(
                outcome=outcome,
                groups=None,
                reason="" if plan.limit is None else f"gold without its LIMIT: {whole.error}",
            )
        return self._with_groups(outcome, whole, plan, ordered)

    def _with_groups(self, outcome: Outcome, whole: Outcome, plan: _Plan, ordered: bool) -> Gold:
        """Runs of equal keys in gold's rows; refused where LIMIT or OFFSET cuts a run of different rows."""
        everything = _plain_rows(whole.rows)
        keys = [tuple(row[k] for k in plan.keys) for row in everything]
        rows = [row[: len(row) - plan.extra] for row in everything]
        first = min(plan.offset, len(rows))
        last = len(rows) if plan.limit is None else min(first + plan.limit, len(rows))
        runs: list[list[int]] = []
        for i in range(len(rows)):
            if i and _same_row(keys[i - 1], keys[i], self.tolerance):
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
        for begin, end in runs:
            cut = begin < first < end or begin < last < end
            if cut and any(row != rows[begin] for row in rows[begin:end]):
                how = "cuts through a tie" if ordered else "without ORDER BY"
                return Gold(outcome=outcome, reason=f"gold is not determined: LIMIT {how}")
        if not same_bag(rows[first:last], _plain_rows(outcome.rows), self.tolerance):
            return Gold(outcome=outcome, reason="gold is not determined: its rows change with its columns")
        if not ordered:
            return Gold(outcome=outcome)
        groups = tuple(min(end, last) - max(begin, first) for begin, end in runs if min(end, last) > max(begin, first))
        return Gold(outcome=outcome, groups=groups)

    # ------------------------------------------------------------------------------------------------------ prediction

    def judge(self, answer: str, gold: str, database: Database) -> Verdict:
        """One answer of a model, fenced or bare, against one gold query on every instance of a database.

        Raises:
            DataError: a server that cannot be asked.
        """
        statement = find_statement(answer)
        if statement is None:
            return Verdict(kind="format_error", message="no SQL in the answer")
        refusal = refuse(statement, database.dialect)
        if refusal is not None:
            return Verdict(kind=refusal.kind, message=refusal.message)
        golds = self.golds(gold, database)
        if all(g.reason for g in golds):
            return Verdict(kind="unverified", message=golds[0].reason, gold_error=True)
        usable = [i for i, g in enumerate(golds) if not g.reason]
        outcomes = self._outcomes(statement, database, [database.paths[i] for i in usable])
        found: list[Kind] = []
        message = ""
        for i, outcome in zip(usable, outcomes, strict=False):
            kind, why = self._one(statement, outcome, golds[i], database, database.paths[i])
            found.append(kind)
            if kind not in ("equal", "unverified"):
                return Verdict(kind=kind, message=why, instance=i, per_instance=tuple(found))
            message = why or message
        if "equal" in found:
            return Verdict(kind="equal", instance=usable[found.index("equal")], per_instance=tuple(found))
        return Verdict(kind="unverified", message=message, instance=usable[0], per_instance=tuple(found))

    def _one(self, statement: str, outcome: Outcome, gold: Gold, database: Database, path: str) -> tuple[Kind, str]:
        if outcome.error is not None:
            return outcome.error, outcome.message
        found = self._compare(outcome, gold)
        if (
            found[0] == "equal"
            and gold.groups
            and len(gold.groups) > 1
            and "://" not in path
            and not is_ordered(statement, database.dialect)
        ):
            again = self._run(statement, database, path, backwards=True)
            if again.error is not None or self._compare(again, gold)[0] != "equal":
                return "wrong_order", "the rows are in gold's order by the accident of a scan: no ORDER BY asks for it"
        return found

    def _compare(self, outcome: Outcome, gold: Gold) -> tuple[Kind, str]:
        found = compare(
            outcome.rows,
            gold.outcome.rows,
            columns=(len(outcome.columns), len(gold.outcome.columns)),
            groups=gold.groups,
            permuted=self.permuted,
            tolerance=self.tolerance,
        )
        return found.kind, found.message

    def judge_many(self, tasks: Sequence[tuple[str, str, Database]]) -> list[Verdict]:
        """`judge` for many (answer, gold, database), over all workers, in the order given."""
        if self.workers == 1 or len(tasks) < 2:
            return [self.judge(*task) for task in tasks]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda task: self.judge(*task), tasks))

    def official(self, answer: str, gold: str, database: Database) -> Official:
        """What the test suite (all instances) and BIRD's EX (the first) say of the answer; a gold query that fails counts as wrong."""
        statement = find_statement(answer)
        if statement is None:
            return Official(test_suite=False, bird=False)
        pair = (statement, _statement(gold))
        raw = [self._run(s, database, database.paths[0]) for s in pair]
        bird = not any(o.error for o in raw) and official.bird_equal(raw[0].rows, raw[1].rows)
        struck = [official.strike_distinct(official.normalise_operators(s)) for s in pair]
        answers = [self._outcomes(s, database, database.paths) for s in struck]
        suite = not any(o.error for side in answers for o in side) and all(
            official.test_suite_equal(p.rows, g.rows, ordered=official.orders_matter(gold))
            for p, g in zip(*answers, strict=True)
        )
        return Official(test_suite=suite, bird=bird)


def _statement(gold: str) -> str:
    return find_statement(gold) or gold.strip()


def _plain_rows(rows: Sequence[Row]) -> list[Row]:
    return [tuple(map(plain, row)) for row in rows]


def _same_row(a: Row, b: Row, tolerance: Tolerance) -> bool:
    return all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))


_shared: Judge | None = None


def judge(answer: str, gold: str, database: Database) -> Verdict:
    """`Judge().judge` with one shared judge of one worker and the default limits, closed when Python ends."""
    global _shared
    if _shared is None:
        _shared = Judge()
        atexit.register(_shared.close)
    return _shared.judge(answer, gold, database)
