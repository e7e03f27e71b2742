"""Gated units, norms and attention with a backward pass of their own: equal to the modules' in value and gradient, else left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from trimtab.models import attention, block, lora
from trimtab.models.forward import pack
from trimtab.models.tiny import tiny_model
from trimtab.ops import native
from trimtab.types import TokenRow

pytestmark = pytest.mark.unit

IDS = torch.tensor([[3, 5, 7, 4, 9, 8, 6], [8, 8, 2, 3, 1, 5, 9]])


def with_adapters(family: str, targets: tuple[str, ...], *, rank: int = 3) -> tuple[Any, lora.Switch]:
    """A tiny model with a frozen adapter below a trained one, neither of them zero."""
    model: Any = tiny_model(family)
    model.requires_grad_(False)
    switch = lora.Switch(active=("below", "trained"))
    layers = lora.inject(model, targets, switch)
    for seed, name in enumerate(switch.active):
        paths = [p for p in layers if targets == ("all",) or p.rsplit(".", 1)[-1] in targets]
        lora.new_adapter(model, name, paths=paths, rank=rank + seed, alpha=5, rslora=False, seed=seed)
        generator = torch.Generator().manual_seed(seed + 7)
        for parameter in lora.parameters(model, name).values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            parameter.requires_grad_(name == "trained")
    return model, switch


def gradients(model: Any, weight: Tensor, **given: Any) -> dict[str, Tensor]:
    model.zero_grad()
    for parameter in lora.parameters(model, "trained").values():
        parameter.grad = None
    hidden = model.get_decoder()(**(given or {"input_ids": IDS}), use_cache=False).last_hidden_state
    (hidden * weight).sum().backward()
    found = {n: p.grad.clone() for n, p in lora.parameters(model, "trained").items() if p.grad is not None}
    return found | {"": hidden.detach()}


def compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal but for rounding, array by array: these small random models make 1e-7 of a norm up to 2e-5 of a gradient, either way."""
    assert got.keys() == want.keys()
    for name in want:
        assert float((got[name] - want[name]).norm()) <= 5e-5 * float(want[name].norm()), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [("all",), ("q_proj", "up_proj"), ("down_proj",)])
