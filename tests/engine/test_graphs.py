"""Recorded steps and steps ahead of the host: both give the texts of plain decoding. What records is a stand-in: a CPU has no graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.engine.test_generator import NEVER, engine, policy, prompt, texts
from trimtab.engine import generator, graphs
from trimtab.engine.blocks import BlockDecoder, Weights
from trimtab.engine.graphs import AFTER, COLUMNS, LEFT, Record
from trimtab.types import Sampling

pytestmark = pytest.mark.engine

ROWS = [prompt(i, *range(20 + i, 24 + i + 7 * (i % 5))) for i in range(13)]
"""Prompts of 4 to 32 tokens."""
SAMPLING = Sampling(max_new_tokens=60, seed=4)
"""Rows of 64 to 92 tokens."""
STOPS = tuple(range(3, 20))
"""Rows end after a few tokens to sixty, so that eight slots are full, half full and nearly empty."""


class Tape:
    """Records as a graph does: a replay runs the same function again and writes over what the last one gave."""

    def __init__(self, spoil: float = 0.0) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.replayed = 0
        self.spoil = spoil

    def __call__(self) -> Record:
        def record(run: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], Tensor]:
            first = run()
            out = first.clone()
            self.sizes.append(tuple(out.shape))

            def replay() -> Tensor:
                self.replayed += 1
                return out.copy_(run()).add_(self.spoil)

            return replay, first

        return record


def recording(monkeypatch: pytest.MonkeyPatch, record: Callable[[], object]) -> None:
    """Engines on this CPU record as they would on a GPU."""
    monkeypatch.setattr(graphs, "_refused", [])
    monkeypatch.setattr(graphs, "recorder", lambda device: None if graphs._refused else record())


def test_replayed_texts_are_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = policy()
    for sampling in (SAMPLING, Sampling(temperature=0.0, max_new_tokens=60)):
        plain = engine(roles, STOPS, slots=8).generate(ROWS, sampling)
        tape = Tape()
        recording(monkeypatch, tape)
        done = engine(roles, STOPS, slots=8).generate(ROWS, sampling)
        assert texts(done) == texts(plain)
        assert [c.finish for c in done] == [c.finish for c in plain]
        for ours, theirs in zip(done, plain, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert tape.replayed > 3 * len(tape.sizes) > 0
        monkeypatch.undo()


def steps_of(slots: int, calls: list[tuple[int, int]]) -> tuple[Tape, list[tuple[int, int]]]:
    """Steps of (rows, columns) through a decoder that records, and the sizes that its blocks were asked for."""
    tape = Tape()
    weights = Weights(policy().model, (), packing=False)
    decoder = BlockDecoder(weights, slots, 150, tape())
    asked: list[tuple[int, int]] = []
    plain = decoder._step

    def seen(tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
        asked.append((len(tokens), width))
        return plain(tokens, lengths, width)

    decoder._step = seen  # type: ignore[method-assign]
    with torch.no_grad():
        for rows, columns in calls:
            tokens, lengths = torch.arange(20, 20 + rows), torch.full((rows,), columns - 1)
            found = decoder.step(tokens, lengths, columns - 1)
            torch.testing.assert_close(found, plain(tokens, lengths, columns), atol=1e-5, rtol=1e-5)
    return tape, asked


def test_a_size_is_recorded_when_it_comes_back_and_sizes_are_few() -> None:
    tape, asked = steps_of(12, [(5, 10)] * AFTER)
    assert not tape.sizes and asked == [(5, 10)] * AFTER
    tape, asked = steps_of(12, [(5, 10)] * AFTER + [(6, COLUMNS - LEFT), (7, 60)])
    assert len(tape.sizes) == 1 and set(asked[AFTER:]) == {(8, COLUMNS)}
    tape, asked = steps_of(12, [(5, 192 - LEFT + 1)] * 9)
    assert not tape.sizes  # too few columns are left for it to pay
    sizes = [(r, c) for r in (1, 2, 3, 9) for c in (10, COLUMNS - LEFT + 1)]
    tape, asked = steps_of(12, sizes * (AFTER + 1))
    # rows and columns to a power of two, or all slots, or all columns: 150, in whole steps of 64
    assert set(asked) - set(sizes) == {(r, c) for r in (1, 2, 4, 12) for c in (COLUMNS, 192)}
    assert len(tape.sizes) == 8


def test_recordings_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    sizes = [(r, 10) for r in (1, 2, 3)]
    tape, _ = steps_of(12, sizes * (AFTER + 1) + [(1, 10)])
    assert [rows for rows, _ in tape.sizes] == [1, 2, 4, 1]


def test_a_replay_leaves_earlier_states_alone() -> None:
    decoder = BlockDecoder(Weights(policy().model, (), packing=False), 2, 64, Tape()())
    with torch.no_grad():
        states = [decoder.step(torch.tensor([20 + i]), torch.tensor([i]), i) for i in range(AFTER + 2)]
        kept = states[-2].clone()
        decoder.step(torch.tensor([99]), torch.tensor([AFTER + 2]), AFTER + 2)
    assert torch.equal(states[-2], kept) and not torch.equal(states[-1], kept)


def test_a_recording_that_gives_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = policy()
    plain = engine(roles, STOPS, slots=8).generate(ROWS, SAMPLING)
    tape, said = Tape(spoil=1.0), []
    recording(monkeypatch, tape)
    own = engine(roles, STOPS, slots=8, say=said.append)
    assert texts(own.generate(ROWS, SAMPLING)) == texts(plain)
    assert len(tape.sizes) == 1
    assert len(said) == 1 and "other hidden states" in said[0]
    again = engine(roles, STOPS, slots=8, say=said.append)  # as every step of a training run makes its own
    again.generate(ROWS, SAMPLING)
    assert len(tape.sizes) == 1 and len(said) == 1


def test_a_recording_that_holds_its_inputs_fast_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the right states for the tokens that it was recorded with, and for no others."""

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], Tensor]:
        out = run().clone()
        return lambda: out, out

    said: list[str] = []
    recording(monkeypatch, lambda: record)
    engine(policy(), STOPS, slots=8, say=said.append).generate(ROWS, SAMPLING)
    assert len(said) == 1 and "does not read its tokens" in said[0]


