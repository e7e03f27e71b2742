"""Log-probabilities and entropies from hidden states, without the logits of all rows in memory.

Shapes: s scored positions, d hidden size, v vocabulary, c rows of a chunk.

    z = (hidden weight^T + bias) / temperature          logits, c rows at a time
    logp[i] = z[i, target] - logsumexp(z[i])
    entropy[i] = logsumexp(z[i]) - sum_j p[i, j] z[i, j]      with p = softmax(z)

The logits of a batch are by far its largest array: 8 answers of 256 tokens with 150,000 words are 1.2 GB in float32,
and autograd would keep several of them. Here at most c x v numbers live at any time, forward and backward. The
gradients:

    d logp[i] / d z[i, j] = 1[j = target] - p[i, j]
    d entropy[i] / d z[i, j] = -p[i, j] (log p[i, j] + entropy[i])

Products run in the dtype of `hidden`; the softmax and all sums in float32 (float64 stays float64).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.ops import native
from trimtab.ops.fused import fused
from trimtab.ops.native import products


def logprobs_and_entropy(
    hidden: Float[Tensor, "s d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " s"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " v"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
    """Log-probability of each target, and entropy of each distribution, at the given temperature.

    Both come wide (float32, or float64), and are differentiable once, in `hidden`, `weight` and `bias`. An entropy
    that no loss uses costs nothing in the backward pass. Memory: O(chunk x v), and a `[s d]` array until the backward
    pass.
    """
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    function = _LogprobsAndEntropy.apply
    chunk = chunk or rows_at_a_time(len(weight), hidden.device.type)
    logp, entropy = function(hidden, weight, bias, targets, temperature, chunk, learns)  # type: ignore[no-untyped-call]
    return logp, entropy


def logprobs_and_entropy_plain(
    hidden: Float[Tensor, "s d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " s"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " v"] | None = None,
) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
    """The same in four lines with all logits in memory: the oracle of the tests."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(_wide(hidden)) / temperature
    log_p = torch.log_softmax(logits, dim=-1)
    logp = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(dim=-1)


