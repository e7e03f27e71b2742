"""What every test runs under: no network, one thread, fixed examples, and shapes checked where formulas live."""

from __future__ import annotations

import os

# Before anything imports torch or the hub's client, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# One thread: tiny models are faster on one, and sums come out in one order whatever the machine's core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.errors import raised

if TYPE_CHECKING:
    from trimtab.models.tiny import Family

# Shape annotations become checks on the two floors that are formulas; elsewhere they stay words. Before those are imported.
install_import_hook(["trimtab.ops", "trimtab.algos"], "beartype.beartype")

# Which errors the tests raise, for the last of them to compare with all that can be.
raised.watch()

# The same examples every time, and no verdict by the clock.
settings.register_profile("trimtab", derandomize=True, deadline=None, database=None)
settings.load_profile("trimtab")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/errors/test_raised.py is about all the others."""
    items.sort(key=lambda item: item.path.name == "test_raised.py")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(family, seed=0)`: the folder of a tiny model, made once per session. Do not write into it."""
    from trimtab.models.tiny import make_tiny  # here, so that tests without torch start without it

    root = tmp_path_factory.mktemp("tiny")

    def folder(family: Family = "llama", seed: int = 0) -> Path:
        target = root / f"{family}-{seed}"
        return target if target.exists() else make_tiny(family, target, seed)

    return folder
