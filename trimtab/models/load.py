"""Base models: from a name to a folder, from a folder to a frozen model, and is this the same base as that one?

A name is a packaged model (`models/packaged.py`), a local folder, or a hub id. A base is loaded once, frozen, and never
changed: adapters stand beside it.

Training takes log-probabilities from hidden states (`ops/logprobs.py`), so a model must compute its logits as
`hidden @ weight.T + bias` with nothing after it. `load_base` checks that on a few tokens; `decoder`, `head_weight` and
`head_bias` are the two halves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.errors import ModelError
from trimtab.models.packaged import DEFAULT_MODEL, PACKAGED, fetch, offline, quiet_unless_watched
from trimtab.registry import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

WAY_OUT = f"set model_name_or_path to a local model folder, or to {DEFAULT_MODEL!r}, which pip can fetch"

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


class ModelSource(Protocol):
    """The part of a stage config that says which model, and from where."""

    @property
    def model_name_or_path(self) -> str: ...
    @property
    def cache_dir(self) -> str | None: ...
    @property
    def model_revision(self) -> str: ...
    @property
    def hf_hub_token(self) -> str | None: ...
    @property
    def ms_hub_token(self) -> str | None: ...
    def origin(self, key: str) -> str: ...


# ----------------------------------------------------------------------------------------------------- a name to a folder


def resolve_model(config: ModelSource) -> Path:
    """The folder of the config's base model, fetched if need be, with a config and whole weights in it.

    Raises:
        ModelError: no such folder or hub id, no network, or a folder that is broken.
    """
    name, where = config.model_name_or_path, config.origin("model_name_or_path")
    if name in PACKAGED:
        folder = fetch(name)
    elif (local := Path(name).expanduser()).exists():
        folder = local
    elif _looks_like_a_path(name):
        raise ModelError(
            f"there is no model folder {name!r}",
            where=where,
            why=f"{local.absolute()} does not exist",
            remedy="correct the path (relative paths start at the working directory), or " + WAY_OUT,
        )
    elif os.environ.get("USE_MODELSCOPE_HUB", "").lower() in {"1", "true"} or config.ms_hub_token:
        folder = _from_modelscope(config, where)
    else:
        folder = _from_hub(config, where)
    check_folder(folder, where=where)
    return folder


def _looks_like_a_path(name: str) -> bool:
    """Whether a name that does not exist on disk was meant as a path: no hub id has these marks."""
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(("./", "../"))
    return not hub_id


def _from_hub(config: ModelSource, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # A connection that drops midway raises the HTTP library's own error; which library that is differs between versions
    # of the hub's package, so it is found as the parent of the hub's own error.
    http_error = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    name = config.model_name_or_path
    try:
        folder = Path()
        # Weights in the safe format first; pickled ones only where there are no others.
        for weights in (["*.safetensors", "*.safetensors.index.json"], ["*.bin", "*.bin.index.json"]):
            folder = Path(
                snapshot_download(
                    name,
                    revision=config.model_revision,
                    cache_dir=config.cache_dir,
                    token=config.hf_hub_token,
                    allow_patterns=["*.json", "*.model", "*.txt", "*.jinja", "*.py", *weights],
                    ignore_patterns=["*/*", "consolidated*", "training_args.bin"],
                )
            )
            if any(folder.glob(weights[0])):
                break
    except (OSError, ValueError, http_error) as error:
        guess = nearest(name, PACKAGED)
        why = "HF_HUB_OFFLINE allows no network and it is not in the cache" if offline() else _first_line(error)
        raise ModelError(
            f"cannot get the model {name!r} (revision {config.model_revision}) from the hub"
            + (f"; did you mean {guess!r}?" if guess else ""),
            where=where,
            why=f"{why} (nor is there a folder {Path(name).absolute()})",
            remedy="check the name, the network and hf_hub_token; or " + WAY_OUT,
        ) from error
    return folder


def _from_modelscope(config: ModelSource, where: str) -> Path:
    name = config.model_name_or_path
    remedy = "check the name, the network and ms_hub_token; or " + WAY_OUT
    if offline():
        raise ModelError(
            f"cannot get the model {name!r} from ModelScope",
            where=where,
            why="HF_HUB_OFFLINE allows no network",
            remedy=remedy,
        )
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"cannot get the model {name!r} from ModelScope",
            where=where,
            why="the package modelscope is not installed",
            remedy='pip install "trimtab[modelscope]"',
        ) from error
    # Its default branch has another name than the hub's.
    revision = "master" if config.model_revision == "main" else config.model_revision
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=config.cache_dir, token=config.ms_hub_token or None)
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, and so are ModelScope's of the network
        raise ModelError(
            f"cannot get the model {name!r} (revision {revision}) from ModelScope",
            where=where,
            why=_first_line(error),
            remedy=remedy,
        ) from error


def check_folder(folder: Path, *, where: str = "") -> None:
    """Look at a model folder without loading it: a config, and weight files that are all there and not cut short.

    Raises:
        ModelError: what is missing or broken.
    """
    _read_config(folder, where)
    for file in _weight_files(folder, where):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt"):
                pass  # opening compares the length of the file with what its header promises
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"the weight file {file.name} is broken",
                where=str(file),
                why=f"{error} (a copy or download that was cut short looks like this)",
                remedy="copy or download it again",
            ) from error


def _read_config(folder: Path, where: str = "") -> dict[str, Any]:
    file = folder / "config.json"
    place = where or str(folder)
    if not folder.is_dir():
        raise ModelError(
            f"{str(folder)!r} is not a folder",
            where=place,
            why=f"tried {folder.absolute()}",
            remedy="name the folder that holds config.json",
        )
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(
            f"no config.json in the model folder {str(folder)!r}",
            where=place,
            why="this is an adapter, not a base model" if adapter else f"looked in {folder.absolute()}",
            remedy="name it in adapter_name_or_path, and its base model in model_name_or_path"
            if adapter
            else "name the folder that holds config.json and the weights",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            "the model's config.json is not JSON", where=str(file), why=str(error), remedy="copy or download it again"
        ) from error
    return cast(dict[str, Any], config)


def _weight_files(folder: Path, where: str = "") -> list[Path]:
    """The files that hold the weights, safetensors before pickled ones, every shard that an index names."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ModelError(
                    f"{index.name} is broken", where=str(index), why=str(error), remedy="copy or download it again"
                ) from error
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ModelError(
                    f"{len(missing)} of {len(names)} weight files are missing from {str(folder)!r}",
                    where=str(index),
                    why=f"the index names {missing[0]}, which is not there",
                    remedy="copy or download the missing files",
                )
            return [folder / name for name in names]
    raise ModelError(
        f"no weights in the model folder {str(folder)!r}",
        where=where or str(folder),
        why=f"neither model.safetensors nor pytorch_model.bin (nor an index of shards) is in {folder.absolute()}",
        remedy="copy or download the weights; GGUF files and other formats must be converted first",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    if any(file.suffix == ".bin" for file in _weight_files(path)):
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
            )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the pickled weights in {str(path)!r} hold more than tensors",
            where=str(path),
            why="reading them could run code that someone put there",
            remedy="use a safetensors copy of the model",
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ModelError(
            f"transformers cannot load the model in {str(path)!r}",
            where=str(path),
            why=_first_line(error),
            remedy="check that it is a causal language model, and its own files if it needs trust_remote_code: true",
        ) from error
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", result)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{len(missing)} tensors are missing from the weights in {str(path)!r}, for example {missing[0]}",
            where=str(path),
            why="transformers would fill them with random numbers",
            remedy="use a folder saved from a causal language model (a reward or embedding model has no such head)",
        )
    if packing is None:  # packed weights are where they belong already
        cast(Any, model).to(device)
    cast(Any, model).eval().requires_grad_(False)
    check_plain_head(model)
    return model


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
        ModelError: they differ: logits that are scaled, capped or computed in another way.
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
    config = _read_config(folder)
    names = set(config.get("architectures") or ["unknown"])
    shapes, sampled = _read_rows(_weight_files(folder))
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
