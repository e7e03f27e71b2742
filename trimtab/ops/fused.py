"""Functions that a GPU runs as one pass over their numbers.

Written plainly, and on a GPU with Triton compiled by torch into a kernel or two: there a small product or sum costs some microseconds to
start however little it does, and a large one costs what it reads and writes. Where compiling fails, the plain function goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """Compile `function`, whose first argument is a tensor, at its first call on a GPU."""

    @cache
    def compiled() -> Any:
        return compile_often(function)

    broken: list[str] = []

    @wraps(function)
    def call(x: Any, *more: Any) -> Any:
        if x.device.type != "cuda" or broken or not _has_triton():
            return function(x, *more)
        try:
            return compiled()(x, *more)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler has many ways to fail, none of them about the numbers
            broken.append(str(error))
            log.warning(
                "%s goes on uncompiled, which is slower: %s",
                function.__name__,
                (str(error) or repr(error)).splitlines()[0],
            )
            return function(x, *more)

    call.broken = broken  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


VARIANTS = 64
"""Forms of one compiled function: with and without gradients, one row and several, each shape of a model ..."""


def compile_often(function: Callable[..., Any], **keys: Any) -> Any:
    """`torch.compile`, for as many forms as a run meets: after eight torch goes on uncompiled, where flex_attention makes all scores."""
    settings: Any = import_module("torch._dynamo.config")
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    return torch.compile(function, **keys)
