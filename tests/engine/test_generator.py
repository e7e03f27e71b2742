"""The engine against transformers, against itself in other company, and against the scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.engine import generator
from trimtab.engine.generator import Engine
from trimtab.models import lora
from trimtab.models.forward import score_tokens
from trimtab.models.roles import Roles
from trimtab.models.tiny import FAMILIES, Family, tiny_model, tiny_tokenizer
from trimtab.types import Completion, Example, Origin, Prompt, Sampling, TokenRow

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("way")]


@pytest.fixture(params=["blocks", "forward"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything twice: through the decoder of the Llama family, and through the model's own forward pass."""
    if request.param == "forward":
        monkeypatch.setattr(generator, "why_not", lambda model, active: "the test says so")


NEVER = (100_000,)
"""A stop token that no model here writes."""


def prompt(index: int, *ids: int) -> Prompt:
    return Prompt(index=index, token_ids=ids, example=Example(origin=Origin(file="f", row=1 + index)))


PROMPTS = [
    prompt(0, 20, 31, 42),
    prompt(1, *range(40, 71)),
    prompt(2, 99),
    prompt(3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14),
    prompt(4, 20, 31, 43),
]

# which begin as prompt 1 does: with sixteen of its tokens, with its first twenty-four alone, and all of it
ALIKE = [prompt(5, *range(40, 60), 7), prompt(6, *range(40, 64)), prompt(7, *range(40, 71))]


def policy(family: Family = "qwen2") -> Roles:
    model = tiny_model(family).requires_grad_(False)
    roles = Roles(model=model)
    found = lora.inject(model, ["all"], roles.switch)
    for i, name in enumerate(("x", "idle")):
        lora.new_adapter(model, name, paths=found, rank=3, alpha=6, rslora=False, seed=0)
        generator = torch.Generator().manual_seed(1 + i)
        for parameter in lora.parameters(model, name).values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    roles.define("policy", "x")
    roles.define("base")
    return roles


def engine(roles: Roles, stop_ids: tuple[int, ...] = NEVER, **keys: Any) -> Engine:
    return Engine(roles=roles, role="policy", stop_ids=stop_ids, **keys)


