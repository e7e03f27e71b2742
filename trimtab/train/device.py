"""Which device, which number type, how much memory: the one place that asks the machine."""

from __future__ import annotations

import os
from dataclasses import replace
from math import inf
from typing import Any

import psutil
import torch

from trimtab.errors import ConfigError
from trimtab.ops import native
from trimtab.plan.estimate import MOST
from trimtab.plan.machine import Machine, available_memory, cards, machine


def pick_device(*, use_cpu: bool = False) -> torch.device:
    """CUDA, else MPS, else the CPU; `use_cpu: true` always the CPU."""
    if not use_cpu and torch.cuda.is_available():
        return torch.device("cuda")
    if not use_cpu and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def cpu_has_bfloat16() -> bool:
    """Does this CPU multiply bfloat16 matrices in hardware? Without that they run ten times slower than float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported is not None and supported())


def pick_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute type for `compute_dtype`, and a line that says why when it is not simply what was asked for.

    auto: bfloat16 where the hardware multiplies it, else float32. float16 keeps no more than 65504 and needs loss scaling to train,
    so on a device without float16 arithmetic it means auto.

    Raises:
        ConfigError: float16 on CUDA, which would need a loss scaler.
    """
    fast = cpu_has_bfloat16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()
    best = torch.bfloat16 if fast else torch.float32
    if wanted == "float32":
        return torch.float32, ""
    if wanted == "bfloat16":
        if not fast and device.type == "cpu":
            return (
                torch.float32,
                "bf16: this CPU has no bfloat16 arithmetic (it would be ten times slower); float32 is used",
            )
        return torch.bfloat16, ""
    if wanted == "float16":
        name = str(best).removeprefix("torch.")
        if device.type != "cuda" or fast:
            return best, f"fp16: needs loss scaling and has a narrow range; {name} is used on this {device.type}"
        raise ConfigError(
            "float16 training is not offered on this GPU",
            why="it has no bfloat16, and float16 needs loss scaling",
            remedy="set compute_dtype: float32",
        )
    return best, ""


def spares_a_copy(model: torch.nn.Module) -> bool:
    """May the engine keep a second copy of the weights, in the order that its products like best? Where it takes half of what is free."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return 2 * size <= available_memory()


def default_micro_batch_tokens(device: torch.device) -> int:
    """Tokens of a forward pass where no plan was made (scoring, predictions): enough to keep the matrix units busy."""
    return min(UNPLANNED, MOST["cuda" if device.type == "cuda" else "cpu"])


UNPLANNED = 8192
"""At most, since nothing has looked at the memory: 1.2 GB of a 7 B model's activations."""


def this_machine(device: torch.device) -> Machine:
    """The machine of a plan: what is free on the device, and its rates (those of a GPU of its name, where that is known)."""
    if device.type != "cuda":
        return machine()
    free, _ = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    known = next(
        (card for card in sorted(cards(), key=len, reverse=True) if card in name.lower().replace(" ", "-")), None
    )
    rates = machine(known) if known else Machine(name=name, kind="cuda", memory=0, rate=inf, rate32=inf, bandwidth=inf)
    return replace(rates, name=name, memory=free)


def hardware(device: torch.device) -> dict[str, Any]:
    """What the manifest says of the machine."""
    described: dict[str, Any] = {
        "device": device.type,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cpu":
        described["kernels_in_c"] = native.why_not() or "yes"
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return described
