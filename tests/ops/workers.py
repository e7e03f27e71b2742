"""Several workers in threads of one process: `reduce` waits for all of them and adds what each brings."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from torch import Tensor

from trimtab.ops.masked import Reduce


def together(*works: Callable[[Reduce], Tensor]) -> list[Tensor]:
    """What each work returns, all running at once."""
    barrier, brought = Barrier(len(works), timeout=30), [None] * len(works)

    def run(i: int) -> Tensor:
        def reduce(total: Tensor) -> Tensor:
            brought[i] = total  # type: ignore[call-overload]
            barrier.wait()
            found: Tensor = sum(brought)  # type: ignore[arg-type, assignment]
            barrier.wait()
            return found

        try:
            return works[i](reduce)
        except BaseException:
            barrier.abort()  # the others must not wait for one that is gone
            raise

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, range(len(works))))
