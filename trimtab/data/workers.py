"""Encoding in several processes (`preprocessing_num_workers`): the same rows in the same order, sooner.

A worker is `python -m trimtab.data.workers`, asked over its pipes. Unlike a pool of `multiprocessing` it never imports the
program that started us, so a script without a `__main__` guard, or a notebook, is no danger on any system.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

from trimtab.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
CHUNK = 256


def mapped(function: Callable[..., R], items: Sequence[T], shared: tuple[Any, ...], workers: int) -> Iterator[R]:
    """`function(item, *shared)` for every item, in order.

    Args:
        function: a function of a module, which each worker imports.
        shared: sent to each worker once.

    Raises:
        DataError: a worker died.
    """
    started = [_Worker(function, shared) for _ in range(workers)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in started:
        free.put(worker)

    def ask(chunk: Sequence[T]) -> list[R]:
        worker = free.get()
        try:
            return worker.ask(chunk)
        finally:
            free.put(worker)

    try:
        with ThreadPoolExecutor(workers) as threads:
            for results in threads.map(ask, [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]):
                yield from results
    finally:
        for worker in started:
            worker.stop()


class _Worker:
    def __init__(self, function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimtab.data.workers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )
        self._send((function, shared))

    def ask(self, chunk: Sequence[Any]) -> list[Any]:
        assert self.process.stdout is not None
        try:
            self._send(chunk)
            results, error = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError) as lost:
            raise DataError(
                f"a process that encodes rows has ended (exit code {self.process.wait()})",
                where="preprocessing_num_workers",
                why="often there was not enough memory for so many",
                remedy="lower preprocessing_num_workers, or leave it out",
            ) from lost
        if error is not None:
            raise error
        return list(results)

    def stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        pickle.dump(value, self.process.stdin)
        self.process.stdin.flush()


def main() -> None:
    """Answer chunks from stdin until it closes."""
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not get among the answers
    function, shared = pickle.load(source)
    while True:
        try:
            chunk = pickle.load(source)
        except EOFError:
            return
        results, failed = [], None
        try:
            results = [function(item, *shared) for item in chunk]
        except Exception as error:  # handed to the one who asked
            failed = error
        pickle.dump((results, failed), answers)
        answers.flush()


if __name__ == "__main__":
    main()
