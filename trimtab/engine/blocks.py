"""A decoder for the Llama block family: the same weights and the same numbers as `model.forward`, with less work per token.

    x += o( attention( rope( qkv( norm(x) ) ) ) )          RMSNorm, grouped queries, bias on q k v or none, norms on q and k or none
    x += down( silu( gate( norm(x) ) ) * up( norm(x) ) )

That is Llama 2 and 3, Qwen2, Qwen2.5, Qwen3, Mistral, SmolLM2 and Yi, with rotary embeddings that do not change with the length. What is
saved over a transformers forward: products that share their input are one, weights are in the order that products of few rows want
(`products`), rotary tables are made once, keys and values are written into their slots and read from there by groups of query heads.

Adapters stay beside the weights and are not merged: in bfloat16 merging would round most of a young adapter away. Where weights are
packed, s B stands beside W and the low-rank input beside x, so that a layer and its adapters are one product:

    y = [x | x A^T] [W | s B]^T + bias

Weights are read by the names that transformers gives them, and a model is taken only if a try on a few tokens gives the hidden states
of its own forward pass.

Shapes: n tokens of a pass, b live rows, s slots, h query heads, j key heads, g = h / j, e numbers per head, R ranks of all active adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.engine.between import (
    Layers,
    Low,
    Rotary,
    add_rms,
    attend,
    fill_low,
    keep,
    rms_with_low,
    silu_mul,
    step_in_c,
    turn,
    turn_and_store,
    turn_in_place,
    with_low,
)
from trimtab.engine.decoders import TOKENS, passes
from trimtab.engine.graphs import Record, Replays
from trimtab.engine.products import Joined, Product, can_pack
from trimtab.models import lora
from trimtab.models.attention import tree_attention
from trimtab.models.copies import copied
from trimtab.models.forward import STEP, pack
from trimtab.models.load import decoder, head_bias, head_weight
from trimtab.ops import native
from trimtab.ops.native import products
from trimtab.types import TokenRow

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the configs whose blocks these are."""

FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that do not depend on the length of a sequence."""


CACHED = 2048
"""Prompt tokens of a pass on a CPU: what lies between two products then stays in its caches."""


class Linear:
    """Layers that read the same x, with their active adapters, in one of three forms: packed (a CPU), joined (a GPU), or the layers'
    own weights one after the other."""

    def __init__(self, layers: Sequence[nn.Module], packing: bool, *, gated: bool = False) -> None:
        parts = [_part(layer) for layer in layers]
        self.widths = [len(weight) for weight, *_ in parts]
        weights = [weight for weight, *_ in parts]
        lows = [a for _, _, a, _ in parts if a is not None]
        self.a = torch.cat(lows) if lows else None
        sides = _sides(parts, len(self.a)) if self.a is not None else None
        biases = [bias for _, bias, *_ in parts if bias is not None]
        bias = torch.cat(biases) if biases else None
        self.product: Product | None = None
        self.joined: Joined | None = None
        self.low: Low | None = None
        self.gated: products.Gated | None = None
        if packing:
            weight = torch.cat(weights)
            weight = weight if sides is None else torch.cat([weight, sides], dim=1)
            if (
                gated
                and bias is None
                and products.takes(weight)
                and len(weight) % (2 * native.kernels().trimtab_vector()) == 0
            ):
                self.gated = products.Gated(*weight.chunk(2))
            else:
                self.product = Product(weight, bias)
            self.low = Low.of(self.a) if self.a is not None else None
            # torch's thin products cost a fifth in float32 of what they cost in bfloat16 (docs/log.md); the same numbers up to rounding
            self.a = None if self.a is None else self.a.float()
        elif weights[0].device.type == "cuda":
            self.joined = Joined(layers, self.a, sides, bias)
        else:
            self.parts = [(weight, own) for weight, own, *_ in parts]
            self.sides = sides

    def __call__(self, x: Tensor) -> Tensor:
        """x `[n in]`, with `low` `[n in + R]` -> `[n out]`, the layers' outputs side by side."""
        if self.joined is not None:
            return self.joined(x)
        if self.product is not None:
            return self.product(
                x
                if self.a is None or self.low is not None
                else torch.cat([x, F.linear(x.float(), self.a).to(x.dtype)], dim=1)
            )
        y = x.new_empty(len(x), sum(self.widths))
        for (weight, bias), part in zip(self.parts, torch.split(y, self.widths, dim=1), strict=True):
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        return y if self.a is None or self.sides is None else y.addmm_(F.linear(x, self.a), self.sides.t())

    def in_c(self) -> list[int] | None:
        """W laid out, bias, n, k, A^T of the adapters and their ranks, as `native/step.c` has them; None: it cannot be had there."""
        if self.a is not None and self.low is None:
            return None
        low = (0, 0) if self.low is None else (self.low.matrix.data_ptr(), self.low.rank)
        if self.gated is not None:
            return [self.gated.both.place, 0, self.gated.both.n, self.gated.both.k, *low]
        if self.product is None or self.product.laid_out is None:
            return None
        bias, laid = self.product.bias, self.product.laid_out
        return [laid.place, 0 if bias is None else bias.data_ptr(), laid.n, laid.k, *low]

    def act(self, x: Tensor, low: Low | None) -> Tensor:
        """silu(gate) * up of a layer and its twin `[n f]`, with `low` `[n f + R]`."""
        if self.gated is None:
            return silu_mul(self(x), low)
        return fill_low(self.gated(x, 0 if low is None else low.rank), low)


