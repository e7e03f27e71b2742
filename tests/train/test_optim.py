"""Schedules against transformers', AdamW against hand arithmetic."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from trimtab.train.optim import make_optimizer, schedule, set_learning_rate

pytestmark = pytest.mark.unit


def settings(**more: Any) -> SimpleNamespace:
    """The optimizer's part of a config."""
    plain = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8}
    return SimpleNamespace(**{**plain, "optim": "adamw_torch", "loraplus_lr_ratio": None, **more})


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_those_of_transformers(kind: str, warmup: int) -> None:
    rate, total = 0.25, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        # their polynomial ends at 1e-7 and ours at 0
        expected = optimizer.param_groups[0]["lr"]
        assert rate * schedule(kind, step, total, warmup) == pytest.approx(expected, abs=2e-7), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr": 0.05}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1}),
        ("polynomial", {"lr_end": 0.01, "power": 2}),
        ("inverse_sqrt", {"timescale": 7}),
        ("warmup_stable_decay", {"num_decay_steps": 6}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 6, "num_stable_steps": 3, "min_lr_ratio": 0.2, "decay_type": "linear"},
        ),
        ("warmup_stable_decay", {"num_decay_steps": 6, "decay_type": "1-sqrt"}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_with_settings_are_those_of_transformers(kind: str, settings: dict[str, Any], warmup: int) -> None:
    rate, total = 0.25, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    theirs = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=dict(settings)
    )
    for step in range(total):
        ours = schedule(kind, step, total, warmup, settings=settings, learning_rate=rate)
        assert rate * ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_lora_plus_speeds_up_b_and_what_has_one_axis() -> None:
    names = {"trained/q.lora_A": 2, "trained/q.lora_B": 2, "trained/q.lora_magnitude": 1, "head/summary.bias": 1}
    parameters = {name: torch.nn.Parameter(torch.zeros((2,) * axes)) for name, axes in names.items()}
    config = settings(optim="adamw_torch", loraplus_lr_ratio=16.0, weight_decay=0.1)
    optimizer = make_optimizer(parameters, config, 1e-3)
    set_learning_rate(optimizer, 5e-4)  # as the schedule does
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in parameters.items()}
    assert found == {
        "trained/q.lora_A": (5e-4, 0.1),
        "trained/q.lora_B": (8e-3, 0.1),
        "trained/q.lora_magnitude": (8e-3, 0.0),
        "head/summary.bias": (5e-4, 0.0),
    }


@pytest.mark.parametrize(("name", "moved"), [("sgd", 0.5), ("adagrad", 0.25), ("rmsprop", 2.5)])
def test_the_other_optimizers_by_hand(name: str, moved: float) -> None:
    # rate 0.25, gradient 2: SGD 0.25 * 2; Adagrad 0.25 * 2 / sqrt(4); RMSprop 0.25 * 2 / sqrt(0.01 * 4)
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = make_optimizer({"w": weight}, settings(optim=name), 0.25)
    weight.grad = torch.full((1, 1), 2.0)
    optimizer.step()
    assert weight.item() == pytest.approx(-moved, rel=1e-5)


def test_schedule_by_hand() -> None:
    assert [schedule("linear", step, 6, 2) for step in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule("cosine", 3, 4, 2) == pytest.approx(0.5)
    assert schedule("linear", 9, 6, 2) == 0.0
    with pytest.raises(ValueError, match="wsd"):
        schedule("wsd", 0, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_by_hand(dtype: torch.dtype) -> None:
    """Two steps of arXiv:1711.05101, algorithm 2, with the decay times the learning rate; in float32 fused, and every step is counted."""
    beta1, beta2, eps, decay, rate = 0.9, 0.99, 1e-3, 0.1, 0.5
    matrix = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=dtype))
    bias = torch.nn.Parameter(torch.tensor([3.0], dtype=dtype))
    config = settings(weight_decay=decay, adam_beta1=beta1, adam_beta2=beta2, adam_epsilon=eps)
    optimizer = make_optimizer({"w": matrix, "b": bias}, config, rate)
    assert all(bool(group["fused"]) == (dtype == torch.float32) for group in optimizer.param_groups)
    values, m, v = [1.0, -2.0, 3.0], [0.0] * 3, [0.0] * 3
    decays = [decay, decay, 0.0]  # biases are not decayed
    for step, gradient in enumerate(([0.1, -0.4, 2.0], [0.3, 0.2, -1.0]), 1):
        matrix.grad = torch.tensor([gradient[:2]], dtype=dtype)
        bias.grad = torch.tensor(gradient[2:], dtype=dtype)
        versions = matrix._version, bias._version
        optimizer.step()
        assert matrix._version > versions[0] and bias._version > versions[1]
        for i, g in enumerate(gradient):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            m_hat, v_hat = m[i] / (1 - beta1**step), v[i] / (1 - beta2**step)
            values[i] = values[i] * (1 - rate * decays[i]) - rate * m_hat / (math.sqrt(v_hat) + eps)
        assert [*matrix[0].tolist(), *bias.tolist()] == pytest.approx(
            values, rel=1e-6, abs=0 if dtype == torch.float64 else 1e-6
        )


def test_one_rate_for_all_groups() -> None:
    config = settings()
    parameters = {"w": torch.nn.Parameter(torch.zeros(2, 2)), "b": torch.nn.Parameter(torch.zeros(2))}
    optimizer = make_optimizer(parameters, config, 1.0)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert len(make_optimizer({"b": parameters["b"]}, config, 1.0).param_groups) == 1
