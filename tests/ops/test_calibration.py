"""Calibration by hand."""

from __future__ import annotations

import pytest

from trimtab.ops.calibration import calibration_bins, calibration_error

pytestmark = pytest.mark.unit


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
    assert [bin.count for bin in calibration_bins([0.3, 1.2], [True, True], low=0.5)] == [
        1,
        *[0] * 8,
        1,
    ]  # held at the ends
    assert [(bin.low, bin.high) for bin in calibration_bins([], [], bins=2, low=0.5)] == [(0.5, 0.75), (0.75, 1.0)]
    assert calibration_error(calibration_bins([], [])) == 0.0
    assert calibration_error(calibration_bins([0.75], [True])) == 0.25
    with pytest.raises(ValueError, match="1 probabilities"):
        calibration_bins([0.5], [])
