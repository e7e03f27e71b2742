"""The estimate against hand arithmetic on round numbers, and what `settle` decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.config import load
from trimtab.models import block, lora
from trimtab.models.forward import choose_layout, score_tokens
from trimtab.models.tiny import tiny_model
from trimtab.ops import logprobs
from trimtab.plan import Job, Lengths, Machine, Shape, estimate, job_of, machine, settle
from trimtab.plan.estimate import BUFFERS, KERNELS, MOST, MOST_WIDE, TILE, layer_numbers, slots
from trimtab.plan.job import alike, worst_case
from trimtab.plan.shapes import TABLE
from trimtab.types import TokenRow

pytestmark = pytest.mark.unit

SHAPE = Shape(
    name="round", layers=10, hidden=100, heads=10, key_heads=5, head_size=10, wide=300, vocabulary=1000, tied=True
)
N = 10 * 100 * (2 * 100 + 2 * 50 + 3 * 300)  # parameters of the linear layers
LENGTHS = Lengths(rows=100, prompt=30.0, answer=10.0, longest=40)
JOB = Job(
    stage="ppo", trained="lora", rank=8, targets=("all",), bits=None, compute=4, pure=False, rows=10, group=1, rollout=10,
    updates=4, reference="adapter", old=True, critic="adapter", reward="adapter", frozen_copy=False, scored=True, new=10,
    lengths=LENGTHS, evaluates=False,
)  # fmt: skip
CARD = Machine(name="card", kind="cuda", memory=10**12, rate=1e14, rate32=1e13, bandwidth=1e12)
BOX = Machine(name="box", kind="cpu", memory=10**12, rate=1e12, rate32=1e11, bandwidth=1e10)


def without_head(job: Job) -> dict[str, float]:
    """Operations with an output head of no size."""
    bare = replace(SHAPE, vocabulary=0)
    return estimate(job, bare, BOX, checkpointing=False, budget=1024).flops


def test_tokens_of_a_step() -> None:
    """Ten prompts of 30 tokens, a third of which they begin with in common, and answers of 10."""
    assert JOB.step_tokens == 10 * 40
    assert replace(JOB, group=4).step_tokens == 10 * 30 + 40 * 10
    assert replace(JOB, stage="rm", rollout=0).step_tokens == 10 * 30 + 20 * 10
    begun = replace(JOB, group=4, lengths=replace(LENGTHS, alike=1 / 3))
    assert begun.step_tokens == pytest.approx(10 * 20 + 40 * 10)
    assert replace(begun, shared=False).step_tokens == 40 * 40
    # the engine reads a prompt once whatever the layout
    unit = 2 * N
    assert without_head(begun)["rollout"] == pytest.approx(unit * (10 * 20 + 40 * 10))
    assert without_head(replace(begun, shared=False))["rollout"] == pytest.approx(unit * (10 * 20 + 40 * 10))
    # a GPU reads what unlike prompts begin with for each of them
    on_card = estimate(begun, replace(SHAPE, vocabulary=0), CARD, checkpointing=False, budget=1024).flops["rollout"]
    assert on_card == pytest.approx(unit * (10 * 30 + 40 * 10))


def test_memory_is_planned_as_if_nothing_were_shared() -> None:
    alike = replace(JOB, group=4, lengths=replace(LENGTHS, alike=0.5))
    apart = replace(alike, shared=False, lengths=LENGTHS)
    found, want = (estimate(job, SHAPE, BOX, checkpointing=False, budget=10**6).phases for job in (alike, apart))
    assert found == want


def test_how_much_of_the_prompts_begins_alike() -> None:
    begin = tuple(range(16))
    prompts = [(*begin, 100 + i, 7, 8, 9) for i in range(6)]
    # two of three prompts of 20 tokens go on from the 16
    assert alike(prompts, 3) == pytest.approx(4 * 16 / 120)
    assert alike(prompts, 6) == pytest.approx(5 * 16 / 120)
    assert alike(prompts, 1) == 0
    assert alike([], 4) == 0


def test_the_cost_model_per_sample() -> None:
    """Per sample, full / LoRA, in N x tokens: PPO of four epochs with a critic adapter 58 / 42, RLOO 14 / 12, GRPO alone 8 / 6."""
    unit = N * JOB.step_tokens
    several = replace(JOB, rows=5)  # minibatches a rollout batch
    rloo = replace(several, stage="rloo", updates=1, critic="")
    grpo = replace(several, stage="grpo", updates=1, critic="", reference="", reward="", old=False)
    costs = {}
    for name, job in (("ppo", several), ("rloo", rloo), ("grpo", grpo)):
        for trained in ("full", "lora"):
            costs[name, trained] = sum(without_head(replace(job, trained=trained)).values()) / unit
    assert costs["ppo", "lora"] == pytest.approx(42)
    assert costs["rloo", "full"] == pytest.approx(14)
    assert costs["rloo", "lora"] == pytest.approx(12)
    assert costs["grpo", "full"] == pytest.approx(8)
    assert costs["grpo", "lora"] == pytest.approx(6)
    assert sum(without_head(replace(rloo, old=False)).values()) / unit == pytest.approx(10)
    # beside a trained policy the critic is an adapter on the frozen copy: its updates cost 4 and not 6
    assert costs["ppo", "full"] == pytest.approx(58 - 4 * 2)
    # one minibatch, one micro-batch: the old log-probabilities come from the forward pass of the first update
    assert sum(without_head(JOB).values()) / unit == pytest.approx(40)
    assert sum(without_head(replace(JOB, stage="online_dpo")).values()) / unit == pytest.approx(42)


def test_a_pair_costs_what_the_model_says() -> None:
    """DPO 16 / 12 per pair and token of one row, 12 / 8 where the reference is known from an earlier epoch."""
    dpo = replace(JOB, stage="dpo", rollout=0, updates=1, critic="", reward="", shared=False)
    unit = N * 10 * 40
    for trained, cost in (("full", 16), ("lora", 12)):
        assert sum(without_head(replace(dpo, trained=trained)).values()) / unit == pytest.approx(cost)
    assert without_head(replace(dpo, epochs=1e9))["update"] / unit == pytest.approx(8)
    # the prompt once: 30 + 2 x 10 tokens and not 2 x 40
    assert sum(without_head(replace(dpo, shared=True)).values()) / unit == pytest.approx(12 * 50 / 80)


def test_standing_memory_by_hand() -> None:
    adapter = 10 * 8 * ((200 + 150 + 150 + 200) + 3 * 400)
    assert SHAPE.adapter(8) == adapter
    found = estimate(JOB, SHAPE, BOX, checkpointing=False, budget=64).standing
    parameters = N + 100 + 1000 * 100  # the last norm, the tied embedding; this shape has no other norms
    assert found == {
        "base": parameters * 4,
        "policy": adapter * (4 + 8),
        "reference": adapter * 4,
        "critic": adapter * (4 + 8),
        "reward": adapter * 4,
    }
    half = estimate(replace(JOB, compute=2), SHAPE, BOX, checkpointing=False, budget=64).standing
    assert (half["base"], half["policy"], half["reward"]) == (parameters * 2, adapter * (4 + 2 + 8), adapter * 6)
    packed = estimate(replace(JOB, compute=2, bits=4), SHAPE, BOX, checkpointing=False, budget=64).standing
    assert packed["base"] == round(N * (0.5 + 1 / 64 + 4 / 16384)) + (parameters - N) * 2
    full = estimate(replace(JOB, trained="full", frozen_copy=True), SHAPE, BOX, checkpointing=False, budget=64).standing
    assert full["policy"] == parameters * 8 and full["frozen copy"] == parameters * 4


def test_what_a_layer_keeps_is_what_autograd_keeps() -> None:
    """Numbers per token and layer against the tensors that a real pass saves, the weights left out."""
    model: Any = tiny_model("llama").requires_grad_(False)
    switch = lora.Switch(active=("x",))
    found = lora.inject(model, ["all"], switch)
    lora.new_adapter(model, "x", paths=found, rank=3, alpha=6, rslora=False, seed=0)
    block.install(model)
    choose_layout([model])
    row = TokenRow(token_ids=tuple(range(3, 44)), scored=(40,))  # the last one is not read
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.ndim > 1 and x.is_floating_point() and x.untyped_storage().data_ptr() not in own and x.numel() % 40 == 0:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        score_tokens(model, [row], layout="shared")
    config = model.config
    shape = Shape(
        name="tiny", layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads, head_size=config.head_dim, wide=config.intermediate_size, vocabulary=9, tied=True,
    )  # fmt: skip
    planned = shape.layers * layer_numbers(replace(JOB, rank=3), shape) * 40
    assert sum(kept.values()) == pytest.approx(planned, rel=0.15)


def test_the_tile_is_that_of_the_head() -> None:
    assert TILE == logprobs.TILE


def test_checkpointing_keeps_one_residual_a_layer() -> None:
    plain = estimate(JOB, SHAPE, BOX, checkpointing=False, budget=400)
    again = estimate(JOB, SHAPE, BOX, checkpointing=True, budget=400)
    assert again.updates["critic"] < plain.updates["critic"]
    # it costs one more forward pass of each backward
    assert again.flops["update"] - plain.flops["update"] == 4 * 2 * 2 * N * JOB.step_tokens
    # activations grow with the micro-batch, the rest does not
    twice = estimate(replace(JOB, rows=100, rollout=100), SHAPE, BOX, checkpointing=False, budget=800)
    once = estimate(replace(JOB, rows=100, rollout=100), SHAPE, BOX, checkpointing=False, budget=400)
    standing = sum(once.standing.values()) + BUFFERS["cpu"] + SHAPE.adapter(8) * 4
    assert twice.updates["critic"] - standing == pytest.approx(2 * (once.updates["critic"] - standing))


def test_settle_takes_the_fewest_compromises() -> None:
    job = replace(JOB, stage="sft", rows=1000, rollout=0, new=0, critic="", reward="", reference="")
    free = settle(job, SHAPE, BOX)
    assert (free.checkpointing, free.budget, free.fits) == (False, 1024, True)
    room = estimate(job, SHAPE, BOX, checkpointing=False, budget=512).peak
    tight = settle(job, SHAPE, replace(BOX, memory=round(room / 0.92) + 1))
    assert (tight.checkpointing, tight.budget) == (False, 512)
    long = replace(job, lengths=replace(LENGTHS, longest=600))  # no micro-batch can be smaller than its longest row
    room = estimate(long, SHAPE, BOX, checkpointing=True, budget=1024).peak
    tighter = settle(long, SHAPE, replace(BOX, memory=round(room / 0.92) + 1))
    assert (tighter.checkpointing, tighter.budget, tighter.peak) == (True, 1024, room)
    assert not settle(job, SHAPE, replace(BOX, memory=1000)).fits
    # what the file says is not changed
    asked = settle(job, SHAPE, replace(BOX, memory=1000), checkpointing=False, budget=300)
    assert (asked.checkpointing, asked.budget, asked.fits) == (False, 300, False)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_the_article_fits_a_card_of_24_gb(stage: str) -> None:
    """The question of its readers: three stages on Qwen2-7B, in bfloat16 and in four bits."""
    peaks = {}
    for bits in (None, 4):
        config = load(f"examples/article/{stage}.yaml", [f"quantization_bit={bits}"] if bits else [])
        found = settle(job_of(config, worst_case(config), bfloat16=True), TABLE["qwen2-7b"], machine("cuda:24GB"))
        assert found.fits
        peaks[bits] = found.standing["base"]
    assert peaks[None] == 7_615_616_512 * 2
    assert peaks[4] < 0.4 * peaks[None]
    config = load(f"examples/article/{stage}.yaml", [])
    assert not settle(job_of(config, worst_case(config), bfloat16=True), TABLE["qwen2-7b"], machine("cuda:12GB")).fits


def test_kernels_of_half_precision_on_a_cpu_are_counted_once() -> None:
    """Beside what a half-size number saves: the update of the same job, without activations that differ."""
    wide = estimate(JOB, SHAPE, BOX, checkpointing=False, budget=64)
    half = estimate(replace(JOB, compute=2), SHAPE, BOX, checkpointing=False, budget=64)
    card = estimate(replace(JOB, compute=2), SHAPE, replace(BOX, kind="cuda"), checkpointing=False, budget=64)
    assert (
        half.phases["save"] - sum(half.standing.values()) == wide.phases["save"] - sum(wide.standing.values()) + KERNELS
    )
    assert card.phases["save"] - sum(card.standing.values()) == SHAPE.adapter(8) * 4


def test_a_gpu_decodes_as_many_rows_as_an_eighth_of_it_holds() -> None:
    """A row: 2 x 10 layers x 50 x 2 bytes x 50 columns of cache, and 16 bytes for each of 1000 logits: 116,000 bytes."""
    job = replace(JOB, compute=2)
    card = replace(BOX, kind="cuda")
    assert slots(job, SHAPE, BOX) == 64
    assert slots(job, SHAPE, card) == 256
    assert slots(job, SHAPE, replace(card, memory=8 * 256 * 116_000)) == 256
    assert slots(job, SHAPE, replace(card, memory=8 * 256 * 116_000 - 8)) == 128
    assert slots(job, SHAPE, replace(card, memory=10**6)) == 64
    assert estimate(job, SHAPE, card, checkpointing=False, budget=64).slots == 256


def test_a_pass_on_a_gpu_starts_large() -> None:
    card = replace(BOX, kind="cuda")
    assert settle(JOB, SHAPE, card).budget == MOST["cuda"] == 32768
    assert settle(JOB, replace(SHAPE, hidden=2048), card).budget == MOST_WIDE == 6144
