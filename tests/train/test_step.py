"""The only backward pass: one loss and one gradient whatever the micro-batches, and a stop before damage is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.errors import NumericsError
from trimtab.models import lora
from trimtab.models.forward import choose_layout
from trimtab.models.heads import ValueHead
from trimtab.models.roles import Roles
from trimtab.models.tiny import tiny_model
from trimtab.ops.reduction import reduction_weights
from trimtab.train import step
from trimtab.train.offline import scored_mask
from trimtab.train.step import Forward, Held, Sums, backward_rows, backward_tokens, clip_and_step, hold_tokens
from trimtab.types import LossTerms, TokenRow

pytestmark = pytest.mark.unit


def row(prompt: int, answer: int) -> TokenRow:
    return TokenRow(
        token_ids=(*range(20, 20 + prompt), *range(60, 60 + answer)), scored=tuple(range(prompt, prompt + answer))
    )


ROWS = [row(3, 2), row(3, 5), row(8, 1), row(8, 4), row(3, 3), row(5, 6)]


def trained() -> Roles:
    model = tiny_model("qwen2").requires_grad_(False)
    roles = Roles(model=model)
    found = lora.inject(model, ["all"], roles.switch)
    lora.new_adapter(model, "x", paths=found, rank=3, alpha=6, rslora=False, seed=0)
    for parameter in lora.parameters(model, "x").values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    roles.define("x", "x", head=ValueHead(64, seed=2))
    choose_layout([model])
    return roles


def taken(roles: Roles) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in roles.trainable("x").items() if p.grad is not None}
    for parameter in roles.trainable("x").values():
        parameter.grad = None
    return found


def tokens(roles: Roles, how: Forward, **keys: Any) -> Sums:
    weights = reduction_weights(scored_mask(ROWS, torch.device("cpu")), "token")
    return backward_tokens(
        roles,
        "x",
        ROWS,
        weights,
        lambda scores, which: LossTerms(
            loss=-scores.logp + scores.values.square(), means={"entropy": scores.entropy}, maxima={"top": scores.values}
        ),
        how,
        value_head=True,
        **keys,
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor], scale: float = 1.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        size = float(b[name].abs().max()) * scale
        torch.testing.assert_close(a[name], b[name] * scale, atol=1e-5 * size, rtol=1e-5, msg=name)


def test_token_losses_and_gradients_do_not_depend_on_the_cut() -> None:
    roles = trained()
    whole = tokens(roles, Forward(budget=10_000))
    gradient = taken(roles)
    assert len(gradient) == 30
    for budget in (1, 11, 25, 60):
        for layout in ("padded", "packed", "shared"):
            sums = tokens(roles, Forward(budget=budget, layout=layout))
            assert sums.loss == pytest.approx(whole.loss, rel=1e-5)
            assert sums.figures() == pytest.approx(whole.figures(), rel=1e-5)
            same(taken(roles), gradient)
    tokens(roles, Forward(budget=25), coefficient=0.5)
    same(taken(roles), gradient, scale=0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_that_was_made_is_not_made_again(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    roles, how = trained(), Forward(budget=10_000, layout="shared")
    if checkpointing:
        roles.model.gradient_checkpointing_enable()
        roles.model.train()
    plain = tokens(roles, how)
    wanted = taken(roles)
    held = Held(hold_tokens(roles, "x", ROWS, how, value_head=True))
    monkeypatch.setattr(step, "score_tokens", None)
    sums = tokens(roles, how, held=held)
    assert sums.loss == pytest.approx(plain.loss, rel=1e-6)
    assert sums.figures() == pytest.approx(plain.figures(), rel=1e-5)
    same(taken(roles), wanted)
    assert held.scores is None


def test_a_pass_of_several_micro_batches_is_not_held() -> None:
    assert hold_tokens(trained(), "x", ROWS, Forward(budget=20, layout="shared"), value_head=True) is None


def test_after_out_of_memory_a_held_pass_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, how = trained(), Forward(budget=10_000, layout="shared")
    tokens(roles, how)
    wanted = taken(roles)
    back, calls = torch.autograd.backward, []

    def full_once(total: Tensor) -> None:
        calls.append(total)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        back(total)

    passes, score = [], step.score_tokens
    monkeypatch.setattr(step, "score_tokens", lambda *rest, **named: (passes.append(1), score(*rest, **named))[1])
    monkeypatch.setattr(torch.autograd, "backward", full_once)
    tokens(roles, how, held=Held(hold_tokens(roles, "x", ROWS, how, value_head=True)))
    assert len(calls) == len(passes) == 2
    same(taken(roles), wanted)


def test_a_head_alone_learns_without_a_backward_pass_of_the_layers() -> None:
    """The head's gradient is the same, nothing else gets one, and nothing of the layers is kept for it."""
    roles = trained()
    tokens(roles, Forward(budget=25))
    gradient = {name: grad for name, grad in taken(roles).items() if name.startswith("head/")}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        tokens(roles, Forward(budget=25), trunk_learns=False)
    found = taken(roles)
    same(found, gradient)
    assert len(gradient) == 2
    scored = sum(len(one.scored) for one in ROWS)
    assert sum(x.numel() for x in kept) < 10 * scored * 64  # the states under the head, 64 wide, and little else


