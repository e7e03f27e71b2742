"""The decorator: compiled where there is a GPU with Triton, the plain function elsewhere and where compiling fails."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.ops import fused as module
from trimtab.ops.fused import fused

pytestmark = pytest.mark.unit


def on(device: str) -> Any:
    """All that the decorator asks of a tensor."""
    return SimpleNamespace(device=SimpleNamespace(type=device))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler that says what it was asked for; `fail` in a function's name makes its code break off."""
    asked: list[str] = []

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        asked.append(function.__name__)

        def run(*arguments: Any) -> Any:
            if function.__name__ == "fail":
                raise RuntimeError("no such instruction")
            if function.__name__ == "too_large":
                raise torch.OutOfMemoryError("full")
            return ("compiled", *arguments[1:])

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(module, "_has_triton", lambda: True)
    return asked


def test_a_gpu_gets_the_compiled_function_and_a_cpu_the_plain_one(compiler: list[str]) -> None:
    @fused
    def double(x: Any, y: int) -> Any:
        return ("plain", y)

    assert double(on("cpu"), 1) == ("plain", 1)
    assert not compiler
    assert double(on("cuda"), 2) == ("compiled", 2)
    assert double(on("cuda"), 3) == ("compiled", 3)
    assert compiler == ["double"]  # once


def test_without_triton_nothing_is_compiled(compiler: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_triton", lambda: False)

    @fused
    def double(x: Any) -> Any:
        return "plain"

    assert double(on("cuda")) == "plain" and not compiler


def test_triton_is_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in ("triton", "numba"):
        monkeypatch.setattr(module, "find_spec", lambda name, there=there: name if name == there else None)
        module._has_triton.cache_clear()
        assert module._has_triton() == (there == "triton")
    module._has_triton.cache_clear()


def test_what_cannot_be_compiled_is_said_and_computed_plainly_from_then_on(
    compiler: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    @fused
    def fail(x: Any) -> Any:
        return "plain"

    assert [fail(on("cuda")) for _ in range(3)] == ["plain"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "fail goes on uncompiled, which is slower: no such instruction"
    ]
    assert compiler == ["fail"] and fail.broken == ["no such instruction"]  # type: ignore[attr-defined]


def test_out_of_memory_is_told(compiler: list[str]) -> None:
    @fused
    def too_large(x: Any) -> Any:
        return "plain"

    with pytest.raises(torch.OutOfMemoryError):
        too_large(on("cuda"))
    assert not too_large.broken  # type: ignore[attr-defined]


def test_torch_may_compile_a_function_for_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limit is eight; a larger one that a user has set stays."""
    import torch._dynamo.config as settings

    monkeypatch.setattr(torch, "compile", lambda function, **keys: (function, keys))
    patch: Any = settings.patch  # monkeypatch would hide the setting afterwards
    with patch(recompile_limit=8):
        assert module.compile_often(len, dynamic=True) == (len, {"dynamic": True})
        assert settings.recompile_limit == 64
    with patch(recompile_limit=100):
        module.compile_often(len)
        assert settings.recompile_limit == 100
