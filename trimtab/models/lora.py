"""LoRA with named adapters on one frozen base, reading and writing peft's file format.

    y = x W^T + bias + sum over active adapters  s (x A^T) B^T          A [r in], B [out r], s = alpha / r   (arXiv:2106.09685, eq. 3)

Several adapters may be active at once: their low-rank products add, and W never changes. Which ones are active is one value
shared by all layers (`Switch`), set by `models/roles.py` and nowhere else. A and B are kept in float32 and cast to the type of
x for the product: an update of 1e-5 on weights of 1e-2 does not survive bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.errors import AdapterError
from trimtab.models.copies import Copy, copied, endings, wrap
from trimtab.models.dora import directed
from trimtab.models.folder import ADAPTER_CONFIG, read_adapter
from trimtab.ops import native
from trimtab.ops.native import products

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(slots=True)
class Switch:
    """Which adapters every LoRA layer adds, in order, and the dropout on their inputs (0 outside SFT training)."""

    active: tuple[str, ...] = ()
    dropout: float = 0.0


class Adapter(nn.Module):
    """One low-rank product s B A; with DoRA also the trained lengths of the weight's rows."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, *, trainable: bool, magnitude: Tensor | None = None) -> None:
        super().__init__()
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.float(), requires_grad=trainable)
        self.a = nn.Parameter(a.float(), requires_grad=trainable)
        self.b = nn.Parameter(b.float(), requires_grad=trainable)
        self.scale = scale
        self._cast: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in the type of a product, cast anew only after the masters have changed (an optimizer step counts their version)."""
        state = (dtype, self.a._version, self.a.data_ptr(), self.b._version, self.b.data_ptr())
        if self._cast is None or self._cast[0] != state:
            self._cast = (state, self.a.detach().to(dtype), self.b.detach().to(dtype))
        return self._cast[1:]


class LoraLinear(nn.Module):
    """A frozen linear layer with any number of named adapters beside it.

    It takes over the base layer's parameters under their own names, and adapters are not submodules: the base's state dict and
    parameters stay what they were.
    """

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        # a layer that is not plain (weights packed in 4 or 8 bits) computes by its own forward; its weight is no matrix to read
        self.packed = base if type(base) is not nn.Linear else None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.switch = switch
        self.adapters: dict[str, Adapter] = {}
        self._stacks: dict[tuple[Any, ...], tuple[Any, list[Adapter], Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [... in] -> [... out]"""
        active = self.active()
        if not active and self.packed is None:
            return F.linear(x, self.weight, self.bias)
        if self.is_plain(active):
            a, b = self.stacked(active, x.dtype)
            if not torch.is_grad_enabled():
                return product(x, self.weight, self.bias, a, b)[0]
            matrices = [matrix for adapter in active for matrix in (adapter.a, adapter.b)]
            y: Tensor = _Product.apply(x, self, a, b, active, *matrices)  # type: ignore[no-untyped-call]
            return y
        # the adapters are added in place, and what a packed layer returns may be a view
        y = F.linear(x, self.weight, self.bias) if self.packed is None else self.packed(x).clone()
        for adapter in active:
            learns = adapter.a.requires_grad  # a frozen adapter under the trained one is part of the base
            side = F.dropout(x, self.switch.dropout) if self.switch.dropout and learns else x
            if adapter.magnitude is not None:
                y = directed(
                    y, side, self.weight, self.bias, adapter.a, adapter.b, adapter.scale, adapter.magnitude,
                    dropped=side is not x,
                )  # fmt: skip
                continue
            y = _Side.apply(y, side, adapter.a, adapter.b, adapter)  # type: ignore[no-untyped-call]
        return y

    def active(self) -> list[Adapter]:
        """The adapters of this layer that are added now, in order."""
        return [self.adapters[name] for name in self.switch.active if name in self.adapters]

    def is_plain(self, active: list[Adapter]) -> bool:
        """Are base and adapters products of the same x with nothing else to them, the base frozen?"""
        learns = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return (
            self.packed is None
            and not learns
            and not self.switch.dropout
            and all(adapter.magnitude is None for adapter in active)
        )

    def stacked(self, active: list[Adapter], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A `[R in]` and s B `[out R]` of the active adapters side by side, R the sum of their ranks, in the type of a product.

        Made anew only after a matrix has changed (an optimizer step counts its version). The last few sets of adapters are kept: the
        roles of a step take turns.
        """
        state = tuple(
            part for x in active for part in (x.a._version, x.a.data_ptr(), x.b._version, x.b.data_ptr(), x.scale)
        )
        key = (dtype, *map(id, active))
        found = self._stacks.get(key)
        if found is None or found[0] != state:
            with torch.no_grad():
                a = torch.cat([adapter.a.detach().to(dtype) for adapter in active])
                b = torch.cat([(adapter.b.detach() * adapter.scale).to(dtype) for adapter in active], dim=1)
            found = (state, active, a, b)  # the adapters too: an id is theirs as long as they live
            self._stacks[key] = found
            if len(self._stacks) > STACKS:
                self._stacks.pop(next(iter(self._stacks)))
        return found[2:]


STACKS = 4
"""Sets of adapters whose casts a layer keeps: policy, reference, critic, reward."""


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x W^T + bias + (x A^T) (s B)^T, and x A^T `[n R]`; without adapters the base's product alone."""
    flat = x.flatten(0, -2)
    if products.takes(*(one for one in (flat, weight, bias, a, b) if one is not None)):
        parts: list[products.Part] = [(flat, weight, False)]
        low = None
        if a is not None and b is not None:
            low = products.sums([(flat, a, False)], a.shape[0])
            parts.append((low, b, False))
        n = weight.shape[0]
        return products.sums(parts, n, bias=bias).view(*x.shape[:-1], n), low
    y = F.linear(x, weight, bias)
    if a is None or b is None:
        return y, None
    low = F.linear(x, a).flatten(0, -2)
    y.flatten(0, -2).addmm_(low, b.t())
    return y, low


def product_back(
    products_of_x: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], *, needed: bool = True
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Back through products that share their x.

    Args:
        products_of_x: of each the gradient `[n out]`, W `[out in]`, A `[R in]` and s B `[out R]`.
        needed: is the gradient of x wanted?

    Returns:
        The sum of grad W + (grad s B) A over them `[n in]`, or None; and grad s B `[n R]` of each, None without adapters.
    """
    first, weight, _, _ = products_of_x[0]
    fast = all(products.takes(x) for part in products_of_x for x in part if x is not None)
    pulls: list[Tensor | None] = []
    for grad, _, _, b in products_of_x:
        pulls.append(None if b is None else products.sums([(grad, b, True)], b.shape[1]) if fast else grad @ b)
    if not needed:
        return None, pulls
    if fast:
        parts: list[products.Part] = [(grad, w, True) for grad, w, _, _ in products_of_x]
        parts += [
            (pull, a, True)
            for pull, (_, _, a, _) in zip(pulls, products_of_x, strict=True)
            if pull is not None and a is not None
        ]
        return products.sums(parts, weight.shape[1]), pulls
    total = first @ weight
    for i, ((grad, w, a, _), pull) in enumerate(zip(products_of_x, pulls, strict=True)):
        if i:
            total.addmm_(grad, w)
        if a is not None and pull is not None:
            total.addmm_(pull, a)
    return total, pulls


def adapter_gradients(
    active: Sequence[Adapter], wanted: Sequence[bool], x: Tensor, low: Tensor, grad: Tensor, pull: Tensor | None
) -> list[Tensor | None]:
    """Gradients of A and B of each adapter, None where `wanted` says so.

    Args:
        x `[n in]`, low = x A^T `[n R]`, grad `[n out]` of the product, pull = grad (s B) `[n R]`; R: all ranks side by side.
    """
    grads: list[Tensor | None] = []
    start = 0
    if pull is None:
        return [None] * len(wanted)
    for i, adapter in enumerate(active):
        part = slice(start, start + adapter.a.shape[0])
        grads.append(thin(pull[:, part], x) if wanted[2 * i] else None)
        grads.append(thin(low[:, part], grad, adapter.scale, turned=True) if wanted[2 * i + 1] else None)
        start = part.stop
    return grads


def thin(low: Tensor, x: Tensor, factor: float = 1.0, *, turned: bool = False) -> Tensor:
    """factor low^T x `[r d]`, or its transpose, of low `[n r]` and x `[n d]`: few rows and long sums. In float32 where it is in C."""
    if native.takes(x) and x.dtype == low.dtype and x.stride(1) == low.stride(1) == 1:
        (n, d), r = x.shape, low.shape[1]
        out = torch.empty((d, r) if turned else (r, d), dtype=torch.float32)
        wide = torch.empty(n * r, dtype=torch.float32)
        native.kernels().trimtab_thin(
            low.data_ptr(), low.stride(0), r, x.data_ptr(), x.stride(0), n, d, factor, wide.data_ptr(), out.data_ptr(),
            turned, native.is_narrow(x), torch.get_num_threads(),
        )  # fmt: skip
        return out
    found = (low.t() @ x).to(torch.float32).mul_(factor)
    # oneDNN is half again slower at x^T low
    return found.t() if turned else found


class _Product(torch.autograd.Function):
    """Base and adapters as one product: in the backward pass the adapters' part of x's gradient is added into the base's, in place.

    The frozen base gets no gradient, nor does a frozen adapter, which counts as part of it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: LoraLinear, a: Tensor, b: Tensor, active: list[Adapter], *matrices: Tensor
    ) -> Tensor:
        y, low = product(x, layer.weight, layer.bias, a, b)
        learns = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x if learns else None, low if learns else None, layer.weight, a, b)
        ctx.active = active
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x, (pull,) = product_back([(flat, weight, a, b)], needed=ctx.needs_input_grad[0])
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], a.shape[1])
        if x is None:
            return grad_x, None, None, None, None, *[None] * (2 * len(ctx.active))
        grads = adapter_gradients(ctx.active, ctx.needs_input_grad[5:], x.flatten(0, -2), low, flat, pull)
        return grad_x, None, None, None, None, *grads


