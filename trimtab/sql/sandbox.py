"""A pool of worker processes that run untrusted SQL. What a statement does to its worker ends in an `Outcome`, never in an exception.

Workers are started as `python -c` with this interpreter, not through multiprocessing: the caller's `__main__` is not imported
again, no guard is needed, and nothing is forked from a process that holds a model. They start when first needed.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from trimtab.sql.execute import Limits
from trimtab.sql.verdicts import Outcome
from trimtab.sql.worker import read_message, write_message


class _Worker:
    """One process, with a thread that kills it when an answer is overdue."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None
        self.deadline: float | None = None
        self.overdue = False
        self.wake = threading.Event()
        self.closed = False
        threading.Thread(target=self._watch, daemon=True, name="sql-watch").start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = dict(
            os.environ, PYTHONPATH=os.pathsep.join(p or str(Path.cwd()) for p in sys.path), PYTHONUTF8="1"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", "from trimtab.sql.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        write_message(cast(BinaryIO, process.stdin), asdict(self.limits))
        return process

    def _watch(self) -> None:
        while not self.closed:
            self.wake.wait()
            self.wake.clear()  # before looking: a deadline that is set after this wakes it again
            while (deadline := self.deadline) is not None and not self.closed:
                process = self.process
                if time.monotonic() > deadline and process is not None:
                    self.overdue = True
                    process.kill()
                    self.deadline = None
                time.sleep(0.05)

    def ask(self, request: tuple[Any, ...]) -> list[Any] | Outcome:
        """The worker's answer, or the outcome that its death means."""
        wall = self.limits.wall_seconds if hasattr(os, "fork") else max(1.0, self.limits.seconds)
        for attempt in (1, 2):
            fresh = self.process is None
            if self.process is None:
                self.process = self._start()
            process = self.process
            self.overdue = False
            # A process that has just been started has its imports before it.
            self.deadline = time.monotonic() + wall * max(1, len(request[1])) + (30 if fresh else 0)
            self.wake.set()
            try:
                write_message(cast(BinaryIO, process.stdin), request)
                answer: list[Any] = read_message(cast(BinaryIO, process.stdout))
                return answer
            except (EOFError, OSError):
                self.deadline = None
                code = process.wait()
                self._drop(process)
                self.process = self._start()  # its imports run while the caller thinks about the verdict
                if self.overdue or code in (-27, -14):  # SIGPROF: the CPU clock; SIGALRM: a server's
                    return Outcome(error="timeout", message=f"more than {self.limits.seconds:g} s")
                if attempt == 1 and not fresh and code in (0, 1, -15):
                    continue  # it was dead before it was asked
                return Outcome(error="exec_error", message=f"the worker ended with {code}")
            finally:
                self.deadline = None
        raise AssertionError("unreachable")

    @staticmethod
    def _drop(process: subprocess.Popen[bytes]) -> None:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what was left to write has no reader any more
                    continue

    def close(self) -> None:
        self.closed = True
        self.deadline = None
        self.wake.set()
        process, self.process = self.process, None
        if process is not None:
            self._drop(process)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Sandbox:
    """Runs statements on databases in worker processes. Safe to call from several threads; a context manager.

    Args:
        workers: processes; they are started when first used.
        limits: see `execute.Limits`.
    """

    def __init__(self, workers: int = 1, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.workers = workers
        self._all = [_Worker(self.limits) for _ in range(workers)]
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._all:
            self._free.put(worker)

    def run(
        self,
        statement: str,
        paths: Sequence[str],
        dialect: str = "sqlite",
        *,
        quoted_values: bool = False,
        backwards: bool = False,
    ) -> list[Outcome]:
        """One statement on each database in turn; the list ends with the first that fails."""
        worker = self._free.get()
        try:
            answer = worker.ask((statement, tuple(map(str, paths)), dialect, quoted_values, backwards))
        finally:
            self._free.put(worker)
        if isinstance(answer, Outcome):
            return [answer]
        return [Outcome(columns=c, rows=r, error=e, message=m, steps=s, broken=b) for c, r, e, m, s, b in answer]

    def map(self, tasks: Sequence[tuple[str, Sequence[str], str]]) -> list[list[Outcome]]:
        """`run` for many (statement, paths, dialect), over all workers, in the order given."""
        if self.workers == 1 or len(tasks) < 2:
            return [self.run(*task) for task in tasks]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda task: self.run(*task), tasks))

    def close(self) -> None:
        for worker in self._all:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
