"""What computes the next hidden state of many rows at once: the seam between the scheduler and a model.

A decoder has slots. `prefill` reads prompts and puts each into the slots of its completions, `step` goes one token further in the
first b slots, `move` copies a row into the slot of one that has stopped. `ForwardDecoder` does it with the model's own forward pass:
any causal language model of transformers. `blocks.BlockDecoder` does it for the Llama family with less work per token.

Shapes: p prompts, b live rows (in slots 0 to b - 1), d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.engine.cache import SlotCache
from trimtab.models.load import decoder, head_bias, head_weight

TOKENS = 8192
"""Prompt tokens of a forward pass at most (one prompt at least)."""


class Decoder(Protocol):
    """Rows in slots, one token at a time. Every call is made inside the role's `enter`, without gradients."""

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "p d"]:
        """Read each prompt once and put it into its slots; the hidden state of each prompt's last token."""
        ...

    def step(self, tokens: Int[Tensor, " b"], lengths: Int[Tensor, " b"], longest: int) -> Float[Tensor, "b d"]:
        """Add one token to each row, at column `lengths` (the longest of them is `longest`); its hidden state."""
        ...

    def move(self, sources: Int[Tensor, " m"], targets: Int[Tensor, " m"], width: int) -> None:
        """Copy the first `width` columns of some slots into others."""
        ...

    def logits(self, states: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """The language-model head."""
        ...


def passes(prompts: Sequence[Sequence[int]], padded: bool, most: int = TOKENS) -> Iterator[slice]:
    """Prompts in passes of at most `most` tokens, padding to the longest of a pass counted where rows are `padded`."""
    start = total = widest = 0
    for i, ids in enumerate(prompts):
        widest, own = max(widest, len(ids)), len(ids)
        size = widest * (i - start + 1) if padded else total + own
        if i > start and size > most:
            yield slice(start, i)
            start, total, widest = i, 0, own
        total += own
    yield slice(start, len(prompts))


class ForwardDecoder:
    """Decoding through `model.forward`.

    Args:
        slots: most rows at once.
        capacity: most tokens of a row.
    """

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.cache = SlotCache(model.config.get_text_config().num_hidden_layers, slots, capacity)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        """Prompts are padded on the right, where causal attention does not look: no mask is needed."""
        return torch.cat([self._prefill(prompts[part], slots[part]) for part in passes(prompts, padded=True)])

    def _prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        n = max(map(len, prompts))
        self.cache.place.prefill(slots, self.device)
        state = self._forward(
            input_ids=torch.tensor([[*ids, *[0] * (n - len(ids))] for ids in prompts], device=self.device),
            position_ids=torch.arange(n, device=self.device).expand(len(prompts), n),
        )
        last = torch.tensor([len(ids) - 1 for ids in prompts], device=self.device)
        return state[torch.arange(len(prompts), device=self.device), last]

    def step(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        width = longest + 1
        self.cache.place.step(lengths, width)
        mask = torch.arange(width, device=self.device) <= lengths[:, None]
        return self._forward(
            input_ids=tokens[:, None], position_ids=lengths[:, None], attention_mask=mask[:, None, None]
        )[:, -1]

    def _forward(self, **keys: Any) -> Tensor:
        out: Tensor = decoder(self.model)(past_key_values=self.cache, use_cache=True, **keys).last_hidden_state
        return out

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        self.cache.move(sources, targets, width)

    def logits(self, states: Tensor) -> Tensor:
        return torch.nn.functional.linear(states, head_weight(self.model), head_bias(self.model))
