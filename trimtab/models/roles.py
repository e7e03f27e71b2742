"""Roles on one frozen base: policy, reference, critic, reward. The only door to a forward pass with adapters.

A role is a tuple of adapter names whose products add to the base, and perhaps a value head. `enter` switches the base to one
role for the length of a `with` block, and the backward pass of what is computed inside must end before the block does: gradient
checkpointing recomputes the forward during backward, with whatever adapters are active *then*. Found by experiment: two roles
entered one after the other and one common backward give wrong gradients for half the adapter matrices, and no error.
Nothing here touches `requires_grad`; an adapter is trainable or frozen from the moment it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from trimtab.models import lora
from trimtab.models.heads import ValueHead


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """The adapters of a role in order, and its head."""

    adapters: tuple[str, ...] = ()
    head: ValueHead | None = None


@dataclass(slots=True)
class Roles:
    """A base model and the roles defined on it."""

    model: PreTrainedModel
    switch: lora.Switch = field(default_factory=lora.Switch)
    specs: dict[str, RoleSpec] = field(default_factory=dict)

    def define(self, role: str, *adapters: str, head: ValueHead | None = None) -> None:
        """Name a role. Adapters may be shared between roles (a critic on the policy's trunk shares the policy's)."""
        self.specs[role] = RoleSpec(adapters=adapters, head=head.to(self.model.device) if head is not None else None)

    @contextmanager
    def enter(self, role: str, *, dropout: float = 0.0) -> Iterator[RoleSpec]:
        """Compute as this role until the block ends. Blocks do not nest."""
        if self.switch.active:
            raise RuntimeError(f"role {role!r} entered while {self.switch.active} is active")
        spec = self.specs[role]
        self.switch.active, self.switch.dropout = spec.adapters, dropout
        try:
            yield spec
        finally:
            self.switch.active, self.switch.dropout = (), 0.0

    def trainable(self, role: str) -> dict[str, nn.Parameter]:
        """The role's trainable parameters by name, adapters first, in the model's order."""
        spec = self.specs[role]
        named = {f"{a}/{n}": p for a in spec.adapters for n, p in lora.parameters(self.model, a).items()}
        if spec.head is not None:
            named |= {f"head/{n}": p for n, p in spec.head.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}
