"""Running moments, explained variance, calibration and correlation: by hand and against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.ops.stats import RunningMoments, calibration_bins, calibration_error, correlation, explained_variance

pytestmark = [pytest.mark.unit, pytest.mark.property]


def test_moments_by_hand() -> None:
    """1, 2 then 6: mean 3, squares about it 4 + 1 + 9 = 14, variance 14/3."""
    first = RunningMoments().merge([1.0, 2.0])
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


def ev(values: list[float], returns: list[float]) -> float:
    v, g = (torch.tensor([[*row, float("nan")]], dtype=torch.float64) for row in (values, returns))
    return explained_variance(v, g, ~v.isnan()).item()


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 have variance 8/3."""
    assert ev([0.0, 2.0, 4.0], [0.0, 2.0, 4.0]) == 1.0
    assert ev([7.0, 9.0, 11.0], [0.0, 2.0, 4.0]) == 1.0  # a constant error is bias, not variance
    assert ev([2.0, 2.0, 2.0], [0.0, 2.0, 4.0]) == 0.0
    assert ev([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == pytest.approx(0.75)  # errors -1, 0, 1: variance 2/3
    assert ev([4.0, 2.0, 0.0], [0.0, 2.0, 4.0]) == pytest.approx(-3.0)
    assert ev([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0  # nothing to explain


def test_correlation_by_hand() -> None:
    """x - mean = (-1, 0, 1), y - mean = (-1, 2, -1) + ...: r = 0 by symmetry; (1, 2, 4): 3 / sqrt(2 x 14/3)."""
    assert correlation([1.0, 2.0, 3.0], [1.0, 4.0, 1.0]) == pytest.approx(0.0)
    assert correlation([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert correlation([1.0, 1.0], [3.0, 2.0]) == correlation([], []) == 0.0
    with pytest.raises(ValueError, match="2 values"):
        correlation([1.0, 2.0], [1.0])


def test_calibration_by_hand() -> None:
    """Two bins. Low: 0.2 and 0.4, one of two true, |0.3 - 0.5| = 0.2. High: 1.0, true, 0. Mean error 2/3 x 0.2."""
    low, high = calibration_bins([0.2, 0.4, 1.0], [True, False, True], bins=2)
    assert (low.low, low.high, low.count, low.frequency) == (0.0, 0.5, 2, 0.5)
    assert low.probability == pytest.approx(0.3)
    assert (high.count, high.probability, high.frequency) == (1, 1.0, 1.0)  # the upper end belongs to the last bin
    assert calibration_error((low, high)) == pytest.approx(2 / 3 * 0.2)


def test_calibration_bins_of_a_preference_start_at_a_half() -> None:
    bins = calibration_bins([0.5, 0.99], [False, True], low=0.5)
    assert len(bins) == 10
    assert [bin.count for bin in bins] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert calibration_error(calibration_bins([], [])) == 0.0
    with pytest.raises(ValueError, match="1 probabilities"):
        calibration_bins([0.5], [])
