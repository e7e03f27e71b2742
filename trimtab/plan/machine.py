"""The machine of a plan: how much memory a run may use, and how fast it multiplies and reads. Asked of this one, or named.

A GPU that is not here is named: `rtx-4090`, `h100`, or `cuda:24GB`, which is any card with that much memory (its times are those of the
slowest card of that size in the table). Rates are the makers' dense figures; what a run reaches of them is `USED`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.errors import ConfigError
from trimtab.registry import nearest

GB = 10**9
GIB = 2**30

USED = {"cuda": 0.4, "cpu": 0.6}
"""Share of the rate of products that training reaches, to begin with: 40 % of a GPU's, 60 % of a CPU's (docs/memory.md)."""

CONTEXT = {"cuda": 600 * 2**20, "cpu": 0}
"""What the driver and its libraries keep on a GPU before the first tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Attributes:
    memory: bytes that a run may fill.
    rate: products a second (floating-point operations) in the compute type, as the maker or a measurement has it.
    bandwidth: bytes a second.
    bfloat16: does it multiply them?
    """

    name: str
    kind: str
    memory: int
    rate: float
    rate32: float
    bandwidth: float
    bfloat16: bool = True


# name: memory GiB, bfloat16 with float32 sums and float32 (TFLOP/s, dense), TB/s: from the makers' data sheets
_CARDS: dict[str, tuple[float, float, float, float]] = {
    "rtx-3090": (24, 71, 35.6, 0.936),
    "rtx-4090": (24, 165, 82.6, 1.008),
    "rtx-5090": (32, 209, 104.8, 1.792),
    "rtx-4060-ti": (16, 44, 22.1, 0.288),
    "a10": (24, 125, 31.2, 0.600),
    "l4": (24, 121, 30.3, 0.300),
    "l40s": (48, 362, 91.6, 0.864),
    "a6000": (48, 155, 38.7, 0.768),
    "a100": (40, 312, 19.5, 1.555),
    "a100-80gb": (80, 312, 19.5, 2.039),
    "h100": (80, 989, 67, 3.35),
    "h200": (141, 989, 67, 4.8),
}


def cards() -> tuple[str, ...]:
    return tuple(_CARDS)


def _card(name: str, memory: float | None = None) -> Machine:
    gib, fast, slow, bandwidth = _CARDS[name]
    return Machine(
        name=name, kind="cuda", memory=round((memory or gib) * GIB), rate=fast * 1e12, rate32=slow * 1e12,
        bandwidth=bandwidth * 1e12,
    )  # fmt: skip


def machine(asked: str | None = None, *, where: str = "--device", measure: bool = True) -> Machine:
    """The machine that `asked` names; this one's CPU for None or `cpu`.

    Args:
        measure: this CPU's rates too; else they are infinite (that takes NumPy, and longer than all the rest of a dry run).

    Raises:
        ConfigError: no such device.
    """
    if asked is None or asked == "cpu":
        return this_cpu(measure=measure)
    word = asked.strip().lower().replace(" ", "-").replace("_", "-")
    if match := re.fullmatch(r"(cpu|cuda):(\d+(?:\.\d+)?)(?:gib|gb|g)", word):
        size = float(match[2])
        if match[1] == "cpu":
            return this_cpu(round(size * GIB), measure=measure)
        enough = [name for name, row in _CARDS.items() if row[0] >= size] or list(_CARDS)
        smallest = min(_CARDS[name][0] for name in enough)
        name = min((n for n in enough if _CARDS[n][0] == smallest), key=lambda n: _CARDS[n][1])
        return replace(_card(name, size), name=f"a GPU of {size:g} GB (times as of {name})")
    bare = word.removeprefix("nvidia-").removeprefix("geforce-")
    if bare in _CARDS:
        return _card(bare)
    guess = nearest(bare, _CARDS)
    raise ConfigError(
        f"unknown device {asked!r}" + (f"; did you mean {guess!r}?" if guess else ""),
        where=where,
        remedy=f"cpu, cuda:24GB (any size), or one of: {', '.join(_CARDS)}",
    )


# ------------------------------------------------------------------------------------------------------------ this one


def this_cpu(memory: int | None = None, *, measure: bool = True) -> Machine:
    """This machine's CPU: memory that is free, rates as NumPy reaches them in a twentieth of a second."""
    rate, bandwidth = _rates() if measure else (math.inf, math.inf)
    half = multiplies_bfloat16()
    return Machine(
        name="this CPU",
        kind="cpu",
        memory=available_memory() if memory is None else memory,
        rate=rate * (4 if half else 1),  # what AVX-512 bf16 reached over float32 where it was measured (docs/log.md)
        rate32=rate,
        bandwidth=bandwidth,
        bfloat16=half,
    )


def _rates() -> tuple[float, float]:
    """Floating-point operations of a float32 product, and bytes of a copy, in a second."""
    import numpy as np

    left, right = np.ones((256, 1024), np.float32), np.ones((1024, 1024), np.float32)
    source, target = np.ones(1 << 23, np.float32), np.empty(1 << 23, np.float32)
    rate = 2 * 256 * 1024 * 1024 / _best(lambda: left @ right)
    return rate, 2 * source.nbytes / _best(lambda: np.copyto(target, source))


def _best(work: Callable[[], object], repeats: int = 4) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Does this CPU multiply bfloat16 in hardware (AVX-512 bf16 or AMX)? Without /proc: no."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", text) is not None


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: free memory, and what its container (cgroup v1 or v2) leaves, whichever is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    room = container_room(root)
    return free if room is None else max(0, min(free, room))


def container_room(root: Path = Path("/")) -> int | None:
    """Limit less use of the control group that this process is in and of those above it; None without a limit.

    Pages of files (`inactive_file`) count as use there and are given back when memory is short, so they are room.
    """
    base = root / "sys/fs/cgroup"
    found: list[int] = []
    for line in _lines(root / "proc/self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if controllers == "":  # version 2
            home, limit, use, cache = base, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            home, limit, use, cache = (
                base / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = home / path.lstrip("/")
        # inside a container the path of the host does not exist: the container's own root is the group then
        while True:
            room = _room(group / limit, group / use, group / "memory.stat", cache)
            if room is not None:
                found.append(room)
            if group == home or home not in group.parents:
                break
            group = group.parent
    return min(found) if found else None


def _room(limit: Path, use: Path, stat: Path, cache: str) -> int | None:
    words = _lines(limit)
    if not words or not words[0].isdigit() or int(words[0]) >= 1 << 60:  # "max", or v1's way of saying it
        return None
    used = _lines(use)
    if not used or not used[0].isdigit():
        return None
    pages = [line.split()[1] for line in _lines(stat) if line.startswith(cache + " ")]
    return int(words[0]) - int(used[0]) + (int(pages[0]) if pages else 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or no such controller
        return []
