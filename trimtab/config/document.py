"""The reference page of all keys, written from the table: `python -m trimtab.config.document [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimtab.config.keys import KEYS, REFUSED_VALUES, Key
from trimtab.config.stages import EVERYWHERE, TRAINING

PAGE = Path("docs/configuration.md")

_HEAD = """\
# Configuration

One flat file of `key: value` lines per stage, YAML or JSON, in the dialect of LLaMA-Factory. This page is written from the
key table (`python -m trimtab.config.document`); a test keeps it current.

- `trimtab train FILE key=value ...`: words after the file win over it. `trimtab config FILE` shows every resolved value and
  where it came from.
- A file with `do_train: true` trains its `stage`; one without it is for chat, predict and export.
- Relative paths are taken from the working directory.
- `a, b` and `[a, b]` are the same list; `1e-4` is a number; null leaves a key at its default.
- A key is **acted on**, an **alias** of such a key, **ignored** (it cannot change weights or results; a line at the start says
  so), **refused** (its value asks for something else than we do; exit code 2) or unknown (exit code 2, with the nearest name).
"""


def page() -> str:
    """The whole page as markdown."""
    parts = [_HEAD]
    for section in dict.fromkeys(key.section for key in _of("acted on")):
        keys = [key for key in _of("acted on") if key.section == section]
        rows = ((f"`{k.name}`", k.kind, _value(_default(k)), _stages(k), k.help) for k in keys)
        parts.append(f"## {section}\n\n" + _table(("key", "type", "default", "acts in", "what it does"), rows))
    parts.append(
        "## Aliases\n\n"
        + _table(("key", "stands for", "note"), ((f"`{k.name}`", f"`{k.instead}`", k.help) for k in _of("alias")))
    )
    parts.append(
        "## Refused\n\nAccepted at the default (and at null), refused at any other value.\n\n"
        + _table(
            ("key", "default", "why", "instead"),
            ((f"`{k.name}`", _value(k.default), k.help, k.instead) for k in _of("refused")),
        )
        + "\nValues of keys that are acted on, refused with a reason:\n\n"
        + _table(
            ("value", "why", "instead"),
            ((f"`{key}: {value}`", why, instead) for (key, value), (why, instead) in REFUSED_VALUES.items()),
        )
    )
    parts.append(
        "## Ignored\n\nNone of these can change weights or results here.\n\n"
        + _table(("key", "default", "why"), ((f"`{k.name}`", _value(k.default), k.help) for k in _of("ignored")))
    )
    parts.append(
        "## Removed\n\nNo longer keys anywhere; accepted with a line.\n\n"
        + _table(("key", "why it is not missed"), ((f"`{k.name}`", k.help) for k in _of("removed")))
    )
    return "\n".join(parts)


def _of(state: str) -> list[Key]:
    return [key for key in KEYS.values() if key.state == state]


def _default(key: Key) -> Any:
    return {
        "lora_alpha": "2 x lora_rank",
        "kl_coef": "0.05 (0.2 with kl_target; grpo 0.04)",
        "ppo_epochs": "4 (1 without a critic)",
        "group_size": "1 (rloo 4, grpo 8)",
        "kl_placement": "reward (grpo: loss)",
        "kl_estimator": "k1 (grpo: k3)",
    }.get(key.name, key.default)


def _value(value: Any) -> str:
    if value is None or value == () or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _stages(key: Key) -> str:
    if set(key.stages) == set(EVERYWHERE):
        return "all"
    return "training" if set(key.stages) == set(TRAINING) else ", ".join(key.stages)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page(), encoding="utf-8", newline="\n")
    sys.stdout.write(f"wrote {target}\n")
