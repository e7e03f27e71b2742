"""The exception tree: every mistake that a user can make ends in one of these, with the four things they need to know.

A `TrimtabError` prints as

    what went wrong
      where: file:line: key
      why:   why it cannot work
      do:    what to do about it

The command line catches `TrimtabError` only, prints it without a traceback and exits with `exit_code`. What the machine refuses
(a file, the disk, memory) becomes one in `typed`, at the doors: `run_exp`, `ChatModel`, the command line. Anything else that
escapes is a fault of ours and keeps its traceback. docs/errors.md lists every message (`make errors`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class TrimtabError(Exception):
    """Base of every error that trimtab raises on purpose.

    Args:
        what: one sentence, naming the offending value.
        where: `file:line: key`, a path, or a data row; "" when there is no place to point at.
        why: why it cannot work.
        remedy: what the reader can do now.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where: ", self.where), ("why:   ", self.why), ("do:    ", self.remedy)):
            if text:
                lines.append(f"  {label}{text}")
        return "\n".join(lines)


class ConfigError(TrimtabError):
    """A key, a value or a combination of values in a config file or on the command line."""


class DataError(TrimtabError):
    """A data set, a file of it, or one of its rows."""


class TemplateError(DataError):
    """A chat template that does not exist or does not fit the tokenizer."""


class ModelError(TrimtabError):
    """A base model that cannot be found, read or used."""


class AdapterError(ModelError):
    """An adapter or value head that does not fit the base model."""


class RewardError(TrimtabError):
    """A reward that failed or answered nonsense."""


class RunError(TrimtabError):
    """A run folder: in use, unwritable, not resumable, or a run of zero steps."""


class NumericsError(TrimtabError):
    """A loss or gradient norm that is not finite; raised before the optimizer step.

    Attributes:
        rows: the data rows that it comes from, as `file:number`, where they are known.
    """

    def __init__(
        self, what: str, *, where: str = "", why: str = "", remedy: str = "", rows: Sequence[str] = ()
    ) -> None:
        super().__init__(what, where=where, why=why, remedy=remedy)
        self.rows = tuple(rows)


class MachineError(TrimtabError):
    """What the machine refuses: a file that may not be read or written, a full disk, too little memory."""


@contextmanager
def typed() -> Iterator[None]:
    """Raise what the machine refuses inside the block as a `MachineError`; everything else passes as it is."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output has gone: no fault
        raise
    except OSError as error:
        if error.errno is None and error.filename is None:  # raised by a library in words of its own: not the machine's
            raise
        raise _refused(error) from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or out_of_memory(error)):
            raise
        raise MachineError(
            "out of memory",
            why=(str(error).strip().splitlines() or ["the system gave no more"])[0][:300],
            remedy="lower micro_batch_tokens (no effect on results), cutoff_len, max_new_tokens or lora_rank, set "
            "gradient_checkpointing: true, or take a smaller model; a run goes on with --resume",
        ) from error


def _refused(error: OSError) -> MachineError:
    name = error.filename or error.filename2
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return MachineError(
        "the disk is full" if full else f"the system refuses: {error.strerror or error}",
        where=str(name) if name is not None else "",
        why="nothing more can be written" if full else "this user may not do that there" if denied else str(error),
        remedy="free some space, then run again (a training run with --resume)"
        if full
        else "check the path and its permissions, then run again",
    )


def out_of_memory(error: RuntimeError) -> bool:
    """By name and words: this floor knows no torch."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
