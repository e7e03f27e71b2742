"""One check for every bad input: exit code 2, one message that says what and what to do, no traceback, nothing changed on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.cli import main

ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(6)]
PAIRS = [{"instruction": f"question {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(6)]


@dataclass
class Place:
    """A folder of a test's own: data set `qa`, a config file, and an output_dir that does not exist yet."""

    root: Path
    keys: dict[str, Any]
    capsys: pytest.CaptureFixture[str]

    def write(self, name: str, content: Any) -> Path:
        """Write a file below the folder: bytes and text as they are, anything else as JSON."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    def data(self, content: Any, name: str = "rows.json", **entry: Any) -> None:
        """Make `qa` this file, with these fields in its entry."""
        self.write(f"data/{name}", content)
        self.write("data/dataset_info.json", {"qa": {"file_name": name, **entry}})

    def file(self, **keys: Any) -> str:
        """The config file with these keys on top; None deletes one."""
        merged = {k: v for k, v in {**self.keys, **keys}.items() if v is not None}
        return str(self.write("run.yaml", yaml.safe_dump(merged, allow_unicode=True)))

    def tree(self) -> dict[str, str]:
        return {
            str(p.relative_to(self.root)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(self.root.rglob("*"))
        }

    def refused(self, *words: str, told: str | tuple[str, ...] = ()) -> str:
        """Run the command; it must refuse as promised above, naming `told`. Returns the message."""
        before = self.tree()
        self.capsys.readouterr()
        code = main(list(words))
        captured = self.capsys.readouterr()
        print(captured.err)  # for `pytest -rP`, to read them all
        assert code == 2, f"exit code {code}: {captured.out}{captured.err}"
        assert captured.err.startswith("error: ") and "Traceback" not in captured.err
        assert "\n  do:    " in captured.err, captured.err
        for text in (told,) if isinstance(told, str) else told:
            assert text in captured.err, captured.err
        assert self.tree() == before
        return captured.err


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Place:
    """Everything right: what a test breaks is the only thing wrong."""
    keys = {
        "model_name_or_path": str(tiny_folder("qwen2")),
        "stage": "sft",
        "do_train": True,
        "template": "chatml",
        "dataset": "qa",
        "dataset_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "logging_steps": 1,
        "cutoff_len": 64,
        "lora_rank": 2,
        "compute_dtype": "float32",
        "use_cpu": True,
    }
    place = Place(root=tmp_path, keys=keys, capsys=capsys)
    place.data(ROWS)
    return place
