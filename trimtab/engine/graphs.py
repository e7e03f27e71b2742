"""Decoding steps recorded once and replayed: on a GPU, starting the hundreds of kernels of a small step takes longer than running them.

A CUDA graph repeats the same kernels on the same addresses, so it fits one number of rows and one number of columns of the cache. Steps
are therefore filled up to a few sizes: rows to the next power of two, columns to the next multiple of `COLUMNS`. What stands in the
filled rows and columns is computed and not read. A size that comes back is recorded; its first replay is held against the step itself,
and if they differ, or recording fails, nothing is replayed and `why` says so.

Shapes: b live rows, r of a recorded step, d hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], Tensor]
"""Tokens `[b]`, lengths `[b]`, how many columns of the cache are seen -> hidden states `[b d]`. What else it touches stays in its place."""
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""What repeats a function's kernels, and gives back the tensor that they write."""

COLUMNS = 64
AFTER = 4
"""Times that a size has come before it is recorded: recording costs about two steps."""
TOLERANCE = 2e-2
"""Of a replay against the step itself, relative to the largest number: the same kernels, so far more than they differ."""


class Replays:
    """Recordings of one decoder's step, by size. The step is given at each call: held here it would keep its decoder's cache alive.

    Args:
        slots: most rows.
        capacity: most columns.
        record: `cuda_record()` on a GPU.

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
        columns = min(-(-width // COLUMNS) * COLUMNS, self._capacity)
        size = (rows, columns)
        self._met[size] += 1
        if self.why or (size not in self._recorded and self._met[size] <= AFTER):
            return step(tokens, lengths, width)
        self._tokens[:b], self._lengths[:b] = tokens, lengths
        if size not in self._recorded:
            self._make(step, rows, columns)
            if self.why:
                return step(tokens, lengths, width)
        # a copy: the next replay writes over it
        return self._recorded[size]()[:b].clone()

    def _make(self, step: Step, rows: int, columns: int) -> None:
        """Record a size and try it. A step may be repeated: it writes the same keys and values in the same places."""

        def run() -> Tensor:
            return step(self._tokens[:rows], self._lengths[:rows], columns)

        try:
            want = run()
            replay = self._record(run)
            got = replay()
        except RuntimeError as error:
            self.why = f"recording failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            return
        if not float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max()):
            self.why = f"a recorded step of {rows} rows and {columns} columns gave other hidden states"
            return
        self._recorded[rows, columns] = replay


def cuda_record() -> Record:
    """CUDA graphs that share their memory: no two of them run at a time."""
    pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return record
