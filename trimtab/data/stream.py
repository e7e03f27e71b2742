"""`streaming`: rows are read, shuffled and encoded as they are needed; the set is never in memory as a whole.

Examples pass through a buffer of `buffer_size`: each new one takes the place of a drawn one, so a row moves about that far
from its place in the file. When the files end they begin again, in another order. What comes next is a function of the
seed and of how many examples have been drawn, so a checkpoint holds two numbers and a resumed run draws the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from trimtab.data import info
from trimtab.data.dropped import Dropped
from trimtab.data.formats import FORMATS
from trimtab.data.order import epoch_order
from trimtab.errors import DataError
from trimtab.types import Example, Origin

STREAM = 2**33  # "epochs" of their own: the orders of streams repeat no other
SHOWN = 3

Item = tuple[info.DatasetSpec, Origin, Any]


class RowStream:
    """The training rows of a stage, without end.

    Attributes:
        drawn: examples that have been drawn, in all passes.
        inside: rows already taken of the example drawn last (a long text has several).
        complaints: lines about rows that could not be used, to be said once; the first few of each reason.
    """

    def __init__(
        self,
        specs: Sequence[info.DatasetSpec],
        encode: Any,
        *,
        seed: int,
        buffer_size: int,
        max_samples: int | None = None,
        skip: int = 0,
    ) -> None:
        """
        Args:
            encode: an example to `[(row, tokens lost), ...]` or a `Dropped`.
            max_samples: most rows of each set.
            skip: rows at the beginning that are held out.
        """
        self.specs, self.encode, self.seed, self.buffer_size = specs, encode, seed, buffer_size
        self.max_samples, self.skip = max_samples, skip
        self.complaints: list[str] = []
        self.dropped: Counter[str] = Counter()
        self.seek({"drawn": 0, "inside": 0})

    def take(self, count: int) -> tuple[list[Any], list[Example]]:
        """The next rows and the example of each.

        Raises:
            DataError: a whole pass without a row that can be used.
        """
        rows: list[Any] = []
        examples: list[Example] = []
        while len(rows) < count:
            if self.inside >= len(self.pending):
                self._draw()
                continue
            rows.append(self.pending[self.inside])
            examples.append(self.example)
            self.inside += 1
        return rows, examples

    def state(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"drawn": self.drawn, "inside": self.inside}

    def seek(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was: what lies before is read again, but not encoded."""
        self.source = self._shuffled()
        self.drawn, self.inside, self.since_last = 0, 0, 0
        self.pending: list[Any] = []
        self.example: Any = None
        if state["drawn"]:
            for _ in range(state["drawn"] - 1):
                next(self.source)
            self.drawn = state["drawn"] - 1
            self.since_last = 1  # this pass has been looked at before
            self._draw()
            self.inside = state["inside"]

    def _draw(self) -> None:
        """The rows of the next example; none if it cannot be used."""
        item = next(self.source)
        self.drawn += 1
        self.inside, self.pending = 0, []
        if item is None:  # the files ended
            if not self.since_last:
                raise DataError(
                    "no rows left: a whole pass over the data has given none that can be used",
                    where="streaming",
                    why="; ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
                    or "the files are empty",
                    remedy="`trimtab data FILE` with streaming: false shows why",
                )
            self.since_last = 0
            return
        spec, origin, value = item
        found = read(spec, origin, value)
        encoded = found if isinstance(found, Dropped) else self.encode(found)
        if isinstance(encoded, Dropped):
            self.dropped[encoded.reason] += 1
            if self.dropped[encoded.reason] <= SHOWN:
                self.complaints.append(f"dropped: {encoded}")
            return
        self.pending, self.example = [row for row, _ in encoded], found
        self.since_last += len(self.pending)

    def _shuffled(self) -> Iterator[Item | None]:
        """The items of every pass in its order, and None at the end of each."""
        number = 0
        while True:
            items = islice(items_of(self.specs, self.max_samples), self.skip, None)
            yield from shuffled(items, self.buffer_size, self.seed, STREAM + number)
            yield None
            number += 1


def items_of(specs: Iterable[info.DatasetSpec], max_samples: int | None) -> Iterator[Item]:
    """Every row of the sets, one set after the other."""
    for spec in specs:
        for origin, value in islice(info.rows(spec), max_samples):
            yield spec, origin, value


def read(spec: info.DatasetSpec, origin: Origin, value: Any) -> Example | Dropped:
    """A row as an example, or why not."""
    if not isinstance(value, Mapping):
        return Dropped(origin=origin, reason="not an object", detail=str(value)[:60])
    found: Example | Dropped = FORMATS.load(spec.formatting)(value, spec.layout, origin)
    return found


def shuffled(items: Iterator[Any], size: int, seed: int, number: int) -> Iterator[Any]:
    """The items in an order drawn through a buffer; with a buffer of 1, or of all of them, in order or fully shuffled."""
    buffer = list(islice(items, size))
    raw = np.random.Philox(key=[seed % 2**64, number])
    for item in items:
        place = int(raw.random_raw()) % len(buffer)
        yield buffer[place]
        buffer[place] = item
    yield from (buffer[i] for i in epoch_order(len(buffer), seed, number + 2**32))
