"""pass@k, bootstrap intervals and McNemar's test, against numbers derived by hand and the definitions."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.ops import significance
from trimtab.ops.significance import bootstrap_interval, mcnemar, pass_at_k, weighted_mean

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2) / C(4,2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - C(2,2) / C(4,2) = 1 - 1/6
        (4, 3, 2, 1.0),
        (5, 0, 5, 0.0),
        (5, 1, 5, 1.0),
        (10, 3, 4, 1 - 35 / 210),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [1] * c + [0] * (n - c)
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_of_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} from {c} right of {n}"):
        pass_at_k(n, c, k)


def test_pass_at_k_of_many_answers_does_not_overflow() -> None:
    assert pass_at_k(2000, 1000, 1000) == 1.0
    assert pass_at_k(2000, 1, 500) == pytest.approx(0.25)


def test_weighted_means() -> None:
    assert weighted_mean([1.0, 0.0, 0.0, 1.0]) == 0.5
    assert weighted_mean([1.0, 0.0, 1.0], [3.0, 1.0, 0.0]) == 0.75
    assert weighted_mean([2.0, 4.0], [0.5, 0.5]) == 3.0
    assert math.isnan(weighted_mean([1.0, 0.0], [0.0, 0.0])) and math.isnan(weighted_mean([]))
    with pytest.raises(ValueError):
        weighted_mean([1.0, 0.0], [1.0])


def test_an_interval_by_hand() -> None:
    """Of 0 and 1 the means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: its quantiles are known."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0], level=0.52, draws=20_000) == (0.0, 1.0)  # beyond 1/4 on both sides
    assert bootstrap_interval([0.0, 1.0], level=0.48, draws=20_000) == (0.5, 0.5)
    assert bootstrap_interval([3.5]) == (3.5, 3.5)
    assert bootstrap_interval([1.0, 1.0, 1.0, 1.0]) == (1.0, 1.0)


def test_an_interval_of_many_rows_is_the_normal_one() -> None:
    values = [1.0] * 120 + [0.0] * 280
    low, high = bootstrap_interval(values)
    half = NormalDist().inv_cdf(0.975) * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.006) and high == pytest.approx(0.3 + half, abs=0.006)
    wide = bootstrap_interval(values, level=0.99)
    assert wide[0] < low and wide[1] > high


def test_weights_of_an_interval() -> None:
    """With one row that counts, every draw that has it gives its value; draws without it have no mean."""
    assert bootstrap_interval([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]) == (1.0, 1.0)
    assert bootstrap_interval([2.0, 6.0], [1.0, 3.0]) == (2.0, 6.0)
    assert bootstrap_interval([2.0, 6.0], [1.0, 3.0], level=0.4) == (5.0, 5.0)  # (2 + 18) / 4
    assert bootstrap_interval([0.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == bootstrap_interval([0.0, 1.0, 1.0])
    assert all(map(math.isnan, bootstrap_interval([1.0, 0.0], [0.0, 0.0])))
    assert all(map(math.isnan, bootstrap_interval([])))
    assert [type(end) for end in bootstrap_interval([0.0, 1.0])] == [float, float]  # NumPy's own would not go into JSON


def test_an_interval_is_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(v) for v in np.linspace(0, 1, 37) ** 3]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values) == bootstrap_interval(values, seed=0)
    rng = np.random.default_rng(7)
    means = np.asarray(values)[rng.integers(37, size=(50, 37))].mean(axis=1)
    assert bootstrap_interval(values, seed=7, draws=50) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    # in blocks: as many draws, and none of them twice
    calls: list[tuple[int, int]] = []
    generator = np.random.default_rng

    class Counted:
        def __init__(self, seed: int) -> None:
            self.inner = generator(seed)

        def integers(self, high: int, size: tuple[int, int]) -> np.ndarray:
            calls.append(size)
            return self.inner.integers(high, size=size)

    block = significance.BLOCK
    monkeypatch.setattr(significance, "BLOCK", 100)
    monkeypatch.setattr(np.random, "default_rng", Counted)
    bootstrap_interval(values, draws=5)
    assert calls == [(2, 37), (2, 37), (1, 37)]
    calls.clear()
    monkeypatch.setattr(significance, "BLOCK", 10)
    bootstrap_interval(values, draws=2)
    assert calls == [(1, 37), (1, 37)]
    calls.clear()
    monkeypatch.setattr(significance, "BLOCK", block)
    bootstrap_interval(values)
    assert calls == [(2000, 37)]


@pytest.mark.parametrize(
    ("b", "c", "expected"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 5, 2 * 7 / 64),  # 1 + 6 of 64, twice
        (2, 8, 2 * 56 / 1024),  # 1 + 10 + 45
        (1, 0, 1.0),
        (0, 2, 0.5),
    ],
)
def test_mcnemar_by_hand(b: int, c: int, expected: float) -> None:
    assert mcnemar(b, c) == pytest.approx(expected, abs=1e-15)


def test_mcnemar_of_many_rows() -> None:
    assert mcnemar(2000, 2000) == 1.0
    z = (600 - 500 - 1) / math.sqrt(1100)
    assert mcnemar(500, 600) == pytest.approx(2 * (1 - NormalDist().cdf(z)), rel=0.02)
