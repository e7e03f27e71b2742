"""Names and the things behind them: an algorithm, a template, a format, a reward, an eval is one file and one row.

A registry is filled where it is defined, with import paths rather than objects, so that listing names costs no import.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One entry: its name, `module:attribute` to import when asked for, one line of help, and other names it answers to."""

    name: str
    target: str
    help: str
    aliases: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import and return what the row names."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


class Registry:
    """An ordered set of rows of one kind, found by name or alias."""

    def __init__(self, kind: str, rows: Iterable[Row]) -> None:
        self.kind = kind
        self._rows = {row.name: row for row in rows}
        self._aliases = {alias: row.name for row in self._rows.values() for alias in row.aliases}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, name: str) -> bool:
        return name in self._rows or name in self._aliases

    def names(self) -> list[str]:
        """All names, aliases not among them, in the order of definition."""
        return list(self._rows)

    def row(self, name: str, *, where: str = "") -> Row:
        """The row called `name`.

        Raises:
            ConfigError: no such name; the message holds the nearest one.
        """
        name = self._aliases.get(name, name)
        if name in self._rows:
            return self._rows[name]
        guess = nearest(name, [*self._rows, *self._aliases])
        raise ConfigError(
            f"unknown {self.kind} {name!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where=where,
            remedy=f"choose one of: {', '.join(self._rows)}",
        )

    def load(self, name: str, *, where: str = "") -> Any:
        """Import and return the thing called `name`."""
        return self.row(name, where=where).load()


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None when none is alike ("did you mean")."""
    close = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return close[0] if close else None
