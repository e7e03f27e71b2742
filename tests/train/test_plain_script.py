"""The script of docs/algorithms/rm.md, run as it stands there, gives the scores of `get_scores`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab import ChatModel

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "rm.md"


def test_scores_without_trimtab(rm_folder: Path, tiny_folder: Callable[..., Path]) -> None:
    script = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert script is not None and "trimtab" not in script[1]
    names: dict[str, Any] = {}
    exec(script[1], names)
    base = str(tiny_folder("qwen2"))
    texts = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        for question, answer in (("a", "yes"), ("tell me d", "no"), ("数据 SELECT", "yesyes"))
    ]
    model = ChatModel(
        {"model_name_or_path": base, "adapter_name_or_path": str(rm_folder), "template": "chatml", "stage": "rm",
         "compute_dtype": "float32", "use_cpu": True}
    )  # fmt: skip
    for text, wanted in zip(texts, model.get_scores(texts), strict=True):
        assert names["score"](base, str(rm_folder), text) == pytest.approx(wanted, abs=1e-4)
