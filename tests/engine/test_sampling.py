"""The fixed draw: its uniforms, its inverse CDF, and the filters, against numbers that can be derived."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from trimtab.engine.sampling import draw, filtered, next_tokens, penalise_repeats, uniforms
from trimtab.types import Sampling

pytestmark = pytest.mark.engine

# What chi-square with k degrees of freedom exceeds with probability 1e-4 (Wilson and Hilferty's approximation).
# The draws are fixed, so a pass is a pass for ever.


def chi_square_limit(k: int) -> float:
    return k * (1 - 2 / (9 * k) + 3.719 * math.sqrt(2 / (9 * k))) ** 3


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def one(seed: int = 0, epoch: int = 0, prompt: int = 0, sample: int = 0, tokens: int = 1) -> np.ndarray:
    return uniforms(seed, epoch, np.array([prompt]), np.array([sample]), tokens)[0]


def test_uniforms_are_multiples_in_the_half_open_interval() -> None:
    u = uniforms(1, 0, np.arange(100), np.zeros(100, dtype=int), 100)
    assert u.dtype == np.float32
    assert u.shape == (100, 100)
    assert u.min() >= 0
    assert u.max() < 1
    assert (u * 2.0**23 == np.round(u * 2.0**23)).all()
    assert len(np.unique(u)) > 9900  # of 10,000 draws from 2^23 values about 6 meet


def test_uniforms_in_plain_integers() -> None:
    """SplitMix64 once more, without NumPy: another generator would change every rollout, resumed runs in the middle."""
    word, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    state = golden
    for key in (42, 1, 5, 2):  # seed, epoch, prompt, sample
        state = mix((state * golden + key + golden) & word)
    expected = [(mix((state + i * golden) & word) >> 41) * 2.0**-23 for i in (1, 2, 3)]
    assert one(42, 1, 5, 2, 3).tolist() == expected


@pytest.mark.parametrize("key", ["seed", "epoch", "prompt", "sample", "token"])
def test_uniform_and_independent_along_each_key(key: str) -> None:
    n = 20_000
    if key == "token":
        u = one(7, tokens=n)
    elif key in ("prompt", "sample"):
        along, still = np.arange(n), np.zeros(n, dtype=int)
        u = uniforms(7, 0, *((along, still) if key == "prompt" else (still, along)), 1)[:, 0]
    else:
        u = np.concatenate([one(**{key: i}) for i in range(n)])
    bins = np.histogram(u, bins=20, range=(0, 1))[0]
    assert chi_square(bins, np.full(20, n / 20)) < chi_square_limit(19)
    # neighbours: each pair falls into 8 x 8 cells alike
    pairs = np.histogram2d(u[:-1], u[1:], bins=8, range=[[0, 1], [0, 1]])[0]
    assert chi_square(pairs, np.full((8, 8), (n - 1) / 64)) < chi_square_limit(63)
    # and every bit is fair
    bits = (u[:, None] * 2.0 ** np.arange(1, 24)).astype(np.int64) % 2
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(n)


def test_keys_do_not_stand_in_for_each_other() -> None:
    """(prompt 1, sample 0) is another stream than (prompt 0, sample 1), and so for every pair of keys."""
    streams = {
        tuple(one(seed, epoch, prompt, sample, 2))
        for seed in range(3)
        for epoch in range(3)
        for prompt in range(3)
        for sample in range(3)
    }
    assert len(streams) == 81
    # no stream is another one a few tokens later
    first, second = one(tokens=64), one(sample=1, tokens=64)
    assert not set(first.tolist()) & set(second.tolist())


def test_a_draw_is_one_number_whatever_is_drawn_beside_it() -> None:
    both = uniforms(5, 2, np.array([3, 9]), np.array([1, 0]), 8)
    assert both[0].tolist() == one(5, 2, 3, 1, 8).tolist()
    assert both[1, :4].tolist() == one(5, 2, 9, 0, 4).tolist()


def test_inverse_cdf_by_hand() -> None:
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25]).repeat(7, 1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999, 1 - 2.0**-23])
    # the cumulative sums are 0.25, 0.25, 0.75, 1: the first that exceeds u; token 1 has no probability and is never drawn
    assert draw(probs, u).tolist() == [0, 0, 2, 2, 3, 3, 3]


def test_probabilities_are_scaled_to_their_own_total() -> None:
    probs = torch.tensor([[0.2, 0.2, 0.0]])  # sums to 0.4
    assert [int(draw(probs, torch.tensor([u]))) for u in (0.0, 0.49, 0.5, 1 - 2.0**-23)] == [0, 0, 1, 1]


def test_the_last_tokens_of_a_large_vocabulary_get_their_share() -> None:
    """A float32 cumulative sum of 150,000 terms does not end at 1: scaled to its own end, no draw falls beyond it."""
    probs = torch.softmax(torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0)), dim=-1)
    probs[0, -1] = 0.0
    top = draw(probs, torch.tensor([1 - 2.0**-23]))
    assert 149_000 < int(top) < 149_999
    assert int(draw(probs, torch.tensor([0.0]))) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_chi_square_of_draws(temperature: float) -> None:
    n = 20_000
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -3.0])
    u = torch.from_numpy(uniforms(11, 0, np.arange(n), np.zeros(n, dtype=int), 1)[:, 0])
    tokens, logp = next_tokens(logits.repeat(n, 1), u, Sampling(temperature=temperature))
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    counts = torch.bincount(tokens, minlength=6).numpy()
    assert chi_square(counts, probs.numpy() * n) < chi_square_limit(5)
    torch.testing.assert_close(logp, probs.log()[tokens].float(), atol=1e-6, rtol=1e-6)


def test_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()  # probabilities 0.1, 0.4, 0.3, 0.2

    def kept(**keys: float) -> list[int]:
        return torch.isfinite(filtered(logits, Sampling(**keys))[0]).nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_k=9) == [0, 1, 2, 3]
    # the smallest set whose probability reaches p: 0.4, 0.7, 0.9, 1
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.6) == [1, 2]
    assert kept(top_p=0.75) == [1, 2, 3]
    # first k, then p of what is left: 0.4 and 0.3 become 4/7 = 0.571 and 3/7
    assert kept(top_k=2, top_p=0.5) == [1]
    assert kept(top_k=2, top_p=0.6) == [1, 2]
    # min-p: at least that share of 0.4
    assert kept(min_p=0.2) == [0, 1, 2, 3]
    assert kept(min_p=0.3) == [1, 2, 3]
    assert kept(min_p=0.6) == [1, 2]
    assert kept(min_p=1.0) == [1]


@pytest.mark.parametrize(
    ("k", "p", "least", "penalty"),
    [(0, 0.7, 0, 1.0), (5, 1.0, 0, 1.3), (50, 0.7, 0, 1.0), (12, 0.3, 0, 0.8), (0, 1.0, 0.1, 1.0), (50, 0.9, 0.3, 1.3)],
)
def test_filters_are_those_of_transformers(k: int, p: float, least: float, penalty: float) -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(1)) * 2
    ids = torch.randint(0, 100, (8, 10), generator=torch.Generator().manual_seed(2))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()) if penalty != 1 else logits
    if k:
        theirs = TopKLogitsWarper(k)(ids, theirs)
    if p < 1:
        theirs = TopPLogitsWarper(p)(ids, theirs)
    if least:
        theirs = MinPLogitsWarper(least)(ids, theirs)
    seen = torch.zeros(8, 100, dtype=torch.bool).scatter(1, ids, True)
    ours = filtered(penalise_repeats(logits, seen, penalty), Sampling(top_k=k, top_p=p, min_p=least))
    assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
    torch.testing.assert_close(ours, theirs)


def test_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([[3.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalise_repeats(logits, seen, 2.0).tolist() == [[1.5, -4.0, 1.0]]
    greedy = Sampling(temperature=0.0, repetition_penalty=4.0)
    assert next_tokens(logits, torch.zeros(1), greedy, seen)[0].tolist() == [2]  # 3 / 4 < 1


def test_logprobs_are_those_of_the_plain_policy() -> None:
    """Whatever is filtered out, the log-probability kept is of the full distribution at the temperature."""
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    token, logp = next_tokens(logits, torch.tensor([0.9]), Sampling(top_k=2))
    assert token.tolist() == [2]
    assert logp.item() == pytest.approx(math.log(0.3))
    token, logp = next_tokens(logits, torch.tensor([0.9]), Sampling(temperature=0.0))
    assert token.tolist() == [1]
    assert logp.item() == pytest.approx(math.log(0.4))
