"""What lies between the products of a block, each as one pass over its numbers: compiled for a GPU (`ops/fused.py`), in C on a CPU
(`ops/native`), elsewhere functions of torch.

The C functions also leave room behind each row for the low-rank input of the adapters that read it, and fill it: `low`, A^T of those
adapters in float32 with its columns filled up to whole vectors, and their number R. The layer then multiplies [x | x A^T] as it lies.

Shapes: n tokens or rows, h query heads, j key heads, e numbers per head, d hidden size, s slots, c columns of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops import native
from trimtab.ops.fused import fused
from trimtab.ops.native import products


@dataclass(frozen=True, slots=True)
class Low:
    """A^T of the adapters that read one x, as the C functions want it: `[d, w]` float32 of which the first `rank` columns count, or in
    bfloat16 as their products have it laid out."""

    matrix: Tensor
    rank: int

    @classmethod
    def of(cls, a: Tensor) -> Low | None:
        """From A `[R d]`, in the type of the x that it will be multiplied with; None where C cannot."""
        if not native.takes(a):
            return None
        functions, rank = native.kernels(), a.shape[0]
        if native.is_narrow(a) and functions.trimtab_has_products():
            return cls(products.LaidOut(a).numbers, rank) if products.are_there() else None
        return cls(F.pad(a.float(), (0, 0, 0, -rank % functions.trimtab_vector())).t().contiguous(), rank)


def rms_with_low(x: Tensor, weight: Tensor, eps: float, low: Low | None) -> Tensor:
    """`rms` `[n d]`, or `[n d + R]` with what the adapters make of it."""
    return _norm(x, None, weight, eps, low) if _fit(x, weight) else rms(x, weight, eps)


def add_rms(x: Tensor, y: Tensor, weight: Tensor, eps: float, low: Low | None = None) -> tuple[Tensor, Tensor]:
    """x + y `[n d]` (in C written into x), and its norm, with `low` in C `[n d + R]`."""
    return (x, _norm(x, y, weight, eps, low)) if _fit(x, y, weight) else add_rms_plain(x, y, weight, eps)


def silu_mul(gate_up: Tensor, low: Low | None = None) -> Tensor:
    """silu(gate) * up of `[n 2f]`, with `low` in C `[n f + R]`."""
    if not _fit(gate_up):
        return silu_mul_plain(gate_up)
    n, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = _room(gate_up, f, low)
    gate = gate_up.data_ptr()
    native.kernels().trimtab_gate(
        gate, gate + f * gate_up.element_size(), 2 * f, out.data_ptr(), out.shape[1], *_of(low), n, f,
        native.is_narrow(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def with_low(x: Tensor, low: Low | None) -> Tensor:
    """x `[n d]` -> `[n d + R]`; x itself without adapters."""
    if low is None:
        return x
    out = _room(x, x.shape[1], low)
    out[:, : x.shape[1]] = x
    return fill_low(out, low)


def fill_low(x: Tensor, low: Low | None) -> Tensor:
    """The last R columns of `[n d + R]` from the others."""
    if low is not None:
        native.kernels().trimtab_beside(
            x.data_ptr(),
            x.shape[1],
            *_of(low),
            x.shape[0],
            x.shape[1] - low.rank,
            native.is_narrow(x),
            torch.get_num_threads(),
        )
    return x


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin `[positions e/2]` in float32: what the C functions turn by."""

    cos: Tensor
    sin: Tensor


def turn_in_place(
    qkv: Tensor, rotary: Rotary, positions: Tensor, h: int, j: int, scale: Tensor | None, eps: float
) -> None:
    """Queries and keys of `[n (h + 2 j) e]` turned to their positions `[n]`, in C; scale `[(h + j) e]` float32 or None."""
    n, _, e = qkv.shape
    native.kernels().trimtab_turn(
        qkv.data_ptr(), _at(scale), eps, rotary.cos.data_ptr(), rotary.sin.data_ptr(), positions.data_ptr(), n, h, j, e,
        native.is_narrow(qkv), torch.get_num_threads(),
    )  # fmt: skip


def keep(qkv: Tensor, read: Tensor, slots: Tensor, columns: Tensor, k: Tensor, v: Tensor) -> None:
    """Keys and values of the tokens `read` `[r]` of qkv `[n (h + 2 j) e]` to their slots and columns `[r]` of k and v `[s j c e]`, in C."""
    (_, j, _, e), n = k.shape, read.shape[0]
    native.kernels().trimtab_keep(
        qkv.data_ptr(), read.data_ptr(), slots.data_ptr(), columns.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1),
        n, qkv.shape[1] - 2 * j, j, e, native.is_narrow(qkv), torch.get_num_threads(),
    )  # fmt: skip