def vocabulary_mean(
    hidden: Float[Tensor, "s d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " s"],
    logp: Float[Tensor, " s"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, " s"]:
    """1/V sum over v of log p(v): what label smoothing pulls up. No logits: with z = (W h + b) / T and log p(v) = z_v - log Z,

        mean_v log p(v) = mean_v z_v - log Z = logp(target) + h . (mean_v w_v - w_target) / T      (and likewise for b)

    Args:
        logp: log p of the targets at this temperature, as `logprobs_and_entropy` gives it, gradients included.
    """
    wide = _wide(hidden)
    direction = weight.to(wide).mean(dim=0) - weight[targets]
    z = torch.linalg.vecdot(hidden.to(wide), direction)
    if bias is not None:
        z = z + bias.to(wide).mean() - bias[targets]
    found: Tensor = logp + z / temperature
    return found


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """z `[c v]`, wide. A float32 product is divided in place, a half-precision one in its wide copy."""
    return _product(hidden, weight, bias).to(_wide(hidden)).div_(temperature)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Chunked forward and backward.

    In the usual case (LoRA: only `hidden` wants a gradient) the forward pass, which holds p anyway, also computes the
    gradient of each logp with respect to its own hidden state, `unit [s d]`; the backward pass is then one product
    per row and no logits are computed twice. A gradient for the head, or through the entropy, recomputes them chunk
    by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # an unused entropy arrives in backward as None, not as zeros
        head_learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        logp = hidden.new_empty(len(hidden), dtype=_wide(hidden))
        entropy = torch.empty_like(logp)
        unit = torch.empty_like(hidden) if learns and not head_learns else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            found = _by_tiles(hidden[rows], weight, bias, targets[rows], temperature, wants_unit=unit is not None)
            logp[rows], entropy[rows] = found[:2]
            if unit is not None:
                unit[rows] = cast(Tensor, found[2])
        ctx.save_for_backward(hidden, weight, bias, targets, unit)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, unit = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 7
        if unit is not None and grad_logp is not None and grad_entropy is None:
            return (unit * grad_logp.unsqueeze(-1), *(None,) * 6)

        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = _wide(hidden)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad_z = _grad_logits(
                _logits(hidden[rows], weight, bias, ctx.temperature),
                targets[rows].unsqueeze(-1),
                None if grad_logp is None else grad_logp[rows].unsqueeze(-1),
                None if grad_entropy is None else grad_entropy[rows].unsqueeze(-1),
            ).div_(ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad_z.sum(dim=0)
            narrow = grad_z.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = narrow @ weight
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden[rows]
        return grad_hidden, grad_weight, grad_bias, *(None,) * 4  # autograd rounds them to the types of their leaves


TILE = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits that exist at a time in the forward pass: on a CPU 2 MB, which its caches hold; on a GPU what keeps it busy."""
WHOLE = ("cuda",)
"""Devices on which a tile has the whole vocabulary."""
CHUNK = 256
"""Rows of a chunk on a CPU, whose vocabulary is cut into tiles; on a GPU a tile has the whole vocabulary, and fewer rows."""


def rows_at_a_time(vocabulary: int, device: str) -> int:
    """c"""
    return max(1, TILE["cuda"] // vocabulary) if device == "cuda" else CHUNK


def _by_tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, *, wants_unit: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logp, entropy and (d logp / d hidden) of c rows, the vocabulary in tiles with a running maximum (arXiv:2205.14135, section 3.1).

    With m the maximum so far, every sum over tiles is kept relative to exp(m) and rescaled when m grows:

        others = sum over j != target of exp(z_j - m)         sloped = sum over all j of exp(z_j - m) (z_j - m)
        pull   = sum over j != target of exp(z_j - m) w_j
        d logp / d h = ((1 - p_target) w_target - sum over j != target of p_j w_j) / T

    The target stays out of the sums: 1 - p_target then loses no digits where the model is sure.
    """
    if hidden.device.type in WHOLE:
        return _at_once(hidden, weight, bias, targets, temperature, wants_unit=wants_unit)
    c, v = len(hidden), len(weight)
    width = max(1, min(v, TILE["cpu"] // c))
    sums = hidden.new_zeros(5, c, dtype=_wide(hidden))
    top, others, sloped, z_target, shrink = sums
    top.fill_(-torch.inf)
    pull = hidden.new_zeros(c, hidden.shape[1], dtype=sums.dtype) if wants_unit else None
    for start in range(0, v, width):
        part = weight[start : start + width]
        z = _product(hidden, part, None if bias is None else bias[start : start + width])
        e = _exponentials(z, targets - start, temperature, sums)
        if pull is not None:
            pull.mul_(shrink.unsqueeze(-1))
            if pull.dtype == hidden.dtype:
                pull.addmm_(e, part)
            else:
                pull.add_(_product_sideways(e.to(hidden.dtype), part))
    relative = z_target - top
    own = relative.exp()
    total = others + own
    entropy = total.log() - (sloped + own * relative) / total
    unit = None
    if pull is not None:
        share = (others / total).unsqueeze(-1) * weight[targets]
        unit = share.sub_(pull.div_(total.unsqueeze(-1))).div_(temperature)
    return relative - total.log(), entropy, unit


def _exponentials(z: Tensor, place: Tensor, temperature: float, sums: Tensor) -> Tensor:
    """e^(z / T - m) of the logits of a tile `[c w]`, 0 at the target; z is overwritten.

    Args:
        place: columns of the targets; outside of the tile where it has them not.
        sums: m, others, sloped, z of the target and what the sums so far have shrunk by `[5 c]`, which are brought up to this tile.
    """
    if native.takes(z) and z.is_contiguous() and place.dtype == torch.int64 and place.is_contiguous():
        n, v = z.shape
        native.kernels().trimtab_tile(
            z.data_ptr(), place.data_ptr(), temperature, sums.data_ptr(), n, v, native.is_narrow(z), torch.get_num_threads()
        )  # fmt: skip
        return z
    top, others, sloped, z_target, shrink = sums.unsqueeze(-1)
    z = z.to(sums.dtype).div_(temperature)
    here = ((place >= 0) & (place < z.shape[1])).unsqueeze(-1)
    column = place.clamp(0, z.shape[1] - 1).unsqueeze(-1)
    z_target.copy_(torch.where(here, z.gather(-1, column), z_target))
    higher = torch.maximum(top, z.amax(dim=-1, keepdim=True))
    # the first tile finds -inf, and nothing to rescale
    shift = torch.where(top.isinf(), torch.zeros_like(top), top - higher)
    shrink.copy_(shift.exp())
    e = z.sub_(higher).exp()
    own = torch.where(here, e.gather(-1, column), 0)
    # everything but the target's own term is relative to the old maximum until here
    slope = torch.linalg.vecdot(e, z).unsqueeze(-1) - torch.where(here, own * z.gather(-1, column), 0)
    e.scatter_(-1, column, torch.where(here, 0, e.gather(-1, column)))
    sloped.copy_(shrink * (sloped + shift * others) + slope)
    others.mul_(shrink).add_(e.sum(dim=-1, keepdim=True))
    top.copy_(higher)
    return e


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias of W `[n k]`"""
    if products.takes(*(one for one in (x, weight, bias) if one is not None)):
        return products.sums([(x, weight, False)], len(weight), bias=bias)
    return torch.nn.functional.linear(x, weight, bias)


def _product_sideways(x: Tensor, weight: Tensor) -> Tensor:
    """x W of W `[k n]`"""
    return products.sums([(x, weight, True)], weight.shape[1]) if products.takes(x, weight) else x @ weight


def _at_once(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, *, wants_unit: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with the whole vocabulary in one tile: what a GPU does sooner than many small tiles."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    logp, entropy, others, share = _softmax(z, targets, temperature, wants_unit)
    if not wants_unit:
        return logp, entropy, None
    return logp, entropy, (others * weight[targets]).sub_(share @ weight).div_(temperature)


@fused
def _softmax(
    z: Tensor, targets: Tensor, temperature: float, wants_share: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logits z `[c v]` before the temperature: logp of the targets, entropy, 1 - p(target) `[c 1]`, and p in the type of z with 0 at
    the target (an empty array where it is not wanted)."""
    wide, target = z.to(_wide(z)) / temperature, targets.unsqueeze(-1)
    top = wide.amax(dim=-1, keepdim=True)
    e = (wide - top).exp()
    total = e.sum(dim=-1, keepdim=True)
    entropy = total.log() - (e * (wide - top)).sum(dim=-1, keepdim=True) / total
    logp = wide.gather(-1, target) - top - total.log()
    rest = torch.where(torch.arange(z.shape[-1], device=z.device) == target, 0.0, e)
    others = rest.sum(dim=-1, keepdim=True) / total
    share = (rest / total).to(z.dtype) if wants_share else z.new_empty(0)
    return logp.squeeze(-1), entropy.squeeze(-1), others, share


def _grad_logits(z: Tensor, target: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """Gradient of sum(grad_logp logp + grad_entropy entropy) with respect to z `[c v]`."""
    log_p = z.log_softmax(dim=-1)
    p = log_p.exp()
    pull = torch.zeros_like(target, dtype=z.dtype) if grad_logp is None else grad_logp
    slope = -pull  # what multiplies p
    if grad_entropy is not None:
        entropy = -torch.linalg.vecdot(p, log_p).unsqueeze(-1)
        slope = slope - grad_entropy * (log_p + entropy)
    return (p * slope).scatter_add_(-1, target, pull)
