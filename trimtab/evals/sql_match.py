"""SQL match: the same query up to spelling, as `trimtab.sql.canonical` defines it.

The first statement of the prediction counts, fenced or bare. Equal queries are right, different ones may be right too: the
mean is a lower bound on execution accuracy. A reference that does not parse is compared as exact_match does.
"""

from __future__ import annotations

from trimtab.evals import reference
from trimtab.evals.exact_match import normalise
from trimtab.sql.canonical import canonical_sql
from trimtab.types import Example


def score(predictions: list[str], examples: list[Example]) -> list[float]:
    """1.0 for each prediction whose canonical SQL equals that of its row's reference answer, else 0.0."""
    return [float(match(text, reference(example))) for text, example in zip(predictions, examples, strict=True)]


def match(prediction: str, gold: str) -> bool:
    """Are the two the same query?"""
    wanted = canonical_sql(gold)
    if wanted is None:
        return normalise(prediction) == normalise(gold)
    return canonical_sql(prediction) == wanted
