"""What a reward model's scores of pairs say of it, from `generated_predictions.jsonl` alone: `trimtab rm report`.

| figure | meaning |
|---|---|
| accuracy | share of pairs whose chosen answer scores higher; a tie is an error |
| by margin | the same in five equal parts of the pairs, closest scores first: a model that knows what it does not know errs there |
| by length difference | the same where the chosen answer is longer, equally long, shorter: far apart, it prefers length |
| calibration | probability sigmoid(|r_w - r_l|) of ten bins against how often the model was right; ECE is their mean distance |
| by verdicts | the same for each pair of verdicts, where the pairs were made by execution (`trimtab data prefer`) |
| length correlation | Pearson's r of score with length over all answers |

Which pairs they are stands in `predict_results.json`. Figures go to `rm_report.json`, the picture to
`rm_report.png`, beside the predictions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.files import read_text
from trimtab.errors import DataError
from trimtab.ops.calibration import calibration_bins, calibration_error
from trimtab.ops.moments import correlation
from trimtab.rundir import PREDICT_RESULTS, PREDICTIONS, read_json, replacing, write_json

if TYPE_CHECKING:
    from rich.table import Table

FIGURES, PICTURE = "rm_report.json", "rm_report.png"
PARTS = 5
PAIRS = {
    "held out": "held-out pairs",
    "trained on": "the pairs it was trained on: no measure of how it judges others",
    "unknown": "pairs that it may have been trained on",
}  # by predict_rows of predict_results.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One pair: its two scores; how many tokens each answer has, and what execution said of it, where the file says."""

    chosen: float
    rejected: float
    chosen_tokens: int | None = None
    rejected_tokens: int | None = None
    verdicts: tuple[str, str] | None = None

    @property
    def lead(self) -> float:
        return self.chosen - self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Accuracy of some of the pairs."""

    name: str
    count: int
    accuracy: float | None


def read_pairs(path: Path) -> list[Scored]:
    """The pairs of a file of scores.

    Raises:
        DataError: a file that cannot be read or is no UTF-8, a row without two finite scores, or none at all.
    """
    pairs = []
    try:
        lines = read_text(path).split("\n")  # str.splitlines would also cut inside texts that hold U+2028 and its like
    except OSError as error:
        raise DataError(
            f"cannot read the scores {path.absolute()}",
            where=str(path),
            why=str(error),
            remedy="run trimtab predict with stage: rm first, or name the run folder of a reward model",
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            chosen, rejected = float(row["chosen"]), float(row["rejected"])
            if not (math.isfinite(chosen) and math.isfinite(rejected)):
                raise ValueError("a score is not finite")
        except (ValueError, KeyError, TypeError) as error:
            answers = isinstance(error, KeyError) and "predict" in line
            raise DataError(
                "a line without the two scores of a pair" + (" (these are answers: trimtab eval)" if answers else ""),
                where=f"{path}:{number}",
                why=f"{type(error).__name__}: {error}",
                remedy='each line holds {"chosen": number, "rejected": number}, as trimtab predict writes it for stage: rm',
            ) from error
        lengths = [row.get(name) for name in ("chosen_tokens", "rejected_tokens")]
        known = all(isinstance(n, int) for n in lengths)
        pairs.append(
            Scored(
                chosen=chosen,
                rejected=rejected,
                chosen_tokens=lengths[0] if known else None,
                rejected_tokens=lengths[1] if known else None,
                verdicts=_verdicts(row),
            )
        )
    if not pairs:
        raise DataError(
            "the file holds no scores", where=str(path), why="it is empty", remedy="run trimtab predict again"
        )
    return pairs


def figures(pairs: Sequence[Scored]) -> dict[str, Any]:
    """Every figure of the table above, as plain values."""
    leads = [pair.lead for pair in pairs]
    bins = calibration_bins([1 / (1 + math.exp(-min(abs(d), 700.0))) for d in leads], [d > 0 for d in leads], low=0.5)
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "accuracy": _accuracy(leads),
        "ties": sum(d == 0 for d in leads),
        "margin": math.fsum(leads) / len(leads),
        "nll": math.fsum(math.log1p(math.exp(-d)) if d > -700 else -d for d in leads) / len(leads),
        "reward_chosen": math.fsum(p.chosen for p in pairs) / len(pairs),
        "reward_rejected": math.fsum(p.rejected for p in pairs) / len(pairs),
        "calibration_error": calibration_error(bins),
        "calibration": [asdict(b) for b in bins],
        "by_margin": [asdict(part) for part in by_margin(pairs)],
    }
    if any(pair.verdicts is not None for pair in pairs):
        found["by_verdicts"] = [asdict(part) for part in by_verdicts(pairs)]
    measured = [p for p in pairs if p.chosen_tokens is not None and p.rejected_tokens is not None]
    if measured:
        lengths = [float(n) for p in measured for n in (p.chosen_tokens or 0, p.rejected_tokens or 0)]
        found["length_correlation"] = correlation(lengths, [s for p in measured for s in (p.chosen, p.rejected)])
        found["by_length"] = [asdict(part) for part in by_length(measured)]
    return found


def _verdicts(row: dict[str, Any]) -> tuple[str, str] | None:
    chosen, rejected = row.get("chosen_verdict"), row.get("rejected_verdict")
    return (str(chosen), str(rejected)) if chosen and rejected else None


def by_verdicts(pairs: Sequence[Scored]) -> list[Part]:
    """Accuracy by what execution said of both answers, the most frequent pair of verdicts first."""
    leads: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        if pair.verdicts is not None:
            leads.setdefault(pair.verdicts, []).append(pair.lead)
    ordered = sorted(leads.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        Part(name=f"{better} over {worse}", count=len(some), accuracy=_accuracy(some))
        for (better, worse), some in ordered
    ]


def by_margin(pairs: Sequence[Scored]) -> list[Part]:
    """Accuracy in equal parts of the pairs, those whose scores are closest first."""
    ordered = sorted((pair.lead for pair in pairs), key=abs)
    parts = []
    for i in range(min(PARTS, len(ordered))):
        count = min(PARTS, len(ordered))
        some = ordered[i * len(ordered) // count : (i + 1) * len(ordered) // count]
        name = f"|margin| {abs(some[0]):.2f} to {abs(some[-1]):.2f}"
        parts.append(Part(name=name, count=len(some), accuracy=_accuracy(some)))
    return parts


def by_length(pairs: Sequence[Scored]) -> list[Part]:
    """Accuracy where the chosen answer is longer, equally long, shorter."""
    differences = [((pair.chosen_tokens or 0) - (pair.rejected_tokens or 0), pair.lead) for pair in pairs]
    kinds = {
        "chosen is longer": [lead for d, lead in differences if d > 0],
        "equally long": [lead for d, lead in differences if d == 0],
        "chosen is shorter": [lead for d, lead in differences if d < 0],
    }
    return [Part(name=name, count=len(leads), accuracy=_accuracy(leads)) for name, leads in kinds.items()]


def _accuracy(leads: Sequence[float]) -> float | None:
    return sum(lead > 0 for lead in leads) / len(leads) if leads else None


def write_report(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """Figures and picture of a file of scores, written beside it; returns the figures and both paths."""
    pairs = read_pairs(path)
    rows = read_json(path.parent / PREDICT_RESULTS, {}).get("predict_rows") if path.name == PREDICTIONS else None
    found = {"rows": PAIRS.get(str(rows), f"the pairs of {path.name}"), **figures(pairs)}
    write_json(path.parent / FIGURES, found)
    return found, [path.parent / FIGURES, _draw(path.parent / PICTURE, pairs, found)]


def table(found: dict[str, Any]) -> Table:
    """The figures for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    drawn = Table(title=f"Reward model on {found['rows']}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    drawn.add_column("figure")
    drawn.add_column("pairs", justify="right")
    drawn.add_column("value", justify="right")

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    drawn.add_row("accuracy (a tie is an error)", str(found["pairs"]), share(found["accuracy"]))
    for name in ("margin", "nll", "reward_chosen", "reward_rejected"):
        drawn.add_row(name.replace("_", ", "), "", f"{found[name]:.3f}")
    drawn.add_row("calibration error (ECE, 10 bins)", "", f"{found['calibration_error']:.3f}")
    if "length_correlation" in found:
        drawn.add_row("correlation of score with length", "", f"{found['length_correlation']:+.3f}")
    for title, key in (
        ("accuracy by margin", "by_margin"),
        ("accuracy by length", "by_length"),
        ("accuracy by verdicts", "by_verdicts"),
    ):
        if key in found:
            drawn.add_section()
            drawn.add_row(title, "", "", style="bold")
            for part in found[key]:
                drawn.add_row(f"  {part['name']}", str(part["count"]), share(part["accuracy"]))
    return drawn


def _draw(path: Path, pairs: Sequence[Scored], found: dict[str, Any]) -> Path:
    """Calibration, accuracy by margin, both answers' scores, score against length."""
    from trimtab.report.plots import BLUE, INK, MUTED, ORANGE, styled

    with styled() as new_figure:
        figure = new_figure(figsize=(10.4, 7.2), dpi=140, layout="constrained")
        (calibration, margins), (scores, lengths) = figure.subplots(2, 2)
        figure.suptitle(f"Reward model on {found['rows']}", fontsize=10)

        bins = [b for b in found["calibration"] if b["count"]]
        calibration.plot([0.5, 1], [0.5, 1], color=MUTED, lw=0.9, ls=(0, (4, 3)))
        most = max(b["count"] for b in bins)
        calibration.scatter(
            [b["probability"] for b in bins], [b["frequency"] for b in bins], s=[30 + 170 * b["count"] / most for b in bins],
            color=BLUE, alpha=0.75, edgecolor="white", zorder=3,
        )  # fmt: skip
        for b in bins:
            calibration.annotate(
                str(b["count"]), (b["probability"], b["frequency"]), xytext=(0, 11), textcoords="offset points", ha="center",
                fontsize=7.5, color=MUTED,
            )  # fmt: skip
        calibration.set(title="Calibration", xlabel="probability that the model gives its choice", ylabel="share right")
        calibration.set_xlim(0.48, 1.02)
        calibration.set_ylim(-0.03, 1.1)
        calibration.set_title(
            f"ECE {found['calibration_error']:.3f}", loc="right", fontsize=8.5, fontweight="normal", color=MUTED
        )

        parts = found["by_margin"]
        margins.bar(range(len(parts)), [part["accuracy"] for part in parts], color=BLUE, width=0.7, zorder=2)
        margins.axhline(found["accuracy"], color=INK, lw=1, ls=(0, (4, 3)), zorder=3)
        margins.set_xticks(range(len(parts)), [part["name"].removeprefix("|margin| ") for part in parts], fontsize=8)
        margins.set(
            title="Accuracy by margin",
            xlabel="|score of chosen - score of rejected|",
            ylabel="share right",
            ylim=(0, 1.05),
        )
        margins.set_title(
            f"all: {100 * found['accuracy']:.1f} %", loc="right", fontsize=8.5, fontweight="normal", color=MUTED
        )

        low = min(min(p.chosen, p.rejected) for p in pairs)
        high = max(max(p.chosen, p.rejected) for p in pairs)
        edges = [low + (high - low or 1.0) * i / 24 for i in range(25)]
        scores.hist([p.rejected for p in pairs], bins=edges, color=ORANGE, alpha=0.6, label="rejected")
        scores.hist([p.chosen for p in pairs], bins=edges, color=BLUE, alpha=0.6, label="chosen")
        scores.set(title="Scores", xlabel="score", ylabel="answers")
        scores.legend()

        measured = [p for p in pairs if p.chosen_tokens is not None]
        lengths.set(title="Score and length", xlabel="tokens of the answer", ylabel="score")
        if measured:
            lengths.scatter(
                [p.rejected_tokens for p in measured],
                [p.rejected for p in measured],
                s=9,
                color=ORANGE,
                alpha=0.6,
                label="rejected",
            )
            lengths.scatter(
                [p.chosen_tokens for p in measured],
                [p.chosen for p in measured],
                s=9,
                color=BLUE,
                alpha=0.6,
                label="chosen",
            )
            lengths.set_title(
                f"r = {found['length_correlation']:+.2f}", loc="right", fontsize=8.5, fontweight="normal", color=MUTED
            )
            lengths.legend()
        else:
            lengths.text(
                0.5,
                0.5,
                "the file does not hold lengths",
                ha="center",
                va="center",
                transform=lengths.transAxes,
                color=MUTED,
            )
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    return path
