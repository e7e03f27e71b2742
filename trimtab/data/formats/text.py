"""Plain text, one document a row, for stage pt. The column is `text`, or what the entry names as `text` or `prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.data.dropped import Dropped
from trimtab.data.formats.layout import Layout, UnusableCell, as_text
from trimtab.types import Example, Origin


def read(row: Mapping[str, Any], layout: Layout, origin: Origin) -> Example | Dropped:
    """One row as an example, or why not."""
    name = layout.columns.get("text") or layout.columns.get("prompt") or "text"
    try:
        text = as_text(row.get(name), name)
    except UnusableCell as error:
        return Dropped(origin=origin, reason=error.reason, detail=error.detail)
    if not text.strip():
        detail = "" if name in row else f"no column {name!r}; it has {', '.join(row)}"
        return Dropped(origin=origin, reason="empty text", detail=detail)
    return Example(origin=origin, text=text, columns=row)
