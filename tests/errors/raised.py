"""Which of the places that can raise have raised since the tests began.

`watch` notes, for every `TrimtabError` that is made, the lines of ours that were being executed. `unraised` compares them with `sites`.
What a child process raises is not seen.
"""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path
from typing import Any

from tests.errors.table import ROOT, Site, sites
from trimtab.errors import TrimtabError

PACKAGE = str(ROOT / "trimtab")
DEEP = 4
"""Frames of ours that are noted: a helper that makes an error of its arguments, and who called it."""

_lines: set[tuple[str, int]] = set()


def watch() -> None:
    """From now on."""
    plain = TrimtabError.__init__

    @wraps(plain)
    def noting(self: TrimtabError, *args: Any, **keys: Any) -> None:
        frame, left = sys._getframe(1), DEEP
        while frame is not None and left:
            file = frame.f_code.co_filename
            if file.startswith(PACKAGE):
                _lines.add((Path(file).relative_to(ROOT).as_posix(), frame.f_lineno))
                left -= 1
            frame = frame.f_back  # type: ignore[assignment]
        plain(self, *args, **keys)

    TrimtabError.__init__ = noting  # type: ignore[method-assign]


def unraised() -> list[Site]:
    """Places that no test has reached."""
    return [s for s in sites() if not any((s.file, line) in _lines for line in range(s.first, s.last + 1))]
