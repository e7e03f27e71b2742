"""The PNG plots of a run, from its `metrics.jsonl` alone.

In each: pale line = every logged step, dark line = its exponential moving average (weight in the footer), dots =
held-out evaluations. The axis follows the bulk of the points; how many lie outside is said beside the title.

| file | stages | shows |
|---|---|---|
| `training_loss.png` | all | training loss |
| `training_eval_loss.png` | with evaluation | held-out loss, training loss behind it |
| `training_eval_accuracy.png` | with evaluation | held-out accuracy, exact match, SQL match: whichever is measured |
| `training_reward.png` | online | reward of rollouts and of held-out prompts |
| `STAGE_panel.png` | online | reward, KL, entropy, length, finished rate, clip fraction; with a critic explained variance, value loss |

No display is needed; matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.diagnose import Run
from trimtab.rundir import RunFolder, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
BLUE, ORANGE, _GREEN, _PURPLE = "#1f5fa8", "#d1662a", "#2c8a57", "#7a4fa3"

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#aab4be",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.07,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One quantity on a plot; `dots` for held-out evaluations, which are few and not smoothed."""

    name: str
    label: str
    color: str
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One set of axes.

    Attributes:
        title, unit, curves: what it is called, its unit, what is on it.
        share: values from 0 to 1, shown in per cent.
        line_at: a dashed line worth comparing with.
        floor: values do not go below; the axis starts there unless they are all far above.
        cut: values below are drawn, and smoothed, as this one: single ones can be huge and say no more than "bad".
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    share: bool = False
    line_at: float | None = None
    floor: float | None = None
    cut: float | None = None


REWARD = Plot(
    title="Reward",
    unit="score",
    curves=(
        Curve(name="reward/mean", label="rollouts", color=BLUE),
        Curve(name="eval/reward_sampled", label="held-out, sampled", color=_GREEN, dots=True),
        Curve(name="eval/reward_greedy", label="held-out, greedy", color=ORANGE, dots=True),
    ),
)
PANEL = (
    REWARD,
    Plot(
        title="KL to the reference",
        unit="nat per completion",
        curves=(
            Curve(name="kl/k1_sequence", label="rollouts", color=BLUE),
            Curve(name="eval/kl", label="held-out", color=ORANGE, dots=True),
        ),
        line_at=0.0,
    ),
    Plot(
        title="Entropy", unit="nat per token", curves=(Curve(name="entropy", label="rollouts", color=BLUE),), floor=0.0
    ),
    Plot(
        title="Length",
        unit="tokens",
        curves=(
            Curve(name="length/mean", label="mean", color=BLUE),
            Curve(name="length/p95", label="95th percentile", color=_PURPLE),
            Curve(name="eval/length", label="held-out, mean", color=ORANGE, dots=True),
        ),
        floor=0.0,
    ),
    Plot(
        title="Finished answers",
        unit="share of completions",
        curves=(
            Curve(name="finished_rate", label="rollouts", color=BLUE),
            Curve(name="eval/finished_rate", label="held-out", color=ORANGE, dots=True),
        ),
        share=True,
    ),
    Plot(
        title="Clip fraction",
        unit="share of tokens",
        curves=(Curve(name="clip_fraction", label="rollouts", color=BLUE),),
        share=True,
    ),
    Plot(
        title="Explained variance",
        unit="1 = perfect, 0 = a constant",
        curves=(Curve(name="explained_variance", label="rollouts", color=BLUE),),
        line_at=0.0,
        cut=-1.0,
    ),
    Plot(
        title="Value loss",
        unit="squared score / 2",
        curves=(Curve(name="value_loss", label="rollouts", color=BLUE),),
        floor=0.0,
    ),
)
SINGLE: dict[str, Plot] = {
    "training_loss.png": Plot(
        title="Training loss", unit="loss", curves=(Curve(name="loss", label="training", color=BLUE),)
    ),
    "training_eval_loss.png": Plot(
        title="Held-out loss",
        unit="loss",
        curves=(
            Curve(name="loss", label="training", color=BLUE),
            Curve(name="eval/loss", label="held-out", color=ORANGE, dots=True),
        ),
    ),
    "training_eval_accuracy.png": Plot(
        title="Held-out accuracy",
        unit="share right",
        curves=(
            Curve(name="eval/accuracy", label="accuracy", color=ORANGE, dots=True),
            Curve(name="eval/exact_match", label="exact match", color=_PURPLE, dots=True),
            Curve(name="eval/sql_match", label="SQL match", color=_GREEN, dots=True),
        ),
        share=True,
    ),
    "training_reward.png": REWARD,
}
# A plot with held-out curves only makes sense when one of them was measured.
_NEEDS_EVAL = ("training_eval_loss.png", "training_eval_accuracy.png")


def plot_run(folder: str | Path) -> list[Path]:
    """Draw every plot that the run has figures for, into its folder; returns their paths (none without metrics)."""
    run_folder = RunFolder(folder)
    run = Run(rows=run_folder.metrics(), config={})
    if not run.rows:
        return []
    stage = str(run.rows[0].get("stage") or "")
    names = dict.fromkeys((_ascii(run_folder.path.resolve().name), stage))  # a folder is often called after its stage
    subtitle = " · ".join(name for name in names if name)

    made = []
    for name, plot in SINGLE.items():
        needed = [curve.name for curve in plot.curves if curve.dots or name not in _NEEDS_EVAL]
        if any(run.points(quantity) for quantity in needed):
            made.append(_draw(run_folder.path / name, [plot], run, subtitle))
    panel = [plot for plot in PANEL if any(run.points(curve.name) for curve in plot.curves)]
    if run.points("reward/mean") and panel:
        made.append(_draw(run_folder.path / f"{stage}_panel.png", panel, run, subtitle))
    return made


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction: s_i = sum_j weight^(i-j) x_j / sum_j weight^(i-j), j <= i."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1.0
        smoothed.append(total / mass)
    return smoothed


