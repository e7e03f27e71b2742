"""The examples of docs/rewards.md, run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.config.keys import KEYS
from trimtab.rewards import Answer
from trimtab.rewards.lookup import REWARD_FUNCTIONS, load_functions
from trimtab.types import Completion, Example, Message, Origin, Prompt, TokenRow

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_functions_of_the_page_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, program = blocks("python")
    (tmp_path / "rewards.py").write_text(functions, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (settings,) = (yaml.safe_load(block) for block in blocks("yaml"))
    found = load_functions([name.strip() for name in settings["reward_funcs"].split(",")], timeout=5)
    assert len(found) == len(settings["reward_weights"])
    example = Example(
        origin=Origin(file="f", row=1), prompt=(Message(role="user", content="2 + 2"),), columns={"output": "4"}
    )
    answer = Answer(
        prompt=Prompt(index=0, token_ids=(1,), example=example),
        completion=Completion(prompt_index=0, sample_index=0, token_ids=(2,), logprobs=(0.0,), finish="stop"),
        row=TokenRow(token_ids=(1, 2), scored=(1,)),
        text=" 4",
    )
    assert [one.score([answer]) for one in found] == [[1.0], [-0.02], [1.0]]
    given: dict[str, Any] = {}
    namespace: dict[str, Any] = {}
    exec(program, namespace)
    monkeypatch.setitem(namespace, "run_exp", given.update)
    namespace["train"]({})
    assert [one.score([answer]) for one in load_functions(given["reward_funcs"], timeout=5)] == [[-2.0], [1.0]]


def test_every_key_and_every_ready_made_function_is_on_the_page() -> None:
    keys = {
        name
        for name in KEYS
        if name.startswith("reward_") and "rm" not in KEYS[name].stages and KEYS[name].state == "acted on"
    }
    assert len(keys) >= 8
    assert [name for name in sorted((*keys, *REWARD_FUNCTIONS.names())) if f"`{name}" not in PAGE] == []
