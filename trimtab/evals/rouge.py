"""ROUGE-1, ROUGE-2 and ROUGE-L of each answer against its row's reference: F-measures in per cent (Lin 2004).

    P = overlap / answer,   R = overlap / reference,   F = 2 P R / (P + R)

with the overlap in words (1), pairs of neighbouring words (2) or the longest common subsequence of words (L). Words are those that
jieba's dictionary finds, Chinese and others alike; white space is no word. Cut by rjieba, counted by rouge-score.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from trimtab.evals import reference
from trimtab.types import Example


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    import rjieba

    return [word for word in rjieba.cut(text) if not word.isspace()]


class _Words:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


def _score(kind: str, predictions: list[str], examples: list[Example]) -> list[float]:
    pairs = zip(predictions, examples, strict=True)
    return [100.0 * float(_scorer().score(reference(example), text)[kind].fmeasure) for text, example in pairs]


def rouge_1(predictions: list[str], examples: list[Example]) -> list[float]:
    """Single words."""
    return _score("rouge1", predictions, examples)


def rouge_2(predictions: list[str], examples: list[Example]) -> list[float]:
    """Pairs of neighbouring words; 0 where a text has a single one."""
    return _score("rouge2", predictions, examples)


def rouge_l(predictions: list[str], examples: list[Example]) -> list[float]:
    """The longest common subsequence of words."""
    return _score("rougeL", predictions, examples)
