"""What a checkpoint holds, so that a resumed run is the run that was never stopped.

    checkpoint-N/
        adapter_config.json ...     the model as of step N, as users load it
        state/weights.safetensors   float32 masters of everything trained, and the frozen copy of where the policy started
        state/optimizer.safetensors the moments of every optimizer
        state/state.json            step, counters, KL controller, running moments, best metric

There is no random state to save: initial weights, data order, draws and dropout are functions of (seed, step). The rest of what a
step depends on is in the resolved config beside it. Safetensors and JSON only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.errors import RunError
from trimtab.rundir import read_json, write_json

STATE = "state"


def save_state(
    folder: Path,
    weights: Mapping[str, nn.Parameter],
    optimizers: Mapping[str, torch.optim.Optimizer],
    values: Mapping[str, Any],
) -> None:
    """Write `folder/state`.

    Args:
        weights: every tensor to restore, trained or frozen, by name.
        values: JSON values.
    """
    inside = folder / STATE
    inside.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: p.detach().cpu().contiguous().clone() for name, p in weights.items()}, inside / "weights.safetensors"
    )
    moments: dict[str, Tensor] = {}
    for role, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                moments[f"{role}/{index}/{name}"] = tensor.detach().cpu().contiguous().clone()
    save_file(moments, inside / "optimizer.safetensors")
    write_json(inside / "state.json", values)


def load_state(
    folder: Path, weights: Mapping[str, nn.Parameter], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore what `save_state` wrote, in place; returns its JSON values.

    Raises:
        RunError: the folder holds no training state, or that of another model.
    """
    inside = folder / STATE
    if not (inside / "state.json").is_file():
        raise RunError(
            f"{folder} cannot be resumed: it holds no training state",
            where=str(inside),
            why="it was saved with save_only_model, or is not a checkpoint",
            remedy="choose another checkpoint, or start anew",
        )
    saved = load_file(inside / "weights.safetensors")
    if set(saved) != set(weights) or any(saved[name].shape != p.shape for name, p in weights.items()):
        raise RunError(
            f"{folder} holds the weights of another model or another adapter",
            where=str(inside / "weights.safetensors"),
            remedy="resume with the config that the checkpoint was saved under",
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(saved[name])
    moments = load_file(inside / "optimizer.safetensors")
    for role, optimizer in optimizers.items():
        state = optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            owner, index, name = key.split("/")
            if owner == role:
                entries.setdefault(int(index), {})[name] = tensor
        state["state"] = entries
        optimizer.load_state_dict(state)
    return read_json(inside / "state.json", {})
