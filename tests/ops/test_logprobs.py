"""Log-probabilities and entropies in chunks: by hand, against the plain form, and their own backward against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops import logprobs
from trimtab.ops.logprobs import logprobs_and_entropy, logprobs_and_entropy_plain, vocabulary_mean

pytestmark = [pytest.mark.unit, pytest.mark.property]

S, D, V = 7, 4, 11


def close(got: Tensor | None, want: object, tol: float = 1e-12) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=tol, atol=tol)


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((S, D), (V, D), (V,)))
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), torch.randint(V, (S,), generator=g)


def test_two_words_by_hand() -> None:
    """Logits (0, ln 3), so p = (1/4, 3/4): logp = ln 3/4, entropy = ln 4 - 3/4 ln 3.

    With z = (0, h) the gradients with respect to h are, for the target 1, 1 - p_1 = 1/4, and for the entropy
    -p_1 (ln p_1 + H) = -3/4 (ln 3/4 + ln 4 - 3/4 ln 3) = -3/16 ln 3.
    """
    hidden = torch.tensor([[math.log(3)]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    logp, entropy = logprobs_and_entropy(hidden, weight, torch.tensor([1]))
    close(logp, [math.log(0.75)])
    close(entropy, [math.log(4) - 0.75 * math.log(3)])
    close(torch.autograd.grad(logp.sum(), hidden, retain_graph=True)[0], [[0.25]])
    close(torch.autograd.grad(entropy.sum(), hidden)[0], [[-3 / 16 * math.log(3)]])


def test_temperature_by_hand() -> None:
    """Logits (0, 2 ln 3) at temperature 2 are (0, ln 3); d logp / dh = (1 - p_1) / 2."""
    hidden = torch.tensor([[2 * math.log(3)]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    logp, _ = logprobs_and_entropy(hidden, weight, torch.tensor([1]), temperature=2.0)
    close(logp, [math.log(0.75)])
    logp.sum().backward()
    close(hidden.grad, [[0.125]])


@pytest.mark.parametrize("learns", ["hidden", "weight", "bias", "all"])
@pytest.mark.parametrize("output", ["logp", "entropy", "both"])
def test_gradients(learns: str, output: str) -> None:
    """Every path of the backward pass against finite differences, float64, in chunks of 3."""
    hidden, weight, bias, targets = made()
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        x.requires_grad_(learns in (name, "all"))

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logp, entropy = logprobs_and_entropy(hidden, weight, targets, temperature=0.7, bias=bias, chunk=3)
        return {"logp": (logp,), "entropy": (entropy,), "both": (logp, entropy)}[output]

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


@given(st.integers(1, S + 1), st.floats(0.3, 3), st.booleans())
def test_the_chunk_size_changes_nothing(chunk: int, temperature: float, with_bias: bool) -> None:
    """Values and gradients equal those of the plain form, whatever the chunk."""
    hidden, weight, bias, targets = made()
    used = bias if with_bias else None

    def gradients(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((outputs[0] * rise).sum() + (outputs[1] ** 2).sum(), leaves)

    leaves = [x.requires_grad_() for x in (hidden, weight, used) if x is not None]
    rise = torch.arange(S, dtype=torch.float64)
    got = logprobs_and_entropy(hidden, weight, targets, temperature=temperature, bias=used, chunk=chunk)
    want = logprobs_and_entropy_plain(hidden, weight, targets, temperature=temperature, bias=used)
    for a, b in zip([*got, *gradients(got)], [*want, *gradients(want)], strict=True):
        close(a, b, tol=1e-10)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_half_and_single_precision(dtype: torch.dtype, tol: float) -> None:
    """Outputs are float32 and the gradient has the dtype of its leaf; equal to the plain form up to rounding."""
    hidden, weight, bias, targets = made(dtype)
    hidden.requires_grad_()
    got, want = (f(hidden, weight, targets, bias=bias) for f in (logprobs_and_entropy, logprobs_and_entropy_plain))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == torch.float32
        close(a, b, 1e-5)  # products are rounded alike, and what follows them is float32
    (a,), (b,) = (torch.autograd.grad(pair[0].sum(), hidden) for pair in (got, want))
    assert a.dtype == dtype
    close(a, b, tol)


def test_large_logits_do_not_overflow() -> None:
    """Logits (0, 1e4): the likely word has probability 1, the other log-probability -1e4, and nothing is undecided."""
    weight = torch.tensor([[0.0], [1.0]])
    logp, entropy = logprobs_and_entropy(torch.full((2, 1), 1e4), weight, torch.tensor([0, 1]))
    close(logp, [-1e4, 0.0])
    close(entropy, [0.0, 0.0])


def test_rows_of_unlike_size_do_not_meet() -> None:
    """Logits (0, 1e4) beside (0, 0): each row has its own maximum."""
    weight = torch.tensor([[0.0], [1.0]])
    logp, entropy = logprobs_and_entropy(torch.tensor([[1e4], [0.0]]), weight, torch.tensor([1, 0]))
    close(logp, [0.0, -math.log(2)], 1e-6)
    close(entropy, [0.0, math.log(2)], 1e-6)


@pytest.mark.parametrize(
    ("tile", "widths"), [(1, [1] * 11), (15, [5, 5, 1]), (16, [5, 5, 1]), (18, [6, 5]), (33, [11]), (10**6, [11])]
)
def test_a_tile_holds_as_many_logits_as_it_may(tile: int, widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows and eleven words; at least one word."""
    monkeypatch.setattr(logprobs, "TILE", {"cpu": tile})
    seen = []
    real = logprobs._product
    monkeypatch.setattr(logprobs, "_product", lambda *args: seen.append(len(args[1])) or real(*args))
    hidden, weight, bias, targets = made()
    logprobs_and_entropy(hidden[:3], weight, targets[:3], bias=bias)
    assert seen == widths


