"""Supervised fine-tuning, and pre-training: make the tokens of the data likely.

    loss = sum of -log p(token) over the trained tokens / number of trained tokens, in the whole optimizer step

With label smoothing e each token costs (1 - e) (-log p(token)) + e (-mean over the vocabulary of log p), as transformers' LabelSmoother
has it; held-out loss is without.

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
    """SFT and PT. `label_smoothing` is the share of each label that is spread over the vocabulary."""

    kind: ClassVar[Literal["offline"]] = "offline"
    reads: ClassVar[Literal["logprobs"]] = "logprobs"
    reduction: ClassVar[Literal["token"]] = "token"
    unit: ClassVar[Literal["row"]] = "row"
    label_smoothing: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> Sft:
        return cls(label_smoothing=config.label_smoothing_factor)

    def loss(self, scores: Scores, batch: TokenBatch) -> LossTerms:
        """-log p of each trained token `[b t]`, smoothed."""
        loss = nll(scores.logp)
        means = {"entropy": zero_padding(scores.entropy.detach(), batch.mask)}
        if self.label_smoothing:
            if scores.mean_logp is None:
                raise ValueError("label smoothing needs the mean of log p over the vocabulary")
            means["nll"] = zero_padding(loss.detach(), batch.mask)
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * scores.mean_logp
        return LossTerms(loss=zero_padding(loss, batch.mask), means=means)

    def describe(self) -> str:
        line = "minimises -log p of the trained tokens, averaged over all of them in the optimizer step"
        return line + (f"; labels smoothed by {self.label_smoothing:g}" if self.label_smoothing else "")
