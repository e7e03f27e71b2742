"""Running moments and correlation: by hand and against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.ops.moments import RunningMoments, correlation

pytestmark = [pytest.mark.unit, pytest.mark.property]


def test_moments_by_hand() -> None:
    """1, 2 then 6: mean 3, squares about it 4 + 1 + 9 = 14, variance 14/3."""
    nothing = RunningMoments()
    assert (nothing.count, nothing.mean, nothing.m2, nothing.std) == (0, 0.0, 0.0, 0.0)
    first = nothing.merge([1.0, 2.0])
    both = first.merge([6.0])
    assert (first.count, first.mean, first.m2) == (2, 1.5, 0.5)
    assert (both.count, both.mean) == (3, 3.0)
    assert both.m2 == pytest.approx(14.0)
    assert both.std == pytest.approx(math.sqrt(14 / 3))
    assert first.mean == 1.5  # a value: merging made a new one


def test_a_unit_is_one_until_something_varies() -> None:
    assert RunningMoments().unit == RunningMoments().merge([5.0]).unit == RunningMoments().merge([2.0, 2.0]).unit == 1.0
    assert RunningMoments().merge([1.0, 3.0]).unit == 1.0 == RunningMoments().merge([1.0, 3.0]).std
    assert RunningMoments().merge([1.0, 5.0]).unit == 2.0


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=5), st.sampled_from([0.0, 1e6]))
def test_batches_merge_to_the_moments_of_all(batches: list[list[float]], offset: float) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments = moments.merge([x + offset for x in batch])
    everything = np.array([x + offset for batch in batches for x in batch])
    assert moments.count == len(everything)
    if len(everything):
        assert moments.mean == pytest.approx(everything.mean(), rel=1e-12, abs=1e-9)
        assert moments.std == pytest.approx(everything.std(), rel=1e-6, abs=1e-6)


def test_correlation_by_hand() -> None:
    """x - mean = (-1, 0, 1), y - mean = (-1, 2, -1) + ...: r = 0 by symmetry; (1, 2, 4): 3 / sqrt(2 x 14/3)."""
    assert correlation([1.0, 2.0, 3.0], [1.0, 4.0, 1.0]) == pytest.approx(0.0)
    assert correlation([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert correlation([1.0, 1.0], [3.0, 2.0]) == correlation([3.0, 2.0], [1.0, 1.0]) == correlation([], []) == 0.0
    with pytest.raises(ValueError, match="2 values"):
        correlation([1.0, 2.0], [1.0])
