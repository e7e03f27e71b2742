"""Peak memory by phase and role, floating-point operations, seconds: formulas of sizes (docs/memory.md states and derives them).

Symbols: N parameters that a token is multiplied with, T tokens of a micro-batch, L layers, c bytes of a number in the products,
d hidden size, q and k widths of queries and keys, f units between gate and down, v vocabulary.

What a layer keeps for its backward pass, in numbers per token (LoRA; `models/block.py` computes the rest again):

    2 d                the residual stream before each norm
    2 d                the norms' outputs, which the adapters' gradients need
    2 q + 2 k          queries, keys, values and what attention gives
    2 f                gate and up

With gradient checkpointing it is d per layer, and one layer's share at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trimtab.plan.job import Job
from trimtab.plan.machine import CONTEXT, USED, Machine
from trimtab.plan.shapes import Shape

CHUNK = 256
"""Rows of the output head's product that are in memory at a time (`ops/logprobs.py`)."""

SLOTS = {"cpu": 64, "cuda": 256}
"""Completions decoded at once at most (`engine`); on a GPU, beyond `FEWEST`, as many as take this share of its memory:"""

FEWEST, SHARE = 64, 1 / 8

LEAST = {"cpu": 256, "cuda": 1024}
"""Tokens of a micro-batch below which a pass is mostly overhead; recomputing activations is the better bargain."""

MOST = {"cpu": 1024, "cuda": 32768}
"""Tokens of a micro-batch beyond which a pass gets no faster for each of them. A GPU is busy with fewer; its host is not: a pass of a small
model takes it as long as one of 20,000 tokens takes the GPU (docs/log.md)."""

WIDE, MOST_WIDE = 2048, 6144
"""Models of this width on a GPU: this many."""

