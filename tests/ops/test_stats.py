"""Explained variance by hand."""

from __future__ import annotations

import pytest
import torch

from tests.ops.workers import together
from trimtab.ops.stats import explained_variance

pytestmark = pytest.mark.unit


def ev(values: list[float], returns: list[float]) -> float:
    v, g = (torch.tensor([[*row, float("nan")]], dtype=torch.float64) for row in (values, returns))
    return explained_variance(v, g, ~v.isnan()).item()


def test_workers_explain_the_variance_of_all() -> None:
    v, g = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [4.0, 9.0]])
    mask = torch.ones_like(v, dtype=torch.bool)
    found = together(*(lambda reduce, i=i: explained_variance(v[i], g[i], mask[i], reduce=reduce) for i in ([0], [1])))
    for one in found:
        torch.testing.assert_close(one, explained_variance(v, g, mask))


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 have variance 8/3."""
    assert ev([0.0, 2.0, 4.0], [0.0, 2.0, 4.0]) == 1.0
    assert ev([0.0, 0.25, 0.5], [0.0, 0.25, 0.5]) == 1.0
    assert ev([7.0, 9.0, 11.0], [0.0, 2.0, 4.0]) == 1.0  # a constant error is bias, not variance
    assert ev([2.0, 2.0, 2.0], [0.0, 2.0, 4.0]) == 0.0
    assert ev([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == pytest.approx(0.75)  # errors -1, 0, 1: variance 2/3
    assert ev([4.0, 2.0, 0.0], [0.0, 2.0, 4.0]) == pytest.approx(-3.0)
    assert ev([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0  # nothing to explain
