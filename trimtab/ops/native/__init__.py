"""Kernels in C for a CPU: attention of packed sequences, and what lies between the products of a layer, each as one pass.

torch starts a function for each of these small things, and a few for each head: between the products of a layer that was 35 to 50 % of
every work (docs/log.md). The C files beside this one are compiled once, at their first use, by the compiler of the machine and for its own
instructions (a few seconds), and kept in the cache folder. They are plain C with the vector types of GCC, and run on torch's own threads.

Where there is no compiler, or the environment says TRIMTAB_NATIVE=0, `library()` is None and torch computes the same up to rounding.

Measured on x86-64 with AVX512; compiled for AVX2 and run there too. Linux alone: elsewhere torch's threads are of another kind.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.cache import cache_folder

log = logging.getLogger(__name__)

SOURCES = ("rows.c", "attention.c", "products.c", "sampling.c", "vocabulary.c", "step.c")
HEADERS = ("vectors.h", "functions.h")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-std=gnu11")
"""GCC's (9 or newer, for its vector types). No -ffast-math: what is not a number must stay so, and a run is stopped by it."""

PATIENCE = 120
"""Seconds that a compiler may take."""

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_TREE = [_L, _P, _P, _P, _P, _L, _P, _F, _L, _L, _L, _I, _I]
SIGNATURES: dict[str, list[type]] = {
    "trimtab_norm": [_P, _P, _P, _F, _P, _L, _P, _L, _L, _L, _I, _I],
    "trimtab_norm_back": [_P, _P, _P, _F, _P, _L, _L, _I, _I],
    "trimtab_gate": [_P, _P, _L, _P, _L, _P, _L, _L, _L, _I, _I],
    "trimtab_gate_back": [_P, _P, _P, _P, _P, _L, _I, _I],
    "trimtab_beside": [_P, _L, _P, _L, _L, _L, _I, _I],
    "trimtab_thin": [_P, _L, _L, _P, _L, _L, _L, _F, _P, _P, _I, _I, _I],
    "trimtab_turn": [_P, _P, _F, _P, _P, _P, _L, _L, _L, _L, _I, _I],
    "trimtab_attend": [_P, _P, _F, _P, _P, _P, _P, _P, _L, _L, _F, _P, _L, _P, _L, _L, _L, _L, _L, _I, _I],
    "trimtab_keep": [_P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _I, _I],
    "trimtab_tree": [*[_P, _L, _L] * 3, _P, *_TREE],
    "trimtab_tree_back": [*[_P, _L, _L] * 4, _P, _P, _P, *_TREE],
    "trimtab_draw": [_P, _F, _P, _P, _P, _L, _L, _I, _I],
    "trimtab_tile": [_P, _P, _F, _P, _L, _L, _I, _I],
    "trimtab_vector": [],
    "trimtab_has_products": [],
}
"""The arguments of each function, as the C files name them."""

PRODUCTS: dict[str, list[type]] = {
    "trimtab_laid_out": [_L, _L],
    "trimtab_lay_out": [_P, _L, _L, _P, _I],
    "trimtab_products": [_P, _L, _P, _I, _P, _L, _L, _L, _I],
    "trimtab_step": [_P, _L, *[_P] * 6, _F, *[_P] * 3, _L, _L, _F, *[_L] * 5, _I],
}
"""The same of those that not every CPU has."""

RESULTS = {"trimtab_vector": _I, "trimtab_has_products": _I, "trimtab_laid_out": _L}
"""What functions return that return something."""


def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are not to be had (`why_not` says it)."""
    return _found()[0]


def kernels() -> ctypes.CDLL:
    """The compiled functions where `takes` has said that they are there."""
    found = library()
    assert found is not None
    return found


def why_not() -> str:
    """Why torch computes alone; empty where it does not."""
    return _found()[1]


def takes(x: Tensor) -> bool:
    """Are there kernels for the numbers of x?"""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and library() is not None


def is_narrow(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("TRIMTAB_NATIVE", "") == "0":
        return None, "TRIMTAB_NATIVE=0"
    if sys.platform != "linux":
        return None, f"not offered on {sys.platform}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "cc"))), None)
    if compiler is None:
        return None, "no C compiler (gcc)"
    try:
        threads = _openmp()
        if threads is None:
            return None, "torch does not run on OpenMP here"
        return _loaded(_compiled(compiler, threads)), ""
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or ["?"]
        return None, f"{compiler} does not compile them ({lines[0].strip()})"
    except (OSError, subprocess.TimeoutExpired, AttributeError, RuntimeError, ValueError) as error:
        return None, str(error) or type(error).__name__


def _loaded(file: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(file))
    names = {**SIGNATURES, **(PRODUCTS if functions.trimtab_has_products() else {})}
    for name, arguments in names.items():
        getattr(functions, name).argtypes = arguments
        getattr(functions, name).restype = RESULTS.get(name)
    return functions


def _openmp() -> str | None:
    """The OpenMP library that torch has loaded: with one of its own the kernels would run on a second set of threads."""
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    loaded = {Path(parts[5]) for parts in (line.split(maxsplit=5) for line in lines) if len(parts) == 6}
    own = sorted(file for file in loaded if file.name.startswith(("libgomp", "libiomp5", "libomp")))
    # torch's own lies in its folder, or in torch.libs beside it; others may have brought one too
    home = Path(torch.__file__).parent
    beside = [file for file in own if home in file.parents or home.with_name("torch.libs") in file.parents]
    return next((str(file) for file in (*beside, *own)), None)


def _compiled(compiler: str, threads: str) -> Path:
    """The library in the cache, compiled unless it is there: named by all that it depends on."""
    here = Path(__file__).parent
    plain = {**os.environ, "LC_ALL": "C"}  # messages that can be found among others
    run: dict[str, Any] = {
        "capture_output": True,
        "text": True,
        "errors": "replace",
        "check": True,
        "timeout": PATIENCE,
        "env": plain,
    }
    version = subprocess.run([compiler, "--version"], **run)
    state = hashlib.sha256()
    for part in (*FLAGS, version.stdout, threads, platform.machine(), _instructions()):
        state.update(part.encode() + b"\0")
    for name in (*HEADERS, *SOURCES):
        state.update((here / name).read_bytes())
    file = cache_folder() / "native" / f"{state.hexdigest()[:16]}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            run["cwd"] = folder
            subprocess.run([compiler, *FLAGS, "-c", *(str(here / name) for name in SOURCES)], **run)
            objects = [name.replace(".c", ".o") for name in SOURCES]
            # linked with the very file, without -fopenmp, which would add the compiler's own
            subprocess.run([compiler, "-shared", "-o", "native.so", *objects, threads, "-lm"], **run)
            (Path(folder) / "native.so").replace(file)  # at once: another process may do the same
        log.info("compiled %s", file)
    return file


def _instructions() -> str:
    """What this CPU can do: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
