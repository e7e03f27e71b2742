"""The shape of a decoder-only model: from its config.json, or from a table of well-known ones where there is no folder to read.

Counts are exact for the block that nearly all of them share (RMSNorm, grouped queries, SwiGLU); a model of another build is counted from
the headers of its weight files, and its activations are taken to be those of that block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import ModelError
from trimtab.models.folder import read_config, read_header, weight_files

BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "I8": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model.

    Attributes:
        heads, key_heads, head_size: of attention; wide: units between gate and down.
        biases: numbers of the biases of one layer; norms: those of its norms.
        counted: parameters as the weight files have them; None: by the formula.
        stored: bytes of a number on disk.
        source: where these numbers come from.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    wide: int
    vocabulary: int
    tied: bool
    biases: int = 0
    norms: int = 0
    counted: int | None = None
    stored: int = 2
    source: str = ""

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_size

    @property
    def linear(self) -> int:
        """Parameters of the linear layers of all blocks: what a token is multiplied with, the output head apart."""
        per_layer = self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.wide)
        return self.layers * per_layer

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; a tied head once."""
        if self.counted is not None:
            return self.counted
        return (
            self.linear + self.layers * (self.norms + self.biases) + self.hidden + self.head * (1 if self.tied else 2)
        )

    def adapter(self, rank: int, targets: tuple[str, ...] = ("all",)) -> int:
        """Parameters of a LoRA adapter: rank (in + out) of every target layer."""
        d, q, k, f = self.hidden, self.queries, self.keys, self.wide
        sizes = {
            "q_proj": d + q, "k_proj": d + k, "v_proj": d + k, "o_proj": q + d,
            "gate_proj": d + f, "up_proj": d + f, "down_proj": f + d,
        }  # fmt: skip
        chosen = sizes.values() if targets == ("all",) else [sizes[t] for t in targets if t in sizes]
        return self.layers * rank * sum(chosen)


def _row(
    name: str, sizes: tuple[int, ...], *, tied: bool = False, qkv_bias: bool = False, qk_norm: bool = False
) -> Shape:
    layers, hidden, heads, key_heads, head_size, wide, vocabulary = sizes
    return Shape(
        name=name, layers=layers, hidden=hidden, heads=heads, key_heads=key_heads, head_size=head_size, wide=wide,
        vocabulary=vocabulary, tied=tied, biases=(heads + 2 * key_heads) * head_size if qkv_bias else 0,
        norms=2 * hidden + (2 * head_size if qk_norm else 0), source="the built-in table",
    )  # fmt: skip


