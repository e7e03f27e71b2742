"""Typed stage configs, the YAML dialect they are written in, and the table of every key."""

from __future__ import annotations

from trimtab.config.explain import ExplainRow, dump_resolved, explain
from trimtab.config.resolve import load
from trimtab.config.stages import InferConfig, OnlineConfig, PpoConfig, PtConfig, RmConfig, SftConfig, StageConfig

__all__ = [
    "ExplainRow",
    "InferConfig",
    "OnlineConfig",
    "PpoConfig",
    "PtConfig",
    "RmConfig",
    "SftConfig",
    "StageConfig",
    "dump_resolved",
    "explain",
    "load",
]
