"""Parity with TRL, in an environment of its own (`make parity`): without TRL there is nothing to collect here."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("trl") else ["test_*.py"]