def test_values_and_gradients_are_those_of_the_modules(family: str, targets: tuple[str, ...]) -> None:
    model, _ = with_adapters(family, targets)
    weight = torch.randn(*IDS.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    want = gradients(model, weight)
    layers = model.config.num_hidden_layers
    norms = 4 if family == "qwen3" else 2
    in_c = int(native.library() is not None and family != "qwen3")
    assert block.install(model) == layers * (1 + norms + in_c) + 1
    assert block.install(model) == 0
    got = gradients(model, weight)
    assert want.keys() == got.keys() and len(want) > layers
    compare(got, want)


@pytest.mark.skipif(native.library() is None, reason="no kernels here: not Linux, no gcc, or TRIMTAB_NATIVE=0")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", [("all",), ("q_proj", "o_proj"), ("v_proj",), ("up_proj",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_packed_rows_is_that_of_the_module(
    family: str, targets: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share a beginning, biases on q, k and v in one family, adapters on all, some or none of the four; in bfloat16 no
    further from the module in float32 than the module in bfloat16 is, by much."""
    model, _ = with_adapters(family, targets)
    attention.install(model)
    ids = ((3, 5, 7, 4, 9), (3, 5, 7, 8, 8, 1, 2), (6, 2))
    packed = pack([TokenRow(token_ids=row, scored=(1,)) for row in ids], "shared", torch.device("cpu"), 4)
    assert packed.trees is not None and len(packed.trees.segments) == 4
    weight = torch.randn(packed.ids.shape[1], model.config.hidden_size, generator=torch.Generator().manual_seed(3))

    def found() -> dict[str, Tensor]:
        keys = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "trees": packed.trees}
        return gradients(model, weight, input_ids=packed.ids, position_ids=packed.positions, **keys)

    want = found()
    model.to(dtype)
    theirs = found()
    block.install(model)
    looked = []
    real = block.look
    monkeypatch.setattr(block, "look", lambda *args: looked.append(1) or real(*args))
    got = found()
    assert len(looked) == model.config.num_hidden_layers
    ours, module = (
        sum(float((one[name].float() - want[name]).norm() / want[name].norm()) for name in want) / len(want)
        for one in (got, theirs)
    )
    assert got.keys() == want.keys() and ours <= 1.5 * module + 2e-5, (ours, module)
    with torch.no_grad():
        keys = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "trees": packed.trees}
        again = model.get_decoder()(input_ids=packed.ids, position_ids=packed.positions, use_cache=False, **keys)
    assert torch.equal(again.last_hidden_state, got[""])


def test_attention_with_more_to_it_is_left_alone() -> None:
    class Odd(LlamaAttention):
        def forward(self, hidden_states: Tensor, *args: Any, **keys: Any) -> Any:
            out, weights = super().forward(hidden_states, *args, **keys)
            return out + 0.1 * hidden_states, weights

    config = tiny_model("llama").config
    for kind, changed in ((LlamaAttention, 1), (Odd, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            module = kind(config, 0).to(dtype)
            # weights that are trained: the module goes its own way, and nothing is known of it
            assert block.install(module) == 0
            module.requires_grad_(False)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
            assert block.install(module) == (changed if native.library() is not None else 0)
    config.model_type = "olmo"
    assert block.install(LlamaAttention(config, 0).requires_grad_(False)) == 0


@pytest.mark.skipif(native.library() is None, reason="no kernels here: not Linux, no gcc, or TRIMTAB_NATIVE=0")
def test_the_rotation_of_a_part_of_a_head_is_left_to_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LlamaAttention(tiny_model("llama").config, 0).requires_grad_(False)
    assert block.install(module) == 1
    monkeypatch.setattr(LlamaAttention, "forward", lambda *_, **keys: ("its own", None))
    trees = attention.Trees((attention.Segment(0, 3),), 3, 4, torch.device("cpu"))
    tables = torch.ones(1, 3, 8)  # of heads of 16
    assert module(torch.zeros(1, 3, 64), position_embeddings=(tables, tables), trees=trees)[0] == "its own"


def test_what_has_more_to_it_goes_its_own_way() -> None:
    """Dropout on adapters, and base weights that are trained."""
    model, switch = with_adapters("llama", ("all",))
    weight = torch.randn(*IDS.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    switch.dropout = 0.5
    torch.manual_seed(1)
    want = gradients(model, weight)
    block.install(model)
    torch.manual_seed(1)
    got = gradients(model, weight)
    compare(got, want)
    switch.dropout = 0.0
    layer = model.get_decoder().layers[0]
    for parameter in (layer.mlp.up_proj.weight, layer.input_layernorm.weight):
        parameter.requires_grad_(True)
    gradients(model, weight)
    assert layer.mlp.up_proj.weight.grad is not None and layer.input_layernorm.weight.grad is not None


def test_a_module_of_the_name_that_computes_something_else_is_left_alone() -> None:
    class GemmaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    assert block.install(GemmaRMSNorm()) == 0


def test_a_copy_computes_with_its_own_weights() -> None:
    """The frozen copy of a trained model is a deep copy: its replaced forward must be bound to it."""
    import copy

    model: Any = tiny_model("llama")
    model.requires_grad_(False)
    block.install(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        hidden = twin.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    assert float(hidden.abs().sum()) > 0


def test_an_optimizer_step_is_seen_at_once() -> None:
    """The stacked matrices are kept until a master changes: by any of torch's optimizers."""
    for make in (
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    ):
        model, _ = with_adapters("llama", ("all",))
        block.install(model)
        weight = torch.randn(*IDS.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
        before = gradients(model, weight)[""]
        make(list(lora.parameters(model, "trained").values())).step()
        assert not torch.equal(gradients(model, weight)[""], before)
