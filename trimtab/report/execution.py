"""Execution accuracy as a report: figures with their intervals, the waterfall of verdicts, two systems on the same rows.

| figure | over | meaning |
|---|---|---|
| execution accuracy | verifiable rows | right on every instance that can tell |
| pass@k | verifiable rows | the chance that one of k sampled answers is right (unbiased, `ops/significance`) |
| weighted by mutants | verifiable rows | each row counts by the share of wrong versions of its gold query that its databases tell apart |
| instance i | rows whose instance i can tell | right on that instance alone |
| test suite, BIRD | verifiable rows | what two public evaluators say of the same answers |
| class | verifiable rows of the class | `sql/classes` |

Intervals are 95 % bootstrap intervals over rows. Rows that cannot be judged are in none of the figures, and counted beside them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.errors import DataError
from trimtab.evals.execution import JudgedRow
from trimtab.ops.significance import bootstrap_interval, mcnemar, pass_at_k, weighted_mean
from trimtab.sql.classes import CLASSES
from trimtab.sql.verdicts import KINDS

if TYPE_CHECKING:
    from rich.table import Table

Figure = dict[str, Any]


def figures(rows: Sequence[JudgedRow], *, seed: int = 0) -> dict[str, Any]:
    """Every figure of the table above, as plain values for JSON."""
    judged = [row for row in rows if row.verifiable]
    reasons = Counter(row.message for row in rows if not row.verifiable)
    right = [float(row.right) for row in judged]
    found: dict[str, Any] = {
        "rows": len(rows),
        "verifiable": len(judged),
        "unverified": len(rows) - len(judged),
        "unverified_reasons": dict(reasons.most_common(5)),
        "execution_accuracy": _figure(right, seed),
        "weighted_by_mutants": _figure(right, seed, [row.weight for row in judged]),
        "test_suite": _figure([float(row.test_suite) for row in judged], seed),
        "bird": _figure([float(row.bird) for row in judged], seed),
        "verdicts": {kind: sum(row.kind == kind for row in judged) for kind in KINDS if kind != "unverified"},
        "classes": {
            name: _figure([float(row.right) for row in judged if name in row.classes], seed) for name in CLASSES
        }
        | {"none of these": _figure([float(row.right) for row in judged if not row.classes], seed)},
        "instances": [
            _figure([float(told) for row in judged for told in row.instances[i : i + 1] if told is not None], seed)
            for i in range(max((len(row.instances) for row in judged), default=0))
        ],
    }  # fmt: skip
    drawn = min((len(row.samples) for row in judged), default=0)
    if drawn:
        found["samples"] = drawn
        found["pass_at_k"] = {
            str(k): _figure([pass_at_k(len(row.samples), sum(row.samples), k) for row in judged], seed)
            for k in _powers(drawn)
        }
    return found


def _figure(values: Sequence[float], seed: int, weights: Sequence[float] | None = None) -> Figure:
    low, high = bootstrap_interval(values, weights, seed=seed)
    numbers = {"value": weighted_mean(values, weights), "low": low, "high": high}
    return {name: None if math.isnan(number) else number for name, number in numbers.items()} | {"count": len(values)}


def _powers(most: int) -> list[int]:
    """1, 2, 4 ... and the number of samples itself."""
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})


def compare(one: Sequence[JudgedRow], other: Sequence[JudgedRow], *, seed: int = 0) -> dict[str, Any]:
    """Two systems on the same rows: both accuracies, the difference with its interval, and McNemar's exact p.

    Raises:
        DataError: the rows are not the same.
    """
    if len(one) != len(other):
        raise DataError(
            f"{len(one)} rows here and {len(other)} there cannot be compared in pairs",
            where=f"{one[0].where}, {other[0].where}",
            why="a paired test needs the same rows on both sides",
            remedy="predict both on the same data set, with the same eval_max_samples",
        )
    for left, right in zip(one, other, strict=True):
        if (left.gold, left.databases, left.verifiable) != (right.gold, right.databases, right.verifiable):
            differs = "gold queries" if left.gold != right.gold else "databases"
            raise DataError(
                "the two sides are not about the same rows",
                where=f"{left.where}, {right.where}",
                why=f"their {differs} differ: "
                + (f"{left.gold:.80} / {right.gold:.80}" if left.gold != right.gold else f"{left.databases} / {right.databases}"),
                remedy="predict both on the same data set, in the same order",
            )  # fmt: skip
    pairs = [(left.right, right.right) for left, right in zip(one, other, strict=True) if left.verifiable]
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    return {
        "rows": len(one),
        "verifiable": len(pairs),
        "first": _figure([float(a) for a, _ in pairs], seed),
        "second": _figure([float(b) for _, b in pairs], seed),
        "difference": _figure([float(b) - float(a) for a, b in pairs], seed),
        "both": sum(a and b for a, b in pairs),
        "only_first": only_first,
        "only_second": only_second,
        "neither": sum(not a and not b for a, b in pairs),
        "p": mcnemar(only_first, only_second),
    }


# --------------------------------------------------------------------------------------------------------- for a terminal


def table(found: dict[str, Any], name: str) -> Table:
    """The figures of one system."""
    drawn = _table(f"Execution accuracy: {name}")
    for title, key in (
        ("right on every instance (EX)", "execution_accuracy"),
        ("weighted by mutants", "weighted_by_mutants"),
        ("Spider's test suite would say", "test_suite"),
        ("BIRD's EX would say", "bird"),
    ):
        _add(drawn, title, found[key])
    for k, figure in found.get("pass_at_k", {}).items():
        _add(drawn, f"pass@{k} of {found['samples']} sampled answers", figure)
    if len(found["instances"]) > 1:
        drawn.add_section()
        for number, figure in enumerate(found["instances"]):
            _add(drawn, f"on instance {number} alone", figure)
    drawn.add_section()
    for kind, figure in found["classes"].items():
        if figure["count"]:
            _add(drawn, kind, figure)
    drawn.add_section()
    left = found["verifiable"]
    for kind, count in found["verdicts"].items():
        if count:
            before, left = left, left - count
            share = f"{100 * count / found['verifiable']:.1f} %"
            drawn.add_row(kind, str(count), share, "" if kind == "equal" else f"{before} -> {left}")
    if found["unverified"]:
        drawn.add_row("unverified (in no figure)", str(found["unverified"]), "", "")
    return drawn


def comparison_table(found: dict[str, Any], names: tuple[str, str]) -> Table:
    """Two systems."""
    drawn = _table(f"{names[0]} and {names[1]} on the same rows")
    _add(drawn, f"EX of {names[0]}", found["first"])
    _add(drawn, f"EX of {names[1]}", found["second"])
    _add(drawn, "difference", found["difference"], sign="+")
    drawn.add_section()
    for title, key in (
        ("both right", "both"),
        (f"only {names[0]}", "only_first"),
        (f"only {names[1]}", "only_second"),
        ("neither", "neither"),
    ):
        drawn.add_row(title, str(found[key]), "", "")
    drawn.add_row("McNemar, exact, two-sided", "", f"p = {found['p']:.3g}", "")
    return drawn


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    drawn.add_column("figure")
    for column in ("rows", "value", "95 % interval"):
        drawn.add_column(column, justify="right")
    return drawn


def _add(drawn: Table, title: str, figure: Figure, sign: str = "") -> None:
    if figure["value"] is None:
        drawn.add_row(title, str(figure["count"]), "-", "")
        return
    value, low, high = (f"{100 * figure[name]:{sign}.1f}" for name in ("value", "low", "high"))
    drawn.add_row(title, str(figure["count"]), f"{value} %", f"{low} to {high}")
