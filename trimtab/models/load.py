"""Base models: from a folder (`models/folder.py`) to a frozen model, and is this the same base as that one?

A base is loaded once, frozen, and never changed: adapters stand beside it.

Training takes log-probabilities from hidden states (`ops/logprobs.py`), so a model must compute its logits as
`hidden @ weight.T + bias` with nothing after it. `load_base` checks that on a few tokens; `decoder`, `head_weight` and
`head_bias` are the two halves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trimtab.errors import ModelError, out_of_memory
from trimtab.models.folder import check_folder, read_config, weight_files
from trimtab.models.packaged import quiet_unless_watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# How much of a model a fingerprint looks at: this many matrices, evenly spread over the sorted names, four rows of each.
_SAMPLED_TENSORS = 16
_SAMPLED_ROWS = 4

Fingerprint = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Packing:
    """Weights in few bits (QLoRA, arXiv:2305.14314): `nf4` or `fp4`, and whether their scales are packed too (4 bits)."""

    bits: int
    kind: str = "nf4"
    double: bool = True


def _in_short(error: BaseException) -> str:
    """What a library says of a folder that it cannot load."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if any("ignore_mismatched_sizes" in line for line in lines):
        return "tensors in the weights have other shapes than config.json asks for: the two are not of one model"
    text = " ".join(lines[:2])[:300]
    return text if isinstance(error, (OSError, ValueError, ImportError)) and text else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------------------------------------------- a folder to a model


def load_base(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn: str = "sdpa",
    trust_remote_code: bool = False,
    packing: Packing | None = None,
) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode, every parameter frozen. No network.

    Args:
        packing: keep the linear layers' weights in 4 or 8 bits, all but the output head's.

    Raises:
        ModelError: a broken folder, an architecture that transformers does not know, weights that the architecture has and the
            folder does not, or logits that are not a plain linear map of the hidden states.
    """
    from transformers import AutoModelForCausalLM

    check_folder(path)
    if any(file.suffix == ".bin" for file in weight_files(path)):
        log.info(
            "%s holds pickled weights; they are read as plain tensors (weights_only), nothing else in them runs", path
        )
    try:
        with quiet_unless_watched():
            result: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attn,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **(_packed(packing, dtype, device) if packing is not None else {}),
                **(_at_once(device) if packing is None else {}),
            )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the pickled weights in {str(path)!r} hold more than tensors",
            where=str(path),
            why="reading them could run code that someone put there",
            remedy="use a safetensors copy of the model",
        ) from error
    except Exception as error:  # a config that contradicts itself fails anywhere in a library, as anything
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
            raise
        raise ModelError(
            f"transformers cannot load the model in {str(path)!r}",
            where=str(path),
            why=_in_short(error),
            remedy="check that it is a causal language model and copied whole, and its own files if it needs "
            "trust_remote_code: true",
        ) from error
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", result)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{len(missing)} tensors are missing from the weights in {str(path)!r}, for example {missing[0]}",
            where=str(path),
            why="transformers would fill them with random numbers",
            remedy="use a folder saved from a causal language model (a reward or embedding model has no such head)",
        )
    if packing is None and torch.device(device).type != "cuda":  # else they are where they belong already
        cast(Any, model).to(device)
    cast(Any, model).eval().requires_grad_(False)
    check_plain_head(model)
    return model


def _at_once(device: torch.device | str) -> dict[str, Any]:
    """Onto a GPU tensor by tensor: a model that fills it need not fit into the machine's own memory as well."""
    return {"device_map": {"": device}} if torch.device(device).type == "cuda" else {}


def _packed(packing: Packing, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What transformers is told, so that bitsandbytes packs the weights as they are read.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    import transformers

    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization_bit: {packing.bits} needs bitsandbytes",
            where="quantization_bit",
            why="the package is not installed",
            remedy='pip install "trimtab[quantization]", or leave quantization_bit out',
        )
    make: Any = transformers.BitsAndBytesConfig
    settings = make(
        load_in_4bit=packing.bits == 4,
        load_in_8bit=packing.bits == 8,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=packing.kind,
        bnb_4bit_use_double_quant=packing.double,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal LM that ends at the hidden states `[b, n, d]` (field `last_hidden_state` of what it returns)."""
    return cast(nn.Module, cast(Any, model).get_decoder())


def head_weight(model: nn.Module) -> Tensor:
    """The LM head's weight `[vocab, d]`; with tied embeddings it is the embedding's own."""
    return cast(Tensor, cast(Any, model).get_output_embeddings().weight)


def head_bias(model: nn.Module) -> Tensor | None:
    """The LM head's bias `[vocab]`, or None."""
    return cast("Tensor | None", getattr(cast(Any, model).get_output_embeddings(), "bias", None))


@torch.no_grad()
def check_plain_head(model: nn.Module) -> None:
    """Compare `model(ids).logits` with `hidden @ head_weight.T + head_bias` on a few tokens.

    Raises:
        ModelError: they differ: logits that are scaled, capped or computed in another way; or are not finite.
    """
    config = cast(Any, model).config
    where = getattr(config, "_name_or_path", "") or type(model).__name__
    what = f"the logits of {type(model).__name__} are not a plain linear map of its hidden states"
    why = "training computes log-probabilities as softmax(hidden @ lm_head), so they would be wrong for this model"
    remedy = "use a model without logit scaling or capping (Llama, Qwen2, Qwen3, Mistral, SmolLM and most others)"
    # Capping is tanh, which is all but linear near 0: logits of a few tokens need not show it.
    if getattr(config, "final_logit_softcapping", None):
        raise ModelError(what, where=where, why=f"it caps them (final_logit_softcapping); {why}", remedy=remedy)
    if cast(Any, model).get_output_embeddings() is None:
        raise ModelError(what, where=where, why="it has no LM head", remedy="use a causal language model")
    weight, bias = head_weight(model), head_bias(model)
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    plain = nn.functional.linear(hidden, weight, bias).float()
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "the model's logits are not finite",
            where=where,
            why="NaN or infinity after four tokens: its weights hold such a number, or this number type is too narrow for them",
            remedy="copy or download the model again, or set compute_dtype: float32",
        )
    # The same two products in the same type: only the order of sums may differ.
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    if logits.shape != plain.shape or not bool((logits - plain).abs().max() <= tolerance * logits.abs().max()):
        raise ModelError(what, where=where, why=why, remedy=remedy)