def ema_weight(count: int) -> float:
    """How much to smooth so many points: an average over a thirtieth of them, 0.5 to 0.98; 0 (none) below 12.

    The average lags by weight / (1 - weight) points, so a heavier one would draw trends where they no longer are.
    """
    return 0.0 if count < 12 else min(0.98, max(0.5, 1.0 - 30.0 / count))


# -------------------------------------------------------------------------------------------------------------- drawing


@contextmanager
def styled() -> Iterator[Callable[..., Figure]]:
    """Our look, and what makes a figure in it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**mpl.rcParamsDefault, **_STYLE}  # a user's matplotlibrc does not change our plots
    with mpl.rc_context(style):
        yield Figure


def _draw(path: Path, plots: Sequence[Plot], run: Run, subtitle: str) -> Path:
    with styled() as new_figure:
        alone = len(plots) == 1
        columns = 1 if alone else min(4, (len(plots) + 1) // 2)
        lines = -(-len(plots) // columns)
        figure = new_figure(
            figsize=(7.2, 4.3) if alone else (3.9 * columns, 3.0 * lines + 0.9), dpi=140, layout="constrained"
        )
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax, plot in zip(axes, plots, strict=False):
            _fill(ax, plot, run, subtitle if alone else "")
        for ax in axes[len(plots) :]:
            ax.set_visible(False)
        if not alone:
            figure.suptitle(subtitle, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
        _footer(figure, plots, run)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    return path


def _footer(figure: Figure, plots: Sequence[Plot], run: Run) -> None:
    """How to read the lines."""
    weights = {ema_weight(len(run.points(c.name))) for p in plots for c in p.curves if not c.dots} - {0.0}
    if not weights:
        return
    parts = [f"pale: each logged step, dark: moving average (EMA, weight {max(weights):.2f})"]
    if any(c.dots and run.points(c.name) for p in plots for c in p.curves):
        parts.append("dots: held-out evaluation")
    figure.supxlabel("   |   ".join(parts), fontsize=8, color=MUTED, x=0.988, ha="right")


def _fill(ax: Axes, plot: Plot, run: Run, subtitle: str) -> None:
    """Draw one set of axes; `subtitle` stands on the right above it, after what is said of points outside."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    present = [curve for curve in plot.curves if run.points(curve.name)]
    raw: list[float] = []
    firm: list[float] = []
    below = 0
    for curve in present:
        points = run.points(curve.name)
        if curve.dots:  # the best model, loaded at the end, is evaluated at the last step again: no point of this curve
            points = sorted({step: (step, value) for step, value in reversed(points)}.values())
        steps, values = [step for step, _ in points], [value for _, value in points]
        weight = ema_weight(len(points))
        if plot.cut is not None:
            below += sum(value < plot.cut for value in values)
            values = [max(value, plot.cut) for value in values]
        if curve.dots:
            ax.plot(
                steps,
                values,
                "-o",
                color=curve.color,
                lw=1.2,
                ms=4.5,
                mec="white",
                mew=0.8,
                label=curve.label,
                zorder=4,
            )
            firm += values
        elif weight:
            line = smooth(values, weight)
            ax.plot(steps, values, color=curve.color, lw=0.9, alpha=0.28, zorder=2)
            ax.plot(steps, line, color=curve.color, lw=2.0, label=curve.label, zorder=3)
            raw += values
            firm += line
        else:
            ax.plot(steps, values, "-o", color=curve.color, lw=1.5, ms=3, label=curve.label, zorder=3)
            firm += values

    if plot.line_at is not None:
        ax.axhline(plot.line_at, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
    low, high = _limits(raw, firm, plot)
    ax.set_ylim(low, high)
    outside = sum(not low <= value <= high for value in raw)
    notes = [f"{below} below {plot.cut:g}"] if below else []
    notes += [f"{outside} outside"] if outside else []
    ax.set_title(plot.title)
    ax.set_title("   ".join([*notes, subtitle]), loc="right", fontsize=8, fontweight="normal", color=MUTED)
    ax.set_xlabel("step")
    ax.set_ylabel(plot.unit)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if plot.share:
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0 if high - low > 0.05 else 1))
    if len(present) > 1 or any(curve.dots for curve in present):
        ax.legend(loc="best")


def _limits(raw: Sequence[float], firm: Sequence[float], plot: Plot) -> tuple[float, float]:
    """An axis around the middle 96 % of the raw points and all of the firm ones, with room; shares within 0 and 1."""
    ordered = sorted(raw)
    cut = len(ordered) // 50
    inner = ordered[cut : len(ordered) - cut] if len(ordered) >= 50 else ordered
    shown = [*inner, *firm] + ([plot.line_at] if plot.line_at is not None else [])
    low, high = min(shown), max(shown)
    room = 0.07 * (high - low) or 0.05 * max(abs(high), 0.2)
    if plot.share:
        return max(-0.02, low - room), min(1.02, high + room)
    if plot.floor is not None and low >= plot.floor:
        return max(plot.floor, low - room) if low > 0.4 * high else plot.floor, high + room
    return low - room, high + room


def _ascii(name: str) -> str:
    """A folder's name if the plot's font has its letters."""
    return name if name.isascii() else ""
