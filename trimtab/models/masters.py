"""Training a model's own weights: all of them (`finetuning_type: full`), or those of some layers (`freeze`).

Adam moves a weight of 0.02 by 1e-5, and in bfloat16 the nearest other weight is 1e-4 away: the step would be rounded off. So each
trained weight has a float32 master, which the optimizer moves; the model computes with a copy of it in the compute type:

    model.w  --backward-->  w.grad  --added in float32 as soon as it is there-->  master.grad        (w.grad is freed)
    optimizer.step(): master moves;  publish(): model.w = round(master)

Bytes per trained weight, Adam's two moments included: 2 + 4 + 4 + 8 = 18 in bfloat16 (gradients are summed over micro-batches in
float32); 4 + 4 + 8 = 16 in float32, where the weight is its own master; 2 + 2 + 4 = 8 with `pure_bf16`, which has no masters and
sums, steps and keeps moments in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError

_LAYER = re.compile(r"^(.*?\.)?(\d+)\.(.+)$")


class Masters:
    """The weights of one model that are trained, as the optimizer sees them.

    Attributes:
        parameters: by their names in the model; a weight's own parameter where it needs no master.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], dtype: torch.dtype, *, pure: bool = False) -> None:
        """Make the named weights trainable and turn the whole model to its compute type.

        Args:
            model: with its weights as they were read, in float32 where its files hold that.
            dtype: compute type; buffers (such as rotary frequencies) keep theirs.
            pure: no masters: train what the model computes with.
        """
        self.parameters: dict[str, nn.Parameter] = {}
        self._copies: dict[str, nn.Parameter] = {}
        wanted = set(names)
        for name, parameter in model.named_parameters():
            exact = parameter.detach()
            if parameter.is_floating_point():
                parameter.data = exact.to(dtype)
            parameter.requires_grad_(name in wanted)
            if name not in wanted:
                continue
            if pure or parameter.dtype == torch.float32:
                self.parameters[name] = parameter
                continue
            master = nn.Parameter(exact.float().clone())
            self.parameters[name], self._copies[name] = master, parameter

    def collect(self) -> None:
        """From now on, move every gradient to its master the moment backward has finished it."""
        for name, copy in self._copies.items():
            hookable: Any = copy
            hookable.register_post_accumulate_grad_hook(_mover(self.parameters[name]))

    def publish(self, *_: Any) -> None:
        """Give the model the masters' values; to be called whenever they have changed (it is a hook after `optimizer.step`)."""
        with torch.no_grad():
            for name, copy in self._copies.items():
                copy.copy_(self.parameters[name])


def _mover(master: nn.Parameter) -> Any:
    def move(copy: Tensor) -> None:
        assert copy.grad is not None
        if master.grad is None:
            master.grad = copy.grad.float()
        else:
            master.grad.add_(copy.grad)
        copy.grad = None

    return move


def trained_names(
    model: nn.Module,
    kind: Literal["full", "freeze"],
    *,
    layers: int = 2,
    modules: Sequence[str] = ("all",),
    extra: Sequence[str] = (),
) -> list[str]:
    """Names of the weights to train. Tied weights have one name, the first.

    Args:
        layers: freeze: the last so many hidden layers; below 0 the first so many; 0 none.
        modules: freeze: parts of those layers, by their names inside a layer (`self_attn`, `mlp` ...); all: every part.
        extra: freeze: parts outside the layers (`embed_tokens`, `norm`, `lm_head`).

    Raises:
        ConfigError: a name that the model does not have, or nothing left to train.
    """
    every = [name for name, _ in model.named_parameters()]
    if kind == "full":
        return every
    inside = {name: match for name in every if (match := _LAYER.match(name))}
    count = max((int(match[2]) for match in inside.values()), default=-1) + 1
    chosen = range(max(0, count - layers), count) if layers > 0 else range(min(-layers, count))
    parts = {match[3].split(".")[0] for match in inside.values()}
    # a tied head is the embedding, under the embedding's name
    outside = {name.rsplit(".", 2)[-2]: name for name in every if name not in inside}
    head = "with tied embeddings the output head is embed_tokens" if "lm_head" in extra else ""
    for key, given, there, why in (
        ("freeze_trainable_modules", [m for m in modules if m != "all"], parts, "it names parts of a hidden layer"),
        ("freeze_extra_modules", extra, set(outside), head or "it names parts outside the hidden layers"),
    ):
        if unknown := [name for name in given if name not in there]:
            raise ConfigError(
                f"{key}: this model has no {unknown[0]!r}",
                where=key,
                why=why,
                remedy=f"choose from: {', '.join(sorted(there))}",
            )
    names = [
        name
        for name in every
        if (
            name in inside
            and int(inside[name][2]) in chosen
            and ("all" in modules or inside[name][3].split(".")[0] in modules)
        )
        or (name not in inside and name.rsplit(".", 2)[-2] in extra)
    ]
    if not names:
        raise ConfigError(
            "finetuning_type: freeze leaves nothing to train",
            where="freeze_trainable_layers",
            why="it is 0, and freeze_extra_modules is empty",
            remedy="freeze_trainable_layers: 2 trains the last two layers",
        )
    return names
