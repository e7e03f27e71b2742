"""What two public evaluators would say of the same answers: for figures that can be laid beside published ones. Own code.

**Test-suite accuracy** (Zhong, Yu, Klein 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites"; the evaluator of
Spider): DISTINCT is struck from both queries first; answers are equal when some order of the columns makes them the same bag, or,
where the gold text contains "order by" anywhere, the same list; two empty answers are equal; values must be equal in Python.

**BIRD's EX** (Li et al. 2023, "Can LLM Already Serve as A Database Interface?"): the *sets* of rows are equal, columns by position.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from trimtab.sql.compare import _orders
from trimtab.sql.statement import tokens
from trimtab.sql.verdicts import Row


def strike_distinct(statement: str) -> str:
    """The statement without the word DISTINCT (strings and quoted names keep theirs)."""
    return "".join(t.text for t in tokens(statement) if not (t.kind == "word" and t.text.upper() == "DISTINCT"))


def orders_matter(gold: str) -> bool:
    """Their test: the words, anywhere in the text."""
    return "order by" in gold.lower()


def test_suite_equal(predicted: Sequence[Row], gold: Sequence[Row], *, ordered: bool) -> bool:
    """Equality of two answers as the test suite has it."""
    if not predicted and not gold:
        return True
    if len(predicted) != len(gold) or len(predicted[0]) != len(gold[0]):
        return False
    width = len(gold[0])
    for order in [tuple(range(width)), *_orders(list(predicted), list(gold))]:
        turned = [tuple(row[i] for i in order) for row in predicted]
        if turned == list(gold) if ordered else Counter(turned) == Counter(gold):
            return True
    return False


test_suite_equal.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever its name


def bird_equal(predicted: Sequence[Row], gold: Sequence[Row]) -> bool:
    """Equality of two answers as BIRD's EX has it."""
    return set(predicted) == set(gold)


def normalise_operators(statement: str) -> str:
    """`> =` and its kin joined, as the test suite's reader does before running."""
    return re.sub(r"([<>!])\s+=", r"\1=", statement)
