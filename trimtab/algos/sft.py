"""Supervised fine-tuning, and pre-training: make the tokens of the data likely.

    loss = sum of -log p(token) over the trained tokens / number of trained tokens, in the whole optimizer step

What is trained on is settled before this file: in sft the answers with their end markers, in pt every token. What is
left is a negative log-likelihood, and a denominator that no micro-batch size can move (`ops/reduction.py`, "token").

Details with sources, and what each metric means: docs/algorithms/sft.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trimtab.ops.losses import nll
from trimtab.ops.masked import zero_padding
from trimtab.types import LossTerms, Scores, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sft:
    """SFT and PT have no keys of their own."""

    kind: ClassVar[Literal["offline"]] = "offline"
    reads: ClassVar[Literal["logprobs"]] = "logprobs"
    reduction: ClassVar[Literal["token"]] = "token"
    unit: ClassVar[Literal["row"]] = "row"

    @classmethod
    def from_config(cls, config: Any) -> Sft:
        return cls()

    def loss(self, scores: Scores, batch: TokenBatch) -> LossTerms:
        """-log p of each trained token `[b t]`."""
        return LossTerms(
            loss=zero_padding(nll(scores.logp), batch.mask),
            means={"entropy": zero_padding(scores.entropy.detach(), batch.mask)},
        )

    def describe(self) -> str:
        return "minimises -log p of the trained tokens, averaged over all of them in the optimizer step"
