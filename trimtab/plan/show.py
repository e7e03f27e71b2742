"""A plan as a reader sees it: lines and two tables."""

from __future__ import annotations

from typing import Any

from trimtab.plan.estimate import Estimate
from trimtab.plan.job import Job
from trimtab.plan.machine import GIB, Machine
from trimtab.plan.shapes import Shape

WHAT = {
    "load": "reading the weights",
    "rollout": "answers, with their cache",
    "score": "old, reference and value passes",
    "update": "forward and backward",
    "eval": "held-out rows",
    "save": "a checkpoint",
}


def lines(job: Job, shape: Shape, machine: Machine, found: Estimate) -> list[str]:
    """What the tables rest on, and what was decided."""
    packed = f"base in {job.bits} bits, " if job.bits else ""
    kind = f"LoRA of rank {job.rank}" if job.trained == "lora" else job.trained
    compute = "bfloat16" if job.compute == 2 else "float32"
    said = [
        f"{job.stage}: {shape.name}, {shape.parameters / 1e9:.3g} B parameters ({shape.source}); {packed}{kind}, {compute}",
        f"tokens: {job.lengths.prompt:.0f} of a prompt and {job.lengths.answer:.0f} of an answer on average, "
        f"{job.longest} of the longest row ({job.lengths.source})",
        f"on {machine.name}: {machine.memory / GIB:.1f} GiB to use; {found.budget} tokens a pass, gradient checkpointing "
        f"{'on' if found.checkpointing else 'off'}",
    ]
    if not found.fits:
        said.append(
            f"this does not fit: the peak is {found.peak / GIB:.1f} GiB. "
            + ("quantization_bit: 4 packs the base; " if machine.kind == "cuda" and not job.bits else "")
            + "a smaller cutoff_len or max_new_tokens shortens the longest row"
        )
    return said


def memory_table(job: Job, found: Estimate) -> Any:
    """Peak of each phase, and what stands through all of them, in GiB."""
    from rich.table import Table

    table = Table("memory, GiB", "peak", "what", box=None, header_style="bold")
    for name, value in found.standing.items():
        table.add_row(f"  {name}", f"{value / GIB:.2f}", "stays through the run")
    for phase, value in found.phases.items():
        if phase == "update":
            for role, own in found.updates.items():
                table.add_row(f"update, {role}", f"{own / GIB:.2f}", WHAT[phase])
        else:
            table.add_row(phase, f"{value / GIB:.2f}", WHAT[phase])
    table.add_row("peak", f"{found.peak / GIB:.2f}", "the largest of these")
    return table


def time_table(job: Job, found: Estimate) -> Any:
    """Operations and seconds of a step by phase, tokens a second, hours."""
    from rich.table import Table

    table = Table("a step", "TFLOP", "seconds", box=None, header_style="bold")
    for phase, value in found.flops.items():
        table.add_row(phase, f"{value / 1e12:.3g}", f"{found.seconds[phase]:.3g}")
    total = sum(found.seconds.values())
    table.add_row("all", f"{sum(found.flops.values()) / 1e12:.3g}", f"{total:.3g}")
    return table


def time_line(job: Job, found: Estimate) -> str:
    """Tokens a second and hours."""
    steps = job.steps()
    if steps is None or found.hours is None:
        size = job.rollout if job.online else job.rows
        each = sum(found.seconds.values()) / size / 3.6
        return f"{found.tokens_per_second:,.0f} tokens a second; {each:.3g} hours for each 1000 rows of an epoch (--rows says how many)"
    return f"{found.tokens_per_second:,.0f} tokens a second; {steps} steps: {found.hours:.3g} hours"
