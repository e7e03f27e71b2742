"""The decoder of the Llama family: which models it takes, its packed products, and that it notices new weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.engine.test_generator import ALIKE, NEVER, PROMPTS, policy, texts
from trimtab.engine import between, blocks, generator, products
from trimtab.engine.blocks import BlockDecoder, Weights, why_not
from trimtab.engine.generator import Engine
from trimtab.models import lora
from trimtab.models.roles import Roles
from trimtab.models.tiny import FAMILIES, Family, tiny_model
from trimtab.ops import native
from trimtab.ops.native import products as native_products
from trimtab.types import Sampling

pytestmark = pytest.mark.engine

SIZES = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def llama(**keys: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **keys})).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_taken(family: Family) -> None:
    assert why_not(tiny_model(family), ()) == ""


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 128, "rope_theta": 5e5},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_embeddings_that_are_scaled_are_those_of_the_model(rope: dict[str, object]) -> None:
    assert why_not(llama(rope_parameters=rope), ()) == ""


def test_what_has_other_blocks_goes_its_own_way() -> None:
    assert "gelu" in why_not(llama(hidden_act="gelu"), ())
    assert "rotary" in why_not(llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), ())
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    assert "window" in why_not(windowed, ())
    assert why_not(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval(), ()) == ""
    some = Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)).eval()
    assert "window" in why_not(some, ())


def test_a_block_that_computes_otherwise_is_found_by_its_numbers() -> None:
    """Same names and shapes, another residual: no look at the config shows it."""
    model = llama()
    layer = model.model.layers[1]
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: 1.1 * plain(x)
    assert "other hidden states" in why_not(model, ())


def test_adapters_that_are_not_plain_products_go_the_models_own_way() -> None:
    roles = policy()
    assert why_not(roles.model, ("x",)) == ""
    for layer in lora.layers(roles.model).values():
        layer.adapters["x"].magnitude = nn.Parameter(torch.ones(layer.out_features))
    assert "DoRA" in why_not(roles.model, ("x",))
    assert why_not(roles.model, ("idle",)) == ""


def test_new_weights_are_noticed() -> None:
    roles = policy()
    engine = Engine(roles=roles, role="policy", stop_ids=NEVER)
    sampling = Sampling(temperature=0.0, max_new_tokens=8)
    before = texts(engine.generate(PROMPTS, sampling))
    kept = engine.kept.weights
    assert texts(engine.generate(PROMPTS, sampling)) == before and engine.kept.weights is kept  # made once
    with torch.no_grad():
        for parameter in lora.parameters(roles.model, "x").values():
            parameter.mul_(-3.0)
    after = texts(engine.generate(PROMPTS, sampling))
    assert after != before
    assert after == texts(Engine(roles=roles, role="policy", stop_ids=NEVER).generate(PROMPTS, sampling))


def test_rows_take_the_slots_of_those_that_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve prompts in four slots: prompts are read as slots fall free, not wave by wave."""
    read: list[int] = []
    roles = policy()
    assert why_not(roles.model, ()) == ""  # tried now, and not counted
    plain = BlockDecoder.prefill

    def counted(self: BlockDecoder, prompts: object, slots: list[list[int]]) -> torch.Tensor:
        read.append(len(slots))
        return plain(self, prompts, slots)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockDecoder, "prefill", counted)
    prompts = [generator.Prompt(index=i, token_ids=(20 + i, 31, 42), example=PROMPTS[0].example) for i in range(12)]
    stop = tuple(range(20, 60))
    sampling = Sampling(max_new_tokens=20)
    done = Engine(roles=roles, role="policy", stop_ids=stop, slots=4).generate(prompts, sampling)
    assert sum(read) == 12 and read[0] == 4 and max(read[1:]) < 4
    alone = [Engine(roles=roles, role="policy", stop_ids=stop).generate([p], sampling)[0] for p in prompts]
    assert texts(done) == texts(alone)


# ------------------------------------------------------------------------------------------------------- packed products

needs_packing = pytest.mark.skipif(
    not all(products.can_pack(dtype, "cpu") for dtype in (torch.bfloat16, torch.float32)),
    reason="this torch has no packed products",
)


