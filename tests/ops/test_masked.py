"""Masked sums and moments: by hand, against NumPy, and with rubbish in the padding."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.workers import together
from trimtab.ops import masked

pytestmark = [pytest.mark.unit, pytest.mark.property]

NAN = float("nan")
# Real entries 1, 2 | 3 | none: sum 6, mean 2, squares about it 1 + 0 + 1, variance 2/3.
X = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


def close(got: Tensor, want: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


def test_moments_by_hand() -> None:
    close(masked.masked_sum(X, MASK), 6.0)
    close(masked.masked_mean(X, MASK), 2.0)
    close(masked.masked_var(X, MASK), 2 / 3)  # biased: the unbiased one is 1
    close(masked.row_sum(X, MASK), [3.0, 3.0, 0.0])
    close(masked.row_mean(X, MASK), [1.5, 3.0, 0.0])
    close(
        masked.row_mean(X[:2], MASK[:2]), [1.5, 3.0]
    )  # counts along the rows: this mask has other ones down its columns
    assert masked.lengths(MASK).tolist() == [2, 1, 0]


def test_whiten_by_hand() -> None:
    """(1, 2, 3) has mean 2 and std sqrt(2/3), so 1 becomes -sqrt(3/2) and 3 becomes +sqrt(3/2)."""
    up = math.sqrt(1.5)
    close(masked.whiten(X, MASK, eps=0.0), [[-up, 0, 0], [up, 0, 0], [0, 0, 0]])
    close(masked.whiten(X, MASK, shift_mean=False, eps=0.0), [[2 - up, 2, 0], [2 + up, 0, 0], [0, 0, 0]])


def test_whitening_what_does_not_vary_gives_zeros() -> None:
    close(masked.whiten(torch.full_like(X, 7.0), MASK), torch.zeros(3, 3))


def test_is_last_marks_one_entry_of_each_row_that_has_any() -> None:
    assert masked.is_last(MASK).tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert masked.is_last(torch.ones(1, 2, dtype=torch.bool)).tolist() == [[False, True]]


def test_nothing_real_gives_finite_zeros() -> None:
    nothing = torch.zeros_like(MASK)
    for value in (
        masked.masked_sum(X, nothing),
        masked.masked_mean(X, nothing),
        masked.masked_var(X, nothing),
        masked.whiten(X, nothing),
        masked.row_mean(X, nothing),
    ):
        close(value, torch.zeros_like(value))


def test_no_gradient_and_no_nan_passes_through_padding() -> None:
    """d mean(x^2) / dx = 2x / 3 at the three real entries; padding is taken out before the square sees it."""
    x = X.clone().requires_grad_()
    masked.masked_mean(masked.zero_padding(x, MASK) ** 2, MASK).backward()
    assert x.grad is not None
    close(x.grad, [[2 / 3, 4 / 3, 0], [2, 0, 0], [0, 0, 0]])


def test_two_workers_with_the_same_rows_see_the_same_moments() -> None:
    def twice(total: Tensor) -> Tensor:
        return 2 * total

    close(masked.masked_sum(X, MASK, reduce=twice), 12.0)
    close(masked.masked_mean(X, MASK, reduce=twice), 2.0)
    close(masked.masked_var(X, MASK, reduce=twice), 2 / 3)
    close(masked.whiten(X, MASK, reduce=twice), masked.whiten(X, MASK))


@pytest.mark.parametrize("moment", [masked.masked_sum, masked.masked_mean, masked.masked_var])
def test_workers_with_other_rows_see_the_moments_of_all(moment: Callable[..., Tensor]) -> None:
    """Two rows with one worker, one with the other: each gets what one process gets of the three."""
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN], [-3.0, 0.5, 8.0]], dtype=torch.float64)
    mask = ~x.isnan()
    found = together(
        lambda reduce: moment(x[:2], mask[:2], reduce=reduce), lambda reduce: moment(x[2:], mask[2:], reduce=reduce)
    )
    for one in found:
        close(one, moment(x, mask).item())


@pytest.mark.parametrize("shift_mean", [True, False])
def test_workers_with_other_rows_whiten_alike(shift_mean: bool) -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN], [-3.0, 0.5, 8.0]], dtype=torch.float64)
    mask = ~x.isnan()
    found = together(
        *(
            lambda reduce, p=p: masked.whiten(x[p], mask[p], shift_mean=shift_mean, reduce=reduce)
            for p in (slice(2), slice(2, 3))
        )
    )
    close(torch.cat(found), masked.whiten(x, mask, shift_mean=shift_mean))


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=1, max_size=4))
def test_moments_match_numpy(rows: list[list[float]]) -> None:
    width = max(map(len, rows))
    x = torch.tensor([row + [NAN] * (width - len(row)) for row in rows], dtype=torch.float64)
    real = np.array([value for row in rows for value in row])
    mask = ~x.isnan()
    assert masked.masked_mean(x, mask).item() == pytest.approx(real.mean(), abs=1e-9)
    assert masked.masked_var(x, mask).item() == pytest.approx(real.var(), abs=1e-9)
    want = (real - real.mean()) / np.sqrt(real.var() + 1e-8)
    np.testing.assert_allclose(masked.whiten(x, mask)[mask].numpy(), want, atol=1e-6)
