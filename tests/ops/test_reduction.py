"""Reduction weights by hand, and the promise that they are made for: the split does not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops.reduction import Reduction, reduction_weights

pytestmark = [pytest.mark.unit, pytest.mark.property]

# Rows of 2, 1 and 0 real tokens: three tokens, two rows.
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


def close(got: Tensor, want: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("token", [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("sequence", [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0], [0, 0, 0]]),
        ("constant", [[1 / 10, 1 / 10, 0], [1 / 10, 0, 0], [0, 0, 0]]),  # 1 / (max_length 5 x 2 rows)
        ("row", [1 / 2, 1 / 2, 0]),
    ],
)
def test_weights_by_hand(kind: Reduction, weights: object) -> None:
    found = reduction_weights(MASK, kind, max_length=5, dtype=torch.float64)
    assert found.dtype == torch.float64
    close(found, weights)


@pytest.mark.parametrize(("kind", "weight"), [("token", 1.0), ("sequence", 1.0), ("constant", 0.2), ("row", 1.0)])
def test_a_single_token_has_all_the_weight(kind: Reduction, weight: float) -> None:
    assert reduction_weights(torch.tensor([[True]]), kind, max_length=5).flatten().tolist() == pytest.approx([weight])


def test_rows_may_be_given_as_rows() -> None:
    close(reduction_weights(torch.tensor([True, False, True, True]), "row"), [1 / 3, 0, 1 / 3, 1 / 3])


def test_constant_needs_a_length() -> None:
    with pytest.raises(ValueError, match="max_length"):
        reduction_weights(MASK, "constant")


@pytest.mark.parametrize("kind", ["token", "sequence", "constant", "row"])
def test_nothing_real_weighs_nothing(kind: Reduction) -> None:
    weights = reduction_weights(torch.zeros_like(MASK), kind, max_length=5)
    assert (weights == 0).all()


@pytest.mark.parametrize("kind", ["token", "sequence", "constant", "row"])
def test_the_denominator_is_that_of_all_workers(kind: Reduction) -> None:
    """Two workers with the same rows: each weight halves, so that the sum over workers is the same mean."""
    ours = reduction_weights(MASK, kind, max_length=5)
    close(reduction_weights(MASK, kind, max_length=5, reduce=lambda count: 2 * count), ours / 2)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
    st.sampled_from(["token", "sequence", "constant", "row"]),
    st.integers(1, 8),
)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(lengths: list[int], kind: Reduction, size: int) -> None:
    b, t = len(lengths), 6
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    weights = reduction_weights(mask, kind, max_length=t, dtype=torch.float64)
    shape = (b,) if kind == "row" else (b, t)
    x = torch.linspace(-1, 2, b if kind == "row" else b * t, dtype=torch.float64).reshape(shape).requires_grad_()

    whole = (x**2 * weights).sum()
    (want,) = torch.autograd.grad(whole, x)
    total = 0.0
    for start in range(0, b, size):
        rows = slice(start, start + size)
        part = (x[rows] ** 2 * weights[rows]).sum()
        part.backward()  # gradients accumulate
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-12, abs=1e-12)
    assert x.grad is not None
    close(x.grad, want)


def test_the_naive_mean_does_depend_on_it() -> None:
    """Why this file exists: losses 1, 1 | 4 have token mean 2, but the mean of the two micro-batch means is 2.5."""
    loss = torch.tensor([[1.0, 1.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    weights = reduction_weights(MASK, "token", dtype=torch.float64)
    assert sum((loss[i] * weights[i]).sum().item() for i in range(3)) == pytest.approx(2.0)
    assert (loss[0][MASK[0]].mean() + loss[1][MASK[1]].mean()).item() / 2 == 2.5