def attend(
    qkv: Tensor,
    rotary: Rotary,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    h: int,
    scale: Tensor | None,
    eps: float,
    low: Low | None,
) -> Tensor:
    """A step's attention in C: row i of qkv `[n (h + 2 j) e]` goes on from `lengths[i]` tokens in slot i of k and v `[s j c e]`.

    Returns:
        `[n (h e)]`, or `[n (h e) + R]`.
    """
    (_, j, _, e), n = k.shape, qkv.shape[0]
    out = _room(qkv, h * e, low)
    native.kernels().trimtab_attend(
        qkv.data_ptr(), _at(scale), eps, rotary.cos.data_ptr(), rotary.sin.data_ptr(), lengths.data_ptr(), k.data_ptr(),
        v.data_ptr(), k.stride(0), k.stride(1), e**-0.5, out.data_ptr(), out.shape[1], *_of(low), n, h, j, e,
        native.is_narrow(qkv), torch.get_num_threads(),
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Layers:
    """What `native/step.c` reads of all layers.

    Attributes:
        words: `[layers 29]` int64, the struct of each as it has it.
        widths: numbers of the widest input of a norm's readers, of attention's output, and of qkv or what passes the gates, with adapters.
    """

    words: Tensor
    widths: tuple[int, int, int]


def step_in_c(
    x: Tensor, norm: Tensor, layers: Layers, rotary: Rotary, k: Tensor, lengths: Tensor, h: int, eps: float
) -> Tensor:
    """A step through all layers at once: x `[n d]` bfloat16, which is overwritten, to the states after the last norm `[n d]`.

    Args:
        norm: weight of the first norm.
        k: the first layer's cache `[s j c e]`: the others' lie as it does.
    """
    (n, d), (_, j, _, e) = x.shape, k.shape
    normed, y, seen, wide = (x.new_empty(n * width) for width in (layers.widths[0], d, *layers.widths[1:]))
    native.kernels().trimtab_step(
        layers.words.data_ptr(), layers.words.shape[0], norm.data_ptr(), x.data_ptr(), normed.data_ptr(), y.data_ptr(), seen.data_ptr(),
        wide.data_ptr(), eps, rotary.cos.data_ptr(), rotary.sin.data_ptr(), lengths.data_ptr(), k.stride(0), k.stride(1), e**-0.5,
        n, d, h, j, e, torch.get_num_threads(),
    )  # fmt: skip
    return normed[: n * d].view(n, d)


def _fit(*arrays: Tensor) -> bool:
    """Arrays as the C functions read them: of one number type, in one piece."""
    return native.takes(arrays[0]) and all(x.dtype == arrays[0].dtype and x.is_contiguous() for x in arrays)


def _norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, low: Low | None) -> Tensor:
    n, d = x.shape
    out = _room(x, d, low)
    native.kernels().trimtab_norm(
        x.data_ptr(), _at(y), weight.data_ptr(), eps, out.data_ptr(), out.shape[1], *_of(low), n, d,
        native.is_narrow(x), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _room(x: Tensor, d: int, low: Low | None) -> Tensor:
    return x.new_empty(x.shape[0], d + (low.rank if low is not None else 0))


def _of(low: Low | None) -> tuple[int | None, int]:
    return (None, 0) if low is None else (low.matrix.data_ptr(), low.rank)


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# ------------------------------------------------------------------------------------------------------------ in torch


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps), moments in float32, rounded to the type of x before w as transformers does (arXiv:1910.07467)."""
    wide = x.float()
    r: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * r).to(x.dtype).mul_(weight)


@fused
def add_rms_plain(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y `[n d]`, and its norm."""
    x = x + y
    return x, rms(x, weight, eps)


@fused
def silu_mul_plain(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[n 2f]`"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def turn(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: int, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[n h e]`, keys and values `[n j e]` of `[n (h + 2 j) e]`, the first two turned to their positions (arXiv:2104.09864).

    Args:
        cos, sin: `[n 1 e]`; the first half of sin with its sign changed, as the halves of a head are swapped and not negated.
        scale: `[(h + j) e]` of the norms on queries and keys, or None.
    """
    qk, value = qkv[:, :-keys], qkv[:, -keys:]
    if scale is not None:
        qk = rms(qk, scale, eps)
    half = qk.shape[-1] // 2
    qk = torch.addcmul(qk * cos, torch.cat([qk[..., half:], qk[..., :half]], dim=-1), sin)
    return qk[:, :-keys], qk[:, -keys:], value


@fused
def turn_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | None,
    eps: float,
) -> Tensor:
    """`turn`, and the keys and values of row i written to k and v `[s j c e]` at slot `rows[i]`, column `columns[i]`; the queries."""
    q, key, value = turn(qkv, cos, sin, k.shape[1], scale, eps)
    k[rows, :, columns] = key
    v[rows, :, columns] = value
    return q