def _sides(parts: Sequence[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]], rank: int) -> Tensor:
    """s B of all layers `[out R]`: each reads its own low-rank input, a block of columns per layer, zero elsewhere."""
    weight = parts[0][0]
    sides = weight.new_zeros(sum(len(weight) for weight, *_ in parts), rank)
    row = column = 0
    for own, _, a, b in parts:
        if a is not None and b is not None:
            sides[row : row + len(own), column : column + len(a)] = b
            column += len(a)
        row += len(own)
    return sides


def _part(layer: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias, A and s B of a layer as it computes now."""
    active = layer.active() if isinstance(layer, lora.LoraLinear) else []
    a, b = layer.stacked(active, layer.weight.dtype) if active else (None, None)
    bias = None if layer.bias is None else layer.bias.detach()
    return layer.weight.detach(), bias, a, b


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one layer, and the norm that comes after it."""

    norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    o: Linear
    norm_after: Tensor
    gate_up: Linear
    down: Linear
    norm_next: Tensor
    wide_qk_norm: Tensor | None


class Weights:
    """The weights of a model and its active adapters, ready for decoding. Made anew when one of them has changed.

    Args:
        active: names of the active adapters.
        packing: keep a packed copy where that is faster; else compute with the model's own tensors.
    """

    def __init__(self, model: PreTrainedModel, active: Sequence[str], *, packing: bool) -> None:
        self.model = model
        trunk: Any = decoder(model)
        config: Any = model.config.get_text_config()
        weight = head_weight(model)
        self.packed = packing = packing and can_pack(weight.dtype, weight.device.type)
        self.dtype, self.device = weight.dtype, weight.device
        self.heads, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.attends_in_c = (
            native.takes(weight)
            and self.size % native.kernels().trimtab_vector() == 0
            and trunk.embed_tokens.weight.dtype == weight.dtype
        )
        self.embedding = trunk.embed_tokens.weight.detach()
        self.rotary = trunk.rotary_emb
        norms = [layer.input_layernorm.weight for layer in trunk.layers[1:]] + [trunk.norm.weight]
        self.blocks = [
            self._block(layer, norm.detach(), packing) for layer, norm in zip(trunk.layers, norms, strict=True)
        ]
        self._state = _state(model, active)  # after joining, which moves weights
        bias = head_bias(model)
        self._head = (weight.detach(), None if bias is None else bias.detach())
        self._packed_head = Product(*self._head) if packing else None

    def _block(self, layer: Any, norm_next: Tensor, packing: bool) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        qk_norm = None
        if hasattr(attention, "q_norm"):
            scales = [(attention.q_norm, self.heads), (attention.k_norm, self.keys)]
            qk_norm = torch.cat([norm.weight.detach().expand(count, -1) for norm, count in scales])
        return Block(
            norm=layer.input_layernorm.weight.detach(),
            qkv=Linear([attention.q_proj, attention.k_proj, attention.v_proj], packing),
            qk_norm=qk_norm,
            o=Linear([attention.o_proj], packing),
            norm_after=layer.post_attention_layernorm.weight.detach(),
            gate_up=Linear([mlp.gate_proj, mlp.up_proj], packing, gated=True),
            down=Linear([mlp.down_proj], packing),
            norm_next=norm_next,
            wide_qk_norm=None if qk_norm is None else qk_norm.float().contiguous(),
        )

    def current(self, active: Sequence[str]) -> bool:
        """Are these still the weights of the model with these adapters?"""
        return self._state == _state(self.model, active)

    def take(self) -> None:
        """Before each pass: two streams with unlike adapters may take turns on one model."""
        for block in self.blocks:
            for linear in (block.qkv, block.o, block.gate_up, block.down):
                if linear.joined is not None:
                    linear.joined.take()

    def head(self, states: Tensor) -> Tensor:
        """`[b d]` -> `[b v]`"""
        return F.linear(states, *self._head) if self._packed_head is None else self._packed_head(states)


def _state(model: nn.Module, active: Sequence[str]) -> tuple[Any, ...]:
    """What changes when a weight or an active adapter does: an optimizer step counts a tensor's version."""
    tensors = list(model.parameters())
    for layer in lora.layers(model).values():
        tensors += [m for name in active if name in layer.adapters for m in layer.adapters[name].parameters()]
    return (*active, *[(t.data_ptr(), t._version) for t in tensors])


class BlockDecoder:
    """Rows in slots through the blocks of `weights`.

    Args:
        slots: most rows at once.
        capacity: most tokens of a row.
        record: how steps are recorded to be replayed; None: they are not.
    """

    def __init__(self, weights: Weights, slots: int, capacity: int, record: Record | None = None) -> None:
        self.weights = w = weights
        if record is not None:
            capacity = -(-capacity // 64) * 64  # kernels for a mask like rows that are aligned
        shape = (len(w.blocks), slots, w.keys, capacity, w.size)
        # zeros: a shorter row's masked columns are multiplied by 0, and what lay in memory may be nan
        self.k = torch.zeros(shape, dtype=w.dtype, device=w.device)
        self.v = torch.zeros(shape, dtype=w.dtype, device=w.device)
        cos, sin = w.rotary(self.k, torch.arange(max(capacity, STEP), device=w.device)[None])
        half = w.size // 2
        # rotate_half(x) sin = swap(x) (-sin1 | sin2): the two halves of a head swapped, with the sign in the table
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        self.rotary = (
            Rotary(*(x[0, :, :half].float().contiguous() for x in (cos, sin)))
            if w.attends_in_c and cos.shape[-1] == w.size
            else None
        )
        self.replays = Replays(slots, capacity, w.device, record) if record else None
        self.layers = self._layers()

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        """Prompts without padding, each blind to the others; on a CPU what they begin with in common is read once."""
        self.weights.take()
        most = TOKENS if self.weights.device.type != "cpu" else CACHED
        return torch.cat(
            [self._prefill(prompts[part], slots[part]) for part in passes(prompts, padded=False, most=most)]
        )

    def _prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        w, k = self.weights, len(slots[0])
        # a GPU computes the rows of one call at once sooner than a few of them one by one, and rows that share nothing in its own kernel
        early = w.device.type == "cpu"
        rows = [TokenRow(token_ids=tuple(ids), scored=(len(ids),)) for ids in prompts]
        multiple = STEP if w.packed or w.dtype.itemsize == 2 else 1
        packed = pack(rows, "shared" if early else "packed", w.device, w.heads, multiple)
        assert packed.trees is not None
        trees, paths = packed.trees, [torch.tensor(where, device=w.device) for _, where in packed.places]
        read, last = torch.cat(paths), torch.stack([path[-1] for path in paths])
        columns = packed.positions[0]
        kept_at = columns[read]
        places = [
            torch.tensor([own[i] for ids, own in zip(prompts, slots, strict=True) for _ in ids], device=w.device)
            for i in range(k)
        ]
        x = F.embedding(packed.ids[0], w.embedding)
        normed = rms_with_low(x, w.blocks[0].norm, w.eps, w.blocks[0].qkv.low)
        for number, block in enumerate(w.blocks):
            qkv = block.qkv(normed).view(len(x), -1, w.size)
            if self.rotary is not None:
                turn_in_place(qkv, self.rotary, columns, w.heads, w.keys, block.wide_qk_norm, w.eps)
                q, key, value = torch.split(qkv, [w.heads, w.keys, w.keys], dim=1)
                for slot in places:
                    keep(qkv, read, slot, kept_at, self.k[number], self.v[number])
            else:
                cos, sin = self.cos[columns][:, None], self.sin[columns][:, None]
                q, key, value = turn(qkv, cos, sin, w.keys, block.qk_norm, w.eps)
                for slot in places:
                    self.k[number, slot, :, kept_at] = key[read]
                    self.v[number, slot, :, kept_at] = value[read]
            # of the last layer only the last token of each prompt is read, but it sees them all
            if early and number == len(w.blocks) - 1:
                seen = _last_attention(q[last], key, value, paths, w.size**-0.5)
                x = x[last]
            else:
                seen = tree_attention(
                    q.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None], trees, w.size**-0.5
                )[0].flatten(1)
            x, normed = self._after(number, x, with_low(seen, block.o.low))
        return normed if early else normed[last]

    def step(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        self.weights.take()
        if self.replays is not None:
            return self.replays(self._step, tokens, lengths, longest + 1)
        return self._step(tokens, lengths, longest + 1)

    def _step(self, tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
        """Nothing here may wait for the device or depend on a tensor's numbers: it is recorded."""
        w, b = self.weights, len(tokens)
        x = F.embedding(tokens, w.embedding)
        if self.layers is not None and self.rotary is not None:
            return step_in_c(x, w.blocks[0].norm, self.layers, self.rotary, self.k[0], lengths, w.heads, w.eps)
        normed = rms_with_low(x, w.blocks[0].norm, w.eps, w.blocks[0].qkv.low)
        look = self._look(lengths, width) if self.rotary is None else self._look_in_c(lengths)
        for number, block in enumerate(w.blocks):
            x, normed = self._after(number, x, look(number, block.qkv(normed).view(b, -1, w.size)))
        return normed

    def _layers(self) -> Layers | None:
        """What `native/step.c` reads of all layers; None where a step is not a single function in C."""
        w, blocks = self.weights, self.weights.blocks
        norms = [norm for block in blocks for norm in (block.norm, block.norm_after, block.norm_next)]
        gated = all(block.gate_up.gated is not None for block in blocks)
        if self.rotary is None or not gated or not products.takes(w.embedding, *norms):
            return None
        layers = []
        for number, block in enumerate(blocks):
            words: list[int] = []
            for linear in (block.qkv, block.o, block.gate_up, block.down):
                own = linear.in_c()
                if own is None:
                    return None
                words += own
            scale = 0 if block.wide_qk_norm is None else block.wide_qk_norm.data_ptr()
            words += [block.norm_after.data_ptr(), block.norm_next.data_ptr(), scale]
            layers.append([*words, self.k[number].data_ptr(), self.v[number].data_ptr()])
        found = torch.tensor(layers)
        qkv, o, gates, down = found[:, :24].view(-1, 4, 6).amax(0).tolist()  # n and k of each are the third and fourth
        return Layers(found, (max(qkv[3], gates[3]), o[3], max(qkv[2], down[3])))

    def _look_in_c(self, lengths: Tensor) -> Callable[[int, Tensor], Tensor]:
        """What each layer's attention makes of qkv `[b (h + 2 j) e]`."""
        w, rotary = self.weights, self.rotary
        assert rotary is not None

        def look(number: int, qkv: Tensor) -> Tensor:
            block = w.blocks[number]
            return attend(
                qkv, rotary, self.k[number], self.v[number], lengths, w.heads, block.wide_qk_norm, w.eps, block.o.low
            )

        return look

    def _look(self, lengths: Tensor, width: int) -> Callable[[int, Tensor], Tensor]:
        """The same with torch's attention."""
        w, b = self.weights, len(lengths)
        rows = torch.arange(b, device=w.device)
        # padding is -inf in the type of q, as torch's kernel wants it; no mask where all rows are as long as the cache
        short = torch.arange(width, device=w.device) > lengths[:, None]
        mask = torch.zeros(b, 1, 1, width, dtype=w.dtype, device=w.device).masked_fill_(
            short[:, None, None], -torch.inf
        )
        cos, sin = self.cos[lengths][:, None], self.sin[lengths][:, None]

        def look(number: int, qkv: Tensor) -> Tensor:
            k, v = self.k[number], self.v[number]
            q = turn_and_store(qkv, cos, sin, k, v, rows, lengths, w.blocks[number].qk_norm, w.eps)
            # the g query heads of a key head are g queries of one head: nothing is repeated
            seen = F.scaled_dot_product_attention(
                q.view(b, w.keys, -1, w.size), k[:b, :, :width], v[:b, :, :width], attn_mask=mask, scale=w.size**-0.5
            )
            return with_low(seen.reshape(b, -1), w.blocks[number].o.low)

        return look

    def _after(self, number: int, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of a block, from what attention saw `[n (h e)]`: the residual stream, and what the next one reads of it."""
        blocks, eps = self.weights.blocks, self.weights.eps
        block, low = blocks[number], blocks[number + 1].qkv.low if number + 1 < len(blocks) else None
        x, normed = add_rms(x, block.o(seen), block.norm_after, eps, block.gate_up.low)
        return add_rms(x, block.down(block.gate_up.act(normed, block.down.low)), block.norm_next, eps, low)

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        for own in (self.k, self.v):
            own[:, targets, :, :width] = own[:, sources, :, :width]

    def logits(self, states: Tensor) -> Tensor:
        return self.weights.head(states)


def _last_attention(q: Tensor, key: Tensor, value: Tensor, paths: Sequence[Tensor], scale: float) -> Tensor:
    """What the last token of each prompt sees, which lies at these columns: q `[p h e]` -> `[p (h e)]`."""
    _, h, e = q.shape
    found = []
    for own, path in zip(q, paths, strict=True):
        k, v = key[path].transpose(0, 1), value[path].transpose(0, 1)
        found.append(F.scaled_dot_product_attention(own.view(len(k), -1, e), k, v, scale=scale).reshape(h * e))
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------- which models these are

_tried: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def why_not(model: PreTrainedModel, active: Sequence[str]) -> str:
    """Why this model is decoded by its own forward pass; empty when the blocks here are its blocks."""
    if model not in _tried:
        _tried[model] = _structure(model) or _numbers(model)
    if _tried[model]:
        return _tried[model]
    for layer in lora.layers(model).values():
        own = [layer.adapters[name] for name in active if name in layer.adapters]
        if not all(adapter.magnitude is None for adapter in own):
            return "an active adapter is DoRA"
    if any(name in module.copies for module in copied(model).values() for name in active):
        return "an active adapter holds whole modules"
    return ""


def _structure(model: PreTrainedModel) -> str:
    config: Any = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not of the Llama block family"
    if getattr(config, "hidden_act", "") != "silu":
        return f"its gated unit is {getattr(config, 'hidden_act', '')}"
    if getattr(config, "use_sliding_window", False) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        return "some layers see a sliding window"
    if config.model_type == "mistral" and getattr(config, "sliding_window", None):
        return "its layers see a sliding window"
    trunk: Any = decoder(model)
    if getattr(trunk.rotary_emb, "rope_type", "default") not in FIXED_ROTARY:
        return f"its rotary embedding is {trunk.rotary_emb.rope_type}"
    plain = (nn.Linear, lora.LoraLinear)
    for layer in trunk.layers:
        every = [getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        every += [getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(type(one) in plain and getattr(one, "packed", None) is None for one in every):
            return "its linear layers are packed or of another kind"
    return ""


@torch.no_grad()
def _numbers(model: PreTrainedModel) -> str:
    """Try it on two prompts and one more token of each, without adapters: the hidden states must be those of the model."""
    # tokens of all the vocabulary: its first ones are often markers, on whose sequences a model is all rounding
    ids = torch.linspace(0, len(head_weight(model)) - 1, 14).long().tolist()[1:-1]
    prompts, more = (ids[:7], ids[7:10]), ids[10:]
    try:
        weights = Weights(model, (), packing=False)
        ours = BlockDecoder(weights, 2, 8)
        found = [ours.prefill(prompts, ((0,), (1,)))]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=weights.device)
        found.append(ours.step(torch.tensor(more, device=weights.device), lengths, 7))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"its blocks are others ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    tolerance = 1e-3 if weights.dtype == torch.float32 else 0.1
    for i, (prompt, token) in enumerate(zip(prompts, more, strict=True)):
        row = torch.tensor([[*prompt, token]], device=weights.device)
        want = decoder(model)(input_ids=row, use_cache=False).last_hidden_state[0, -2:].float()
        got = torch.stack([found[0][i], found[1][i]]).float()
        if not bool(((got - want).norm(dim=-1) <= tolerance * want.norm(dim=-1)).all()):
            return "its blocks compute other hidden states"
    return ""
