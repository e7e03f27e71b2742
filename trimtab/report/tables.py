"""What runs gained and what they cost, from their folders alone: the closing table, and the summary of one run.

`stage_rows` and `summary` give plain values; `stage_table` and `summarise` draw them with rich. Held-out figures are
those of the evaluations before training (step 0; unknown when that was not asked for) and after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.diagnose import Finding, Point, Run, diagnose
from trimtab.errors import RunError
from trimtab.rundir import RunFolder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How a figure is called and read: is more better, less, or neither; is it a share, shown in per cent."""

    label: str
    better: Literal["more", "less", "neither"] = "neither"
    share: bool = False


# In the order in which they are shown.
HELD_OUT: dict[str, Measure] = {
    "eval/loss": Measure(label="loss", better="less"),
    "eval/accuracy": Measure(label="accuracy", better="more", share=True),
    "eval/margin": Measure(label="margin", better="more"),
    "eval/reward_greedy": Measure(label="reward, greedy", better="more"),
    "eval/reward_sampled": Measure(label="reward, sampled", better="more"),
    "eval/exact_match": Measure(label="exact match", better="more", share=True),
    "eval/sql_match": Measure(label="SQL match", better="more", share=True),
    "eval/kl": Measure(label="KL (nat/answer)"),
    "eval/entropy": Measure(label="entropy (nat/token)"),
    "eval/length": Measure(label="length (tokens)"),
    "eval/finished_rate": Measure(label="finished", better="more", share=True),
}
TRAINING: dict[str, Measure] = {
    "loss": Measure(label="loss", better="less"),
    "accuracy": Measure(label="accuracy", better="more", share=True),
    "reward/mean": Measure(label="reward", better="more"),
    "kl/k1_sequence": Measure(label="KL (nat/answer)"),
    "entropy": Measure(label="entropy (nat/token)"),
    "length/mean": Measure(label="length (tokens)"),
    "finished_rate": Measure(label="finished", better="more", share=True),
    "clip_fraction": Measure(label="clip fraction", share=True),
    "explained_variance": Measure(label="explained variance", better="more"),
    "value_loss": Measure(label="value loss", better="less"),
}
# The stages that are not written as their name in capitals.
_STAGE_NAMES = {
    "simpo": "SimPO",
    "reinforce_pp": "REINFORCE++",
    "remax": "ReMax",
    "online_dpo": "online DPO",
}
_NOT_KNOWN = "-"


# ------------------------------------------------------------------------------------------------------- closing table


