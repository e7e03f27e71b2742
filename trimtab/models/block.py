"""Parts of a transformer layer with a backward pass of their own: less memory and fewer passes over it, the same numbers.

    y = down(silu(gate(x)) * up(x))            keeps x, gate(x) and up(x); the rest is one pass over them in the backward pass
    y = w x / sqrt(mean(x^2) + eps)            keeps x and one number a token
    y = o(attention(turn(q(x)), turn(k(x)), v(x)))     of packed rows on a CPU: keeps x, the three as they are looked at, and what was seen

What autograd keeps of the first is five arrays of the wide size (both factors of the product, the product, and twice the input of silu's
neighbours), of the second three. The gradients of x that come from the base and from the adapters, of gate and of up, are added up
inside the products.

A module is replaced only if it computes what is said above, which is tried on a few numbers; whatever else a layer does (dropout on
adapters, packed weights, DoRA, trained base weights) goes the module's own way, call by call.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.models.attention import NAME, Segment, Trees, in_c, look, look_back
from trimtab.models.lora import Adapter, LoraLinear, adapter_gradients, product, product_back
from trimtab.ops import native

Part = tuple[Tensor, "Tensor | None", "Tensor | None", list[Adapter]]
"""One linear layer: its weight, and A, s B and the adapters they come from."""


def install(model: nn.Module) -> int:
    """Give the gated units and norms of a model their own backward pass; returns how many modules were changed."""
    changed = 0
    for module in model.modules():
        if "forward" in vars(module):
            continue
        forward: Any = None
        if _is_gated(module):
            forward = _gated
        elif _is_norm(module):
            forward = _normed
        elif _is_attention(module):
            forward = _attended
        if forward is not None:
            # a method bound to the module, so that a deep copy computes with its own weights
            cast(Any, module).forward = MethodType(forward, module)
            changed += 1
    return changed


def _close(want: Tensor, got: Tensor) -> bool:
    """Equal but for rounding, on a few numbers?"""
    tolerance = 1e-5 if want.dtype == torch.float32 else 2e-2
    return bool((want.float() - got.float()).abs().max() <= tolerance * want.float().abs().max())


def _numbers(weight: Tensor) -> Tensor:
    width = weight.shape[-1]
    return torch.linspace(-2, 2, 3 * width, device=weight.device).view(1, 3, width).cos().to(weight.dtype)


# ----------------------------------------------------------------------------------------------------------- gated unit


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear | LoraLinear) for part in parts):
        return False
    gate, up, down = parts
    if any(part.bias is not None or not part.weight.is_floating_point() for part in parts):
        return False
    x = _numbers(gate.weight)
    return _close(module(x), down(F.silu(gate(x)) * up(x)))


def _gated(module: Any, x: Tensor) -> Tensor:
    """The forward of a gated unit."""
    gate, up, down = (_part(layer, x.dtype) for layer in (module.gate_proj, module.up_proj, module.down_proj))
    if gate is None or up is None or down is None:
        y: Tensor = type(module).forward(module, x)
        return y
    if not torch.is_grad_enabled():
        g, u = product(x, gate[0], None, gate[1], gate[2])[0], product(x, up[0], None, up[1], up[2])[0]
        return product(_act(g, u), down[0], None, down[1], down[2])[0]
    matrices = [m for part in (gate, up, down) for adapter in part[3] for m in (adapter.a, adapter.b)]
    y = _GatedUnit.apply(x, (gate, up, down), *matrices)  # type: ignore[no-untyped-call]
    return y


def _part(layer: nn.Module, dtype: torch.dtype) -> Part | None:
    """The matrices of a layer as it computes now; None if there is more to it than products."""
    if isinstance(layer, LoraLinear):
        active = layer.active()
        if not layer.is_plain(active):
            return None
        return (layer.weight, *(layer.stacked(active, dtype) if active else (None, None)), active)
    if type(layer) is not nn.Linear or any(p.requires_grad for p in layer.parameters()):
        return None
    return layer.weight, None, None, []


class _GatedUnit(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with the adapters of all three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: tuple[Part, Part, Part], *matrices: Tensor) -> Tensor:
        (wg, ag, bg, _), (wu, au, bu, _), (wd, ad, bd, _) = parts
        g, low_g = product(x, wg, None, ag, bg)
        u, low_u = product(x, wu, None, au, bu)
        y, low_d = product(_act(g, u), wd, None, ad, bd)
        ctx.save_for_backward(x, g, u, low_g, low_u, low_d)
        ctx.parts = parts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, low_g, low_u, low_d = ctx.saved_tensors
        gate, up, down = ctx.parts
        x, g, u = x.flatten(0, -2), g.flatten(0, -2), u.flatten(0, -2)
        flat = grad.flatten(0, -2)
        wanted = list(ctx.needs_input_grad[2:])

        def take(active: list[Adapter]) -> list[bool]:
            return [wanted.pop(0) for _ in range(2 * len(active))]

        of_gate, of_up, of_down = take(gate[3]), take(up[3]), take(down[3])
        grad_act, (pull,) = product_back([(flat, *down[:3])])
        assert grad_act is not None
        grad_g, grad_u, act = _act_back(g, u, grad_act)
        grads_down = adapter_gradients(down[3], of_down, act, low_d, flat, pull) if any(of_down) else _none(down)
        grad_x, pulls = product_back([(grad_g, *gate[:3]), (grad_u, *up[:3])], needed=ctx.needs_input_grad[0])
        grads_gate = adapter_gradients(gate[3], of_gate, x, low_g, grad_g, pulls[0]) if any(of_gate) else _none(gate)
        grads_up = adapter_gradients(up[3], of_up, x, low_u, grad_u, pulls[1]) if any(of_up) else _none(up)
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, None, *grads_gate, *grads_up, *grads_down


def _act(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u"""
    if not (native.takes(g) and g.is_contiguous() and u.is_contiguous()):
        return F.silu(g).mul_(u)
    act, n, d = torch.empty_like(g), g.numel() // g.shape[-1], g.shape[-1]
    native.kernels().trimtab_gate(
        g.data_ptr(), u.data_ptr(), d, act.data_ptr(), d, None, 0, n, d, native.is_narrow(g), torch.get_num_threads()
    )
    return act