def texts(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers(family: Family) -> None:
    roles = policy(family)
    ours = engine(roles).generate([*PROMPTS, *ALIKE], Sampling(temperature=0.0, max_new_tokens=12))
    base = Engine(roles=roles, role="base", stop_ids=NEVER).generate(
        [*PROMPTS, *ALIKE], Sampling(temperature=0.0, max_new_tokens=12)
    )
    with roles.enter("policy"):
        for p, completion in zip([*PROMPTS, *ALIKE], ours, strict=True):
            out = roles.model.generate(
                torch.tensor([p.token_ids]),
                attention_mask=torch.ones(1, len(p.token_ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                min_new_tokens=12,
                eos_token_id=NEVER[0],
                pad_token_id=0,
            )
            assert completion.token_ids == tuple(out[0, len(p.token_ids) :].tolist())
            assert completion.finish == "length"
    assert texts(base) != texts(ours)  # the adapter was active, and is not in a role without it


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_on_a_hundred_prompts(family: Family) -> None:
    """Ten lengths, in sixteen slots, so that rows join and leave. A text may part from transformers' only where two tokens tie."""
    roles = policy(family)
    numbers = np.random.default_rng(0)
    prompts = [prompt(i, *numbers.integers(3, 120, size=3 + 5 * (i % 10)).tolist()) for i in range(100)]
    ours = engine(roles, slots=16).generate(prompts, Sampling(temperature=0.0, max_new_tokens=10))
    parted = 0
    for start in range(10):
        some = list(range(start, 100, 10))
        ids = torch.tensor([prompts[i].token_ids for i in some])
        with roles.enter("policy"):
            out = roles.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, min_new_tokens=10,
                eos_token_id=NEVER[0], pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        for row, i in enumerate(some):
            theirs = out.sequences[row, ids.shape[1] :].tolist()
            for t, (a, b) in enumerate(zip(ours[i].token_ids, theirs, strict=True)):
                if a != b:
                    best = out.logits[t][row].topk(2).values
                    assert float(best[0] - best[1]) < 1e-5, f"prompt {i}, token {t}"
                    parted += 1
                    break
    assert parted <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_those_of_the_scorer(family: Family) -> None:
    roles = policy(family)
    for temperature in (1.0, 0.7):
        completions = engine(roles).generate(PROMPTS, Sampling(temperature=temperature, max_new_tokens=9), k=2)
        rows = [
            TokenRow(
                token_ids=(*PROMPTS[c.prompt_index].token_ids, *c.token_ids),
                scored=tuple(range(n := len(PROMPTS[c.prompt_index].token_ids), n + len(c.token_ids))),
            )
            for c in completions
        ]
        with torch.no_grad(), roles.enter("policy"):
            scored = score_tokens(roles.model, rows, layout="shared", temperature=temperature)
        drawn = torch.tensor([c.logprobs for c in completions])
        torch.testing.assert_close(drawn, scored.logp, atol=1e-4, rtol=0)


def test_texts_do_not_depend_on_companions_slots_or_k() -> None:
    roles = policy()
    sampling = Sampling(max_new_tokens=10, seed=3, epoch=1)
    stop = (17, 23, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49)  # rows leave at different times
    whole = engine(roles, stop).generate(PROMPTS, sampling, k=3)
    assert [(c.prompt_index, c.sample_index) for c in whole] == [(p, s) for p in range(5) for s in range(3)]
    assert len({len(c.token_ids) for c in whole}) > 1
    for slots in (1, 4, 7):
        again = engine(roles, stop, slots=slots).generate(PROMPTS, sampling, k=3)
        assert texts(again) == texts(whole)
    alone = [engine(roles, stop).generate([p], sampling, k=3) for p in PROMPTS]
    assert [text for some in alone for text in texts(some)] == texts(whole)
    assert texts(engine(roles, stop).generate(PROMPTS[::-1], sampling, k=1)) == texts(whole)[::3][::-1]
    for one, other in zip([c for some in alone for c in some], whole, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.finish == other.finish


def test_memory_that_runs_out_halves_the_slots_and_repeats_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the third step of more than six rows the device is full; later with more than three, and then there is room."""
    roles = policy()
    sampling = Sampling(max_new_tokens=10, seed=3)
    stop = tuple(range(40, 60))
    want = engine(roles, stop).generate(PROMPTS, sampling, k=3)
    most, steps = [6, 3, 10**9], [0]
    plain = Engine._decoder

    def crowded(self: Engine, slots: int, capacity: int) -> Any:
        made = plain(self, slots, capacity)
        step, limit = made.step, most.pop(0)

        def full(tokens: torch.Tensor, lengths: torch.Tensor, longest: int) -> torch.Tensor:
            steps[0] += 1
            if len(tokens) > limit and steps[0] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
            return step(tokens, lengths, longest)

        made.step = full
        return made

    monkeypatch.setattr(Engine, "_decoder", crowded)
    said: list[str] = []
    counted: list[int] = []
    one = engine(roles, stop, say=said.append)
    got = one.generate(PROMPTS, sampling, k=3, progress=counted.append)
    assert texts(got) == texts(want) and [c.finish for c in got] == [c.finish for c in want]
    assert len(said) == 2 and one.slots == 3 and sum(counted) == len(got)
    most[:] = [2]
    with pytest.raises(torch.OutOfMemoryError):  # three answers to a prompt cannot be parted
        engine(roles, stop, slots=3).generate(PROMPTS[:1], sampling, k=3)


def test_other_seeds_and_epochs_are_other_texts() -> None:
    roles = policy()
    found = {
        tuple(texts(engine(roles).generate(PROMPTS, Sampling(max_new_tokens=6, seed=seed, epoch=epoch), k=2)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(found) == 4
    completions = engine(roles).generate(PROMPTS, Sampling(max_new_tokens=6), k=2)
    assert len(set(texts(completions))) == 10  # the k of one prompt differ too


def test_endings() -> None:
    roles = policy()
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    free = engine(roles).generate([PROMPTS[0]], greedy)[0].token_ids
    third = free[2]
    cut = free.index(third) + 1
    stopped = engine(roles, (third, 100_000)).generate([PROMPTS[0]], greedy)[0]
    assert (stopped.token_ids, stopped.finish, stopped.finished) == (free[:cut], "stop", True)  # the stop token is kept
    other = engine(roles, (100_000, third)).generate([PROMPTS[0]], greedy)[0]
    assert (other.token_ids, other.finish, other.finished) == (free[:cut], "other_stop", False)
    short = engine(roles).generate([PROMPTS[0]], Sampling(temperature=0.0, max_new_tokens=3))[0]
    assert (short.token_ids, short.finish, short.finished) == (free[:3], "length", False)
    # a stop token as the very last that the limit allows is a stop
    last = engine(roles, (third,)).generate([PROMPTS[0]], Sampling(temperature=0.0, max_new_tokens=cut))[0]
    assert last.finish == "stop"


def test_stop_strings() -> None:
    roles = policy()
    decode = tiny_tokenizer("qwen2").decode
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    free = engine(roles).generate([PROMPTS[0]], greedy)[0].token_ids
    string = decode(free[1:3])  # made of two tokens
    expected = next(i for i in range(1, 9) if string in decode(free[:i]))
    found = engine(roles, decode=decode).generate(
        [PROMPTS[0]], Sampling(temperature=0.0, max_new_tokens=8, stop=("never", string))
    )[0]
    assert (found.token_ids, found.finish) == (free[:expected], "other_stop")


def test_stream_is_generate() -> None:
    roles = policy()
    sampling = Sampling(max_new_tokens=10, seed=5)
    whole = engine(roles).generate([PROMPTS[3]], sampling)[0]
    tokens = []
    for token in engine(roles).stream(PROMPTS[3], sampling):
        tokens.append(token)
        with roles.enter("base"):  # between two tokens the reader may compute as any role
            pass
    assert tuple(token.token_id for token in tokens) == whole.token_ids
    assert [token.finish for token in tokens] == [None] * 9 + ["length"]
    # a reader who goes away leaves nothing switched on
    stream = engine(roles).stream(PROMPTS[3], sampling)
    next(stream)
    stream.close()
    assert roles.switch.active == ()


def test_version_and_progress() -> None:
    roles = policy()
    generator = engine(roles)
    generator.update(7)
    seen: list[int] = []
    completions = generator.generate(PROMPTS, Sampling(max_new_tokens=2), k=2, progress=seen.append)
    assert {c.policy_version for c in completions} == {7}
    assert sum(seen) == 10
    assert generator.generate([], Sampling()) == []


def test_chi_square_of_first_tokens() -> None:
    """The engine's own draws, from prefill to token, against the model's probabilities."""
    roles = policy()
    n = 3000
    completions = engine(roles, slots=n).generate([PROMPTS[0]], Sampling(max_new_tokens=1, seed=9), k=n)
    with torch.no_grad(), roles.enter("policy"):
        probs = roles.model(torch.tensor([PROMPTS[0].token_ids])).logits[0, -1].softmax(-1).double().numpy()
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=len(probs))
    order = np.argsort(-probs)
    groups = np.array_split(order, 12)  # rare tokens together
    observed = np.array([counts[group].sum() for group in groups])
    expected = np.array([probs[group].sum() for group in groups]) * n
    assert expected.min() > 5
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 36.9  # 11 degrees of freedom, p = 1e-4 (Wilson and Hilferty: 36.9)


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    """Greedy with a penalty, against the same steps by hand on full forward passes."""
    roles = policy()
    penalty = 1.8
    found = engine(roles).generate(
        PROMPTS, Sampling(temperature=0.0, max_new_tokens=8, repetition_penalty=penalty), k=1
    )
    free = engine(roles).generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=8))
    assert texts(found) != texts(free)
    with torch.no_grad(), roles.enter("policy"):
        for p, completion in zip(PROMPTS, found, strict=True):
            ids = list(p.token_ids)
            for _ in range(8):
                logits = roles.model(torch.tensor([ids])).logits[0, -1].clone()
                for token in set(ids):
                    logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
                ids.append(int(logits.argmax()))
            assert completion.token_ids == tuple(ids[len(p.token_ids) :])


def test_filters_act_in_the_engine() -> None:
    roles = policy()
    greedy = engine(roles).generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=6))
    for sampling in (Sampling(top_k=1, max_new_tokens=6), Sampling(top_p=1e-6, max_new_tokens=6)):
        found = engine(roles).generate(PROMPTS, sampling)
        assert texts(found) == texts(greedy)
        assert all(
            math.exp(lp) < 1 for c in found for lp in c.logprobs
        )  # of the whole distribution, not the filtered one