@pytest.mark.parametrize("tile", [1, 5, 12, 1000])
@pytest.mark.parametrize("order", ["rising", "falling", "drawn"])
def test_the_tiles_of_the_vocabulary_change_nothing(tile: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one word, of some, of all; a maximum that moves with every tile, stays in the first, or does what it likes."""
    monkeypatch.setattr(logprobs, "TILE", {"cpu": tile})
    hidden, weight, bias, targets = made()
    if order != "drawn":
        bias = torch.arange(len(bias), dtype=bias.dtype) * (9.0 if order == "rising" else -9.0)
    got = logprobs_and_entropy(hidden.requires_grad_(), weight, targets, temperature=0.7, bias=bias, chunk=3)
    grad = torch.autograd.grad(got[0].sum(), hidden)[0]
    want = logprobs_and_entropy_plain(hidden, weight, targets, temperature=0.7, bias=bias)
    close(grad, torch.autograd.grad(want[0].sum(), hidden)[0])
    close(got[0], want[0])
    close(got[1], want[1])


def test_the_gradient_of_a_sure_token_keeps_its_digits() -> None:
    """p_target = 1 - 2e-7: in float32 1 - p_target computed as a difference would be off by a quarter."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[16.0], [0.6]])
    logp, _ = logprobs_and_entropy(hidden.requires_grad_(), weight, torch.tensor([0]))
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    other = 1 / (1 + math.exp(15.4))
    assert grad.item() == pytest.approx(other * (16.0 - 0.6), rel=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_all_of_a_vocabulary_at_once_is_its_tiles(temperature: float, with_bias: bool) -> None:
    """What a GPU computes, here on a CPU."""
    hidden, weight, bias, targets = made()
    own = bias if with_bias else None
    tiles = logprobs._by_tiles(hidden, weight, own, targets, temperature, wants_unit=True)
    at_once = logprobs._at_once(hidden, weight, own, targets, temperature, wants_unit=True)
    for a, b in zip(at_once, tiles, strict=True):
        close(a, b)
    assert logprobs._at_once(hidden, weight, own, targets, temperature, wants_unit=False)[2] is None


@pytest.mark.parametrize("learns", [True, False])
def test_where_a_tile_is_the_vocabulary_values_and_gradients_are_the_same(
    learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, at_once = [], []
    plain = logprobs._softmax
    monkeypatch.setattr(logprobs, "_softmax", lambda *rest: (at_once.append(len(rest[0])), plain(*rest))[1])
    for whole in ((), ("cpu",)):
        assert not at_once
        monkeypatch.setattr(logprobs, "WHOLE", whole)
        hidden, weight, bias, targets = made()
        hidden.requires_grad_(learns)
        logp, entropy = logprobs_and_entropy(hidden, weight, targets, temperature=0.7, bias=bias)
        grad = torch.autograd.grad(logp.sum(), hidden)[0] if learns else torch.zeros(())
        found.append((logp.detach(), entropy.detach(), grad))
    assert at_once == [S]
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_half_precision_is_summed_wide_at_once() -> None:
    z = made()[0].to(torch.bfloat16)
    targets = torch.zeros(S, dtype=torch.long)
    logp, entropy, others, share = logprobs._softmax(z, targets, 1.0, True)
    wanted = logprobs._softmax(z.float(), targets, 1.0, True)
    assert logp.dtype == entropy.dtype == others.dtype == torch.float32 and share.dtype == torch.bfloat16
    for a, b in zip((logp, entropy, others), wanted, strict=False):
        close(a, b, tol=1e-6)


def test_a_sure_token_keeps_its_digits_at_once() -> None:
    """Logits (40, 0): 1 - p = 1 / (1 + e^40) = 4.248e-18, which 1 - exp(logp) would round to 0."""
    z = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    logp, entropy, others, share = logprobs._softmax(z, torch.tensor([0]), 1.0, True)
    close(others, [[4.248354255291589e-18]], tol=1e-15 * 4e-18)
    close(share, [[0.0, 4.248354255291589e-18]], tol=1e-15 * 4e-18)
    close(logp, [0.0])
    close(entropy, [41 * 4.248354255291589e-18], tol=1e-14)


def test_rows_of_a_chunk_on_a_gpu_are_those_of_a_tile() -> None:
    assert logprobs.rows_at_a_time(1 << 16, "cuda") == 1 << 10
    assert logprobs.rows_at_a_time(1 << 27, "cuda") == 1
    assert logprobs.rows_at_a_time(1 << 16, "cpu") == 256


def test_no_rows() -> None:
    hidden, weight, _, targets = made()
    hidden = hidden[:0].requires_grad_()
    logp, entropy = logprobs_and_entropy(hidden, weight, targets[:0])
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, D)


def test_without_gradients_there_is_no_graph() -> None:
    hidden, weight, _, targets = made()
    hidden.requires_grad_()
    with torch.no_grad():
        logp, _ = logprobs_and_entropy(hidden, weight, targets)
    assert not logp.requires_grad


@pytest.mark.parametrize(("through_entropy", "passes"), [(False, 1), (True, 2)])
def test_logits_are_recomputed_only_for_the_entropy(
    monkeypatch: pytest.MonkeyPatch, through_entropy: bool, passes: int
) -> None:
    """With a frozen head, the backward pass of the log-probabilities alone makes no logits; 7 rows are 3 chunks of 3."""
    made_logits = []
    real = logprobs._product
    monkeypatch.setattr(logprobs, "_product", lambda *args: made_logits.append(1) or real(*args))
    hidden, weight, _, targets = made()
    logp, entropy = logprobs_and_entropy(hidden.requires_grad_(), weight, targets, chunk=3)
    (logp.sum() + (entropy.sum() if through_entropy else 0)).backward()
    assert len(made_logits) == 3 * passes


def test_chunks_are_of_256_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = logprobs._product
    monkeypatch.setattr(logprobs, "_product", lambda *args: sizes.append(len(args[0])) or real(*args))
    logprobs_and_entropy(torch.ones(257, 2), torch.ones(3, 2), torch.zeros(257, dtype=torch.int64))
    assert sizes == [256, 1]


@pytest.mark.parametrize(
    ("learns", "grad", "wanted"),
    [
        ((), True, False),
        (("hidden",), True, True),
        (("hidden",), False, False),
        (("hidden", "bias"), True, False),
        (("weight",), True, False),
    ],
)
def test_the_gradient_of_a_hidden_state_is_made_where_it_will_be_used(
    learns: tuple[str, ...], grad: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward pass when the head is frozen; never without gradients."""
    asked: list[bool] = []
    real = logprobs._by_tiles

    def noted(*args: Any, **keys: Any) -> Any:
        asked.append(keys["wants_unit"])
        return real(*args, **keys)

    monkeypatch.setattr(logprobs, "_by_tiles", noted)
    hidden, weight, bias, targets = made()
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        x.requires_grad_(name in learns)
    with torch.set_grad_enabled(grad):
        logprobs_and_entropy(hidden, weight, targets, bias=bias)
    assert asked == [wanted]


def test_no_array_of_all_logits_is_ever_made() -> None:
    """The largest array of forward and backward holds chunk x v numbers."""
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor))
            return out

    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(100, 4)
    with Sizes():
        logp, entropy = logprobs_and_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64), chunk=8)
        (logp.sum() + entropy.sum()).backward()
    assert max(sizes) == 8 * 100


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
def test_the_mean_over_the_vocabulary_is_that_of_the_logits(temperature: float, biased: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(9, 5, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(9, dtype=torch.float64, generator=generator) if biased else None
    targets = torch.tensor([0, 8, 3, 3, 1, 7])
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, dim=-1)
    expected = torch.autograd.grad(log_p.mean(-1).square().sum(), (hidden, weight))
    logp, _ = logprobs_and_entropy(hidden, weight, targets, temperature=temperature, bias=bias)
    found = vocabulary_mean(hidden, weight, targets, logp, temperature=temperature, bias=bias)
    torch.testing.assert_close(found, log_p.mean(-1))
    for mine, theirs in zip(torch.autograd.grad(found.square().sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_mean_over_the_vocabulary_is_computed_wide() -> None:
    """From bfloat16 numbers in float32 arithmetic: as the same numbers give in float64, but for 1e-5."""
    hidden, weight, bias, targets = made(torch.bfloat16)
    z = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, targets[:, None]).squeeze(-1).float()
    found = vocabulary_mean(
        hidden, weight, targets, logp, bias=bias
    )  # at temperature 1, which is what nothing said means
    assert found.dtype == torch.float32
    close(found, log_p.mean(-1).float(), 1e-5)


def test_the_gradient_of_a_head_in_half_precision_is_summed_wide() -> None:
    """Three hundred chunks of one row: sums in bfloat16 would stand still after a few dozen."""
    g = torch.Generator().manual_seed(0)
    hidden = (1 + torch.rand(300, 2, generator=g)).to(torch.bfloat16)
    weight, bias = torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    logp, _ = logprobs_and_entropy(
        hidden, weight.requires_grad_(), torch.zeros(300, dtype=torch.int64), bias=bias.requires_grad_(), chunk=1
    )
    logp.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    # p = 1/2 everywhere: half of each hidden state towards the target's row
    expected = hidden.double().sum(0) / 2
    close(weight.grad.double(), torch.stack([expected, -expected]), 0.01)
    close(bias.grad.double(), [150.0, -150.0], 0.01)  # type: ignore[union-attr]