TILE = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits that the output head has in memory at a time (`ops/logprobs.py`, which this floor cannot import: a test compares them)."""

HELD = {"cpu": 1.3, "cuda": 1.05}
"""What the allocator holds for each byte of activations: measured on a CPU at 256 to 1024 tokens a pass (docs/memory.md)."""

BUFFERS = {"cpu": 110 * 2**20, "cuda": 0}
"""Buffers of the math library and code that is loaded on first use, measured as the part that no number of tokens explains."""

KERNELS = 470 * 2**20
"""What oneDNN keeps besides in bfloat16 on a CPU: a kernel for each shape and number of rows that it has met (docs/memory.md)."""

KEPT_FREE = 0.08
"""Share of the memory that a plan leaves alone: allocators round up, and lengths vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Attributes:
    standing: bytes that stay through the run, by what they are.
    phases: peak bytes of each phase, `standing` included.
    updates: the same for the update of each role that learns.
    checkpointing, budget: as the plan has them (tokens of a micro-batch); slots: completions decoded at once.
    flops: floating-point operations of a step, by phase.
    seconds: of a step, by phase.
    """

    standing: dict[str, int]
    phases: dict[str, int]
    updates: dict[str, int]
    checkpointing: bool
    budget: int
    flops: dict[str, float]
    seconds: dict[str, float]
    tokens_per_second: float
    hours: float | None
    fits: bool
    slots: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def settle(
    job: Job, shape: Shape, machine: Machine, *, checkpointing: bool | None = None, budget: int | None = None
) -> Estimate:
    """The estimate with what the file leaves open decided: the fewest compromises that fit into the machine's memory.

    First the micro-batch is halved, down to the longest row or to where passes are mostly overhead; then activations are
    recomputed, with the largest micro-batch again; then both.
    """
    kind = machine.kind
    room = machine.memory * (1 - KEPT_FREE)
    least = max(job.longest * (2 if job.rows_of_an_entry == 2 else 1), LEAST[kind])
    most = MOST_WIDE if kind == "cuda" and shape.hidden >= WIDE else MOST[kind]
    sizes = [budget] if budget else [most]
    while not budget and sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    recomputing = [checkpointing] if checkpointing is not None else [False, True]
    found: Estimate | None = None
    for recompute in recomputing:
        for size in sizes:
            found = estimate(job, shape, machine, checkpointing=recompute, budget=size)
            if found.peak <= room:
                return found
    assert found is not None
    return replace(found, fits=False)


def estimate(job: Job, shape: Shape, machine: Machine, *, checkpointing: bool, budget: int) -> Estimate:
    """Memory and time at the given micro-batch."""
    standing = _standing(job, shape, machine)
    base = sum(standing.values()) + BUFFERS[machine.kind]
    if machine.kind == "cpu" and job.compute == 2:
        base += KERNELS
    # as if nothing were shared: a step of unlike rows, or a model that is padded, must fit too
    tokens = max(min(budget, round(job.entries * (job.lengths.prompt + job.lengths.answer))), job.longest)
    phases = {"load": sum(standing.values()) + _loading(job, shape)}
    updates = {
        role: base
        + _learning(job, shape, role)
        + round(HELD[machine.kind] * _saved(job, shape, role, tokens, checkpointing=checkpointing, kind=machine.kind))
        for role in _learners(job)
    }
    if job.online:
        phases["rollout"] = base + _decoding(job, shape, machine)
        phases["score"] = base + _passing(job, shape, tokens, _head(job, shape, machine.kind))
    phases["update"] = max(updates.values())
    if job.evaluates:
        decoding = _decoding(job, shape, machine) if job.new else 0
        phases["eval"] = base + max(
            decoding, _passing(job, shape, tokens, _head(job, shape, machine.kind) if job.scored else 0)
        )
    phases["save"] = base + _trained(job, shape) * (4 if job.trained == "lora" else job.compute)
    flops = _flops(job, shape, machine.kind, checkpointing=checkpointing, budget=budget)
    seconds = _seconds(job, shape, machine, flops)
    total = sum(seconds.values())
    steps = job.steps()
    return Estimate(
        standing=standing,
        phases=phases,
        updates=updates,
        checkpointing=checkpointing,
        budget=budget,
        flops=flops,
        seconds=seconds,
        tokens_per_second=job.step_tokens / total if total else math.inf,
        hours=None if steps is None else total * steps / 3600,
        fits=max(phases.values()) <= machine.memory,
        slots=slots(job, shape, machine),
    )


# -------------------------------------------------------------------------------------------------------------- memory


def _learners(job: Job) -> list[str]:
    if job.stage == "rm":
        return ["reward"]
    return ["policy", "critic"] if job.critic == "adapter" else ["policy"]


def weights(job: Job, shape: Shape) -> int:
    """Bytes of the base: in the compute type, or its linear layers packed.

    Four bits: half a byte and a scale of one byte for each 64, in blocks of 256 scales with one of four (arXiv:2305.14314, section 3);
    eight bits: one byte and a scale of four for each row.
    """
    if job.bits is None:
        return shape.parameters * job.compute
    packed = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0 + 4 / shape.hidden}[job.bits]
    return round(shape.linear * packed) + (shape.parameters - shape.linear) * job.compute


def _trained(job: Job, shape: Shape) -> int:
    """Parameters of what one role trains."""
    if job.trained == "lora":
        return shape.adapter(job.rank, job.targets)
    return round(shape.parameters * job.share)


def _standing(job: Job, shape: Shape, machine: Machine) -> dict[str, int]:
    """What is there from the first step to the last: weights, adapters, optimizer states."""
    adapter = shape.adapter(job.rank, job.targets)
    held = 4 + (job.compute if job.compute < 4 else 0)  # the float32 matrices, and their casts for the products
    found = {"base": weights(job, shape)}
    if CONTEXT[machine.kind]:
        found["device"] = CONTEXT[machine.kind]
    if job.trained == "lora":
        found["policy"] = adapter * (held + 8)  # Adam's two moments
        if job.reference == "adapter":
            found["reference"] = adapter * held
    else:
        masters = 0 if job.pure or job.compute == 4 else 4
        moments = 2 * (job.compute if job.pure else 4)
        found["policy"] = round(shape.parameters * job.share * (masters + moments))
        if job.frozen_copy:
            found["frozen copy"] = shape.parameters * job.compute
    if job.reference == "model":
        found["reference"] = shape.parameters * job.compute
    if job.critic == "adapter":
        found["critic"] = adapter * (held + 8)
    if job.reward == "adapter":
        found["reward"] = adapter * held * max(1, job.judges)
    elif job.reward == "model":
        found["reward"] = shape.parameters * job.compute
    return found


def _loading(job: Job, shape: Shape) -> int:
    """While weights are read in another type than they are stored in: the largest tensor once more."""
    return shape.head * shape.stored if shape.stored != job.compute or job.bits else 0


def _learning(job: Job, shape: Shape, role: str) -> int:
    """Gradients of a role."""
    if job.trained == "lora" or role == "critic":
        return shape.adapter(job.rank, job.targets) * 4
    return round(shape.parameters * job.share) * (job.compute if job.pure else 4)


def layer_numbers(job: Job, shape: Shape) -> int:
    """Numbers that a layer keeps for each token until its backward pass."""
    d, q, k, f = shape.hidden, shape.queries, shape.keys, shape.wide
    return 4 * d + 2 * q + 2 * k + 2 * f + 8 * job.rank


def _saved(job: Job, shape: Shape, role: str, tokens: int, *, checkpointing: bool, kind: str) -> int:
    """Activations of a micro-batch until its backward pass, and what the backward pass itself needs."""
    c, layer = job.compute, layer_numbers(job, shape)
    kept = shape.layers * (shape.hidden if checkpointing else layer) * tokens * c
    unpacked = shape.hidden * shape.wide * c if job.bits else 0  # one packed weight at a time
    at_work = unpacked + (layer if checkpointing else 0) * tokens * c + 3 * max(shape.wide, shape.queries) * tokens * c
    if role == "policy" and job.scored:
        at_work = max(at_work, _head(job, shape, kind))
    return kept + at_work


def _head(job: Job, shape: Shape, kind: str) -> int:
    """A tile of logits: in the compute type and wide, and the exponentials."""
    return (TILE[kind] if kind == "cuda" else min(TILE[kind], CHUNK * shape.vocabulary)) * (8 + job.compute)


def _passing(job: Job, shape: Shape, tokens: int, head: int) -> int:
    """A pass without gradients: one layer at a time, then the output head."""
    d, q, k, f = shape.hidden, shape.queries, shape.keys, shape.wide
    return max((3 * d + 2 * q + 2 * k + 3 * f) * tokens * job.compute, head)


def _decoding(job: Job, shape: Shape, machine: Machine) -> int:
    """The cache of the rows that are decoded at once, the prefill, the logits of a token for all of them; on a CPU also the copy of the
    weights that the engine packs (`engine/products.py`), where that takes at most half of what is free."""
    prompts = job.rollout * job.group if job.online else FEWEST
    rows = min(slots(job, shape, machine), max(1, prompts))
    cache = _cached(job, shape) * rows
    copy = job.compute * (shape.linear + shape.head)
    if machine.kind != "cpu" or 2 * copy > machine.memory:
        copy = 0
    return copy + cache + max(_passing(job, shape, rows // max(1, job.group) * job.lengths.longest, 0),
                       rows * shape.vocabulary * DRAWING)  # fmt: skip


DRAWING = 16
"""Bytes of a logit while a token is drawn: four arrays of float32."""


def _cached(job: Job, shape: Shape) -> int:
    """Bytes of the keys and values of the longest row that is decoded."""
    return 2 * shape.layers * shape.keys * job.compute * (job.lengths.longest + job.new)


def slots(job: Job, shape: Shape, machine: Machine) -> int:
    """Completions that are decoded at once: a power of two on a GPU, where more rows cost hardly more time and their cache memory."""
    most = SLOTS[machine.kind]
    row = _cached(job, shape) + shape.vocabulary * DRAWING
    while most > FEWEST and most * row > machine.memory * SHARE:
        most //= 2
    return most


# ---------------------------------------------------------------------------------------------------------------- time


def _flops(job: Job, shape: Shape, kind: str, *, checkpointing: bool, budget: int) -> dict[str, float]:
    """Floating-point operations of a step (docs/memory.md, "Cost model"): 2 N L a forward pass over L tokens, and so on."""
    n, tokens = shape.linear, job.step_tokens
    scored = job.entries * job.lengths.answer if job.scored else 0.0
    head = 2 * shape.head * scored
    forward = 2 * n * tokens
    backward = (2 if job.trained == "lora" else 4) * n * tokens + (2 * n * tokens if checkpointing else 0)
    learn = forward + backward
    if not job.online:
        reference = (forward + head) if job.reference and job.epochs <= 1 else (forward + head) / max(1.0, job.epochs)
        found = {"update": learn + 2 * head}
        if job.reference:  # its log-probabilities are computed once for all epochs
            found["score"] = reference
        return found
    # the engine reads each prompt once in any layout, and on a CPU once what prompts of a pass begin with
    prompts = job.rollout * job.lengths.prompt * (1 - job.lengths.alike if kind == "cpu" else 1)
    found = {"rollout": 2 * n * (prompts + job.entries * job.lengths.answer) + head}
    # the first update begins with that pass
    held = job.rollout <= job.rows and job.stage != "online_dpo" and tokens <= budget
    score = forward + head if job.old and not held else 0
    if job.reference:
        score += forward + head
    if job.critic == "adapter":
        score += forward
    if job.reward:
        score += forward * max(1, job.judges)
    found["score"] = score
    critic = 4 * n * tokens + (2 * n * tokens if checkpointing else 0)
    found["update"] = job.updates * (learn + 2 * head + (critic if job.critic == "adapter" else 0))
    return found


def _seconds(job: Job, shape: Shape, machine: Machine, flops: dict[str, float]) -> dict[str, float]:
    rate = (machine.rate if job.compute == 2 else machine.rate32) * USED[machine.kind]
    found = {phase: value / rate for phase, value in flops.items()}
    if job.online:
        # every token of a wave reads all weights once, however many rows there are
        rows = job.rollout * job.group
        waves = -(-rows // slots(job, shape, machine))
        reading = waves * job.lengths.answer * weights(job, shape) / (machine.bandwidth * 0.6)
        found["rollout"] = max(found["rollout"], reading)
    return found
