"""The kernels in C against float64: every remainder of a vector, both number types, and what they do where there is no compiler."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.engine import between, sampling
from trimtab.models import attention, block, lora
from trimtab.models.attention import Segment, Trees
from trimtab.ops import logprobs, native
from trimtab.ops.native import products
from trimtab.types import Sampling

BUILDS = ["-march=native"]
if platform.machine() == "x86_64":
    BUILDS += ["-march=x86-64-v3", "-march=x86-64"]  # vectors of eight numbers, and of four
TYPES = [torch.float32, torch.bfloat16]

# not where they fail to compile: that is what is tested
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None or os.environ.get("TRIMTAB_NATIVE") == "0",
    reason="no kernels here: not Linux, no gcc, or TRIMTAB_NATIVE=0",
)


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels compiled for this machine and for lesser ones."""
    flags = tuple(request.param if flag == "-march=native" else flag for flag in native.FLAGS)
    monkeypatch.setattr(native, "FLAGS", flags)
    native._found.cache_clear()
    attention._kernel_is_right.cache_clear()
    products._are_right.cache_clear()
    assert native.library() is not None, native.why_not()
    yield request.param
    for one in (native._found, attention._kernel_is_right, products._are_right):
        one.cache_clear()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, want: Tensor, dtype: torch.dtype, ulps: float = 4) -> None:
    """Within some roundings of the largest number, or of one."""
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-22
    error = float((got.double() - want.double()).abs().max())
    assert error <= ulps * unit * max(float(want.abs().max()), 1.0), error


def test_vectors_are_as_wide_as_the_machine_is_told_to_be(build: str) -> None:
    known = {"-march=x86-64-v3": 8, "-march=x86-64": 4}
    width = native.kernels().trimtab_vector()
    assert width == known.get(build, width) and width in (4, 8, 16)


# --------------------------------------------------------------------------------------------------- between products


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [1, 7, 16, 33, 576])
def test_a_norm_and_its_gradient(build: str, dtype: torch.dtype, d: int) -> None:
    x, weight, grad = draw(9, d, dtype=dtype), draw(d, dtype=dtype, seed=1), draw(9, d, dtype=dtype, seed=2)
    wide = x.double().requires_grad_()
    want = weight.double() * wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    torch.autograd.backward(want, grad.double())
    assert wide.grad is not None
    near(block._normed_by_kernel(x, weight, 1e-5), want.detach(), dtype)
    near(block._norm_back_by_kernel(x, grad, weight, 1e-5), wide.grad, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [1, 7, 16, 33, 100])
def test_a_gated_unit_and_its_gradients(build: str, dtype: torch.dtype, d: int) -> None:
    g, u, grad = (draw(5, d, dtype=dtype, seed=seed) * 3 for seed in range(3))
    wide_g, wide_u = g.double().requires_grad_(), u.double().requires_grad_()
    want = F.silu(wide_g) * wide_u
    torch.autograd.backward(want, grad.double())
    assert wide_g.grad is not None and wide_u.grad is not None
    near(block._act(g, u), want.detach(), dtype)
    grad_g, grad_u, act = block._act_back(g, u, grad.clone())
    near(act, want.detach(), dtype)
    near(grad_u, wide_u.grad, dtype)
    near(grad_g, wide_g.grad, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "rank"), [(1, 3), (6, 8), (13, 24)])
