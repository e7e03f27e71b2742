"""The optimizer and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def make_adamw(parameters: Mapping[str, nn.Parameter], config: Any, learning_rate: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with decay on matrices only: biases and one-axis parameters are not decayed."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """What the learning rate is multiplied by at step `step` (from 0) of `total`: linear warm-up, then the named curve.

    As in transformers, where "constant" has no warm-up ("constant_with_warmup" has).
    """
    if step < warmup and kind != "constant":
        return step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    match kind:
        case "linear":
            return max(0.0, 1.0 - done)
        case "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))
        case "constant" | "constant_with_warmup":
            return 1.0
        case "polynomial":  # power 1, to 0 (transformers ends at a rate of 1e-7, which is 0 for any purpose here)
            return max(0.0, 1.0 - done)
        case "inverse_sqrt":
            # the time scale is the warm-up, or 10000 steps without one, as transformers has it
            scale = warmup or 10_000
            return 1.0 / math.sqrt((step + scale - warmup) / scale)
    raise ValueError(f"no schedule called {kind!r}")


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
