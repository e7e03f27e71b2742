"""Where what is made once is kept between runs: fetched models, a reference's log-probabilities, compiled kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """TRIMTAB_CACHE, else XDG_CACHE_HOME/trimtab, else the system's usual place."""
    if own := os.environ.get("TRIMTAB_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "trimtab"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "trimtab" / "cache"
    return Path.home() / ".cache" / "trimtab"