def test_prompts_that_begin_alike_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 31, 21, 24 and 31 tokens: 31, then 5 beside 16 of them, then 0 beside 24, then 0."""
    laid_out = []
    plain = blocks.pack

    def spy(*args: Any) -> Any:
        laid_out.append(plain(*args))
        return laid_out[-1]

    monkeypatch.setattr(blocks, "pack", spy)
    roles = policy()
    engine, sampling = Engine(roles=roles, role="policy", stop_ids=NEVER), Sampling(max_new_tokens=8)
    together = texts(engine.generate([PROMPTS[1], *ALIKE], sampling))
    paths = [where for _, where in laid_out[-1].places]
    assert sorted(map(len, paths)) == [21, 24, 31, 31]
    assert len({column for path in paths for column in path}) == 31 + 5
    assert together == [texts(engine.generate([one], sampling))[0] for one in (PROMPTS[1], *ALIKE)]


@needs_packing
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_a_packed_layer_is_the_layer_and_its_adapters(dtype: torch.dtype, tolerance: float) -> None:
    """q, k and v with two adapters each, against the products one by one in float64."""
    assert products.can_pack(dtype, "cpu")
    roles = policy("qwen2")
    roles.model.to(dtype)
    for layer in lora.layers(roles.model).values():
        layer.adapters["idle"].b.data.mul_(2)
    roles.switch.active = ("x", "idle")
    attention = roles.model.model.layers[0].self_attn
    joined = blocks.Linear([attention.q_proj, attention.k_proj, attention.v_proj], packing=True)
    plain = blocks.Linear([attention.q_proj, attention.k_proj, attention.v_proj], packing=False)
    x = torch.randn(5, roles.model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = []
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        y = x.double() @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
        for adapter in layer.active():
            y = y + adapter.scale * (x.double() @ adapter.a.double().T) @ adapter.b.double().T
        want.append(y)
    scale = float(torch.cat(want, 1).abs().max())
    for found in (joined(between.with_low(x, joined.low)), plain(x)):
        assert float((found.double() - torch.cat(want, 1)).abs().max()) < tolerance * scale
    assert joined.product is not None and plain.product is None
    assert joined.a is not None and joined.a.shape[0] == 3 * 2 * 3  # three layers, two adapters, rank 3


@needs_packing
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_decoding_is_near_the_scorer(family: Family) -> None:
    """FORMULAS' bound for bfloat16: 0.05 nat a token on average."""
    from trimtab.models.forward import score_tokens
    from trimtab.types import TokenRow

    roles = policy(family)
    roles.model.to(torch.bfloat16)
    drawn = Engine(roles=roles, role="policy", stop_ids=NEVER).generate(PROMPTS, Sampling(max_new_tokens=12), k=2)
    rows = []
    for c in drawn:
        ids = PROMPTS[c.prompt_index].token_ids
        rows.append(TokenRow(token_ids=(*ids, *c.token_ids), scored=tuple(range(len(ids), len(ids) + 12))))
    with torch.no_grad(), roles.enter("policy"):
        scored = score_tokens(roles.model, rows, layout="shared")
    assert scored.logp is not None
    away = torch.tensor([c.logprobs for c in drawn]) - scored.logp
    assert float(away.abs().mean()) < 0.05


@pytest.mark.skipif(not native_products.are_there(), reason="this CPU has no AVX512-BF16, or AMX, or no kernels in C")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("active", [(), ("x",), ("x", "idle")])
@pytest.mark.parametrize("rows", [1, 5, 60])
@torch.no_grad()
def test_a_step_in_one_call_is_that_of_its_layers(family: Family, active: tuple[str, ...], rows: int) -> None:
    """The same functions in the same order: the same bits, in the caches too. One layer has adapters on some of its products only."""
    roles = policy(family)
    roles.model.to(torch.bfloat16)
    for layer in lora.layers(roles.model).values():
        layer.adapters["idle"].b.data.mul_(2)
    for name in ("q_proj", "k_proj", "v_proj", "down_proj"):
        part = roles.model.model.layers[1]
        del getattr(part.mlp if name == "down_proj" else part.self_attn, name).adapters["x"]
    roles.switch.active = active
    weights = Weights(roles.model, active, packing=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 90, (rows,), generator=generator)
    lengths = torch.arange(rows) % 7
    one, apart = BlockDecoder(weights, rows, 9), BlockDecoder(weights, rows, 9)
    for cache in (one.k, one.v):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    apart.k.copy_(one.k), apart.v.copy_(one.v)
    assert one.layers is not None
    apart.layers = None
    got, want = one.step(tokens, lengths, 7), apart.step(tokens, lengths, 7)
    assert torch.equal(got, want) and bool(got.isfinite().all())
    assert torch.equal(one.k, apart.k) and torch.equal(one.v, apart.v)


