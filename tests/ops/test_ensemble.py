"""Combined scores of an ensemble by hand, in float64."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops.ensemble import combine, disagreement

pytestmark = pytest.mark.unit

SCORES = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, -6.0], [5.0, 5.0, 3.0]], dtype=torch.float64)


def test_by_hand() -> None:
    """Columns 1, 3, 5 (mean 3, variance 8/3), 5, 5, 5, and 0, -6, 3 (mean -1, variance 14)."""
    std = [(8 / 3) ** 0.5, 0.0, 14**0.5]
    assert disagreement(SCORES).tolist() == pytest.approx(std)
    assert combine(SCORES, "mean").tolist() == pytest.approx([3.0, 5.0, -1.0])
    assert combine(SCORES, "min").tolist() == [1.0, 5.0, -6.0]
    assert combine(SCORES, "mean_minus_std", 0.5).tolist() == pytest.approx(
        [m - 0.5 * s for m, s in zip([3.0, 5.0, -1.0], std, strict=True)]
    )


def test_doubt_counts_once_where_nothing_is_said() -> None:
    assert combine(SCORES, "mean_minus_std").tolist() == combine(SCORES, "mean_minus_std", 1.0).tolist()
    assert combine(SCORES, "mean_minus_std").tolist() != combine(SCORES, "mean").tolist()


def test_one_member_is_itself() -> None:
    for kind in ("mean", "min", "mean_minus_std"):
        assert combine(SCORES[:1], kind).tolist() == SCORES[0].tolist()
