"""Weights that are trained themselves: which ones, and what a float32 master is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.errors import ConfigError
from trimtab.models.masters import Masters, trained_names
from trimtab.models.tiny import tiny_model

pytestmark = pytest.mark.unit


def linear() -> nn.Linear:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    return layer


def ten_steps(masters: Masters, layer: nn.Linear) -> None:
    """Ten steps of plain gradient descent, rate 1e-3, on a gradient of 1 that comes in two micro-batches."""
    optimizer = torch.optim.SGD(masters.parameters.values(), lr=1e-3)
    optimizer.register_step_post_hook(masters.publish)
    for _ in range(10):
        for _ in range(2):
            layer(torch.full((1, 2), 0.5, dtype=layer.weight.dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_small_steps_survive_in_a_float32_master_and_are_lost_without() -> None:
    # 1 - 0.001 rounds to 1 in bfloat16, whose next value below 1 is 1 - 2^-8; ten such steps make 0.99
    kept, lost = linear(), linear()
    masters = Masters(kept, ["weight"], torch.bfloat16)
    masters.collect()
    ten_steps(masters, kept)
    assert masters.parameters["weight"].dtype == torch.float32
    assert masters.parameters["weight"].tolist() == [[pytest.approx(0.99)] * 2]
    assert torch.equal(kept.weight, masters.parameters["weight"].bfloat16())
    assert kept.weight.dtype == torch.bfloat16 and kept.weight.grad is None
    pure = Masters(lost, ["weight"], torch.bfloat16, pure=True)
    pure.collect()
    ten_steps(pure, lost)
    assert lost.weight.tolist() == [[1.0, 1.0]]


def test_micro_batch_gradients_are_summed_in_float32() -> None:
    layer = linear()
    masters = Masters(layer, ["weight"], torch.bfloat16)
    masters.collect()
    for x in (256.0, 1.0, 1.0, 1.0):  # in bfloat16 256 + 1 is 256
        layer(torch.full((1, 2), x, dtype=torch.bfloat16)).sum().backward()
    grad = masters.parameters["weight"].grad
    assert grad is not None and grad.tolist() == [[259.0, 259.0]]


def test_a_master_starts_from_all_the_digits_of_the_file() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight.fill_(1.001)
    masters = Masters(layer, ["weight"], torch.bfloat16)
    assert masters.parameters["weight"][0, 0].item() == pytest.approx(1.001)
    assert layer.weight[0, 0].item() == 1.0


def test_in_float32_a_weight_is_its_own_master() -> None:
    layer = linear()
    masters = Masters(layer, ["weight"], torch.float32)
    assert masters.parameters["weight"] is layer.weight


def test_what_is_not_named_is_cast_and_frozen() -> None:
    model = tiny_model("qwen2")
    Masters(model, ["model.norm.weight"], torch.bfloat16)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["model.norm.weight"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # frequencies in bfloat16 would bend every position


# -------------------------------------------------------------------------------------------------------- which weights


def parts(names: list[str]) -> set[str]:
    return {name.removeprefix("model.").removeprefix("layers.").removesuffix(".weight") for name in names}


def test_full_is_every_weight_once() -> None:
    model = tiny_model("qwen2")
    assert trained_names(model, "full") == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in trained_names(model, "full")  # tied to the embedding


@pytest.mark.parametrize(("layers", "expected"), [(1, {"1"}), (-1, {"0"}), (2, {"0", "1"}), (9, {"0", "1"})])
def test_layers_count_from_the_end_and_below_zero_from_the_start(layers: int, expected: set[str]) -> None:
    names = trained_names(tiny_model("llama"), "freeze", layers=layers)
    assert {name.split(".")[2] for name in names} == expected
    assert all(name.startswith("model.layers.") for name in names)
    assert len(names) == 9 * len(expected)  # q k v o, gate up down, two norms


def test_modules_and_extra_modules_choose_inside_and_outside_the_layers() -> None:
    names = trained_names(
        tiny_model("llama"), "freeze", layers=1, modules=("mlp", "input_layernorm"), extra=("norm", "lm_head")
    )
    assert parts(names) == {
        "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj", "1.input_layernorm", "norm", "lm_head",
    }  # fmt: skip


def test_no_layers_leave_the_extra_modules() -> None:
    assert trained_names(tiny_model("llama"), "freeze", layers=0, extra=("norm",)) == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"modules": ("mpl",)}, "no 'mpl'"),
        ({"modules": ("q_proj",)}, "no 'q_proj'"),  # a part of self_attn, not of the layer
        ({"extra": ("mlp",)}, "no 'mlp'"),
        ({"layers": 0}, "nothing to train"),
    ],
)
def test_names_that_the_model_has_not_are_refused(given: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        trained_names(tiny_model("llama"), "freeze", **given)  # type: ignore[arg-type]


def test_a_tied_head_is_told_to_be_the_embedding() -> None:
    with pytest.raises(ConfigError, match="lm_head") as caught:
        trained_names(tiny_model("qwen2"), "freeze", extra=("lm_head",))
    assert "embed_tokens" in str(caught.value)
