"""The exception tree: every mistake that a user can make ends in one of these, with the four things they need to know.

A `TrimtabError` prints as

    what went wrong
      where: file:line: key
      why:   why it cannot work
      do:    what to do about it

The command line catches `TrimtabError` only, prints it without a traceback and exits with `exit_code`. Anything else that
escapes is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


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
