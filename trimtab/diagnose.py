"""Rules over metric rows: what a training curve says is going wrong, with the number, the step and what to do.

The same rules give the warnings of a live run (over the rows so far) and the doctor of `trimtab report`. Each rule is a
function of a `Run` in `RULES`; it answers None when all is well or when the run does not log what it reads. Rows are
those of `metrics.jsonl` (see `rundir.py`). Pure: no files, no clock, no torch.

The thresholds are rules of thumb, named beside each rule; a finding is a reason to look, not a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
Point = tuple[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to look at.

    Attributes:
        severity: "error" when the result cannot be trusted, "warning" when it will suffer, "note" when worth knowing.
        rule: the rule's name.
        message: what was seen, with the number.
        step: where it was seen first.
        remedy: what to try.
    """

    severity: Severity
    rule: str
    message: str
    step: int
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} ({self.rule})\n  do:    {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The rows that the rules read, and the config they came from (both may be partial)."""

    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]

    def points(self, name: str) -> list[Point]:
        """(step, value) of one quantity in order, rows without it and values that are not finite left out."""
        kept = (row for row in self.rows if _is_number(row.get(name)) and math.isfinite(row[name]))
        return [(int(row["step"]), float(row[name])) for row in kept]

    def names(self, prefix: str) -> list[str]:
        """The quantities whose names start with `prefix`, sorted."""
        return sorted({name for row in self.rows for name in row if name.startswith(prefix)})


Rule = Callable[[Run], Finding | None]
RULES: dict[str, Rule] = {}


def diagnose(rows: Iterable[Mapping[str, Any]], config: Mapping[str, Any] | None = None) -> list[Finding]:
    """What every rule has to say of these rows, errors first, each kind by step.

    Args:
        rows: rows of `metrics.jsonl` in the order written, train and eval mixed; figures that are not finite as floats.
        config: the resolved config, for limits (`max_grad_norm`, `kl_target` ...); a rule without its limit is silent.
            Its `compute_dtype` should say what was used, not "auto".
    """
    run = Run(rows=list(rows), config=config or {})
    found = [finding for rule in RULES.values() if (finding := rule(run)) is not None]
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: (order[finding.severity], finding.step))


# -------------------------------------------------------------------------------------------------- tools of the rules


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rule(function: Rule) -> Rule:
    RULES[function.__name__] = function
    return function


def _streak(points: Sequence[Point], bad: Callable[[float], bool], least: int) -> list[Point]:
    """The longest unbroken run of bad points if it is at least this long, else empty."""
    best: list[Point] = []
    now: list[Point] = []
    for point in points:
        now = [*now, point] if bad(point[1]) else []
        if len(now) > len(best):
            best = now
    return best if len(best) >= least else []


def _mean(points: Sequence[Point]) -> float:
    return sum(value for _, value in points) / len(points)


def _span(points: Sequence[Point]) -> str:
    first, last = points[0][0], points[-1][0]
    return f"at step {first}" if first == last else f"from step {first} to {last}"


def _ends(points: Sequence[Point]) -> tuple[float, float] | None:
    """Means of the first and the last quarter; None below 8 points, which say nothing of a trend."""
    if len(points) < 8:
        return None
    quarter = len(points) // 4
    return _mean(points[:quarter]), _mean(points[-quarter:])


# -------------------------------------------------------------------------------------------------------- every stage


@_rule
def not_finite(run: Run) -> Finding | None:
    """A quantity that is NaN or infinite."""
    for row in run.rows:
        for name, value in row.items():
            if _is_number(value) and not math.isfinite(value):
                return Finding(
                    severity="error",
                    rule="not_finite",
                    message=f"{name} is {value} at step {row['step']}",
                    step=int(row["step"]),
                    remedy="lower learning_rate, or set compute_dtype: float32; look at the rows of that step",
                )
    return None


@_rule
def lr_zero(run: Run) -> Finding | None:
    """A learning rate of 0 on 3 rows or more in a row (the first step of a warm-up and the last of a schedule are)."""
    bad = _streak(run.points("lr"), lambda lr: lr == 0.0, 3)
    if not bad:
        return None
    return Finding(
        severity="error",
        rule="lr_zero",
        message=f"the learning rate is 0 {_span(bad)}: nothing is learned there",
        step=bad[0][0],
        remedy="look at learning_rate, warmup_steps, warmup_ratio and lr_scheduler_type; the schedule may have run out",
    )


@_rule
def grad_always_clipped(run: Run) -> Finding | None:
    """A gradient norm above `max_grad_norm` on at least 95 % of 20 rows or more."""
    limit = run.config.get("max_grad_norm")
    if not limit:
        return None
    for name in run.names("grad_norm"):
        points = run.points(name)
        clipped = [point for point in points if point[1] > limit]
        if len(points) >= 20 and len(clipped) >= 0.95 * len(points):
            return Finding(
                severity="note",
                rule="grad_always_clipped",
                message=f"{name} is above max_grad_norm {limit:g} on {len(clipped)} of {len(points)} rows, "
                f"{_mean(points):.3g} on average",
                step=clipped[0][0],
                remedy="the clip, not learning_rate, sets the step: raise max_grad_norm, or lower learning_rate",
            )
    return None


@_rule
def overfitting(run: Run) -> Finding | None:
    """The last two evaluation losses over 2 % above the best before them, while the training loss went on falling."""
    evals = run.points("eval/loss")
    if len(evals) < 3:
        return None
    best_step, best = min(evals, key=lambda point: point[1])
    after = [value for step, value in evals if step > best_step]
    train = run.points("loss")
    before = [point for point in train if point[0] <= best_step]
    later = [point for point in train if point[0] > best_step]
    rising = len(after) >= 2 and min(after[-2:]) > best + 0.02 * abs(best)
    if not (rising and before and later and _mean(later) < _mean(before)):
        return None
    return Finding(
        severity="warning",
        rule="overfitting",
        message=f"evaluation loss rose from {best:.4g} (step {best_step}) to {after[-1]:.4g} "
        f"while training loss fell to {later[-1][1]:.4g}",
        step=best_step,
        remedy="load_best_model_at_end: true, fewer num_train_epochs, early_stopping_steps, more data",
    )


# ------------------------------------------------------------------------------------------------------- reward model


@_rule
def rm_guesses(run: Run) -> Finding | None:
    """A reward model whose accuracy ends within 0.05 of a coin's, over two evaluations (or the last 20 rows)."""
    if run.config.get("stage") != "rm":
        return None
    points = run.points("eval/accuracy")[-2:]
    if len(points) < 2:
        points = run.points("accuracy")[-20:]
        if len(points) < 20:
            return None
    accuracy = _mean(points)
    if abs(accuracy - 0.5) > 0.05:
        return None
    return Finding(
        severity="warning",
        rule="rm_guesses",
        message=f"the reward model ranks pairs as a coin would: accuracy {accuracy:.3f} {_span(points)}",
        step=points[0][0],
        remedy="check that chosen and rejected are not swapped or equal, and that cutoff_len keeps where they differ; "
        "then raise learning_rate or num_train_epochs",
    )


# ------------------------------------------------------------------------------------------------------ online stages


@_rule
def ratio_not_one(run: Run) -> Finding | None:
    """The first minibatch of an update away from ratio 1, which is scored before the policy has moved.

    In float32 the largest ratio beyond 1.001; else, where rounding spreads single ratios, an approximate KL above 0.01.
    """
    float32 = run.config.get("compute_dtype") == "float32"
    name, limit = ("ratio_max", 1.001) if float32 else ("approx_kl", 0.01)
    bad = _streak(run.points(f"first_minibatch/{name}"), lambda value: value > limit, 1)
    if not bad:
        return None
    return Finding(
        severity="error",
        rule="ratio_not_one",
        message=f"the first minibatch of an update is not at ratio 1: {name} {bad[0][1]:.4g} {_span(bad)}, "
        f"more than {limit:g}",
        step=bad[0][0],
        remedy="old and new log-probabilities come from different models, temperatures or dropout; "
        "set compute_dtype: float32 to see whether rounding is to blame, and report it if not",
    )


@_rule
def sampler_differs(run: Run) -> Finding | None:
    """Log-probabilities of the sampler and of the trainer apart: in float32 max > 1e-4, else mean > 0.05 per token."""
    float32 = run.config.get("compute_dtype") == "float32"
    name, limit = ("sampler_diff/max", 1e-4) if float32 else ("sampler_diff/mean", 0.05)
    bad = _streak(run.points(name), lambda value: abs(value) > limit, 1)
    if not bad:
        return None
    worst = max(bad, key=lambda point: abs(point[1]))
    return Finding(
        severity="error",
        rule="sampler_differs",
        message=f"{name} is {worst[1]:.3g} at step {worst[0]}, more than the {limit:g} that rounding explains",
        step=bad[0][0],
        remedy="what samples is not what is trained: set compute_dtype: float32; if it stays, report it",
    )


@_rule
def kl_negative(run: Run) -> Finding | None:
    """k1 per token below -0.002 on 5 rows in a row: as a mean over samples of the policy itself it is not below 0."""
    bad = _streak(run.points("kl/k1_token"), lambda kl: kl < -0.002, 5)
    if not bad:
        return None
    return Finding(
        severity="error",
        rule="kl_negative",
        message=f"KL to the reference is negative {_span(bad)}, {_mean(bad):.4f} nat per token on average",
        step=bad[0][0],
        remedy="the completions were not drawn from the distribution that is scored: sampling filters (top_p, top_k), "
        "another temperature, or a wrong reference or end token",
    )


@_rule
def kl_exploding(run: Run) -> Finding | None:
    """KL per completion above 30 nat and 5 x `kl_target`, or above 0.5 nat per token, on 3 rows in a row."""
    limit = max(30.0, 5.0 * float(run.config.get("kl_target") or 0.0))
    for name, most in (("kl/k1_sequence", limit), ("kl/k1_token", 0.5)):
        bad = _streak(run.points(name), lambda kl, most=most: kl > most, 3)  # type: ignore[misc]
        if bad:
            worst = max(bad, key=lambda point: point[1])
            return Finding(
                severity="warning",
                rule="kl_exploding",
                message=f"{name} reached {worst[1]:.3g} nat at step {worst[0]} (above {most:g} {_span(bad)}): "
                "the policy has left the reference",
                step=bad[0][0],
                remedy="raise kl_coef or set kl_target, lower learning_rate or ppo_epochs; read samples.jsonl for what "
                "the reward model is being told",
            )
    return None


@_rule
def entropy_collapse(run: Run) -> Finding | None:
    """Entropy below a tenth of what it was (mean of the first 3 rows) on 3 rows in a row."""
    points = run.points("entropy")
    offline = any(
        row.get("stage") in ("pt", "sft", "rm", "dpo", "kto", "orpo", "simpo") for row in run.rows
    )  # a data set is meant to make the model sure
    if len(points) < 6 or offline:
        return None
    start = _mean(points[:3])
    bad = _streak(points[3:], lambda entropy: entropy < 0.1 * start, 3)
    if not bad:
        return None
    return Finding(
        severity="warning",
        rule="entropy_collapse",
        message=f"entropy fell from {start:.3g} to {bad[-1][1]:.3g} nat per token {_span(bad)}: "
        "every answer to a prompt is the same",
        step=bad[0][0],
        remedy="raise kl_coef or entropy_coef, lower learning_rate, or stop at an earlier checkpoint",
    )


@_rule
def reward_without_end(run: Run) -> Finding | None:
    """Reward up from the first quarter of the run to the last while the finished rate falls by more than 0.1."""
    reward, finished = _ends(run.points("reward/mean")), _ends(run.points("finished_rate"))
    if reward is None or finished is None or not (reward[1] > reward[0] and finished[1] < finished[0] - 0.1):
        return None
    return Finding(
        severity="warning",
        rule="reward_without_end",
        message=f"reward rose from {reward[0]:.3g} to {reward[1]:.3g} while finished answers fell from "
        f"{finished[0]:.0%} to {finished[1]:.0%}: the policy is paid for not ending",
        step=run.points("finished_rate")[-1][0],
        remedy="raise missing_eos_penalty or max_new_tokens; check the reward model's correlation with length",
    )


@_rule
def length_at_limit(run: Run) -> Finding | None:
    """Less than half of the answers ended by themselves on 3 rows in a row."""
    bad = _streak(run.points("finished_rate"), lambda rate: rate < 0.5, 3)
    if not bad:
        return None
    limit = run.config.get("max_new_tokens")
    lengths = dict(run.points("length/mean"))
    length = f", {lengths[bad[-1][0]]:.0f} tokens long on average" if bad[-1][0] in lengths else ""
    return Finding(
        severity="warning",
        rule="length_at_limit",
        message=f"only {_mean(bad):.0%} of the answers end by themselves {_span(bad)}{length}; the rest are cut"
        + (f" at {limit} tokens" if limit else ""),
        step=bad[0][0],
        remedy="raise max_new_tokens, check the template's end-of-turn token, or begin from a model after SFT",
    )


@_rule
def clip_fraction_high(run: Run) -> Finding | None:
    """More than 30 % of the tokens clipped on 3 rows in a row."""
    bad = _streak(run.points("clip_fraction"), lambda share: share > 0.3, 3)
    if not bad:
        return None
    return Finding(
        severity="warning",
        rule="clip_fraction_high",
        message=f"{_mean(bad):.0%} of the tokens are clipped {_span(bad)}: updates overshoot their rollouts",
        step=bad[0][0],
        remedy="lower learning_rate or ppo_epochs, or raise the batch size",
    )


@_rule
def critic_useless(run: Run) -> Finding | None:
    """Explained variance below 0 on 10 rows in a row after the critic's warm-up: a constant would predict better."""
    warmup = run.config.get("critic_warmup_steps") or 0
    points = [point for point in run.points("explained_variance") if point[0] > warmup]
    bad = _streak(points, lambda explained: explained < 0.0, 10)
    if not bad:
        return None
    return Finding(
        severity="warning",
        rule="critic_useless",
        message=f"explained variance is negative {_span(bad)}, {_mean(bad):.2f} on average: the critic adds noise",
        step=bad[0][0],
        remedy="raise critic_learning_rate or critic_warmup_steps, or set score_norm: true; "
        "start the critic from the reward model (critic: adapter)",
    )


@_rule
def zero_variance_groups(run: Run) -> Finding | None:
    """At least half of the groups with equal rewards, which teach nothing, on 3 rows in a row (a share from 0 to 1)."""
    if (run.config.get("group_size") or 1) < 2:
        return None
    bad = _streak(run.points("zero_variance_groups"), lambda share: share >= 0.5, 3)
    if not bad:
        return None
    return Finding(
        severity="warning",
        rule="zero_variance_groups",
        message=f"in {_mean(bad):.0%} of the groups every completion has the same reward {_span(bad)}",
        step=bad[0][0],
        remedy="prompts are too easy or too hard for this reward: choose others, raise group_size or temperature",
    )