def test_nan_is_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape(spoil=float("nan"))
    recording(monkeypatch, tape)
    engine(policy(), STOPS, slots=8, say=lambda line: None).generate(ROWS, SAMPLING)
    assert graphs._refused


def test_a_recording_that_fails_is_said_and_decoding_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], Tensor]:
        raise torch.OutOfMemoryError("no memory for a graph\nand more")

    roles, said = policy(), []
    plain = engine(roles, STOPS, slots=8).generate(ROWS, SAMPLING)
    recording(monkeypatch, lambda: refuse)
    done = engine(roles, STOPS, slots=8, say=said.append).generate(ROWS, SAMPLING)
    assert texts(done) == texts(plain)
    assert len(said) == 1 and said[0].endswith("recording failed: no memory for a graph")


def test_the_cache_goes_with_its_decoder() -> None:
    """Nothing keeps a cache until the garbage collector runs: its memory is needed by the update that follows."""
    weights = Weights(policy().model, (), packing=False)
    decoder = BlockDecoder(weights, 2, 16, Tape()())
    gc.disable()
    try:
        with torch.no_grad():
            decoder.step(torch.tensor([20]), torch.tensor([0]), 0)
        held = weakref.ref(decoder.k)
        del decoder
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["blocks", "forward"])
@pytest.mark.parametrize("ahead", [2, 3, 7, 100])
def test_texts_do_not_depend_on_how_often_the_host_looks(way: str, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "forward":
        monkeypatch.setattr(generator, "why_not", lambda model, active: "the test says so")
    roles = policy()
    short = Sampling(max_new_tokens=10, seed=3, repetition_penalty=1.3, stop=("31",))
    for sampling, stops in ((SAMPLING, STOPS), (short, NEVER)):
        found = []
        for n in (1, ahead):
            own = engine(roles, stops, slots=6, ahead=n, decode=lambda ids: " ".join(map(str, ids)))
            found.append(own.generate(ROWS, sampling, k=2))
        one, other = found
        assert texts(one) == texts(other)
        assert [c.finish for c in one] == [c.finish for c in other]
        assert len({c.finish for c in one}) > 1 or stops is STOPS
        for a, b in zip(one, other, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_the_host_looks_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    plain = generator.Engine._told

    def told(self: generator.Engine, rows: object, drawn: list[object], sampling: Sampling) -> object:
        looks.append(len(drawn))
        return plain(self, rows, drawn, sampling)  # type: ignore[arg-type]

    monkeypatch.setattr(generator.Engine, "_told", told)
    engine(policy(), ahead=4).generate(ROWS[:2], Sampling(max_new_tokens=10))
    assert looks == [1, 4, 4, 1]  # the first token comes from the prompts' pass; never past the limit
