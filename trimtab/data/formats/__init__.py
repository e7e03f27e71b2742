"""Data formats: how the columns of a row become an `Example`. A format is one file with `read` and one row here."""

from __future__ import annotations

from trimtab.registry import Registry, Row

FORMATS = Registry(
    "data format",
    [
        Row(name="alpaca", target="trimtab.data.formats.alpaca:read", help="instruction, input, output"),
        Row(
            name="sharegpt", target="trimtab.data.formats.sharegpt:read", help="conversations: a list of {from, value}"
        ),
        Row(name="openai", target="trimtab.data.formats.openai:read", help="messages: a list of {role, content}"),
        Row(name="text", target="trimtab.data.formats.text:read", help="plain text, for stage pt"),
    ],
)
