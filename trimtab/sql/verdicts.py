"""What an execution may end in, and what a comparison may say. Everything in `sql` speaks in these values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "format_error",  # no SQL in the answer
    "multi_statement",  # more than one statement
    "write_attempt",  # anything but reading: DML, DDL, PRAGMA, ATTACH, transactions, SELECT INTO, FOR UPDATE
    "parse_error",  # not the language
    "unknown_identifier",  # no such table, column or function
    "exec_error",  # everything else that a database refuses
    "timeout",  # the step budget, or the CPU or wall clock behind it
    "too_many_rows",  # more rows, or more bytes, than are read
    "wrong_columns",  # another number of columns
    "wrong_rows",  # other rows
    "wrong_order",  # the right rows in an order that gold's ORDER BY excludes
    "wrong_multiplicity",  # the right distinct rows, the wrong number of times
    "equal",
    "unverified",  # nothing can be concluded: gold fails or is not deterministic, or both answers are empty
]

Row = tuple[Any, ...]

#: Every verdict, in the order of the waterfall: from the answer that is not even SQL to the one that is right.
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]

#: Verdicts of a prediction that ran to its end with rows that could be compared.
EXECUTED: frozenset[Kind] = frozenset(
    {"wrong_columns", "wrong_rows", "wrong_order", "wrong_multiplicity", "equal", "unverified"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one statement did on one database: rows, or the kind of its failure.

    Attributes:
        error: None when the rows are the answer.
        steps: virtual machine instructions used, rounded up to the progress handler's period (0 on a server).
        broken: the server is what failed, so that nothing is known of the statement and no verdict may come of this.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    error: Kind | None = None
    message: str = ""
    steps: int = 0
    broken: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of one prediction against one gold query.

    Attributes:
        kind: one of `KINDS`; over several instances the first that is neither equal nor unverified, else equal if any is.
        message: one line for a reader: the database's error, the first differing row, or why nothing can be concluded.
        instance: index of the instance that decided it; -1 when it never came to running.
        per_instance: the verdict on each instance that was run, in order. After the deciding one, none is run.
        gold_error: True when the gold query is what failed.
    """

    kind: Kind
    message: str = ""
    instance: int = -1
    per_instance: tuple[Kind, ...] = field(default=())
    gold_error: bool = False

    @property
    def right_shape(self) -> bool:
        """The prediction ran and gave the right number of columns."""
        return self.kind in EXECUTED and self.kind != "wrong_columns"