def test_the_low_rank_input_lies_behind_each_row(build: str, dtype: torch.dtype, n: int, rank: int) -> None:
    """Added, normed, and multiplied by A^T in one pass; and the same behind a gated unit and behind an array as it is."""
    x, y, weight = draw(n, 40, dtype=dtype), draw(n, 40, dtype=dtype, seed=1), draw(40, dtype=dtype, seed=2)
    a = draw(rank, 40, dtype=dtype, seed=3)
    low = between.Low.of(a)
    total, plain = between.add_rms_plain(x.clone(), y, weight, 1e-5)
    added, normed = between.add_rms(x.clone(), y, weight, 1e-5, low)
    near(added, total, dtype)
    near(normed[:, :40], plain, dtype)
    near(normed[:, 40:], normed[:, :40].double() @ a.double().T, dtype)
    both = draw(n, 80, dtype=dtype, seed=4)
    act = between.silu_mul(both, low)
    near(act[:, :40], between.silu_mul_plain(both), dtype)
    near(act[:, 40:], act[:, :40].double() @ a.double().T, dtype)
    behind = between.with_low(x, low)
    assert torch.equal(behind[:, :40], x)
    near(behind[:, 40:], x.double() @ a.double().T, dtype)
    assert between.with_low(x, None) is x


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("e", [16, 64])
def test_a_step_of_attention(build: str, dtype: torch.dtype, normed: bool, e: int) -> None:
    """Rows of unlike lengths go on in their slots: as turning, storing and looking one after the other do, in float64."""
    h, j, lengths = 6, 2, torch.tensor([0, 5, 15, 16, 37])
    n, capacity = len(lengths), 40
    qkv = draw(n, h + 2 * j, e, dtype=dtype)
    k, v = draw(n + 1, j, capacity, e, dtype=dtype, seed=1), draw(n + 1, j, capacity, e, dtype=dtype, seed=2)
    angle = torch.arange(capacity)[:, None] / 100 ** (torch.arange(e // 2) / e)
    rotary = between.Rotary(angle.cos().contiguous(), angle.sin().contiguous())
    scale = draw(h + j, e, seed=3).to(dtype).float() if normed else None
    wide_k, wide_v = k.double(), v.double()
    cos, sin = (torch.cat([x, x], -1)[lengths][:, None].double() for x in (angle.cos(), angle.sin()))
    sin = torch.cat([-sin[..., : e // 2], sin[..., e // 2 :]], -1)
    q = between.turn_and_store(
        qkv.double(),
        cos,
        sin,
        wide_k,
        wide_v,
        torch.arange(n),
        lengths,
        None if scale is None else scale.double(),
        1e-5,
    )
    want = []
    for i, length in enumerate(lengths.tolist()):
        own_k, own_v = (x[i, :, : length + 1].to(dtype).double() for x in (wide_k, wide_v))
        want.append(F.scaled_dot_product_attention(q[i].to(dtype).double().view(j, -1, e), own_k, own_v).reshape(-1))
    low = between.Low.of(draw(4, h * e, seed=5).to(dtype))
    got = between.attend(qkv, rotary, k, v, lengths, h, scale, 1e-5, low)
    near(got[:, : h * e], torch.stack(want), dtype)
    near(got[:, h * e :], got[:, : h * e].double() @ draw(4, h * e, seed=5).to(dtype).double().T, dtype)
    near(k, wide_k, dtype)
    near(v, wide_v, dtype)
    assert torch.equal(k[n], draw(n + 1, j, capacity, e, dtype=dtype, seed=1)[n])  # a slot that no row is in


@pytest.mark.parametrize("dtype", TYPES)
def test_a_prompt_is_kept_where_it_belongs(build: str, dtype: torch.dtype) -> None:
    qkv, j, e = draw(7, 5, 8, dtype=dtype), 2, 8
    k, v = torch.zeros(3, j, 9, e, dtype=dtype), torch.zeros(3, j, 9, e, dtype=dtype)
    read, slots, columns = torch.tensor([6, 0, 3]), torch.tensor([2, 0, 2]), torch.tensor([1, 8, 0])
    between.keep(qkv, read, slots, columns, k, v)
    for r, s, c in zip(read, slots, columns, strict=True):
        assert torch.equal(k[s, :, c], qkv[r, 1:3]) and torch.equal(v[s, :, c], qkv[r, 3:])
    assert int((k != 0).any(-1).sum()) == int((v != 0).any(-1).sum()) == 3 * j


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_attention_of_a_tree_and_its_gradients(build: str, dtype: torch.dtype, threads: int) -> None:
    """Nested segments, segments of one token, one longer than a block, and a row that shares nothing."""
    sizes = [(5, -1), (1, 0), (70, 0), (16, 2), (33, 2), (90, -1), (1, -1)]
    segments, start = [], 0
    for size, parent in sizes:
        segments.append(Segment(start, start + size, parent))
        start += size
    trees = Trees(tuple(segments), start, 6, torch.device("cpu"))
    q, k, v = (draw(start, heads, 32, dtype=dtype, seed=seed) for seed, heads in enumerate((6, 2, 2)))
    grad = draw(start, 6, 32, dtype=dtype, seed=4)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wide_q, wide_k, wide_v = (x.transpose(0, 1)[None] for x in wide)
    dense = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=trees.mask(), scale=0.2, enable_gqa=True)[
        0
    ].transpose(0, 1)
    torch.autograd.backward(dense, grad.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        got = attention._Native.apply(*own, trees, 0.2)  # type: ignore[no-untyped-call]
        torch.autograd.backward(got, grad)
    finally:
        torch.set_num_threads(before)
    near(got.detach(), dense.detach(), dtype)
    for mine, true in zip(own, wide, strict=True):
        assert mine.grad is not None and true.grad is not None
        near(mine.grad, true.grad, dtype, ulps=16)


def test_the_same_threads_give_the_same_bits() -> None:
    trees = Trees((Segment(0, 40), Segment(40, 120, 0), Segment(120, 190, 0)), 190, 4, torch.device("cpu"))
    q, k, v, grad = (draw(190, heads, 16, seed=seed) for seed, heads in enumerate((4, 2, 2, 4)))
    found = []
    for _ in range(5):
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        attention._Native.apply(*own, trees, 0.25).backward(grad)  # type: ignore[no-untyped-call]
        found.append(torch.cat([x.grad.flatten() for x in own if x.grad is not None]))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_heads_that_are_no_whole_vectors_are_left_to_torch() -> None:
    trees = Trees((Segment(0, 5),), 5, 2, torch.device("cpu"))
    q = draw(1, 2, 5, 10)
    assert not attention.in_c(q[0], q[0], q[0])
    want = F.scaled_dot_product_attention(q, q, q, is_causal=True)[0].transpose(0, 1)
    torch.testing.assert_close(attention.tree_attention(q, q, q, trees, 10**-0.5)[0], want)


# ------------------------------------------------------------------------------------------------------------ products


INSTRUCTIONS = native._instructions().split()
needs_products = pytest.mark.skipif(
    "avx512_bf16" not in INSTRUCTIONS or "amx_bf16" in INSTRUCTIONS, reason="a CPU without AVX512-BF16, or with AMX"
)


@needs_products
def test_a_cpu_with_the_instructions_has_the_products() -> None:
    assert products.are_there()


@needs_products
@pytest.mark.parametrize("m", [1, 11, 12, 13, 64, 150])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 70), (31, 16), (33, 35), (200, 64)])
def test_products_with_remainders_in_every_direction(m: int, n: int, k: int) -> None:
    x, w, bias = draw(m, k + 3).bfloat16()[:, :k], draw(n, k, seed=1).bfloat16(), draw(n, seed=2).bfloat16()
    u, v = draw(m, 5, seed=3).bfloat16(), draw(5, n, seed=4).bfloat16()
    plain = x.double() @ w.double().T
    near(products.sums([(x, w, False)], n), plain, torch.bfloat16)
    near(products.sums([(x, products.LaidOut(w), False)], n, bias=bias), plain + bias.double(), torch.bfloat16)
    near(products.sums([(x, w.T.contiguous(), True)], n), plain, torch.bfloat16)
    whole = plain + u.double() @ v.double()
    near(products.sums([(x, w, False), (u, v, True)], n, bias=bias), whole + bias.double(), torch.bfloat16)


@needs_products
def test_products_of_sizes_that_do_not_belong_together_are_refused() -> None:
    x, w = draw(3, 8).bfloat16(), draw(5, 8).bfloat16()
    cases: list[tuple[list[products.Part], int, Tensor | None]] = [
        ([(x, w, False)], 4, None),
        ([(x, w, True)], 5, None),
        ([(x[:, :7], w, False)], 5, None),
        ([(x, products.LaidOut(w), False), (x[:2], w, False)], 5, None),
        ([(x[:, :7], products.LaidOut(w), False)], 5, None),
        ([(x, w.float(), False)], 5, None),
        ([(x, w, False)], 5, draw(5)),
        ([(x, w, False)] * 9, 5, None),
    ]
    for parts, n, bias in cases:
        with pytest.raises(ValueError, match="do not belong together"):
            products.sums(parts, n, bias=bias)
    with pytest.raises(ValueError, match="do not belong together"):
        products.Gated(draw(16, 8).bfloat16(), draw(16, 8).bfloat16())(x[:, :7])


@needs_products
def test_a_gated_unit_in_one_product() -> None:
    gate, up, x = draw(48, 20).bfloat16(), draw(48, 20, seed=1).bfloat16(), draw(17, 20, seed=2).bfloat16()
    got = products.Gated(gate, up)(x, room=3)
    assert got.shape == (17, 51)
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    near(got[:, :48], F.silu(g) * u, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("v", [1, 5, 16, 1024, 3000])
def test_a_draw_is_the_inverse_of_the_distribution(build: str, dtype: torch.dtype, v: int) -> None:
    """Against cumulative sums in float64, wherever the uniform number is no rounding away from a boundary."""
    logits, u = draw(200, v, dtype=dtype) * 2, torch.rand(200, generator=torch.Generator().manual_seed(1))
    token, logp = sampling.next_tokens(logits, u, Sampling(temperature=0.7, max_new_tokens=1))
    p = (logits.double() / 0.7).softmax(-1)
    upto = p.cumsum(-1)
    want = torch.searchsorted(upto, u.double()[:, None], right=True).squeeze(-1)
    safe = (upto - u.double()[:, None]).abs().amin(-1) > 1e-5
    assert safe.sum() > 150 and torch.equal(token[safe], want[safe].clamp(max=v - 1))
    torch.testing.assert_close(logp.double(), p.log().gather(-1, token[:, None]).squeeze(-1), atol=1e-5, rtol=1e-5)


def test_a_draw_at_the_ends_takes_what_can_be_drawn(build: str) -> None:
    logits = torch.full((4, 40), -torch.inf)
    logits[:, 17] = 0.0
    logits[:, 30] = -3.0
    u = torch.tensor([0.0, 0.5, 1 - 2**-23, 1 - 2**-23])
    token, logp = sampling.next_tokens(logits, u, Sampling(temperature=1.0, max_new_tokens=1))
    assert token.tolist() == [17, 17, 30, 30]
    assert logp[0] == pytest.approx(-0.04858735) and logp[2] == pytest.approx(-3.04858735)


# ------------------------------------------------------------------------------------------------------- the output head


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("widths", "temperature"), [([1, 1, 40], 1.0), ([16, 16, 10], 0.3), ([42], 2.0), ([33, 9], 1.0)]
)
def test_tiles_of_a_vocabulary(build: str, dtype: torch.dtype, widths: list[int], temperature: float) -> None:
    """Logits that grow from tile to tile, so that the sums shrink; a target in each tile, first and last words among them."""
    z = draw(5, 42, dtype=dtype) + torch.linspace(0, 4, 42).to(dtype)
    targets = torch.tensor([0, 1, 16, 40, 41])
    sums, start, exponentials = torch.zeros(5, 5), 0, []
    sums[0] = -torch.inf
    for width in widths:
        tile = z[:, start : start + width].clone()
        e = logprobs._exponentials(tile, targets - start, temperature, sums)
        assert e is tile
        exponentials = [one * sums[4, :, None] for one in exponentials] + [e.double()]
        start += width
    wide = z.double() / temperature
    top = wide.amax(-1)
    near(sums[0], top, torch.float32)
    near(sums[3], wide.gather(-1, targets[:, None]).squeeze(-1), torch.float32)
    want = (wide - top[:, None]).exp().scatter(-1, targets[:, None], 0)
    near(sums[1], want.sum(-1), torch.float32, 8)
    near(sums[2], (want * (wide - top[:, None])).sum(-1), torch.float32, 8)
    near(torch.cat(exponentials, dim=1), want, dtype)


# ------------------------------------------------------------------------------------------------- gradients of adapters


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "rank", "d"), [(1, 1, 1), (70, 8, 37), (130, 7, 64), (200, 20, 576)])
def test_a_long_sum_of_few_rows(build: str, dtype: torch.dtype, n: int, rank: int, d: int) -> None:
    """Of slices, as adapters side by side and rows with room behind them are."""
    low, x = draw(n, rank + 3, dtype=dtype)[:, 2 : 2 + rank], draw(n, d + 5, dtype=dtype, seed=1)[:, :d]
    want = low.double().T @ x.double()
    got, turned = lora.thin(low, x), lora.thin(low, x, 0.5, turned=True)
    assert got.dtype == turned.dtype == torch.float32 and turned.is_contiguous()
    near(got, want, torch.float32, 32)
    near(turned, 0.5 * want.T, torch.float32, 32)


