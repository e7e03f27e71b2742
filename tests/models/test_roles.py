"""Roles: one switch, nothing touched that is not entered, gradients that do not depend on checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.models import lora
from trimtab.models.forward import score_rows, score_tokens
from trimtab.models.heads import ValueHead
from trimtab.models.roles import Roles
from trimtab.models.tiny import FAMILIES, Family, tiny_model
from trimtab.train.assemble import checkpoint_layers
from trimtab.types import TokenRow

pytestmark = pytest.mark.unit

ROWS = [
    TokenRow(token_ids=(20, 31, 42, 53, 64, 75), scored=(3, 4, 5)),
    TokenRow(token_ids=(20, 31, 42, 99), scored=(3,)),
]


def four_roles(family: Family = "qwen2", dtype: torch.dtype = torch.float32) -> Roles:
    """Policy (a frozen adapter and a trained one), reference (the frozen one), critic and reward on one base."""
    model = tiny_model(family).to(dtype).requires_grad_(False)
    roles = Roles(model=model)
    found = lora.inject(model, ["all"], roles.switch)
    for i, (name, trainable) in enumerate({"start": False, "trained": True, "critic": True, "reward": False}.items()):
        lora.new_adapter(model, name, paths=found, rank=3, alpha=6, rslora=False, seed=i)
        generator = torch.Generator().manual_seed(50 + i)
        for parameter in lora.parameters(model, name).values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.requires_grad_(trainable)
    roles.define("policy", "start", "trained")
    roles.define("reference", "start")
    roles.define("critic", "critic", head=ValueHead(64, seed=5))
    roles.define("reward", "reward", head=ValueHead(64, seed=6, trainable=False))
    return roles


def backward(roles: Roles, role: str) -> Tensor:
    """A loss that goes through logp and entropy, or values, or a reward; returns it."""
    with roles.enter(role) as spec:
        scores = score_tokens(roles.model, ROWS, layout="shared", lm_head=spec.head is None, head=spec.head)
        if spec.head is None:
            loss = scores.logp.square().sum() + scores.entropy.sum()
        else:
            loss = scores.values.square().sum() + score_rows(roles.model, ROWS, spec.head).sum()
        loss.backward()
    return loss.detach()


def everything(roles: Roles) -> dict[str, nn.Parameter]:
    """Every parameter there is: the base's, each adapter's, each head's."""
    named: dict[str, nn.Parameter] = {f"base/{name}": p for name, p in roles.model.named_parameters()}
    for role, spec in roles.specs.items():
        for adapter in spec.adapters:
            named |= {f"{adapter}/{name}": p for name, p in lora.parameters(roles.model, adapter).items()}
        if spec.head is not None:
            named |= {f"{role}.head/{name}": p for name, p in spec.head.named_parameters()}
    return named


def gradients(roles: Roles) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in everything(roles).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_checkpointing(family: Family) -> None:
    plain, checkpointed = four_roles(family), four_roles(family)
    checkpoint_layers(checkpointed)
    for role in ("policy", "critic"):  # one after the other, as an update does it
        torch.testing.assert_close(backward(checkpointed, role), backward(plain, role), atol=1e-6, rtol=1e-6)
    a, b = gradients(plain), gradients(checkpointed)
    touched = [name for name, grad in a.items() if grad is not None]
    # seven linear layers in each of two blocks, A and B, for two trained adapters; weight and bias of the critic's head
    assert len(touched) == 2 * 14 * 2 + 2
    for name, grad in a.items():
        assert (grad is None) == (b[name] is None), name
        if grad is not None:
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(grad, b[name], atol=1e-6, rtol=1e-6, msg=name)


def test_checkpointing_really_recomputes_and_leaves_no_gradless_forward_changed() -> None:
    roles = four_roles()
    checkpoint_layers(roles)
    calls = []
    layer = roles.model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    backward(roles, "policy")
    assert len(calls) == 2  # forward, and once more in the backward pass
    ids = torch.tensor([[20, 31, 42]])
    with torch.no_grad(), roles.enter("policy"):
        out = roles.model(ids, use_cache=True)
    assert out.past_key_values is not None
    assert out.past_key_values.get_seq_length() == 3  # sampling between updates has its cache


def test_frozen_roles_stay_frozen_and_the_base_with_them() -> None:
    roles = four_roles()
    before = {name: p.detach().clone() for name, p in everything(roles).items()}
    trained = {role: roles.trainable(role) for role in roles.specs}
    assert trained["reference"] == {}
    assert trained["reward"] == {}
    assert len(trained["policy"]) == 28
    assert sorted(trained["critic"])[-2:] == ["head/summary.bias", "head/summary.weight"]
    for role in ("policy", "critic"):
        optimizer = torch.optim.AdamW(trained[role].values(), lr=1e-2)
        backward(roles, role)
        optimizer.step()
    changed = {name for name, p in everything(roles).items() if not torch.equal(p, before[name])}
    assert {name.split("/")[0] for name in changed} == {"trained", "critic", "critic.head"}
    assert len(changed) == 2 * 28 + 2


def test_entering_is_exclusive_and_always_left() -> None:
    roles = four_roles()
    with pytest.raises(RuntimeError, match="while"), roles.enter("policy"), roles.enter("critic"):
        pass
    assert roles.switch.active == ()
    with roles.enter("policy", dropout=0.5):
        assert (roles.switch.active, roles.switch.dropout) == (("start", "trained"), 0.5)
    with pytest.raises(ZeroDivisionError), roles.enter("policy", dropout=0.5):
        _ = 1 / 0
    assert (roles.switch.active, roles.switch.dropout) == ((), 0.0)


def test_a_reward_is_bit_equal_whatever_is_loaded_beside_it() -> None:
    model = tiny_model("llama").requires_grad_(False)
    roles = Roles(model=model)
    found = lora.inject(model, ["q_proj", "v_proj"], roles.switch)
    lora.new_adapter(model, "reward", paths=found, rank=3, alpha=6, rslora=False, seed=1)
    for parameter in lora.parameters(model, "reward").values():
        parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    head = ValueHead(64, seed=3)
    roles.define("reward", "reward", head=head)

    def scores() -> list[float]:
        with torch.no_grad(), roles.enter("reward"):
            return score_rows(model, ROWS, head).tolist()

    alone = scores()
    every = lora.inject(model, ["all"], roles.switch)
    for i, name in enumerate(("first", "second")):
        lora.new_adapter(model, name, paths=every, rank=3, alpha=6, rslora=False, seed=i)
        for parameter in lora.parameters(model, name).values():
            parameter.data.fill_(0.1)
    roles.define("policy", "first", "second")
    assert scores() == alone
