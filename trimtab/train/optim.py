"""The optimizer and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: Any, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer that `optim` names; AdamW (arXiv:1711.05101) under most of its names.

    Weight decay acts on matrices only: biases and one-axis parameters are not decayed. LoRA+ (arXiv:2402.12354): with
    `loraplus_lr_ratio` every B matrix, and what has one axis, learns that many times as fast as A.
    """
    ratio = config.loraplus_lr_ratio or 1.0
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        matrix = parameter.ndim > 1
        fast = ratio != 1.0 and not name.startswith("head/") and (name.endswith(".lora_B") or not matrix)
        kinds.setdefault((matrix, fast), []).append(parameter)
    groups = [
        {
            "params": members,
            "lr": learning_rate * (ratio if fast else 1.0),
            "weight_decay": config.weight_decay if matrix else 0.0,
            "speed": ratio if fast else 1.0,
        }
        for (matrix, fast), members in sorted(kinds.items(), reverse=True)
    ]
    match config.optim:
        case "sgd":
            return torch.optim.SGD(groups, lr=learning_rate)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=learning_rate)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=learning_rate)
    # on a CPU in one pass over each tensor: an adapter has hundreds of small ones, and a dozen operations on each are 2 % of a step
    fused = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters.values())
    optimizer = torch.optim.AdamW(
        groups, lr=learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=fused or None
    )  # fmt: skip
    optimizer.register_step_post_hook(_count)
    return optimizer


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The fused form does not count the versions of what it changes, by which casts of adapters are kept (`models/lora.py`)."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


def schedule(
    kind: str,
    step: int,
    total: int,
    warmup: int,
    *,
    settings: Mapping[str, Any] | None = None,
    learning_rate: float = 1.0,
) -> float:
    """What the learning rate is multiplied by at step `step` (from 0) of `total`: linear warm-up, then the named curve.

    As in transformers, where "constant" has no warm-up ("constant_with_warmup" has).

    Args:
        settings: `lr_scheduler_kwargs`: num_cycles, power, lr_end, min_lr, min_lr_rate, timescale, num_stable_steps,
            num_decay_steps, decay_type, min_lr_ratio, each where its curve has it.
        learning_rate: the peak rate, of which lr_end and min_lr are absolute values.
    """
    given = settings or {}
    if step < warmup and kind != "constant":
        start = step / max(1, warmup)
        if kind == "warmup_stable_decay":
            floor = float(given.get("min_lr_ratio", 0.0))
            return start * (1 - floor) + floor
        return start
    done = (step - warmup) / max(1, total - warmup)
    match kind:
        case "linear":
            return max(0.0, 1.0 - done)
        case "cosine":
            return max(0.0, _wave(min(1.0, done), given.get("num_cycles", 0.5)))
        case "cosine_with_restarts":
            if done >= 1.0:
                return 0.0
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(given.get("num_cycles", 1)) * done) % 1.0))))
        case "cosine_with_min_lr":
            floor = float(given["min_lr"]) / learning_rate if "min_lr" in given else float(given["min_lr_rate"])
            return max(0.0, _wave(done, given.get("num_cycles", 0.5)) * (1 - floor) + floor)
        case "constant" | "constant_with_warmup":
            return 1.0
        case "polynomial":
            # transformers ends at a rate of 1e-7, which is 0 for any purpose here, unless the file says another
            end = float(given.get("lr_end", 0.0)) / learning_rate
            return float((1.0 - end) * max(0.0, 1.0 - done) ** float(given.get("power", 1.0)) + end)
        case "inverse_sqrt":
            # the time scale is the warm-up, or 10000 steps without one, as transformers has it
            scale = int(given.get("timescale") or warmup or 10_000)
            return 1.0 / math.sqrt((step + scale - warmup) / scale)
        case "warmup_stable_decay":
            decay = int(given["num_decay_steps"])
            stable = int(given.get("num_stable_steps", total - warmup - decay))
            floor = float(given.get("min_lr_ratio", 0.0))
            if step < warmup + stable:
                return 1.0
            fallen = (step - warmup - stable) / max(1, decay)
            if fallen >= 1.0:
                return floor
            curves = {"linear": 1 - fallen, "cosine": _wave(fallen, 0.5), "1-sqrt": 1 - math.sqrt(fallen)}
            return max(0.0, curves[given.get("decay_type", "cosine")] * (1 - floor) + floor)
    raise ValueError(f"no schedule called {kind!r}")


def _wave(done: float, cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * float(cycles) * 2.0 * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group this learning rate, times its own speed (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("speed", 1.0)