# ------------------------------------------------------------------------------------- what is not a number stays so


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_goes_through(build: str, dtype: torch.dtype) -> None:
    x = draw(3, 40, dtype=dtype)
    x[1, 5] = torch.nan
    weight = torch.ones(40, dtype=dtype)
    assert block._normed_by_kernel(x, weight, 1e-5).isnan().any(-1).tolist() == [False, True, False]
    assert block._act(x, x).isnan().sum() == 1
    assert block._act(torch.ones_like(x), x).isnan().sum() == 1
    endless = torch.tensor([[-torch.inf, torch.inf] * 20], dtype=dtype)
    assert block._act(endless, torch.ones_like(endless)).isnan().tolist() == [[True, False] * 20]  # as in torch
    q = draw(6, 2, 16, dtype=dtype)
    q[4, 0, 3] = torch.nan
    trees = Trees((Segment(0, 6),), 6, 2, torch.device("cpu"))
    out = attention._Native.apply(q, q, q, trees, 0.25)  # type: ignore[no-untyped-call]
    assert out[4:, 0].isnan().all(-1).all() and not out[:, 1].isnan().any()
    token, logp = sampling.next_tokens(x, torch.tensor([0.5, 0.5, 0.5]), Sampling(temperature=1.0, max_new_tokens=1))
    assert logp.isnan().tolist() == [False, True, False] and 0 <= int(token[1]) < 40
    flawed = x.clone()
    logp, entropy, unit = logprobs._by_tiles(
        x, draw(20, 40, dtype=dtype), None, torch.zeros(3, dtype=torch.int64), 1.0, wants_unit=True
    )
    assert unit is not None
    for one in (logp, entropy, unit.sum(-1)):
        assert one.isnan().tolist() == [False, True, False]
    assert lora.thin(flawed[:, :2], flawed[:, 2:]).isnan().sum() == 2


