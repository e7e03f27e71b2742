"""`trimtab prove`: what the algorithms are said to do, measured where the right answer is known exactly (docs/proofs.md).

    items   file                                                                        takes
    1, 2    gradients.py    expected gradients by enumeration; KL as value and as loss  a second
    1, 2    steps.py        the same through a file's keys and the loop's reduction     a second
    3, 4    optima.py       where preference losses rest; the frontier                  a dozen seconds
    5, 6    convergence.py  whole runs on enumerable problems; runs that must fail      minutes (`--full`)

Only the last uses the pipeline, and only when it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from trimtab.proofs.claims import Claim, table

__all__ = ["Claim", "prove", "table"]


def prove(*, full: bool = False, say: Callable[[str], None] = print) -> list[Claim]:
    """Measure every claim, in the order of docs/proofs.md.

    Args:
        full: items 5 and 6 too.
        say: is told what has been done.
    """
    from trimtab.proofs.gradients import gradients, kl
    from trimtab.proofs.optima import frontier, preferences

    items: list[Callable[[], list[Claim]]] = [gradients, kl, preferences, frontier]
    if full:
        from trimtab.proofs.convergence import controls, convergence

        items += [lambda: convergence(say), lambda: controls(say)]
    found: list[Claim] = []
    for number, item in enumerate(items, 1):
        started = time.monotonic()
        found += item()
        say(f"item {number}: {time.monotonic() - started:.1f} s")
    return found
