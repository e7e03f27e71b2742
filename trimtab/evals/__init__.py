"""Evaluations of generated answers: `score(predictions, examples) -> one number per answer`.

A task's result is the mean of its scores: a share from 0 to 1 for matches, per cent for BLEU and ROUGE, as everybody prints them. None in
place of a score says that an answer to this row cannot be judged: such rows are counted apart. Each task is one file and one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trimtab.errors import DataError
from trimtab.registry import Registry, Row
from trimtab.types import Example

Score = Callable[[list[str], list[Example]], Sequence[float | None]]

EVALS = Registry(
    "eval task",
    [
        Row(
            name="exact_match",
            target="trimtab.evals.exact_match:score",
            help="the answer is the reference answer, up to spaces and a final semicolon",
        ),
        Row(
            name="execution_accuracy",
            target="trimtab.evals.execution_accuracy:score",
            help="the answer's SQL gives the rows of the reference's on every `database` of its row (trimtab sql build)",
            aliases=("ex", "execution"),
        ),
        Row(
            name="normalised_match",
            target="trimtab.evals.normalised_match:score",
            help="the same text up to case, width of characters, spaces, quotation marks and a final stop",
        ),
        Row(
            name="bleu-4",
            target="trimtab.evals.bleu:score",
            help="BLEU-4 over characters, in per cent",
            aliases=("bleu", "bleu4", "bleu_4"),
        ),
        Row(
            name="rouge-1",
            target="trimtab.evals.rouge:rouge_1",
            help="ROUGE-1 over words, Chinese ones too, in per cent",
            aliases=("rouge1", "rouge_1"),
        ),
        Row(
            name="rouge-2",
            target="trimtab.evals.rouge:rouge_2",
            help="ROUGE-2 over words, in per cent",
            aliases=("rouge2", "rouge_2"),
        ),
        Row(
            name="rouge-l",
            target="trimtab.evals.rouge:rouge_l",
            help="ROUGE-L over words, in per cent",
            aliases=("rouge", "rougel", "rouge_l"),
        ),
        Row(
            name="sql_match",
            target="trimtab.evals.sql_match:score",
            help="the answer's SQL is the reference's, up to spelling (a lower bound on correctness)",
        ),
    ],
)


def reference(example: Example) -> str:
    """The answer to compare with: the row's response, or the chosen answer of a preference row.

    Raises:
        DataError: the row has neither.
    """
    message = example.response or example.chosen
    if message is None:
        raise DataError(
            "a row without a reference answer cannot be evaluated",
            where=str(example.origin),
            why="the eval task compares each generated answer with the row's own",
            remedy="give the row an answer, or leave this eval task out of eval_tasks",
        )
    return message.content