class _Side(torch.autograd.Function):
    """y + s (x A^T) B^T, written into y. Products in the type of x over casts that last until the masters change."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Adapter) -> Tensor:
        a_low, b_low = adapter.cast(x.dtype)
        low = F.linear(x, a_low).flatten(0, -2)
        y.flatten(0, -2).addmm_(low, b_low.t(), alpha=adapter.scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, low, a_low, b_low)
        ctx.scale = adapter.scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a_low, b_low = ctx.saved_tensors
        _, wants_x, wants_a, wants_b, _ = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        pull = (flat @ b_low).mul_(ctx.scale) if wants_x or wants_a else None
        # low^T grad, then transposed: oneDNN is half again slower at grad^T low
        grad_b = (low.t() @ flat).t().to(torch.float32).mul_(ctx.scale) if wants_b else None
        grad_a = (pull.t() @ x.flatten(0, -2)).to(torch.float32) if wants_a and pull is not None else None
        grad_x = (pull @ a_low).view_as(x) if wants_x and pull is not None else None
        return grad, grad_x, grad_a, grad_b, None


def inject(model: nn.Module, targets: Iterable[str], switch: Switch) -> dict[str, LoraLinear]:
    """Replace the target linear layers of `model` by `LoraLinear`, once, and return all of them by module path.

    Args:
        targets: "all" (every linear layer but the output head), or last components of module paths such as "q_proj".

    Raises:
        AdapterError: a target that names no linear layer of this model.
    """
    wanted = list(targets)
    apart = {id(_output_head(model)), *(id(module.base) for module in copied(model).values())}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | LoraLinear) and id(m) not in apart}
    if wanted == ["all"]:
        chosen = linear
    else:
        chosen = {n: m for n, m in linear.items() if any(n == t or n.endswith("." + t) for t in wanted)}
        for target in wanted:
            if not any(n == target or n.endswith("." + target) for n in chosen):
                names = sorted({n.rsplit(".", 1)[-1] for n in linear})
                raise AdapterError(
                    f"lora_target names no linear layer of this model: {target!r}",
                    where="lora_target",
                    remedy=f"use all, or some of: {', '.join(names)}",
                )
    for path, module in chosen.items():
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LoraLinear(module, switch))
    return layers(model)


def _output_head(model: nn.Module) -> nn.Module | None:
    return cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every LoRA layer of the model by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def new_adapter(
    model: nn.Module,
    name: str,
    *,
    paths: Iterable[str],
    rank: int,
    alpha: float,
    rslora: bool,
    seed: int,
    dora: bool = False,
) -> None:
    """Add a trainable adapter that changes nothing yet: A Kaiming-uniform (a = sqrt 5, as peft and the authors), B zero."""
    found = layers(model)
    paths = list(paths)
    widest = max((max(found[path].in_features, found[path].out_features) for path in paths), default=rank)
    if rank > widest:
        raise AdapterError(
            f"lora_rank {rank} is larger than every layer",
            where="lora_rank",
            why=f"the widest layer of this model has {widest} units: a product of that rank cannot exist",
            remedy="choose a rank of 8 to 64",
        )
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = found[path]
        bound = math.sqrt(1.0 / layer.in_features)
        a = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
        scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        lengths = torch.linalg.vector_norm(layer.weight.detach().float(), dim=1) if dora else None
        adapter = Adapter(a, torch.zeros(layer.out_features, rank), scale, trainable=True, magnitude=lengths)
        layer.adapters[name] = adapter.to(layer.weight.device)


def copy_adapter(model: nn.Module, source: str, name: str, *, trainable: bool) -> None:
    """Add `name`, a copy of the adapter `source`."""
    for layer in layers(model).values():
        if source in layer.adapters:
            old = layer.adapters[source]
            lengths = None if old.magnitude is None else old.magnitude.detach().clone()
            twin = Adapter(
                old.a.detach().clone(), old.b.detach().clone(), old.scale, trainable=trainable, magnitude=lengths
            )
            layer.adapters[name] = twin.to(layer.weight.device)
    for module in copied(model).values():
        if source in module.copies:
            module.copies[name] = Copy(dict(module.copies[source].named_parameters()), trainable=trainable)


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by `path.lora_A`, `path.lora_B` (`path.lora_magnitude`), in the model's order, then whole copies."""
    found: dict[str, nn.Parameter] = {}
    for path, layer in layers(model).items():
        if name in layer.adapters:
            found[f"{path}.lora_A"] = layer.adapters[name].a
            found[f"{path}.lora_B"] = layer.adapters[name].b
            if (lengths := layer.adapters[name].magnitude) is not None:
                found[f"{path}.lora_magnitude"] = lengths
    for path, module in copied(model).items():
        if name in module.copies:
            found |= {f"{path}.{key}": p for key, p in module.copies[name].named_parameters()}
    return found


