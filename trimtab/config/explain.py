"""A resolved config shown: as a plain dict for the run folder, as rows for a reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.config.keys import KEYS
from trimtab.config.stages import MODELS, StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainRow:
    """One line of `trimtab config FILE`: the key, its resolved value, where it came from, what becomes of it."""

    key: str
    value: Any
    origin: str
    state: str


def dump_resolved(config: StageConfig) -> dict[str, Any]:
    """Every value as JSON types; secrets become null. `load` of it gives the same values again."""
    values = config.model_dump(mode="json")
    return {name: None if KEYS[name].secret else value for name, value in values.items()}


def explain(config: StageConfig) -> list[ExplainRow]:
    """What was written, in the file's order, then every default; what is not acted on with its reason."""
    values = config.model_dump()
    kind = next(name for name, model in MODELS.items() if type(config) is model)
    rows: list[ExplainRow] = []
    for name in [*config.given, *(name for name in values if name not in config.given)]:
        row = KEYS[name]
        value = values.get(name, config.given.get(name))
        shown = "***" if row.secret and value is not None else value
        state: str = row.state
        if state in ("ignored", "removed"):
            state = f"{state}: {row.help}"
        elif state == "refused":
            state = "at its off value"
        elif state == "alias":
            state = f"alias of {row.instead}"
        elif kind not in row.stages:
            state = "not read without do_train" if kind == "infer" else f"not read by stage {kind}"
        rows.append(ExplainRow(key=name, value=shown, origin=config.origin(name), state=state))
    return rows
