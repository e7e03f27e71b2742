"""One optimizer step of each side, on the same model and the same token ids: its loss, every gradient, every parameter after it.

Ours is an ordinary run's first step (`trainer.step(0)` on what `assemble` made of a file's keys); theirs is TRL's trainer given those
very ids, its own loss, its own AdamW. Neither clips gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RATE = 1e-3
EPSILON = 1e-4
"""Large for Adam: with 1e-8 a gradient that is rounding noise is made a whole step, in either direction."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step came to; tensors by the model's own parameter names. `figures`: what ours logged besides."""

    loss: float
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]
    figures: Mapping[str, float] = field(default_factory=dict)


def keys(folder: Path, stage: str, **more: Any) -> dict[str, Any]:
    """A file's worth of keys: full fine-tuning of the tiny model in float32, one step over all rows."""
    return {
        "model_name_or_path": str(folder / "model"),
        "stage": stage,
        "do_train": True,
        "finetuning_type": "full",
        "template": "chatml",
        "dataset_dir": str(folder),
        "cutoff_len": 64,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "disable_shuffling": True,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "adam_epsilon": EPSILON,
        "max_grad_norm": 1e9,
        "max_steps": 1,
        "compute_dtype": "float32",
        "use_cpu": True,
        **more,
    }


QUESTIONS = ("a", "b c", "tell me d", "is it e")
MARGINS = (0.0, 0.5, 1.0, 0.25)


def write(folder: Path) -> Path:
    """The tiny model, another of the same shape, and data sets; returns the folder.

    `qa`; `pairs`, and `led` with their margins; `level`, with equal chosen answers; `marks`.
    """
    from trimtab.models.tiny import make_tiny

    make_tiny("llama", folder / "model", seed=0)
    make_tiny("llama", folder / "other", seed=1)
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in ("qa", "pairs", "level", "marks")}
    for i, question in enumerate(QUESTIONS):
        text, worse = question.upper() * (i + 1), "no" * (4 - i)
        made["qa"].append({"instruction": question, "output": text})
        made["pairs"].append({"instruction": question, "chosen": text, "rejected": worse, "lead": MARGINS[i]})
        made["level"].append({"instruction": question, "chosen": "yes", "rejected": worse})
        made["marks"].append({"instruction": question, "output": text if i % 2 else worse, "kto_tag": bool(i % 2)})
    for name, rows in made.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    info: dict[str, dict[str, Any]] = {
        name: {"file_name": f"{name}.json", "ranking": name in ("pairs", "level")} for name in made
    }
    sides = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info["led"] = {"file_name": "pairs.json", "ranking": True, "columns": {**sides, "margin": "lead"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


# ----------------------------------------------------------------------------------------------------------------- ours


def our_step(trainer: Any, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """The trainer's first step, with its gradients (the last pass's) seen just before the optimizer uses them."""
    gradients: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        gradients.update({_bare(n): p.grad.detach().clone() for n, p in parameters.items() if p.grad is not None})

    hook = optimizer.register_step_pre_hook(look)
    figures = trainer.step(0)
    hook.remove()
    return Step(figures["loss"], gradients, {_bare(n): p.detach().clone() for n, p in parameters.items()}, figures)


def _bare(name: str) -> str:
    return name.removeprefix("model/")


# --------------------------------------------------------------------------------------------------------------- theirs


def load_theirs(folder: Path, name: str = "model") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # the end that chatml's answers have, by which theirs tells a truncated one
    return AutoTokenizer.from_pretrained(folder / "model", eos_token="<|im_end|>")


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments that every trainer of theirs is given."""
    return {
        "output_dir": str(folder / "theirs"),
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "weight_decay": 0.01,
        "adam_epsilon": EPSILON,
        "max_grad_norm": 1e9,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        **more,
    }


def their_step(trainer: Any, inputs: Any, loss_of: Callable[[Any, Any], Tensor] | None = None, passes: int = 1) -> Step:
    """The gradient of their loss on these inputs, and a step of the optimizer that their trainer makes.

    With more `passes` than one over the same inputs: the mean of their losses, and the last one's gradient, as `our_step` sees them.
    """
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()
    losses: list[float] = []
    for _ in range(passes):
        optimizer.zero_grad()
        loss = (loss_of or trainer.compute_loss)(model, inputs)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return Step(sum(losses) / passes, gradients, {n: p.detach().clone() for n, p in model.named_parameters()})


def padded(rows: Sequence[Any], pad: int = 0) -> dict[str, Tensor]:
    """Token rows as their collators lay them out: ids padded on the right, and which tokens are an answer's."""
    n = max(len(row.token_ids) for row in rows)
    ids = torch.full((len(rows), n), pad)
    real, answer = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.token_ids)] = torch.tensor(row.token_ids)
        real[i, : len(row.token_ids)] = 1
        answer[i, list(row.scored)] = 1
    return {"input_ids": ids, "attention_mask": real, "completion_mask": answer}


# ------------------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest differences of a step; gradients and parameters relative to their tensor's largest number (1e-3 at least)."""

    loss: float
    gradient: float
    after: float


def difference(ours: Step, theirs: Step, *, names: Mapping[str, str] | None = None) -> Difference:
    """Compare all tensors that ours has a gradient for; `names` are those that theirs calls otherwise."""
    other = names or {}

    def far(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        assert a, "nothing was compared"
        worst = 0.0
        for name in ours.gradients:
            theirs_of_it = b[other.get(name, name)].view_as(a[name])
            worst = max(worst, float((a[name] - theirs_of_it).abs().max() / theirs_of_it.abs().max().clamp(min=1e-3)))
        return worst

    return Difference(
        abs(ours.loss - theirs.loss), far(ours.gradients, theirs.gradients), far(ours.after, theirs.after)
    )
