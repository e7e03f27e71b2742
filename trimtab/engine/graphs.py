"""Decoding steps recorded once and replayed: on a GPU, starting the hundreds of kernels of a small step takes longer than running them.

A CUDA graph repeats the same kernels on the same addresses, so it fits one number of rows and one number of columns of the cache. Steps
are therefore filled up to a few sizes, powers of two both. What stands in the filled rows and columns is computed and not read: reading
a cache twice as long costs less than recording twice. A size that comes back is recorded, and held against the step itself; if they
differ, or recording fails, this process replays nothing more and says so once.

Shapes: b live rows, r of a recorded step, d hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], Tensor]
"""Tokens `[b]`, lengths `[b]`, how many columns of the cache are seen -> hidden states `[b d]`. What else it touches stays in its place."""
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Tensor], Tensor]]
"""What repeats a function's kernels, and gives back the tensor that they write; beside it what the function itself gave."""

COLUMNS = 128
"""The fewest columns of a recorded step."""
AFTER = 1
"""Times that a size has come before it is recorded."""
LEFT = 24
"""Columns that must still be free in a size that is recorded: recording and trying costs as much as a few steps."""
MOST = 32
"""Recordings that are kept; the oldest goes first. A graph of a large model takes some megabytes beside torch's count."""
TOLERANCE = 1e-2
"""Mean distance of a replay from the step itself in each row, relative to the row's mean size. The kernels are the same: it is far less."""


class Replays:
    """Recordings of one decoder's step, by size. The step is given at each call: held here it would keep its decoder's cache alive.

    Args:
        slots: most rows.
        capacity: most columns.
        record: what `recorder` gives.

    Attributes:
        why: why steps are not replayed any more; empty while they are.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device, record: Record) -> None:
        self._record, self._capacity = record, capacity
        self._tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self._met: Counter[tuple[int, int]] = Counter()
        self._recorded: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self.why = ""

    def __call__(self, step: Step, tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
        """What `step(tokens, lengths, width)` gives."""
        b = len(tokens)
        rows = min(1 << (b - 1).bit_length(), len(self._tokens))
        columns = min(max(COLUMNS, 1 << (width + LEFT - 1).bit_length()), self._capacity)
        size = (rows, columns)
        self._met[size] += 1
        pays = self._met[size] > AFTER and columns - width >= LEFT
        if self.why or (size not in self._recorded and not pays):
            return step(tokens, lengths, width)
        self._tokens[:b], self._lengths[:b] = tokens, lengths
        if size not in self._recorded and not self._make(step, rows, columns):
            return step(tokens, lengths, width)
        # a copy: the next replay writes over it
        return self._recorded[size]()[:b].clone()

    def _make(self, step: Step, rows: int, columns: int) -> bool:
        """Record a size and try it: a step may be repeated, its keys and values go to the same places.

        Returns:
            May it be replayed? If not, `why` says why not.
        """
        own = self._tokens[:rows].clone()
        try:
            replay, want = self._record(lambda: step(self._tokens[:rows], self._lengths[:rows], columns))
            want = want.clone()
            # other tokens first: a recording that has its input built in would go on giving what it gave
            self._tokens[:rows] = (own == 0).long()
            other = replay().clone()
            self._tokens[:rows] = own
            if not _near(replay(), want):
                self.why = f"a recorded step of {rows} rows and {columns} columns gave other hidden states"
            elif torch.equal(other, want):
                self.why = f"a recorded step of {rows} rows and {columns} columns does not read its tokens"
        except RuntimeError as error:
            self.why = f"recording failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        self._tokens[:rows] = own
        if self.why:
            return False
        if len(self._recorded) >= MOST:
            self._recorded.pop(next(iter(self._recorded)))
        self._recorded[rows, columns] = replay
        return True


def _near(found: Tensor, want: Tensor) -> bool:
    away = (found - want).float().abs().mean(-1)
    return bool((away <= TOLERANCE * want.float().abs().mean(-1)).all())


# ------------------------------------------------------------------------------------------------------------- on a GPU

_refused: list[str] = []


def refuse(why: str) -> None:
    """Record nothing more in this process: a capture that has failed leaves the driver's state to be doubted."""
    _refused.append(why)


def recorder(device: torch.device) -> Record | None:
    """What records steps on this device; None where there is nothing to gain, or a recording has failed before."""
    if device.type != "cuda" or _refused:
        return None
    # graphs share their memory: no two of them run at a time
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], Tensor]:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            first = run()  # libraries set up what they need at their first call on a stream, which cannot be recorded
            stream.synchronize()
            # thread_local: a reward function's own thread may use the GPU meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = run()
            except BaseException:
                _abandon(graph, device, pool)
                raise
            try:
                graph.capture_end()
            except RuntimeError:
                _close(device, pool)
                raise
        here.wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay, first

    return record


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int]) -> None:
    """End a capture in which something failed."""
    try:
        graph.capture_end()
    except RuntimeError:
        _close(device, pool)


def _close(device: torch.device, pool: tuple[int, int]) -> None:
    """Tell torch's allocator that a broken capture is over; it would refuse `empty_cache` from here on."""
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda._utils._get_device_index(device, optional=True), pool)