def _act_back(g: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of g and u from that of silu(g) * u, which is overwritten, and silu(g) * u once more."""
    if not (native.takes(g) and all(x.is_contiguous() for x in (g, u, grad))):
        silu = F.silu(g)
        act = silu * u
        grad_u = silu.mul_(grad)
        return torch.ops.aten.silu_backward(grad.mul_(u), g), grad_u, act
    grad_u, act = torch.empty_like(u), torch.empty_like(u)
    native.kernels().trimtab_gate_back(
        *(x.data_ptr() for x in (g, u, grad, grad_u, act)), g.numel(), native.is_narrow(g), torch.get_num_threads()
    )
    return grad, grad_u, act


def _none(part: Part) -> list[Tensor | None]:
    return [None] * (2 * len(part[3]))


# ------------------------------------------------------------------------------------------------------------ attention


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ROTATED = ("llama", "mistral", "qwen2")
"""`model_type` of the configs whose attention this is. Others may do more where a try does not lead (OLMo clips what is large)."""


@torch.no_grad()
def _is_attention(module: Any) -> bool:
    """Four projections, rotary positions in halves and nothing else, which is tried on two short rows? Only where it is computed in C."""
    config: Any = getattr(module, "config", None)
    e = getattr(module, "head_dim", None)
    if getattr(config, "model_type", None) not in ROTATED or {name for name, _ in module.named_children()} != {
        *PROJECTIONS
    }:
        return False
    layers: list[Any] = [getattr(module, name) for name in PROJECTIONS]
    if not all(isinstance(layer, nn.Linear | LoraLinear) and layer.weight.is_floating_point() for layer in layers):
        return False
    weight = layers[0].weight
    # a layer that goes its own way would be compared with itself
    if (
        not isinstance(e, int)
        or not in_c(*[weight.new_empty(1, 1, e)] * 3)
        or any(_part(x, weight.dtype) is None for x in layers)
    ):
        return False
    trees = Trees((Segment(0, 4), Segment(4, 6, 0), Segment(6, 9)), 9, weight.shape[0] // e, weight.device)
    x = 3 * torch.randn(1, 9, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    angles = torch.linspace(0, 3, 9 * (e // 2)).view(1, 9, e // 2).repeat(1, 1, 2)
    given: dict[str, Any] = {
        "position_embeddings": (angles.cos().to(x.dtype), angles.sin().to(x.dtype)),
        "attention_mask": None,
        "trees": trees,
    }
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        want = type(module).forward(module, x, **given)[0]
        got = _attended(module, x, **given)[0]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        config._attn_implementation = before
    # in norm: single numbers pass through a softmax of numbers that were rounded on the way
    tolerance = 1e-5 if want.dtype == torch.float32 else 5e-2
    return bool((want.float() - got.float()).norm() <= tolerance * want.float().norm())


def _attended(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **keys: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward of attention, for packed rows."""
    trees, x = keys.get("trees"), hidden_states
    layers = [getattr(module, name) for name in PROJECTIONS]
    ours = isinstance(trees, Trees) and position_embeddings is not None and past_key_values is None and native.takes(x)
    # a rotation of some of a head's numbers has shorter tables
    ours = ours and position_embeddings is not None and position_embeddings[0].shape[-1] == module.head_dim
    parts = [_part(layer, x.dtype) for layer in layers] if ours else [None]
    if any(part is None for part in parts):
        y: tuple[Tensor, Tensor | None] = type(module).forward(
            module, x, position_embeddings=position_embeddings, attention_mask=attention_mask, past_key_values=past_key_values, **keys
        )  # fmt: skip
        return y
    own = cast(list[Part], parts)
    assert isinstance(trees, Trees) and position_embeddings is not None
    biases = [layer.bias for layer in layers]
    turns = trees.turns(*position_embeddings)
    matrices = [m for part in own for adapter in part[3] for m in (adapter.a, adapter.b)]
    out: Tensor = _Attention.apply(x, own, biases, turns, trees, module.head_dim, module.scaling, *matrices)  # type: ignore[no-untyped-call]
    return out, None


class _Attention(torch.autograd.Function):
    """o(softmax(q k^T scale) v) of q, k and v made from x, the first two turned to their positions, with the adapters of all four."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: list[Part], biases: list[Tensor | None], turns: tuple[Tensor, Tensor, Tensor], trees: Trees,
        e: int, scale: float, *matrices: Tensor,
    ) -> Tensor:  # fmt: skip
        flat = x.flatten(0, -2)
        (q, low_q), (k, low_k), (v, low_v) = (
            product(flat, w, bias, a, b) for (w, a, b, _), bias in zip(parts[:3], biases, strict=False)
        )
        q, k, v = (y.view(len(flat), -1, e) for y in (q, k, v))
        for y in (q, k):
            _turn(y, *turns[:2])
        seen = look(q, k, v, trees, scale).flatten(1)
        w, a, b, _ = parts[3]
        y, low_o = product(seen, w, biases[3], a, b)
        ctx.save_for_backward(flat, q, k, v, seen, low_q, low_k, low_v, low_o)
        ctx.parts, ctx.turns, ctx.trees, ctx.scale = parts, turns, trees, scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, q, k, v, seen, *lows = ctx.saved_tensors
        cos, _, back = ctx.turns
        wanted = list(ctx.needs_input_grad[7:])
        flat = grad.flatten(0, -2)
        of_o = ctx.parts[3]
        grad_seen, (pull_o,) = product_back([(flat, *of_o[:3])])
        assert grad_seen is not None
        pulled = look_back(q, k, v, grad_seen.view(q.shape), ctx.trees, ctx.scale)
        for y in pulled[:2]:
            _turn(y, cos, back)
        own = [y.flatten(1) for y in pulled]
        grad_x, pulls = product_back(
            [(y, *part[:3]) for y, part in zip(own, ctx.parts, strict=False)], needed=ctx.needs_input_grad[0]
        )
        grads: list[Tensor | None] = []
        for part, read, low, y, pull in zip(
            ctx.parts, (x, x, x, seen), lows, (*own, flat), (*pulls, pull_o), strict=True
        ):
            asked = [wanted.pop(0) for _ in range(2 * len(part[3]))]
            grads += adapter_gradients(part[3], asked, read, low, y, pull) if any(asked) else _none(part)
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, None, None, None, None, None, None, *grads


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x `[n h e]` turned in place, row by row of cos and sin `[n e/2]`."""
    n, h, e = x.shape
    native.kernels().trimtab_turn(
        x.data_ptr(), None, 0.0, cos.data_ptr(), sin.data_ptr(), None, n, h, 0, e,
        native.is_narrow(x), torch.get_num_threads(),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- norm


@torch.no_grad()
def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return False
    if not hasattr(module, "variance_epsilon") or len(list(module.parameters())) != 1:
        return False
    x = _numbers(weight)
    got: Tensor = _Norm.apply(x, weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return _close(module(x), got)


def _normed(module: Any, x: Tensor) -> Tensor:
    """The forward of a norm."""
    if module.weight.requires_grad:
        y: Tensor = type(module).forward(module, x)
        return y
    if x.device.type == "cuda":  # one kernel of torch each way; it rounds once, after w
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    y = _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + eps), moments in float32, rounded to the type of x before w as transformers does (arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        if _has_kernel(x, weight):
            ctx.save_for_backward(x, weight, None)
            return _normed_by_kernel(x, weight, eps)
        wide = x.float()
        r = torch.rsqrt(torch.linalg.vecdot(wide, wide).unsqueeze(-1).div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, r)
        return (wide * r).to(x.dtype) * weight if x.dtype != torch.float32 else (wide * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        if r is None:
            return _norm_back_by_kernel(x, grad.contiguous(), weight, ctx.eps), None, None
        wide, pull = x.float(), grad.float() * weight.float()
        # d x_i: r (p_i - x_i r^2 mean(p x)), p = grad w
        slope = torch.linalg.vecdot(pull, wide).unsqueeze(-1).mul_(r * r).div_(x.shape[-1])
        return pull.addcmul_(wide, slope, value=-1).mul_(r).to(x.dtype), None, None


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return native.takes(x) and x.is_contiguous() and weight.dtype == x.dtype


def _normed_by_kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, d = torch.empty_like(x), x.shape[-1]
    native.kernels().trimtab_norm(
        x.data_ptr(),
        None,
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        d,
        None,
        0,
        x.numel() // d,
        d,
        native.is_narrow(x),
        torch.get_num_threads(),
    )
    return out


def _norm_back_by_kernel(x: Tensor, grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, d = torch.empty_like(x), x.shape[-1]
    native.kernels().trimtab_norm_back(
        *(one.data_ptr() for one in (x, grad, weight)),
        eps,
        out.data_ptr(),
        x.numel() // d,
        d,
        native.is_narrow(x),
        torch.get_num_threads(),
    )
    return out
