"""Attention in packed sequences against one dense mask, output and gradients, in float64; and what each token sees, by hand."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

from trimtab.models import attention
from trimtab.models.attention import SQUARE, Segment, Trees, tree_attention
from trimtab.models.tiny import tiny_model

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def forest(nodes: list[tuple[int, int]], heads: int = 4) -> Trees:
    """Segments of these (tokens, depth): each goes on from the last one before it that is one less deep."""
    at, segments, open_ = 0, [], []
    for length, depth in nodes:
        depth = min(depth, len(open_))
        segments.append(Segment(at, at + length, open_[depth - 1] if depth else -1))
        open_ = [*open_[:depth], len(segments) - 1]
        at += length
    return Trees(tuple(segments), at, heads, CPU)


def grow(shapes: list[tuple[int, list[int]]], heads: int = 4) -> Trees:
    """Trees of these (stem, branches) lengths, one after the other."""
    nodes = []
    for stem, branches in shapes:
        nodes += [(stem, 0)] * bool(stem) + [(length, int(stem > 0)) for length in branches]
    return forest(nodes, heads)


def test_who_sees_whom() -> None:
    mask = grow([(2, [1, 2]), (0, [2])]).mask()[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],  # the second answer: the prompt and itself, not the first answer
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],  # another row sees none of them
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_a_token_sees_all_that_it_goes_on_from() -> None:
    """A system message, two schemas behind it, two questions behind the first; then a row of its own."""
    trees = forest([(1, 0), (2, 1), (1, 2), (1, 2), (1, 1), (1, 0)])
    assert [segment.parent for segment in trees.segments] == [-1, 0, 1, 1, 0, -1]
    assert trees.ends().tolist() == [6, 5, 5, 4, 5, 6, 7]
    assert trees.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],  # the second question: the message, its schema and itself
        [1, 0, 0, 0, 0, 1, 0],  # the second schema: the message and itself
        [0, 0, 0, 0, 0, 0, 1],
    ]


NODES = [(2, 0), (1, 1), (2, 1), (2, 0), (5, 0), (3, 1), (1, 2), (2, 2), (4, 1), (1, 0)]


def test_the_function_for_a_gpu_sees_what_the_mask_sees() -> None:
    trees = forest(NODES)
    seen = create_mask(trees.sees(), 1, 1, trees.n, trees.n, device="cpu")
    assert torch.equal(seen, trees.mask())


@pytest.mark.parametrize(("triton", "most"), [(True, 0), (False, 4096), (False, 0)])
def test_the_forms_for_a_gpu_compute_what_the_blocks_do(
    triton: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flex_attention with its block mask (uncompiled); one boolean mask where Triton is missing, and none for many tokens."""
    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention if triton else None)
    monkeypatch.setattr(attention, "ONE_MASK", most)
    trees = forest(NODES)
    mask = trees.mask()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, trees.n, 16, generator=generator) for heads in (4, 2, 2))
    tree_attention(q, k, v, trees, 0.3)  # kernels are tried once, on a few tokens and against a mask
    if not triton and not most:
        monkeypatch.setattr(Trees, "mask", lambda self: pytest.fail("a mask of n^2 entries"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not compiled
        got = attention._on_cuda(q, k, v, trees, 0.3)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_no_block_that_is_looked_at_is_left_out(seed: int) -> None:
    """Of long trees and rows, in blocks of 128 tokens; and no others are computed."""
    draw = random.Random(seed)
    trees = forest([(draw.choice((3, 40, 150, 400)), draw.randint(0, 4)) for _ in range(25)])
    n = -(-trees.n // SQUARE)
    padded = F.pad(trees.mask()[0, 0].float(), (0, -trees.n % SQUARE) * 2)
    needed = padded.view(n, SQUARE, n, SQUARE).amax((1, 3)).bool()
    seen = trees._blocks_seen()
    assert torch.equal(needed, seen)


def test_a_branch_does_not_compute_its_siblings() -> None:
    """A stem and two branches of two blocks each: 3 + 7 + 7 pairs of blocks would be seen without sharing's mask; four are not."""
    seen = grow([(256, [256, 256])])._blocks_seen()
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_rows_that_share_nothing_are_found() -> None:
    found = grow([(0, [2]), (0, [1, 3]), (0, [2])]).rows()
    assert found is not None
    starts, longest = found
    assert starts.tolist() == [0, 2, 3, 6, 8] and starts.dtype == torch.int32 and longest == 3
    assert grow([(0, [2]), (1, [1, 3])]).rows() is None


def against_a_dense_mask(trees: Trees) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        shape = (1, heads, trees.n, 8)
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    q, k, v = draw(4), draw(2), draw(2)
    ours = tree_attention(q, k, v, trees, 0.3)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=trees.mask(), scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, dense, atol=1e-12, rtol=1e-12)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for name, a, b in zip(
        "qkv",
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((dense * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10, msg=name)


@pytest.mark.property
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=14))
def test_trees_of_any_shape_are_one_dense_mask(nodes: list[tuple[int, int]]) -> None:
    against_a_dense_mask(forest(nodes))


def test_spans_longer_than_a_block_are_cut() -> None:
    trees = forest([(300, 0), (2, 1), (260, 1), (1, 2), (257, 2), (1, 1), (3, 0), (4, 1), (257, 0)])
    assert len(trees.blocks()) > 4
    against_a_dense_mask(trees)


def test_like_spans_are_computed_together() -> None:
    assert [len(block.read) for block in grow([(0, [5])] * 7).blocks()] == [7]
    # 40 and 4 tokens: padding the short ones would cost ten times their own work
    assert sorted(len(block.read) for block in grow([(0, [40]), (0, [4]), (0, [4])]).blocks()) == [1, 2]


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    trees = grow([(30, [20, 25]), (0, [60])])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, trees.n, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    exact = tree_attention(q.double(), k.double(), v.double(), trees, 0.5)
    # half a unit in the last place of the result, and nothing from the scores
    torch.testing.assert_close(tree_attention(q, k, v, trees, 0.5).double(), exact, atol=1e-6, rtol=2**-8)


def test_a_prepared_model_is_what_it_was_without_trees() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        before = model(ids).logits, model(ids, attention_mask=mask).logits
        attention.install(model)
        assert attention.installed(model)
        after = model(ids).logits, model(ids, attention_mask=mask).logits
        attention.uninstall(model)
    assert not attention.installed(model)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
