"""The most memory that each phase of a run has held, to be set beside what the plan said (`trimtab/plan`)."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peaks by phase: allocated by torch on CUDA; else resident in this process beyond what it held when this object was made.

    Linux keeps the high-water mark itself, and lets a process reset its own; elsewhere memory is sampled five times a second.
    Phases may nest: the innermost takes the mark.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, int] = {}
        self.base = 0 if device.type == "cuda" else resident()
        self._stack: list[str] = []
        self._highest = 0
        self._sampled = 0
        self._exact = device.type == "cuda" or _reset_mark()
        self._stop = threading.Event()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is held until the block ends counts for this phase."""
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    @contextmanager
    def watch(self) -> Iterator[PeakMemory]:
        """Sample in the background while the block runs, where the system keeps no mark of its own."""
        thread = None if self._exact else threading.Thread(target=self._sample, daemon=True)
        if thread is not None:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            if thread is not None:
                thread.join()

    def read(self) -> int:
        """The highest of all so far, in bytes, the part before this object included (on a CPU)."""
        self._settle()
        return self._highest

    def above(self) -> dict[str, int]:
        """Peaks by phase beyond what stood at the start."""
        self._settle()
        return {name: max(0, value - self.base) for name, value in self.phases.items()}

    def _settle(self) -> None:
        """Credit the mark since the last call to the phase that is under way, and reset it."""
        if self.device.type == "cuda":
            mark = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._exact:
            mark = max(_mark(), resident())
            _reset_mark()
        else:
            mark, self._sampled = max(self._sampled, resident()), 0
        self._highest = max(self._highest, mark)
        if self._stack:
            name = self._stack[-1]
            self.phases[name] = max(self.phases.get(name, 0), mark)

    def _sample(self) -> None:
        while not self._stop.wait(0.2):
            self._sampled = max(self._sampled, resident())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


def _mark() -> int:
    """Linux: the most that was resident since the last reset."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _reset_mark() -> bool:
    """Linux (proc(5), clear_refs): set the high-water mark to what is resident now. False where that is not possible."""
    try:
        _RESET.write_text("5", encoding="utf-8")
        return _mark() > 0
    except OSError:
        return False