def _table() -> dict[str, Shape]:
    """layers, hidden, heads, key heads, head size, wide, vocabulary: from the config.json of each release."""
    rows = [
        _row("smollm2-135m", (30, 576, 9, 3, 64, 1536, 49152), tied=True),
        _row("smollm2-360m", (32, 960, 15, 5, 64, 2560, 49152), tied=True),
        _row("smollm2-1.7b", (24, 2048, 32, 32, 64, 8192, 49152), tied=True),
        _row("llama-2-7b", (32, 4096, 32, 32, 128, 11008, 32000)),
        _row("llama-2-13b", (40, 5120, 40, 40, 128, 13824, 32000)),
        _row("llama-3-8b", (32, 4096, 32, 8, 128, 14336, 128256)),
        _row("llama-3.2-1b", (16, 2048, 32, 8, 64, 8192, 128256), tied=True),
        _row("llama-3.2-3b", (28, 3072, 24, 8, 128, 8192, 128256), tied=True),
        _row("mistral-7b", (32, 4096, 32, 8, 128, 14336, 32000)),
        _row("yi-6b", (32, 4096, 32, 4, 128, 11008, 64000)),
        _row("yi-34b", (60, 7168, 56, 8, 128, 20480, 64000)),
    ]
    for name, sizes, tied in (
        ("0.5b", (24, 896, 14, 2, 64, 4864, 151936), True),
        ("1.5b", (28, 1536, 12, 2, 128, 8960, 151936), True),
        ("3b", (36, 2048, 16, 2, 128, 11008, 151936), True),
        ("7b", (28, 3584, 28, 4, 128, 18944, 152064), False),
        ("14b", (48, 5120, 40, 8, 128, 13824, 152064), False),
        ("32b", (64, 5120, 40, 8, 128, 27648, 152064), False),
        ("72b", (80, 8192, 64, 8, 128, 29568, 152064), False),
    ):
        rows.append(_row(f"qwen2-{name}", sizes, tied=tied, qkv_bias=True))
    for name, sizes, tied in (
        ("0.6b", (28, 1024, 16, 8, 128, 3072, 151936), True),
        ("1.7b", (28, 2048, 16, 8, 128, 6144, 151936), True),
        ("4b", (36, 2560, 32, 8, 128, 9728, 151936), True),
        ("8b", (36, 4096, 32, 8, 128, 12288, 151936), False),
        ("14b", (40, 5120, 40, 8, 128, 17408, 151936), False),
        ("32b", (64, 5120, 64, 8, 128, 25600, 151936), False),
    ):
        rows.append(_row(f"qwen3-{name}", sizes, tied=tied, qk_norm=True))
    return {row.name: row for row in rows}


TABLE = _table()

_SAME = {"qwen2.5": "qwen2", "llama-3.1": "llama-3", "llama2": "llama-2", "llama3": "llama-3", "yi-1.5": "yi"}
"""Releases with the sizes of another one (docs of each)."""


def known(name: str) -> Shape | None:
    """The shape of a well-known model by its name or the last part of its path, however that is spelt (qwen2_7b, Qwen2-7B-Instruct)."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().replace("_", "-").replace(" ", "-")
    for theirs, ours in _SAME.items():
        last = re.sub(rf"(^|-){re.escape(theirs)}(?=-|$)", rf"\1{ours}", last)
    found = [key for key in TABLE if re.search(rf"(^|-){re.escape(key)}(?=-|$)", last)]
    return TABLE[max(found, key=len)] if found else None


def shape_of(folder: Path) -> Shape:
    """The shape of a model folder: sizes from config.json, parameters from the headers of its weight files.

    Raises:
        ModelError: no config.json, broken weight files, or a config without the sizes of a decoder.
    """
    config = read_config(folder)
    text: Mapping[str, Any] = config.get("text_config") or config
    try:
        heads = int(text["num_attention_heads"])
        hidden = int(text["hidden_size"])
        size = int(text.get("head_dim") or hidden // heads)
        key_heads = int(text.get("num_key_value_heads") or heads)
        shape = Shape(
            name=folder.name,
            layers=int(text["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            key_heads=key_heads,
            head_size=size,
            wide=int(text.get("intermediate_size") or 4 * hidden),
            vocabulary=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            stored=BYTES.get(str(text.get("dtype") or text.get("torch_dtype")), 2),
            source=str(folder / "config.json"),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            "the sizes of this model cannot be read from its config.json",
            where=str(folder / "config.json"),
            why=f"{type(error).__name__}: {error}",
            remedy="the plan knows decoders whose config names hidden_size, num_hidden_layers, num_attention_heads and vocab_size",
        ) from error
    counted, stored = _count(folder, shape)
    return replace(shape, counted=counted, stored=stored or shape.stored)


def _count(folder: Path, shape: Shape) -> tuple[int | None, int]:
    """Parameters and bytes of each in the headers of the weight files; None where they are pickled."""
    total = size = 0
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            return None, 0
        for name, entry in read_header(file).items():
            if shape.tied and name == "lm_head.weight":
                continue
            count = math.prod(entry["shape"])
            total += count
            size += count * BYTES.get(entry["dtype"], 2)
    return total, round(size / max(1, total))
