"""Out of memory in the middle of a backward pass: the micro-batch is halved, and loss and gradient are those of a run that had room."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.train.test_step import ROWS, same, taken, tokens, trained
from trimtab.models import budget
from trimtab.models.budget import Budget
from trimtab.models.roles import Roles
from trimtab.train.step import Forward

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LEAST", 4)


def full_device(roles: Roles, *calls: int) -> Callable[[], None]:
    """Run out of memory when the gradient of a matrix in the middle of the model is computed for the n-th time, n in `calls`.

    By then the layers above it have added theirs.
    """
    names = [name for name in roles.trainable("x") if name.startswith("x/")]
    parameter = roles.trainable("x")[names[len(names) // 2]]
    count = 0

    def hook(grad: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return grad

    return parameter.register_hook(hook).remove


@pytest.mark.parametrize(("calls", "left"), [((2,), 16), ((1,), 16), ((2, 4), 8), ((1, 2, 3), 4)])
def test_loss_and_gradient_are_those_of_a_run_with_room(calls: tuple[int, ...], left: int) -> None:
    roles = trained()
    whole = tokens(roles, Forward(budget=10_000))
    gradient = taken(roles)
    remove = full_device(roles, *calls)
    room = Budget(32)
    sums = tokens(roles, Forward(budget=32, room=room, layout="packed"))
    remove()
    assert room.tokens == left  # and the next pass begins with it
    assert sums.loss == pytest.approx(whole.loss, rel=1e-5)
    assert sums.figures() == pytest.approx(whole.figures(), rel=1e-5)
    same(taken(roles), gradient)


def test_gradients_of_an_earlier_pass_stay() -> None:
    """Two passes that add up to one step: the second breaks off, the first one's gradient is still there."""
    roles = trained()
    tokens(roles, Forward(budget=10_000))
    gradient = taken(roles)
    tokens(roles, Forward(budget=10_000))
    remove = full_device(roles, 2)
    tokens(roles, Forward(budget=24, room=Budget(24)))
    remove()
    same(taken(roles), gradient, scale=2.0)


def test_what_does_not_fit_at_all_is_an_error_and_leaves_the_roles_usable() -> None:
    roles = trained()
    remove = full_device(roles, *range(1, 50))
    room = Budget(32)
    with pytest.raises(torch.OutOfMemoryError):
        tokens(roles, Forward(budget=32, room=room))
    remove()
    assert room.tokens == budget.LEAST
    for parameter in roles.trainable("x").values():
        parameter.grad = None
    tokens(roles, Forward(budget=10_000))
    assert len(taken(roles)) == 30
    assert len(ROWS) == 6


def test_a_pass_without_gradients_begins_again() -> None:
    seen: list[int] = []

    def work(size: int) -> str:
        seen.append(size)
        if size > 10:
            raise torch.OutOfMemoryError("no")
        return "done"

    assert Budget(48).attempt(work) == "done"
    assert seen == [48, 24, 12, 6]


def test_scores_are_those_of_a_run_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.models import forward
    from trimtab.models.heads import ValueHead
    from trimtab.rewards import model

    roles = trained()
    roles.define("judge", "x", head=ValueHead(roles.model.config.hidden_size, seed=0))
    whole = model.score_rows_as(roles, "judge", ROWS, budget=10_000)
    plain = forward.score_rows

    def full(*args: object, **keys: object) -> Tensor:
        if len(args[1]) > 1:  # type: ignore[arg-type]
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return plain(*args, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "score_rows", full)
    said: list[str] = []
    room = Budget(10_000, said.append)
    assert model.score_rows_as(roles, "judge", ROWS, budget=room) == pytest.approx(whole, rel=1e-5)
    assert room.tokens < 10_000 and len(said) > 1
