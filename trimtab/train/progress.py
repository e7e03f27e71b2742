"""Lines and progress bars on the terminal; quiet bars when it is not one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Lines(Console):
    """A console whose reader may go: training does not end because `| head` has seen enough."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Lines(highlight=False)


def say(line: str) -> None:
    """One line to the user."""
    console.print(line, markup=False, soft_wrap=True)


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; the function it yields takes how far to advance and an optional short text to show at its end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def advance(amount: int = 1, note: str | None = None) -> None:
            progress.advance(task, amount)
            if note is not None:
                progress.update(task, note=note)

        yield advance
