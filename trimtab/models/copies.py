"""Modules trained whole beside an adapter: peft's `modules_to_save`, LLaMA-Factory's `additional_target`.

Embeddings, the output head or a norm have no low-rank adapter of ours. An adapter may hold a whole copy of such a module instead,
which takes the module's place wherever the adapter is active (the last active one that has a copy). The base's own weights never
change. With tied embeddings a copy of one of the two is a copy of that one alone, as in peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from trimtab.errors import AdapterError


class Active(Protocol):
    """What says which adapters are active, in order (`lora.Switch`)."""

    active: tuple[str, ...]


class Copy(nn.Module):
    """Whole parameters of one module, float32."""

    def __init__(self, tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().float().clone(), requires_grad=trainable))


class Copied(nn.Module):
    """A module of the base, and copies of its parameters by the adapters that hold them."""

    def __init__(self, base: nn.Module, switch: Active) -> None:
        super().__init__()
        self.base = base
        self.switch = switch
        self.copies: dict[str, Copy] = {}  # not submodules: the base's parameters stay what they were

    def parameter(self, name: str) -> Tensor | None:
        """The parameter that computes now, in the base's type."""
        own = cast("Tensor | None", getattr(self.base, name, None))
        for adapter in reversed(self.switch.active):
            if adapter in self.copies and own is not None:
                return cast(Tensor, getattr(self.copies[adapter], name)).to(own.dtype)
        return own

    @property
    def weight(self) -> Tensor:
        """As a layer's own: the output head's weight is read by name."""
        found = self.parameter("weight")
        assert found is not None
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias, or None."""
        return self.parameter("bias")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not any(name in self.copies for name in self.switch.active):
            return self.base(*args, **kwargs)
        tensors = {
            name: tensor for name, _ in self.base.named_parameters() if (tensor := self.parameter(name)) is not None
        }
        return torch.func.functional_call(self.base, tensors, args, kwargs)


def wrap(model: nn.Module, targets: Iterable[str], switch: Active) -> dict[str, Copied]:
    """Make room for copies of the named modules; returns those, by path. A module is wrapped once.

    Args:
        targets: ends of module paths, as peft matches them: `norm` is every module whose name ends so.

    Raises:
        AdapterError: a name that the model does not have, or that is no single layer of plain weights.
    """
    found: dict[str, Copied] = {}
    for target in targets:
        paths = [path for path, _ in model.named_modules() if path.endswith(target)]
        if not paths:
            simple = sorted({n.rsplit(".", 2)[-2] for n, _ in model.named_parameters()})
            raise AdapterError(
                f"additional_target: this model has no {target!r}",
                where="additional_target",
                remedy=f"choose from: {', '.join(simple)}",
            )
        for path in paths:
            module = model.get_submodule(path)
            if not isinstance(module, Copied):
                if hasattr(module, "adapters") or any(module.children()) or not list(module.parameters()):
                    has = (
                        "it has a low-rank adapter already"
                        if hasattr(module, "adapters")
                        else "it is a group of layers"
                    )
                    raise AdapterError(
                        f"additional_target: {target!r} cannot be trained whole beside the adapter",
                        where="additional_target",
                        why=has,
                        remedy="name single layers that lora_target does not: embed_tokens, lm_head, norm",
                    )
                wrapped = Copied(module, switch)
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, wrapped)
                module = wrapped
            found[path] = module
    return found


def endings(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Names that match these modules and no others, for `modules_to_save`: last components where those are enough."""
    wanted = set(paths)
    every = [path.removesuffix(".base") for path, _ in model.named_modules()]
    names = set()
    for path in wanted:
        last = path.rsplit(".", 1)[-1]
        names.add(last if all(other in wanted for other in every if other.endswith(last)) else path)
    return sorted(names)


def copied(model: nn.Module) -> dict[str, Copied]:
    """Every wrapped module by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Copied)}


def add_copies(
    model: nn.Module, name: str, targets: Iterable[str], switch: Active, *, below: tuple[str, ...] = ()
) -> None:
    """Trainable copies of the named modules as part of the adapter `name`, where it has none yet.

    Args:
        below: the adapters under it; what computes under them is where a copy starts.
    """
    for module in wrap(model, targets, switch).values():
        if name in module.copies:
            continue
        source: nn.Module = next((module.copies[b] for b in reversed(below) if b in module.copies), module.base)
        made = Copy(dict(source.named_parameters()), trainable=True)
        module.copies[name] = made.to(next(module.base.parameters()).device)
