"""What the matrix products of a work alone would take on this machine, at the work's own shapes: the limit that a figure is held against.

All weights of the default model's shape are drawn once, each layer its own, so that nothing stays in a cache that would not stay there
in a run. `forward(m)` times every product of one forward pass over m tokens. No attention, no norms, no adapters: nobody can be faster
without leaving products out. What unlike prompts begin with in common is counted for each of them, so works on text-to-SQL rows may pass
100 %.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from works import Work

LAYERS, HIDDEN, KEYS, WIDE, VOCABULARY = 30, 576, 192, 1536, 49152


@dataclass(slots=True)
class Products:
    """The linear layers of SmolLM2-135M, in the compute type that trimtab chooses on this machine."""

    dtype: torch.dtype
    seen: dict[tuple[int, int], float] = field(default_factory=dict)
    layers: list[list[torch.Tensor]] = field(default_factory=list)
    head: Any = None

    def __post_init__(self) -> None:
        shapes = ((HIDDEN + 2 * KEYS, HIDDEN), (HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE))
        self.layers = [[torch.randn(s, dtype=self.dtype) * 0.02 for s in shapes] for _ in range(LAYERS)]
        self.head = torch.randn(VOCABULARY, HIDDEN, dtype=self.dtype) * 0.02

    @torch.no_grad()
    def forward(self, tokens: int, scored: int) -> float:
        """Seconds of the products of one pass over `tokens` tokens with the output head at `scored` of them; the best of five."""
        if (tokens, scored) not in self.seen:
            narrow, wide = torch.randn(tokens, HIDDEN, dtype=self.dtype), torch.randn(tokens, WIDE, dtype=self.dtype)
            out = torch.randn(scored, HIDDEN, dtype=self.dtype)
            best = float("inf")
            for _ in range(6):
                start = time.perf_counter()
                for qkv, o, gate_up, down in self.layers:
                    torch.nn.functional.linear(narrow, qkv)
                    torch.nn.functional.linear(narrow, o)
                    torch.nn.functional.linear(narrow, gate_up)
                    torch.nn.functional.linear(wide, down)
                for chunk in out.split(512):
                    torch.nn.functional.linear(chunk, self.head)
                best = min(best, time.perf_counter() - start)
            self.seen[tokens, scored] = best
        return self.seen[tokens, scored]

    def read(self, tokens: int, scored: int, budget: int = 1024) -> float:
        """The same for any number of tokens, in passes of `budget`."""
        whole, rest = divmod(tokens, budget)
        share = scored / tokens
        seconds = whole * self.forward(budget, round(share * budget)) if whole else 0.0
        return seconds + (self.forward(rest, max(1, round(share * rest))) if rest and (rest > 32 or not whole) else 0.0)

    def write(self, rows: int, prompts: int, prompt: int, new: int) -> float:
        """Prompts read once, then `new` tokens for each of `rows` rows at once."""
        return self.read(prompts * prompt, prompts) + (new - 1) * self.forward(rows, rows)


def limit(work: Work, products: Products) -> float:
    """Seconds of a work's products. Backward passes under LoRA cost as much as forward ones: the gradient of each product's input."""
    prompt = sum(work.prompt) // 2
    row, answers = prompt + work.new, work.rows * work.k
    if work.kind in ("decode", "prefill"):
        return products.write(work.rows, work.rows, prompt, work.new)
    if work.kind == "scoring":
        return products.read(work.rows * row, work.rows * work.new)
    if work.kind == "sft":
        return 2 * products.read(work.rows * row, work.rows * work.new)
    if work.kind == "rm":  # both answers to a prompt behind it once; no output head
        return 2 * products.read(work.rows * (prompt + 2 * work.new), 1)
    packed = work.rows * (prompt + work.k * work.new)
    scored = answers * work.new
    prompts = work.batch * work.buffer
    # the reference's pass, and that for the old log-probabilities; forward and backward of each update. The second comes with the first
    # update where that is the only one and nothing reads them before, or over all rows in one pass
    held = work.buffer == 1 and packed * prompts <= 1024 * work.rows
    passes = (1 if held or (work.kind == "group" and products.dtype == torch.float32) else 2) + 2 * work.epochs
    drawn = -(-work.rows // prompts) * products.write(prompts * work.k, prompts, prompt, work.new)
    seconds = drawn + passes * products.read(packed, scored)
    if work.kind == "ppo":
        seconds += products.read(packed, 1)  # the reward model reads it too
        if work.critic == "adapter":
            seconds += (1 + 2 * work.epochs) * products.read(packed, 1)
    return seconds