# ------------------------------------------------------------------------------------------------ where there are none


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing has been looked for or compiled yet."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.delenv("TRIMTAB_NATIVE", raising=False)
    native._found.cache_clear()
    yield
    native._found.cache_clear()


def test_it_can_be_switched_off(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_NATIVE", "0")
    assert native.library() is None and native.why_not() == "TRIMTAB_NATIVE=0"
    x = draw(3, 8)
    assert not native.takes(x) and not products.takes(x.bfloat16())
    torch.testing.assert_close(block._act(x, x), F.silu(x) * x)


def test_without_a_compiler_torch_computes(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.library() is None and native.why_not() == "no C compiler (gcc)"


def test_a_compiler_that_fails_is_named_with_what_it_said(
    anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "mycc"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'rows.c:1: error: no such thing' >&2\nexit 1\n"
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    assert native.library() is None
    assert native.why_not() == f"{compiler} does not compile them (rows.c:1: error: no such thing)"
    assert not list((tmp_path / "native").iterdir())


def test_what_has_been_compiled_is_found_again(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert native.library() is not None
    (file,) = (tmp_path / "native").iterdir()
    made = file.stat().st_mtime_ns
    native._found.cache_clear()
    assert native.library() is not None and file.stat().st_mtime_ns == made
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    native._found.cache_clear()
    assert native.library() is not None and len(list((tmp_path / "native").iterdir())) == 2


def test_the_kernels_run_on_the_threads_of_torch() -> None:
    """One OpenMP library in the process, and it is torch's."""
    maps = Path(f"/proc/{os.getpid()}/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "omp.so" in line or "omp-" in line}) == 1