def is_dora(model: nn.Module, name: str) -> bool:
    """Does the adapter scale rows, so that it cannot be stacked?"""
    return any(
        name in layer.adapters and layer.adapters[name].magnitude is not None for layer in layers(model).values()
    )


# --------------------------------------------------------------------------------------------------------------- files


def load_adapter(
    model: nn.Module, name: str, folder: Path, switch: Switch, *, trainable: bool = False
) -> dict[str, Any]:
    """Read an adapter folder in peft's format and add it as `name`; returns its adapter_config.

    Raises:
        AdapterError: no adapter there, an adapter of a kind we do not compute, or one that does not fit this base.
    """
    settings = read_adapter(folder)
    weights = _read_weights(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    lengths: dict[str, Tensor] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    saved = settings.get("modules_to_save") or []
    for key, value in weights.items():
        path, _, last = key.removeprefix(_PREFIX).rpartition(".")
        if ".lora_" not in key and any(path.endswith(part) for part in saved):
            whole.setdefault(path, {})[last] = value
            continue
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", key)
        if found is not None:
            lengths[found[1]] = value
            continue
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight", key)
        if match is None:
            raise AdapterError(
                f"this adapter holds weights that are not a LoRA matrix: {key!r}",
                where=str(folder / WEIGHTS),
                why="only A and B of linear layers, DoRA's magnitudes and modules_to_save are read",
                remedy="train the adapter with plain LoRA on linear layers, or merge it into the base with peft first",
            )
        pairs.setdefault(match[1], {})[match[2]] = value
    modules = dict(model.named_modules())
    head = _output_head(model)
    for path, pair in pairs.items():
        base = modules.get(path)
        if base is not None and base is head:
            raise AdapterError(
                f"this adapter changes the output head ({path})",
                where=str(folder / WEIGHTS),
                why="log-probabilities are computed from the base's own head; with tied embeddings it is the input embedding too",
                remedy="train the adapter without the head in target_modules, or merge it into full weights with peft",
            )
        if base is None or not isinstance(base, nn.Linear | LoraLinear):
            raise _misfit(folder, f"it changes {path!r}, which is no linear layer of the base model")
        if set(pair) != {"A", "B"}:
            raise _misfit(folder, f"one of the two matrices of {path!r} is missing")
        rank = pair["A"].shape[0]
        if rank != pair["B"].shape[1] or rank != _by_module(settings, "r", "rank_pattern", path, rank):
            raise _misfit(folder, f"the rank of {path!r} is {rank} in its weights and another in {ADAPTER_CONFIG}")
        if not (bool(pair["A"].isfinite().all()) and bool(pair["B"].isfinite().all())):
            raise AdapterError(
                f"this adapter holds NaN or infinity in {path!r}",
                where=str(folder / WEIGHTS),
                why="every answer of the model would be NaN",
                remedy="copy it again, or take an earlier checkpoint of the run that made it",
            )
        if pair["A"].shape[1] != base.in_features or pair["B"].shape[0] != base.out_features:
            have = f"{pair['B'].shape[0]} x {pair['A'].shape[1]}"
            raise _misfit(folder, f"{path!r} is {base.out_features} x {base.in_features} in the base and {have} in it")
    if settings.get("use_dora") and (bare := sorted(pairs.keys() - lengths.keys())):
        raise _misfit(folder, f"it is DoRA, and the magnitudes of {bare[0]!r} are missing")
    if lost := [part for part in saved if not any(path.endswith(part) for path in whole)]:
        raise _misfit(folder, f"modules_to_save names {lost[0]!r}, which its weights do not hold")
    places = inject(model, list(pairs), switch)
    for path, pair in pairs.items():
        scale = _scale(settings, path, pair["A"].shape[0])
        adapter = Adapter(pair["A"], pair["B"], scale, trainable=trainable, magnitude=lengths.get(path))
        places[path].adapters[name] = adapter.to(places[path].weight.device)
    for path, tensors in whole.items():
        _add_whole(model, name, folder, path, tensors, switch, trainable=trainable)
    return settings


def _add_whole(
    model: nn.Module, name: str, folder: Path, path: str, tensors: dict[str, Tensor], switch: Switch, *, trainable: bool
) -> None:
    """A module that was trained whole beside the adapter, checked against the base's."""
    modules = dict(model.named_modules())
    if path not in modules:
        raise _misfit(folder, f"it holds a whole {path!r}, which the base model has not")
    module = wrap(model, [path], switch)[path]
    for key, parameter in module.base.named_parameters():
        if key not in tensors or tensors[key].shape != parameter.shape:
            have = tuple(tensors[key].shape) if key in tensors else "missing"
            raise _misfit(folder, f"{path}.{key} is {tuple(parameter.shape)} in the base and {have} in it")
    module.copies[name] = Copy(tensors, trainable=trainable).to(next(module.base.parameters()).device)


def file_hash(folder: Path) -> str:
    """SHA-256 of an adapter's weights file; "" when there is none of ours or peft's."""
    file = folder / WEIGHTS
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _by_module(settings: Mapping[str, Any], key: str, patterns: str, path: str, default: float) -> float:
    """A number of the config for one module; a pattern's keys match the end of a module path, the first wins, as in peft."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(settings.get(key, default))


def _scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora."""
    alpha = _by_module(settings, "lora_alpha", "alpha_pattern", path, 8)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if file.is_file():
        try:
            return load_file(file)
        except SafetensorError as error:
            raise AdapterError(
                f"broken adapter file: {error}", where=str(file), remedy="copy or save it again"
            ) from None
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        return read_pickled(pickled)
    raise AdapterError(
        f"{ADAPTER_CONFIG} is there but {WEIGHTS} is not",
        where=str(file.resolve()),
        remedy="copy the whole adapter folder",
    )


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, which is a pickle: nothing else in it is opened.

    Raises:
        AdapterError: it holds more than tensors, or is torn.
    """
    try:
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(
            f"{file.name} cannot be read as plain tensors",
            where=str(file),
            why=f"{str(error).splitlines()[0]} (a pickle may hold code, so only tensors are taken from it)",
            remedy="save it again as safetensors with the tool that made it",
        ) from None
    return loaded


def _misfit(folder: Path, why: str) -> AdapterError:
    return AdapterError(
        "this adapter was not trained on this base model",
        where=str(folder),
        why=why,
        remedy="set model_name_or_path to the model that the adapter was trained on",
    )


def adapter_state(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Tensor], int, float, dict[str, int]]:
    """The adapters in a stack as one: tensors under peft's names, its rank, alpha, and the ranks that differ by module.

    The sum of s_i B_i A_i is one product of the concatenated matrices: A = [A_1; A_2], B = [s_1 B_1, s_2 B_2], with scale 1.
    A single adapter keeps its own matrices and scale.
    """
    stack = list(names)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: set[float] = set()
    for path, layer in layers(model).items():
        parts = [layer.adapters[name] for name in stack if name in layer.adapters]
        if not parts:
            continue
        a = torch.cat([part.a.detach() for part in parts])
        single = len(stack) == 1
        b = parts[0].b.detach() if single else torch.cat([part.b.detach() * part.scale for part in parts], dim=1)
        ranks[path] = a.shape[0]
        scales.add(parts[0].scale if single else 1.0)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a.cpu().contiguous().clone()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b.cpu().contiguous().clone()
        if parts[0].magnitude is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = parts[0].magnitude.detach().cpu().clone()
    if not ranks:
        raise AdapterError(
            f"no adapter called {' + '.join(stack)} is loaded", remedy="load or make one before it is saved"
        )
    rank = max(ranks.values())
    if len(scales) > 1:  # alpha differs by module: fold every scale into B, as for a stack
        for path, layer in layers(model).items():
            if f"{_PREFIX}{path}.lora_B.weight" in tensors:
                tensors[f"{_PREFIX}{path}.lora_B.weight"] *= layer.adapters[stack[0]].scale
        scales = {1.0}
    return tensors, rank, scales.pop() * rank, {path: r for path, r in ranks.items() if r != rank}


def save_adapter(model: nn.Module, names: Iterable[str], folder: Path, *, base: str, task: str = "CAUSAL_LM") -> None:
    """Write a stack of adapters as one peft adapter that loads on the raw base.

    Args:
        names: adapters whose products add, in order; one is saved as it is.
        base: `base_model_name_or_path` of the adapter_config.
    """
    stack = list(names)
    tensors, rank, alpha, odd = adapter_state(model, stack)
    targets = sorted(_targets(key for key in tensors if ".lora_A." in key))
    whole: set[str] = set()
    for path, module in copied(model).items():
        for name in reversed(stack):
            if name in module.copies:
                whole.add(path)
                for key, value in module.copies[name].named_parameters():
                    tensors[f"{_PREFIX}{path}.{key}"] = value.detach().cpu().clone()
                break
    scale = alpha / rank
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": odd,
        "alpha_pattern": {path: scale * r for path, r in odd.items()},
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": endings(model, whole) or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _targets(keys: Iterable[str]) -> set[str]:
    """Last components of the adapted paths: what peft matches against the base model's module names."""
    return {key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for key in keys}