@needs_packing
def test_products_that_are_not_right_are_not_used_for_adapters_either(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = policy()
    roles.model.to(torch.bfloat16)
    roles.switch.active = ("x",)
    layers = [getattr(roles.model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    x = torch.randn(5, roles.model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    usual = blocks.Linear(layers, packing=True)
    want = usual(between.with_low(x, usual.low))
    monkeypatch.setattr(native_products, "are_there", lambda: False)
    found = blocks.Linear(layers, packing=True)
    assert found.product is not None and found.product.laid_out is None
    assert found.low is None or not native.kernels().trimtab_has_products()
    got = found(between.with_low(x, found.low))
    assert float((got - want).abs().max()) <= 0.02 * float(want.abs().max())


def test_without_packing_the_models_own_tensors_compute() -> None:
    weights = Weights(policy().model, ("x",), packing=False)
    held = weights.blocks[0].qkv.parts[0][0]
    assert held.data_ptr() == weights.model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert weights.blocks[0].qkv.product is None


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_compute_what_they_did_and_hold_nothing_twice(bias: bool) -> None:
    """What a GPU multiplies with, here on a CPU; the second layer has no adapter."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, width, bias=bias) for width in (7, 5, 4)]
    x = torch.randn(3, 12)
    a, b, c = torch.randn(3, 12), torch.randn(7, 3), torch.randn(4, 2)
    low = torch.randn(2, 12)
    want = torch.cat([layer(x) for layer in layers], dim=1)
    want[:, :7] += x @ a.t() @ b.t()
    want[:, 12:] += x @ low.t() @ c.t()
    sides = torch.zeros(16, 5)
    sides[:7, :3], sides[12:, 3:] = b, c
    biases = torch.cat([layer.bias.detach() for layer in layers]) if bias else None
    with torch.no_grad():
        joined = products.Joined(layers, torch.cat([a, low]), sides, biases)
        torch.testing.assert_close(joined(x), want)
        assert joined.weight.shape == (24, 12)  # 16 outputs, 5 ranks and three rows to fill up
        assert layers[1].weight.data_ptr() == joined.weight[7:].data_ptr()
        torch.testing.assert_close(
            torch.cat([layer(x) for layer in layers], dim=1), want - joined_sides(x, a, b, low, c)
        )
        other = products.Joined(layers, torch.zeros(5, 12), sides, biases)
        assert other.weight.data_ptr() == joined.weight.data_ptr()
        torch.testing.assert_close(other(x), torch.cat([layer(x) for layer in layers], dim=1))
        joined.take()  # its own adapters are back
        torch.testing.assert_close(joined(x), want)
        again = products.Joined(layers, None, None, biases)
        torch.testing.assert_close(again(x), torch.cat([layer(x) for layer in layers], dim=1))
        layers[0].weight += 1  # a step of an optimizer is seen
        torch.testing.assert_close(again(x), torch.cat([layer(x) for layer in layers], dim=1))
        layers[2].weight.data = layers[2].weight.clone()  # another tensor is joined anew
        assert products.Joined(layers, None, None, biases).weight.data_ptr() != joined.weight.data_ptr()


def joined_sides(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, low: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.cat([x @ a.t() @ b.t(), torch.zeros(len(x), 5), x @ low.t() @ c.t()], dim=1)


def test_two_streams_with_unlike_adapters_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU both compute with one buffer."""
    plain = blocks.Linear.__init__

    def joining(self: blocks.Linear, layers: Sequence[nn.Module], packing: bool) -> None:
        plain(self, layers, packing=False)
        biases = [bias for _, bias in self.parts if bias is not None]
        self.joined = products.Joined(layers, self.a, self.sides, torch.cat(biases) if biases else None)

    def answers(roles: Roles) -> list[list[int]]:
        streams = [
            Engine(roles=roles, role=role, stop_ids=NEVER).stream(PROMPTS[1], Sampling(max_new_tokens=12, seed=1))
            for role in ("policy", "other")
        ]
        turns = list(zip(*streams, strict=True))
        return [[token.token_id for token in own] for own in zip(*turns, strict=True)]

    roles = policy()
    roles.define("other", "idle")
    want = answers(roles)
    monkeypatch.setattr(blocks.Linear, "__init__", joining)
    roles = policy()
    roles.define("other", "idle")
    found = answers(roles)
    assert found == want and found[0] != found[1]
