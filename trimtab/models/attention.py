"""Attention inside packed sequences: which token sees which, and the products without the masked part.

A packed sequence holds many rows one after the other, and tokens that several rows begin with are there once. It is cut into *segments*,
each of which goes on from its parent; a parent lies before its children, and all that goes on from a segment follows it before anything
else does (depth first):

    [ system and schema | question 1 | answer 1 | answer 2 | question 2 | answer 3 ] [ a row that shares nothing ]

A token sees what precedes it in its own segment, and its segment's ancestors. In that order one number a token says it all: the column
at which what may see the token ends. As one mask that is n^2 numbers of which few are true: eight answers of 48 tokens to a prompt of
400 use 40 % of it, forty rows of 40 tokens use 1 %. So the sequence is cut into blocks (some queries, and the keys that they may see),
blocks of like size are computed together, and only the inputs are kept for the backward pass.

The products run in float32, also over bfloat16 inputs: scores are not rounded before the softmax. On a CPU that is
`ops/native/attention.c`; without a compiler the blocks are computed by torch's products, which takes twice as long, and torch's own kernel
five times as long as those on rows of 40 tokens in bfloat16 (docs/log.md). On CUDA rows that share nothing go through torch's flash
attention, others become a block mask of flex_attention; where Triton is missing, one boolean mask or these blocks.

Shapes: n tokens of the sequence, h query heads, j key heads, d numbers per head; r spans of a block, m queries and c keys of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trimtab.ops import native
from trimtab.ops.fused import compile_often

NAME = "trimtab_trees"
"""What `config._attn_implementation` says of a model that computes packed sequences here."""

QUERIES = 256
"""Queries of a block at most: the masked triangle of a long row is cut away in steps of this."""

SCORES = 1 << 19
"""Score entries (over all heads) of a block at most, unless it is a single span: 2 MB, which a core's cache holds."""

SQUARE = 128
"""Tokens of a block of flex_attention's mask, either way."""


PARTS = 16
"""Threads of the backward pass in C at most: each has the gradients of a head's keys and values to itself until they are added up."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Columns of some tokens that go on from the last token of `parent`, by its number; -1: from nothing."""

    start: int
    end: int
    parent: int = -1


@dataclass(frozen=True, slots=True)
class Block:
    """Queries of r spans and what they see.

    Attributes:
        read: columns of the queries, with some column for padding; write: the same with column n (a spare one) for padding.
        keys: columns of the keys; mask: 0 where a query may look, else -inf (padding of the keys included).
    """

    read: Int[Tensor, "r m"]
    write: Int[Tensor, "r m"]
    keys: Int[Tensor, "r c"]
    keys_write: Int[Tensor, "r c"]
    mask: Float[Tensor, "r 1 1 m c"]


