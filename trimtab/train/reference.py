"""The reference's log-probabilities of a data set: computed once, kept on disk by what they depend on.

The reference does not move and the answers are fixed, so each number is needed once per epoch and is the same every time.
They are kept in the user's cache under a fingerprint of everything that they depend on (base model, the reference's adapters
as they are in memory, token ids of every row, number type, kind of device, layout): a sweep over beta or over losses computes
them once, and where anything differs the name differs and they are computed anew.

    <cache>/reference/<fingerprint>.safetensors      "logp" [all scored tokens], "lengths" [rows]
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.cache import cache_folder
from trimtab.models import lora
from trimtab.train.assemble import REFERENCE, Session
from trimtab.train.progress import say
from trimtab.train.rollout import score_role
from trimtab.types import TokenRow

ROWS = 1024
"""Rows whose padded arrays exist at one time."""


def reference_logp(session: Session, rows: Sequence[TokenRow]) -> list[Tensor]:
    """log pi_ref of each row's scored tokens, one `[n]` on the CPU for each row, from the cache if it holds them."""
    lengths = [len(row.scored) for row in rows]
    path = cache_folder() / "reference" / f"{fingerprint(session, rows)}.safetensors"
    flat = _read(path, lengths)
    if flat is None:
        started = time.monotonic()
        flat = torch.cat([part.cpu() for part in _compute(session, rows)])
        kept = _write(path, flat, lengths)
        say(
            f"reference: log-probabilities of {len(rows)} answers in {time.monotonic() - started:.1f} s"
            + (f", kept in {path}" if kept else "")
        )
    else:
        say(f"reference: log-probabilities of {len(rows)} answers from {path}")
    return list(torch.split(flat, lengths))


def fingerprint(session: Session, rows: Sequence[TokenRow]) -> str:
    """A hash of all that the reference's log-probabilities of these rows depend on."""
    digest = hashlib.sha256()
    facts: dict[str, Any] = {
        "base": session.fingerprint,
        "dtype": str(session.dtype),
        "device": session.device.type,
        "layout": session.layout,
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    model = session.roles.of(REFERENCE)
    for name, parameter in model.named_parameters():  # a copy of the start, or a model that the file names
        digest.update(f"|{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        # all of it: a few edited rows of an embedding make another reference. A second for a gigabyte, and the passes take minutes
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for adapter in session.roles.specs[REFERENCE].adapters:
        for name, parameter in lora.parameters(model, adapter).items():
            digest.update(f"|{name}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        for module in model.modules():
            if isinstance(module, lora.LoraLinear) and adapter in module.adapters:
                digest.update(f"|{module.adapters[adapter].scale}".encode())
    for row in rows:
        digest.update(f"|{len(row.token_ids)},{len(row.scored)}|".encode())
        digest.update(array("q", (*row.token_ids, *row.scored)).tobytes())
    return digest.hexdigest()[:32]


def _compute(session: Session, rows: Sequence[TokenRow]) -> list[Tensor]:
    parts = []
    for start, end in pairwise([*range(0, len(rows), ROWS), len(rows)]):
        some = rows[start:end]
        logp = score_role(session, REFERENCE, some, temperature=1.0)["logp"]
        parts += [logp[i, : len(row.scored)] for i, row in enumerate(some)]
    return parts


def _read(path: Path, lengths: list[int]) -> Tensor | None:
    """The log-probabilities in the file; None when there is no such file, or it is not whole."""
    try:
        held = load_file(path)
    except (OSError, SafetensorError):
        return None
    if held.keys() != {"logp", "lengths"} or held["lengths"].tolist() != lengths or len(held["logp"]) != sum(lengths):
        return None
    return held["logp"]


def _write(path: Path, flat: Tensor, lengths: list[int]) -> bool:
    """Keep them, whole or not at all; a cache that cannot be written costs time, not the run."""
    beside = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logp": flat.contiguous(), "lengths": torch.tensor(lengths)}, beside)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        say(f"reference: not kept on disk ({error})")
        return False
    return True
