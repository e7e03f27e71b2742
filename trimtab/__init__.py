"""trimtab: RLHF that one engineer can run, read and trust.

The public names load on first use, so that `import trimtab` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "run_exp": "trimtab.pipeline",
    "ChatModel": "trimtab.serve.chat",
    "Response": "trimtab.serve.chat",
    "TrimtabError": "trimtab.errors",
}

if TYPE_CHECKING:
    from trimtab.errors import TrimtabError as TrimtabError
    from trimtab.pipeline import run_exp as run_exp
    from trimtab.serve.chat import ChatModel as ChatModel
    from trimtab.serve.chat import Response as Response

__all__ = ["ChatModel", "Response", "TrimtabError", "__version__", "run_exp"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