def stage_rows(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One row per run folder, in the order given, as plain values.

    Keys: folder, stage, status (as `run_status`), steps, metrics, seconds, tokens, tokens_per_second,
    peak_memory_bytes; what was not measured is None. `metrics` maps a held-out quantity to {"before", "after"};
    before is None when nothing was evaluated at step 0.

    Raises:
        RunError: a folder that holds no run.
    """
    rows = []
    for path in folders:
        folder = _open(path)
        manifest = folder.manifest()
        measured = manifest.get("measured") or {}
        evals = folder.metrics("eval")
        rows.append(
            {
                "folder": str(folder.path),
                "stage": manifest.get("stage") or folder.config().get("stage"),
                "status": run_status(folder),
                "steps": manifest.get("steps"),
                "metrics": _before_and_after(evals),
                **{
                    name: measured.get(name) for name in ("seconds", "tokens", "tokens_per_second", "peak_memory_bytes")
                },
            }
        )
    return rows


def stage_table(folders: Iterable[str | Path]) -> Table:
    """The table that closes a pipeline: each stage with its held-out figures before and after, and its cost."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="What each stage gained, on held-out rows",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("held-out", no_wrap=True)
    for heading in ("before", "after", "time", "tokens/s", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in stage_rows(folders):
        name = _STAGE_NAMES.get(row["stage"], str(row["stage"]).upper())
        done = row["status"] == "finished"
        cost = [
            _duration(row["seconds"]),
            _whole(row["tokens_per_second"]),
            _memory(row["peak_memory_bytes"]),
        ]
        figures = list(row["metrics"].items()) or [("", {"before": None, "after": None})]
        for number, (quantity, values) in enumerate(figures):
            measure = HELD_OUT.get(quantity, Measure(label=quantity or "not evaluated"))
            first = number == 0
            table.add_row(
                name if first else "",
                measure.label,
                _figure(values["before"], measure),
                _coloured(values["before"], values["after"], measure),
                *(cost if first else [""] * 3),
                end_section=done and number == len(figures) - 1,
            )
        if not done:
            table.add_row("", f"[yellow]{row['status']}[/]", end_section=True)
    return table


# ------------------------------------------------------------------------------------------------------- one run alone


def summary(folder: str | Path) -> dict[str, Any]:
    """The key figures of one run, finished or not, as plain values.

    Keys: folder, stage, status, steps, total_steps, seconds, tokens, model; `held_out` maps a quantity to
    {"first", "last", "best", "best_step"} (best is None where neither direction is better); `training` maps one to
    {"first", "last"}, means over the first and last tenth of its rows; `findings` is a list of `diagnose.Finding`.

    Raises:
        RunError: a folder that holds no run.
    """
    run_folder = _open(folder)
    manifest, config = run_folder.manifest(), run_folder.config()
    rows = run_folder.metrics()
    run = Run(rows=rows, config=config)
    last_row: Mapping[str, Any] = rows[-1] if rows else {}
    used = manifest.get("dtype") or config.get("compute_dtype")
    return {
        "folder": str(run_folder.path),
        "stage": manifest.get("stage") or config.get("stage"),
        "status": run_status(run_folder),
        "model": config.get("model_name_or_path"),
        "steps": last_row.get("step", 0),
        "total_steps": manifest.get("total_steps"),
        "seconds": last_row.get("seconds"),
        "tokens": last_row.get("tokens"),
        "held_out": {name: _ends_and_best(points, m) for name, m in HELD_OUT.items() if (points := run.points(name))},
        "training": {name: _tenths(points) for name in TRAINING if (points := run.points(name))},
        "findings": diagnose(rows, {**config, "compute_dtype": used}),
    }


def summarise(folder: str | Path) -> RenderableType:
    """The summary of one run to print: what it is, its figures from first to last, and what the doctor finds."""
    from rich.console import Group
    from rich.text import Text

    facts = summary(folder)
    stage = _STAGE_NAMES.get(facts["stage"], str(facts["stage"]).upper())
    steps = f"step {facts['steps']}" + (f" of {facts['total_steps']}" if facts["total_steps"] else "")
    line = ", ".join(
        part
        for part in (
            str(facts["status"]),
            steps,
            _duration(facts["seconds"]) if facts["seconds"] is not None else "",
            f"{_whole(facts['tokens'])} tokens" if facts["tokens"] else "",
            str(facts["model"] or ""),
        )
        if part
    )
    parts: list[RenderableType] = [Text.assemble((f"{stage}  {facts['folder']}", "bold"), f"\n{line}")]
    if facts["held_out"]:
        parts.append(_figures_table("held-out", facts["held_out"], HELD_OUT, best=True))
    if facts["training"]:
        parts.append(_figures_table("training", facts["training"], TRAINING, best=False))
    if not facts["held_out"] and not facts["training"]:
        parts.append(Text("no figures yet"))
    parts.append(_findings(facts["findings"]))
    return Group(*parts)


def run_status(folder: RunFolder) -> str:
    """The manifest's status, but "interrupted" for a run that says it is running and that no process holds."""
    status = folder.status() or "unknown"
    return "interrupted" if status == "running" and not folder.in_use() else status


# -------------------------------------------------------------------------------------------------------------- figures


def _open(path: str | Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.has_run():
        raise RunError(
            f"{path} is not a run folder",
            where=str(folder.path.absolute()),
            why="it has neither manifest.json nor config.resolved.json",
            remedy="name the output_dir of a run",
        )
    return folder


def _before_and_after(evals: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    run = Run(rows=evals, config={})
    found: dict[str, dict[str, float | None]] = {}
    for name in HELD_OUT:
        if points := run.points(name):
            step, value = points[0]
            only_before = len(points) == 1 and step == 0
            found[name] = {"before": value if step == 0 else None, "after": None if only_before else points[-1][1]}
    return found


def _ends_and_best(points: Sequence[Point], measure: Measure) -> dict[str, float | int | None]:
    best: Point | None = None
    if measure.better != "neither":
        pick = max if measure.better == "more" else min
        best = pick(points, key=lambda point: point[1])
    return {
        "first": points[0][1],
        "last": points[-1][1],
        "best": best[1] if best else None,
        "best_step": best[0] if best else None,
    }


def _tenths(points: Sequence[Point]) -> dict[str, float]:
    tenth = math.ceil(len(points) / 10)
    first, last = points[:tenth], points[-tenth:]
    return {"first": sum(v for _, v in first) / tenth, "last": sum(v for _, v in last) / tenth}


# -------------------------------------------------------------------------------------------------------------- drawing


def _figures_table(
    heading: str, figures: Mapping[str, Mapping[str, Any]], measures: Mapping[str, Measure], *, best: bool
) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column(heading, no_wrap=True, min_width=24)
    for name in ("first", "last", "best", "at step")[: 4 if best else 2]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in figures.items():
        measure = measures[name]
        cells = [_figure(values["first"], measure), _coloured(values["first"], values["last"], measure)]
        if best:
            cells += [_figure(values["best"], measure), _whole(values["best_step"])]
        table.add_row(measure.label, *cells)
    return table


def _findings(findings: Sequence[Finding]) -> RenderableType:
    from rich.text import Text

    if not findings:
        return Text("the doctor finds nothing wrong\n", style="green")
    colours = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    text = Text()
    for finding in findings:
        text.append(finding.severity, style=colours[finding.severity])
        text.append(f": {finding.message} ({finding.rule})\n  do: {finding.remedy}\n")
    return text


def _coloured(before: float | None, after: float | None, measure: Measure) -> str:
    """`after`, green when it is better than `before` and red when it is worse, as far as the digits shown tell."""
    text = _figure(after, measure)
    if before is None or after is None or measure.better == "neither" or text == _figure(before, measure):
        return text
    return f"[green]{text}[/]" if (after > before) == (measure.better == "more") else f"[red]{text}[/]"


def _figure(value: float | None, measure: Measure) -> str:
    if value is None:
        return _NOT_KNOWN
    if measure.share:
        return f"{100 * value:.1f} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _whole(value: float | None) -> str:
    return _NOT_KNOWN if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _NOT_KNOWN
    if seconds < 1000:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _memory(count: float | None) -> str:
    return _NOT_KNOWN if count is None else f"{count / 2**30:.2f} GiB"
