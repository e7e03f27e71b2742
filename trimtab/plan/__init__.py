"""What a run will need before it runs: memory by role and phase, tokens per second, hours. No torch, no weights."""

from __future__ import annotations

from trimtab.plan.estimate import Estimate, estimate, settle
from trimtab.plan.job import Job, Lengths, job_of
from trimtab.plan.machine import Machine, machine
from trimtab.plan.shapes import Shape, shape_of

__all__ = [
    "Estimate",
    "Job",
    "Lengths",
    "Machine",
    "Shape",
    "estimate",
    "job_of",
    "machine",
    "settle",
    "shape_of",
]