# --------------------------------------------------------------------------------------------------------- the same base?


def base_fingerprint(model: nn.Module | Path | str) -> Fingerprint:
    """What a base is, by content: architecture, a hash of all names and shapes, and hashes of sampled rows of sampled matrices.

    A matrix has one hash for every type that its values can be rounded to in one step: float32 weights have three, 16-bit
    weights their own. So a base has a common hash with its copy in bfloat16 or float16, whatever folder or path it lies in.
    A loaded model must carry no adapters. JSON values only.

    Raises:
        ModelError: a folder that is broken.
    """
    if isinstance(model, nn.Module):
        parameters = dict(model.named_parameters())  # tied weights once, under their first name
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        sampled = {name: parameters[name].detach()[:_SAMPLED_ROWS].cpu() for name in _sampled_names(shapes)}
        return _fingerprint(type(model).__name__, shapes, sampled)

    folder = Path(model)
    config = read_config(folder)
    names = set(config.get("architectures") or ["unknown"])
    shapes, sampled = _read_rows(weight_files(folder))
    # Some tools save a tied head and some do not.
    tied = "lm_head.weight" in shapes and config.get("tie_word_embeddings", False)
    if tied:
        del shapes["lm_head.weight"]
    wanted = _sampled_names(shapes)
    return _fingerprint(min(names), shapes, {name: sampled[name] for name in wanted})


def same_base(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two fingerprints can be of one base: equal architecture and shapes, and equal hashes wherever both have one.

    Only a float16 copy and a bfloat16 copy of one float32 model have no hash in common; they pass on shapes.
    """
    if (a["architecture"], a["shapes"]) != (b["architecture"], b["shapes"]) or a["tensors"].keys() != b[
        "tensors"
    ].keys():
        return False
    for name, hashes in a["tensors"].items():
        other = b["tensors"][name]
        if any(hashes[kind] != other[kind] for kind in hashes.keys() & other.keys()):
            return False
    return True


def _sampled_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    matrices = sorted(name for name, shape in shapes.items() if len(shape) >= 2)
    count = min(_SAMPLED_TENSORS, len(matrices))
    return [matrices[i * len(matrices) // count] for i in range(count)]


def _fingerprint(
    architecture: str, shapes: Mapping[str, tuple[int, ...]], sampled: Mapping[str, Tensor]
) -> Fingerprint:
    listing = json.dumps(sorted((name, list(shape)) for name, shape in shapes.items()))
    return {
        "architecture": architecture,
        "shapes": hashlib.sha256(listing.encode()).hexdigest(),
        "tensors": {name: _hashes(tensor) for name, tensor in sampled.items()},
    }


def _hashes(tensor: Tensor) -> dict[str, str]:
    """A hash of the values for every type they round to in one step (two roundings in a row may give another value)."""
    kinds: Iterable[torch.dtype] = (tensor.dtype,)
    if tensor.dtype == torch.float32:
        kinds = (torch.float32, torch.bfloat16, torch.float16)
    hashes = {}
    for kind in kinds:
        data = tensor.to(kind).contiguous().view(torch.uint8).numpy().tobytes()
        hashes[str(kind).removeprefix("torch.")] = hashlib.sha256(data).hexdigest()[:16]
    return hashes


def _read_rows(files: Iterable[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Every tensor's shape, and the first rows of every matrix, without reading the rest from disk."""
    shapes: dict[str, tuple[int, ...]] = {}
    rows: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    part = weights.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    if len(shapes[name]) >= 2:
                        rows[name] = part[:_SAMPLED_ROWS]
        else:
            for name, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
                shapes[name] = tuple(tensor.shape)
                rows[name] = tensor[:_SAMPLED_ROWS].clone()
    return shapes, rows