def test_the_loss_is_the_mean_over_tokens_of_the_whole_step() -> None:
    roles = trained()
    sums = tokens(roles, Forward(budget=25))
    total, count = 0.0, 0
    with torch.no_grad(), roles.enter("x") as spec:
        for one in ROWS:
            out = roles.model(torch.tensor([one.token_ids]), output_hidden_states=True)
            log_p = out.logits[0].log_softmax(-1)
            for index in one.scored:
                value = spec.head(out.hidden_states[-1][0, index - 1][None])
                total += float(-log_p[index - 1, one.token_ids[index]] + value**2)
                count += 1
    assert count == 21
    assert sums.loss == pytest.approx(total / count, rel=1e-5)


def test_pair_losses_and_gradients_do_not_depend_on_the_cut() -> None:
    roles = trained()

    def pairs(budget: int, layout: str) -> Sums:
        weights = reduction_weights(torch.ones(3, dtype=torch.bool), "row")
        scale = torch.tensor([1.0, 2.0, 4.0])
        return backward_rows(
            roles,
            "x",
            ROWS,
            weights,
            lambda scores, which: LossTerms(
                loss=(scores[:, 0] - 2 * scores[:, 1]) * scale[which], means={"chosen": scores[:, 0]}
            ),
            Forward(budget=budget, layout=layout),
            sizes=[2, 2, 2],
        )

    whole = pairs(10_000, "padded")
    gradient = taken(roles)
    for budget in (1, 20, 45):
        for layout in ("padded", "packed", "shared"):
            sums = pairs(budget, layout)
            assert sums.loss == pytest.approx(whole.loss, rel=1e-5)
            assert sums.figures() == pytest.approx(whole.figures(), rel=1e-5)
            same(taken(roles), gradient)


def test_a_loss_that_is_not_finite_names_its_row_and_changes_nothing() -> None:
    roles = trained()
    parameters = roles.trainable("x")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    mask = scored_mask(ROWS, torch.device("cpu"))
    poison = torch.zeros(6, 6)
    poison[3, 1] = float("nan")
    with pytest.raises(NumericsError) as caught:
        backward_tokens(
            roles,
            "x",
            ROWS,
            reduction_weights(mask, "token"),
            lambda scores, which: LossTerms(loss=-scores.logp + poison[which]),
            Forward(budget=20),
            names=[f"train.json:{n}" for n in range(1, 7)],
        )
    assert caught.value.where == "train.json:4"
    assert roles.switch.active == ()
    assert all(torch.equal(before[name], p) for name, p in parameters.items())


def test_nan_in_padding_is_no_reason_to_stop() -> None:
    roles = trained()
    mask = scored_mask(ROWS, torch.device("cpu"))
    tokens_of = reduction_weights(mask, "token")
    sums = backward_tokens(
        roles, "x", ROWS, tokens_of, lambda scores, which: LossTerms(loss=-scores.logp), Forward(budget=20)
    )
    assert sums.loss > 0


def test_clipping_by_hand() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([a, b], lr=1.0)

    def step(limit: float | None) -> float:
        a.data.zero_(), b.data.zero_()
        a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
        return clip_and_step(optimizer, {"a": a, "b": b}, limit, "policy")

    assert step(1.0) == 5.0  # the norm before clipping
    assert [a.item(), b.item()] == pytest.approx([-0.6, -0.8], abs=1e-5)
    assert a.grad is None
    for off in (0.0, None, 100.0):
        assert step(off) == 5.0
        assert [a.item(), b.item()] == [-3.0, -4.0]
    for bad in (float("nan"), float("inf")):
        a.data.zero_()
        a.grad = torch.tensor([bad])
        with pytest.raises(NumericsError, match="policy"):
            clip_and_step(optimizer, {"a": a, "b": b}, 1.0, "policy")
        assert a.item() == 0.0
