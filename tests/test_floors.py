"""Torch-free floors start without torch: what import-linter cannot see, it being about running code."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

IMPORT_ALL = """
import importlib, pkgutil, sys

NAMES = ["types", "errors", "registry", "rundir", "diagnose", "config", "data", "report", "plan", "models.folder", "dry_run", "databases"]
for name in NAMES:
    module = importlib.import_module(f"trimtab.{name}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"trimtab.{name}."):
        importlib.import_module(found.name)
print(" ".join(sorted({"torch", "transformers", "peft", "matplotlib"} & sys.modules.keys())))
"""


def imported_by(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    ).stdout.strip()


def test_torch_free_floors_import_no_torch() -> None:
    assert imported_by(IMPORT_ALL) == ""


def test_importing_trimtab_is_free() -> None:
    code = "import sys, trimtab; print(' '.join(sorted({'torch', 'transformers', 'pydantic'} & sys.modules.keys())))"
    assert imported_by(code) == ""
