"""Roles: policy, reference, critic, reward. The only door to a forward pass with adapters.

A role is a tuple of adapter names whose products add to a model, and perhaps a value head. With LoRA that model is one frozen base
for all of them. When weights are trained themselves (`models/masters.py`) it is the trained model for the policy, and one frozen
copy of the starting weights for the reference, the critic and the reward; a reward model or a reference of its own base brings its
own model. `enter` switches the base to one
role for the length of a `with` block, and the backward pass of what is computed inside must end before the block does: gradient
checkpointing recomputes the forward during backward, with whatever adapters are active *then*. Found by experiment: two roles
entered one after the other and one common backward give wrong gradients for half the adapter matrices, and no error. A pass may be held
for a later block of the same role (`train/step.hold_tokens`) as long as no other role is entered and nothing is stepped between.
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
from trimtab.models.masters import Masters

POLICY, REFERENCE, CRITIC, REWARD = "policy", "reference", "critic", "reward"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """The adapters of a role in order, its head, and the model that they stand on (None: the roles' own)."""

    adapters: tuple[str, ...] = ()
    head: ValueHead | None = None
    model: PreTrainedModel | None = None


@dataclass(slots=True)
class Roles:
    """A model and the roles defined on it and beside it.

    Attributes:
        model: inside `enter`, the model of the entered role; outside, the base (the trained model, where weights are trained).
        masters: the float32 weights that are trained in that model itself; None with LoRA.
    """

    model: PreTrainedModel
    switch: lora.Switch = field(default_factory=lora.Switch)
    specs: dict[str, RoleSpec] = field(default_factory=dict)
    masters: Masters | None = None
    _entered: str | None = None

    def define(
        self, role: str, *adapters: str, head: ValueHead | None = None, model: PreTrainedModel | None = None
    ) -> None:
        """Name a role. Adapters may be shared between roles (a critic on the policy's trunk shares the policy's)."""
        where = (model if model is not None else self.model).device
        self.specs[role] = RoleSpec(
            adapters=adapters,
            head=head.to(where) if head is not None else None,
            model=None if model is self.model else model,
        )

    @contextmanager
    def enter(self, role: str, *, dropout: float = 0.0) -> Iterator[RoleSpec]:
        """Compute as this role until the block ends. Blocks do not nest."""
        if self._entered is not None:
            raise RuntimeError(f"role {role!r} entered while {self._entered!r} is active")
        spec, base = self.specs[role], self.model
        self._entered = role
        self.model = spec.model or base
        self.switch.active, self.switch.dropout = spec.adapters, dropout
        try:
            yield spec
        finally:
            self._entered, self.model = None, base
            self.switch.active, self.switch.dropout = (), 0.0

    def of(self, role: str) -> PreTrainedModel:
        """The model that a role computes with."""
        return self.specs[role].model or self.model

    def models(self) -> list[PreTrainedModel]:
        """Every model that a role computes with, once, the trained one first."""
        found = {id(model): model for model in (self.model, *(self.of(role) for role in self.specs))}
        return list(found.values())

    def trains_weights(self, role: str) -> bool:
        """Are the role's own model weights trained, and not an adapter beside them?"""
        return self.masters is not None and self.specs[role].model is None

    def trainable(self, role: str) -> dict[str, nn.Parameter]:
        """The role's trainable parameters by name, adapters first, in the model's order."""
        spec = self.specs[role]
        named = {f"{a}/{n}": p for a in spec.adapters for n, p in lora.parameters(self.of(role), a).items()}
        if self.masters is not None and self.trains_weights(role):
            named |= {f"model/{n}": p for n, p in self.masters.parameters.items()}
        if spec.head is not None:
            named |= {f"head/{n}": p for n, p in spec.head.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}
