"""BLEU-4 of each answer against its row's reference, in per cent, over characters.

    BLEU = BP exp(1/4 sum_{n=1..4} log p_n),    BP = min(1, exp(1 - r / c))

with p_n the clipped precision of n-grams, c and r the lengths of answer and reference (Papineni et al. 2002). A precision of 0 becomes
1 / (2^j count) for the j-th of them, the third smoothing of Chen and Cherry (2014), since a single answer often has no equal 4-gram.
Characters, not words: the figure then means the same for Chinese and for SQL, and can be compared with what LLaMA-Factory prints.
Computed by nltk.
"""

from __future__ import annotations

from trimtab.evals import reference
from trimtab.types import Example


def score(predictions: list[str], examples: list[Example]) -> list[float]:
    """Per cent, one for each prediction; 0 where either text is empty."""
    return [bleu4(text, reference(example)) for text, example in zip(predictions, examples, strict=True)]


def bleu4(prediction: str, gold: str) -> float:
    """BLEU-4 of one text, 0 to 100."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not prediction or not gold:
        return 0.0
    smoothing = SmoothingFunction().method3
    if len(prediction) < 4 or len(gold) < 4:
        # no 4-grams: the orders that the shorter text has, or equal short answers would be far from 100
        orders = min(len(prediction), len(gold))
        weights = (1 / orders,) * orders
        return 100.0 * float(sentence_bleu([list(gold)], list(prediction), weights, smoothing_function=smoothing))
    return 100.0 * float(sentence_bleu([list(gold)], list(prediction), smoothing_function=smoothing))