@dataclass(slots=True)
class Trees:
    """The segments of one packed sequence of n tokens, depth first, and what is derived from them once for all layers."""

    segments: tuple[Segment, ...]
    n: int
    heads: int
    device: torch.device
    _blocks: list[Block] | None = None
    _mask: Any = None
    _block_mask: Any = None
    _rows: tuple[Tensor, int] | None = None
    _laid: tuple[Tensor, int, int] | None = None
    _turns: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def blocks(self) -> list[Block]:
        """The sequence in blocks, like sizes together."""
        if self._blocks is None:
            self._blocks = list(_cut(self.segments, self.n, self.heads, self.device))
        return self._blocks

    def laid(self, vector: int) -> tuple[Int[Tensor, "4 r"], int]:
        """Start, end and parent of each segment, and its place where each begins at a multiple of `vector`; and the columns of that."""
        if self._laid is None or self._laid[2] != vector:
            places, column = [], 0
            for segment in self.segments:
                places.append(column)
                column += -(-(segment.end - segment.start) // vector) * vector
            columns = zip(*((s.start, s.end, s.parent) for s in self.segments), strict=True)
            self._laid = torch.tensor([*columns, places]), column, vector
        return self._laid[:2]

    def turns(
        self, cos: Tensor, sin: Tensor
    ) -> tuple[Float[Tensor, "n e/2"], Float[Tensor, "n e/2"], Float[Tensor, "n e/2"]]:
        """cos, sin and -sin of each token in float32, of the `[1 n e]` that every layer is given: one half, which the other repeats."""
        if self._turns is None or self._turns[0] is not cos:
            c, s = (x[0, :, : x.shape[-1] // 2].float().contiguous() for x in (cos, sin))
            self._turns = cos, c, s, -s
        return self._turns[1:]

    def ends(self) -> Int[Tensor, " n"]:
        """For each token the column where the segments that go on from its own end: nothing from there on sees it."""
        last = [segment.end for segment in self.segments]
        for number in reversed(range(len(last))):
            parent = self.segments[number].parent
            if parent >= 0:
                last[parent] = max(last[parent], last[number])
        sizes = torch.tensor([segment.end - segment.start for segment in self.segments])
        return torch.tensor(last).repeat_interleave(sizes).to(self.device)

    def rows(self) -> tuple[Int[Tensor, " r1"], int] | None:
        """Where each row starts (and the last one ends), int32, and the longest row; None where some share tokens."""
        if self._rows is None and all(segment.parent < 0 for segment in self.segments):
            starts = torch.tensor([0, *(segment.end for segment in self.segments)], dtype=torch.int32)
            self._rows = starts.to(self.device), max(segment.end - segment.start for segment in self.segments)
        return self._rows

    def mask(self) -> Tensor:
        """`[1 1 n n]`: True where the row may look at the column. The definition that every other form is tested against."""
        if self._mask is None:
            column = torch.arange(self.n, device=self.device)
            self._mask = ((column <= column[:, None]) & (column[:, None] < self.ends()))[None, None]
        mask: Tensor = self._mask
        return mask

    def sees(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as a function of batch, head, row and column, which flex_attention compiles into its kernel."""
        ends = self.ends()

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < ends[k])

        return sees

    def block_mask(self) -> Any:
        """The same for flex_attention. Which blocks are looked at comes from the segments: no mask of n^2 entries is ever made."""
        if self._block_mask is None:
            seen = self._blocks_seen()
            self._block_mask = BlockMask.from_kv_blocks(
                seen.sum(dim=-1, dtype=torch.int32)[None, None].to(self.device),
                seen.int().argsort(dim=-1, descending=True, stable=True).int()[None, None].to(self.device),
                BLOCK_SIZE=SQUARE,
                mask_mod=self.sees(),
                seq_lengths=(self.n, self.n),
            )
        return self._block_mask

    def _blocks_seen(self) -> Tensor:
        """`[m m]`, m blocks of `SQUARE` tokens: does a token of the row's block look at one of the column's?"""
        ends = F.pad(self.ends().cpu(), (0, -self.n % SQUARE)).view(-1, SQUARE).amax(1)
        return (torch.arange(len(ends))[:, None] * SQUARE < ends).tril()


# ------------------------------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries of a segment: `queries` of them from its token `first` on; the segment starts at column `start` and sees `path` before it."""

    first: int
    queries: int
    start: int
    path: Int[Tensor, " shared"]


def _cut(segments: Sequence[Segment], n: int, heads: int, device: torch.device) -> list[Block]:
    """Blocks of all segments: every token is a query once; segments whose padding would cost little are computed together."""
    paths: list[Tensor] = []
    pieces: list[_Piece] = []
    for segment in segments:
        path = torch.empty(0, dtype=torch.long)
        if segment.parent >= 0:
            parent = segments[segment.parent]
            path = torch.cat([paths[segment.parent], torch.arange(parent.start, parent.end)])
        paths.append(path)
        for first in range(0, segment.end - segment.start, QUERIES):
            queries = min(QUERIES, segment.end - segment.start - first)
            pieces.append(_Piece(first, queries, segment.start, path))
    pieces.sort(key=lambda piece: (piece.first, -len(piece.path), -piece.queries, piece.start))
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups:
            head = groups[-1][0]  # the longest path of the group
            queries = max(max(p.queries for p in groups[-1]), piece.queries)
            area = queries * (len(head.path) + head.first + queries)
            alike = piece.first == head.first and 4 * len(piece.path) >= 3 * len(head.path)
            if alike and 4 * piece.queries >= 3 * queries and (len(groups[-1]) + 1) * area * heads <= SCORES:
                groups[-1].append(piece)
                continue
        groups.append([piece])
    return [_block(group, n, device) for group in groups]


def _block(pieces: list[_Piece], n: int, device: torch.device) -> Block:
    r, first = len(pieces), pieces[0].first
    shared, m = max(len(p.path) for p in pieces), max(p.queries for p in pieces)
    start = torch.tensor([p.start for p in pieces])[:, None]
    queries = torch.tensor([p.queries for p in pieces])[:, None]
    read, keys = start + first + torch.arange(m), start + torch.arange(first + m)
    real, known = torch.arange(m) < queries, torch.arange(first + m) < first + queries
    path, walked = start.expand(r, shared).clone(), torch.zeros(r, shared, dtype=torch.bool)
    for i, piece in enumerate(pieces):
        path[i, : len(piece.path)] = piece.path
        walked[i, : len(piece.path)] = True
    known, keys = torch.cat([walked, known], dim=1), torch.cat([path, keys], dim=1)
    mask = torch.zeros(r, m, shared + first + m)
    mask[:, :, :shared].masked_fill_(~walked[:, None], -torch.inf)
    # own keys that are padding come after every query
    mask[:, :, shared:] = torch.full((m, first + m), -torch.inf).triu(first + 1)
    if bool((mask == mask[:1]).all()):
        mask = mask[:1]
    return Block(
        read=read.where(real, start).to(device),
        write=read.where(real, torch.tensor(n)).to(device),
        keys=keys.where(known, start).to(device),
        keys_write=keys.where(known, torch.tensor(n)).to(device),
        mask=mask[:, None, None].to(device),
    )


# ----------------------------------------------------------------------------------------------------------- attention


class _Native(torch.autograd.Function):
    """softmax(q k^T scale) v by `ops/native/attention.c`; backward computes the probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, trees: Trees, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.trees, ctx.scale = trees, scale
        return look(q, k, v, trees, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return *look_back(q, k, v, grad.contiguous(), ctx.trees, ctx.scale), None, None


def look(q: Tensor, k: Tensor, v: Tensor, trees: Trees, scale: float) -> Tensor:
    """q `[n h d]`, k and v `[n j d]` -> `[n h d]`, in C; where `in_c` says so."""
    (_, h, e), j = q.shape, k.shape[1]
    own, tree, columns = _arguments(trees, q, k, v)
    out = q.new_empty(q.shape)
    room = torch.empty(2 * j * columns * e, dtype=torch.float32)
    native.kernels().trimtab_tree(
        *own, out.data_ptr(), *tree, room.data_ptr(), scale, h, j, e, native.is_narrow(q), torch.get_num_threads()
    )
    return out


def look_back(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, trees: Trees, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each in one piece, from that of what `look` returned."""
    (_, h, e), j = q.shape, k.shape[1]
    own, tree, columns = _arguments(trees, q, k, v, grad)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    parts = min(torch.get_num_threads(), PARTS)
    room = torch.empty((3 + 2 * parts) * columns * e, dtype=torch.float32)
    native.kernels().trimtab_tree_back(
        *own, *(x.data_ptr() for x in grads), *tree, room.data_ptr(), scale, h, j, e, native.is_narrow(q), parts
    )
    return grads


def _arguments(trees: Trees, *arrays: Tensor) -> tuple[list[int], list[int], int]:
    """What the kernels read of `[n heads d]` arrays, of the tree, and the columns that its segments are laid out in."""
    own = []
    for x in arrays:
        assert x.stride(2) == 1
        own += [x.data_ptr(), x.stride(0), x.stride(1)]
    laid, columns = trees.laid(native.kernels().trimtab_vector())
    step = laid.stride(0) * laid.element_size()
    return own, [laid.shape[1], *(laid.data_ptr() + i * step for i in range(4)), columns], columns


def in_c(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Are these heads of one size and one number type that the kernels have, on a machine on which they give what a mask gives?"""
    e = q.shape[-1]
    alike = (
        k.shape == v.shape
        and k.shape[-1] == e
        and q.dtype == k.dtype == v.dtype
        and all(x.stride(-1) == 1 for x in (q, k, v))
    )
    return alike and native.takes(q) and e % native.kernels().trimtab_vector() == 0 and _kernel_is_right()


@cache
@torch.no_grad()
def _kernel_is_right() -> bool:
    """Tried once, on a tree with grouped queries: a compiler may be wrong, or the machine not what it says."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(21, h, 32, generator=generator) for h in (4, 2, 2))
    trees = Trees((Segment(0, 4), Segment(4, 7, 0), Segment(7, 21)), 21, 4, torch.device("cpu"))
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    want = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=trees.mask(), enable_gqa=True)
    got = _Native.apply(q, k, v, trees, 32**-0.5)  # type: ignore[no-untyped-call]
    return bool((got - want[0].transpose(0, 1)).abs().max() <= 1e-5)


class _TreeAttention(torch.autograd.Function):
    """softmax(q k^T scale) v block by block; backward computes the probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, trees: Trees, scale: float) -> Tensor:
        """q `[n h d]`, k and v `[n j d]` -> `[n h d]`"""
        out = q.new_empty(trees.n + 1, *q.shape[1:])
        j = k.shape[1]
        for block in trees.blocks():
            p = _probabilities(_gather(q, block.read, j), _gather(k, block.keys, j), block, scale)
            out[block.write] = _scatterable(p @ _gather(v, block.keys, j), block.read.shape[1]).to(q.dtype)
        ctx.save_for_backward(q, k, v)
        ctx.trees, ctx.scale = trees, scale
        return out[: trees.n]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        trees, scale, j = ctx.trees, ctx.scale, k.shape[1]
        grad_q = q.new_empty(trees.n + 1, *q.shape[1:])
        # a segment's keys collect from all that goes on from it: the sums are wide
        grad_k = k.new_zeros(trees.n + 1, *k.shape[1:], dtype=_wide(k))
        grad_v = torch.zeros_like(grad_k)
        for block in trees.blocks():
            queries, keys = _gather(q, block.read, j), _gather(k, block.keys, j)
            values, pull = _gather(v, block.keys, j), _gather(grad, block.read, j, real=block.write < trees.n)
            p = _probabilities(queries, keys, block, scale)
            m, c = block.read.shape[1], block.keys.shape[1]
            _add(grad_v, _scatterable(p.transpose(-1, -2) @ pull, c), block.keys_write)
            # through the softmax: p (dp - sum(p dp))
            slope = pull @ values.transpose(-1, -2)
            slope.sub_(torch.linalg.vecdot(p, slope).unsqueeze(-1)).mul_(p).mul_(scale)
            _add(grad_k, _scatterable(slope.transpose(-1, -2) @ queries, c), block.keys_write)
            grad_q[block.write] = _scatterable(slope @ keys, m).to(q.dtype)
        return grad_q[: trees.n], grad_k[: trees.n].to(k.dtype), grad_v[: trees.n].to(v.dtype), None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gather(x: Tensor, columns: Tensor, j: int, real: Tensor | None = None) -> Tensor:
    """Columns `[r m]` of x `[n h d]` as wide matrices `[r j (g m) d]`: the g = h / j query heads of a key head share its product."""
    r, m = columns.shape
    picked = x[columns]
    if real is not None:
        picked = picked.mul_(real[:, :, None, None])
    return picked.view(r, m, j, x.shape[1] // j, -1).permute(0, 2, 3, 1, 4).to(_wide(x)).reshape(r, j, -1, x.shape[2])


def _scatterable(x: Tensor, m: int) -> Tensor:
    """`[r j (g m) d]` back to `[r m h d]`."""
    r, j, gm, d = x.shape
    return x.view(r, j, gm // m, m, d).permute(0, 3, 1, 2, 4).reshape(r, m, -1, d)


def _add(total: Tensor, part: Tensor, columns: Tensor) -> None:
    total.index_add_(0, columns.flatten(), part.flatten(0, 1))


def _probabilities(queries: Tensor, keys: Tensor, block: Block, scale: float) -> Tensor:
    """`[r j (g m) c]`, wide; 0 where a query may not look."""
    r, j, gm, _ = queries.shape
    m, c = block.read.shape[1], block.keys.shape[1]
    scores = (queries @ keys.transpose(-1, -2)).mul_(scale).view(r, j, gm // m, m, c)
    return scores.add_(block.mask.to(scores.dtype)).softmax(dim=-1).view(r, j, gm, c)


def tree_attention(
    q: Float[Tensor, "1 h n d"], k: Float[Tensor, "1 j n d"], v: Float[Tensor, "1 j n d"], trees: Trees, scale: float
) -> Float[Tensor, "1 n h d"]:
    """Attention of one packed sequence; h is a multiple of j (grouped queries). Sums in float32, the result in the type of q."""
    return (_on_cuda if q.device.type == "cuda" else _by_blocks)(q, k, v, trees, scale)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, trees: Trees, scale: float) -> Tensor:
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    function = _Native if in_c(*rows) else _TreeAttention
    out: Tensor = function.apply(*rows, trees, scale)  # type: ignore[no-untyped-call]
    return out[None]


ONE_MASK = 4096
"""Tokens up to which one mask of n^2 entries is made where Triton is missing."""


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, trees: Trees, scale: float) -> Tensor:
    """The forms for a GPU: flash attention over rows that share nothing, else flex_attention; where Triton is missing (Windows) one mask
    for few tokens, and the blocks of the CPU for many."""
    if _flash_takes(q) and (rows := trees.rows()) is not None:
        return _flash(q, k, v, *rows, scale)[None]
    grouped = q.shape[1] != k.shape[1]
    flex = _flex_attention()
    if flex is None and trees.n > ONE_MASK:
        return _by_blocks(q, k, v, trees, scale)
    if flex is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=trees.mask(), scale=scale, enable_gqa=grouped)
    else:
        out = flex(q, k, v, block_mask=trees.block_mask(), scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
    """Rows one after the other, `[1 h n d]` -> `[n h d]`. torch's own build of arXiv:2307.08691, differentiable."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(x[0].transpose(0, 1) for x in (q, k, v)), starts, starts, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return out


def _flash_takes(q: Tensor) -> bool:
    """16-bit numbers and a head that its kernels have, on a GPU on which it gives what a mask gives."""
    fits = q.element_size() == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and _flash_is_right(str(q.device), q.dtype)


@cache
@torch.no_grad()
def _flash_is_right(device: str, dtype: torch.dtype) -> bool:
    """Tried once on two rows with grouped queries; it is a private operator of torch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 11, 64, generator=generator).to(device, dtype) for h in (4, 2, 2))
    trees = Trees((Segment(0, 4), Segment(4, 11)), 11, 4, torch.device(device))
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=trees.mask(), enable_gqa=True)
    rows = trees.rows()
    assert rows is not None
    try:
        got = _flash(q, k, v, *rows, 64**-0.5).float()
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((got - want[0].transpose(0, 1)).abs().max() <= 2e-2)


@cache
def _flex_attention() -> Any:  # pragma: no cover - needs a GPU
    """torch's flex_attention, compiled (uncompiled it makes all scores); None without Triton, which compiles it."""
    if find_spec("triton") is None:
        return None
    return compile_often(flex_attention, dynamic=True)


# --------------------------------------------------------------------------------------------- the seam to transformers


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keys: Any
) -> tuple[Tensor, None]:
    """What a layer of transformers calls: trees when the forward was given some, else torch's attention as before."""
    trees = keys.pop("trees", None)
    if trees is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **keys)
        return out
    scale = keys.get("scaling")
    return tree_attention(query, key, value, trees, query.shape[-1] ** -0.5 if scale is None else scale), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model: PreTrainedModel) -> None:
    """Make the model's layers take `trees`. Without them every forward is what it was (torch's attention)."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa":
        config._attn_implementation = NAME


def uninstall(model: PreTrainedModel) -> None:
    """Back to torch's attention alone."""
    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        config._attn_implementation = "sdpa"


def installed(model: torch.nn.Module) -> bool:
    """Do the layers of this model take `trees`?"""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return bool(config._attn_implementation == NAME)
