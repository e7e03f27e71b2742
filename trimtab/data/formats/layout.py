"""Where a data set keeps what: the columns and tags of its `dataset_info.json` entry, and how cells become text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.types import Message

COLUMNS = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    "chosen",
    "rejected",
    "ranked",
    "margin",
    "kto_tag",
    "score",
    "text",
)
TAGS = (
    "role_tag",
    "content_tag",
    "user_tag",
    "assistant_tag",
    "observation_tag",
    "function_tag",
    "system_tag",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the entry of a data set says about its rows.

    Attributes:
        ranking: the rows are preferences (chosen, rejected).
        columns: names of columns that differ from the format's defaults; a default stays unless named here.
        tags: the same for role and content names inside messages.
    """

    ranking: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def cell(self, row: Mapping[str, Any], column: str, default: str | None = None) -> Any:
        """The value of a column by its meaning, or None; without a default the entry must name the column."""
        name = self.columns.get(column, default)
        return None if name is None else row.get(name)


class UnusableCell(Exception):
    """A cell that cannot be read as what it should be; a reader turns it into `Dropped`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def as_text(value: Any, column: str) -> str:
    """A cell as text: nothing is "", numbers are written out, lists and objects are refused."""
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UnusableCell(
                f"{column} holds half a character", "a lone surrogate, which no tokenizer reads"
            ) from None
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableCell(f"{column} is not text", f"it is {value}, an empty cell of a table perhaps")
    if isinstance(value, bool | int | float):
        return str(value)
    raise UnusableCell(f"{column} is not text", f"it is a {type(value).__name__}")


def as_json(value: Any, column: str) -> Any:
    """A list or object; csv cells hold it written as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise UnusableCell(f"{column} is text, but not JSON", value[:60]) from None


def as_flag(value: Any, column: str) -> bool | None:
    """A yes/no cell; None when empty."""
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return value
    known = {"true": True, "1": True, "false": False, "0": False}
    flag = known.get(str(value).strip().lower())
    if flag is None:
        raise UnusableCell(f"{column} is neither true nor false", repr(value)[:60])
    return flag


def as_number(value: Any, column: str) -> float | None:
    """A cell as a finite number; None when empty."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UnusableCell(f"{column} is not a number", repr(value)[:60]) from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise UnusableCell(f"{column} is not a number", repr(value)[:60])
    return number


def as_ranked(value: Any) -> list[Any]:
    """The cells of a ranking, from best to worst."""
    listed = as_json(value, "ranked")
    if not isinstance(listed, list | tuple):
        raise UnusableCell("ranked is not a list of answers", f"it is {str(listed)[:60]}")
    if len(listed) < 2:
        raise UnusableCell("fewer than two ranked answers", f"there are {len(listed)}")
    return list(listed)


def as_tools(value: Any) -> str | None:
    """The tools column as the row writes it: text as it is, anything else as JSON."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def system_message(text: str) -> tuple[Message, ...]:
    """The system text as the head of a dialogue; none when it is empty."""
    return (Message(role="system", content=text),) if text else ()
