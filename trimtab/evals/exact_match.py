"""Exact match: the same text, up to white space and one final semicolon.

Compared after `normalise`; case counts, quotes count.
"""

from __future__ import annotations

from trimtab.evals import reference
from trimtab.types import Example


def normalise(text: str) -> str:
    """Runs of white space become one space; those at the ends, and one semicolon at the end, go."""
    return " ".join(text.split()).removesuffix(";").rstrip()


def score(predictions: list[str], examples: list[Example]) -> list[float]:
    """1.0 for each prediction that equals its row's reference answer, else 0.0."""
    pairs = zip(predictions, examples, strict=True)
    return [float(normalise(prediction) == normalise(reference(example))) for prediction, example in pairs]
