"""Value heads: one linear map from a hidden state to a number, used by reward models and critics.

Saved as `value_head.safetensors` with the keys that users' tools know (`v_head.summary.weight`, `v_head.summary.bias`), beside a
record of how the score is read (`value_head.json`): read-out, template, system prompt, length. A head without our record was
saved by another tool; it is then read at the last token, which is what that tool trained.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.errors import AdapterError
from trimtab.models.folder import ADAPTER_CONFIG
from trimtab.models.lora import read_pickled

WEIGHTS = "value_head.safetensors"
RECORD = "value_head.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRecord:
    """How the numbers of a saved head are to be read.

    Attributes:
        readout: a reward is read at the end-of-turn token (stop), or at the last token of the full template (last).
        purpose: a reward model's head, or a critic's (which values states, and is no judge of answers).
    """

    readout: Literal["stop", "last"] = "stop"
    purpose: Literal["reward", "critic"] = "reward"
    template: str | None = None
    default_system: str | None = None
    cutoff_len: int | None = None


class ValueHead(nn.Module):
    """r = w . h + c in float32. Weights start N(0, 1/(d+1)), bias 0 (arXiv:2009.01325, appendix)."""

    def __init__(self, hidden_size: int, *, seed: int | None = None, trainable: bool = True) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.bias)
        if seed is None:
            nn.init.zeros_(self.summary.weight)
        else:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                std = 1 / math.sqrt(hidden_size + 1)
                self.summary.weight.copy_(torch.randn(1, hidden_size, generator=generator) * std)
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)

    def forward(self, hidden: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        score: Tensor = self.summary(hidden.float()).squeeze(-1)
        return score


def save_head(head: ValueHead, folder: Path, record: HeadRecord) -> None:
    """Write the head and its record into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"v_head.{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in head.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_head(folder: Path, hidden_size: int, *, trainable: bool = False) -> tuple[ValueHead, HeadRecord]:
    """Read a head and its record (`readout="last"` when there is none).

    Raises:
        AdapterError: no head in the folder, or one of another hidden size.
    """
    if (folder / WEIGHTS).is_file():
        try:
            state = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise AdapterError(
                f"broken value head: {error}", where=str(folder / WEIGHTS), remedy="copy or save it again"
            ) from None
    elif (folder / "value_head.bin").is_file():
        state = read_pickled(folder / "value_head.bin")
    else:
        kinds = {ADAPTER_CONFIG: "an adapter", "config.json": "a model"}
        there = next((f"{kind} without one" for name, kind in kinds.items() if (folder / name).is_file()), "neither")
        raise AdapterError(
            f"no value head in {str(folder)!r}",
            where=str((folder / WEIGHTS).resolve()),
            why=f"a reward model is an adapter or a model with a value head beside it; this folder holds {there}",
            remedy="give the output_dir of a run with stage: rm",
        )
    weight = state.get("v_head.summary.weight")
    if weight is None or tuple(weight.shape) != (1, hidden_size):
        found = "missing" if weight is None else f"{weight.shape[-1]} wide"
        raise AdapterError(
            f"the value head does not fit this base model: its weight is {found}, the hidden states are {hidden_size} wide",
            where=str(folder / WEIGHTS),
            remedy="use the reward model's own base",
        )
    if not bool(weight.isfinite().all()):
        raise AdapterError(
            "the value head holds NaN or infinity",
            where=str(folder / WEIGHTS),
            why="every score would be NaN",
            remedy="copy it again, or take an earlier checkpoint of the run that made it",
        )
    head = ValueHead(hidden_size, trainable=trainable)
    with torch.no_grad():
        head.summary.weight.copy_(weight)
        head.summary.bias.copy_(state.get("v_head.summary.bias", torch.zeros(1)))
    record = HeadRecord(readout="last")
    if (folder / RECORD).is_file():
        record = HeadRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    return head, record
