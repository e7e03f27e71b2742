"""The process that runs statements: reads requests from stdin, answers on stdout, may be killed at any moment.

Requests and answers are `marshal` values behind a length of four bytes; both ends are the same Python. It ends when its input does,
so no worker outlives its trainer.
"""

from __future__ import annotations

import marshal
import os
import struct
import sys
from typing import Any, BinaryIO

from trimtab.sql.execute import Limits, Reader

_HEAD = struct.Struct("<I")


def write_message(stream: BinaryIO, value: Any) -> None:
    body = marshal.dumps(value)
    stream.write(_HEAD.pack(len(body)) + body)
    stream.flush()


def read_message(stream: BinaryIO) -> Any:
    """The next value; EOFError when the other end is gone."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError
    (size,) = _HEAD.unpack(head)
    body = stream.read(size)
    if len(body) < size:
        raise EOFError
    return marshal.loads(body)


def _confine(limits: Limits) -> None:
    """Memory and files of this process, where the system knows such limits."""
    try:
        import resource
    except ImportError:  # Windows: the step and length limits, SQLite's heap limit and the kill remain
        return
    room = (limits.memory_mb + 512) * 2**20
    for name, value in (("RLIMIT_AS", room), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError, AttributeError):  # a lower limit of the user's own, or a system without this one
            continue


def _cpu_clock(seconds: float) -> None:
    """Kill this process after so much CPU time; 0 stops the clock. The signal's default action works inside C code, too."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Serve until the input ends."""
    os.environ["TZ"] = "UTC"
    import time

    if hasattr(time, "tzset"):
        time.tzset()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    limits = Limits(**read_message(source))
    _confine(limits)
    reader = Reader(limits)
    while True:
        try:
            statement, paths, dialect, quoted_values, backwards = read_message(source)
        except EOFError:
            break
        if dialect != "sqlite" or any("://" in path for path in paths):
            import sqlglot  # noqa: F401  # its import is not the statement's time
        if any("://" in path for path in paths):
            import psycopg  # noqa: F401
        outcomes = []
        for path in paths:
            _cpu_clock(limits.seconds)
            found = reader.run(statement, path, dialect, quoted_values=quoted_values, backwards=backwards)
            _cpu_clock(0)
            outcomes.append((found.columns, found.rows, found.error, found.message, found.steps, found.broken))
            if found.error is not None:
                break
        write_message(sink, outcomes)
    reader.close()


if __name__ == "__main__":
    main()
