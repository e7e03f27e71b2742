"""The dialect's syntax: files, dicts and words into entries, each with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.config.dialect import from_mapping, overrides, read
from trimtab.errors import ConfigError

pytestmark = pytest.mark.unit


def _write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_entries_have_the_line_and_the_text_as_written(tmp_path: Path) -> None:
    path = _write(tmp_path, "# a comment\nstage: sft\n\neval_strategy: no\noutput_dir: E:\\runs\\new\n")
    stage, strategy, folder = read(path)
    assert (stage.key, stage.value, stage.where) == ("stage", "sft", f"{path}:2: stage")
    assert (strategy.value, strategy.text, strategy.where) == (False, "no", f"{path}:4: eval_strategy")
    assert folder.value == r"E:\runs\new"


def test_json_keys_have_their_lines_tabs_and_nested_values(tmp_path: Path) -> None:
    text = '{\n\t"stage": "rm", "lora_rank": 4,\n\t"dataset_dir": {"a": {"stage": "}"}},\n\t"dataset": ["a", "b"]\n}\n'
    path = _write(tmp_path, text, "run.json")
    assert [(e.key, e.value, e.where) for e in read(path)] == [
        ("stage", "rm", f"{path}:2: stage"),
        ("lora_rank", 4, f"{path}:2: lora_rank"),
        ("dataset_dir", {"a": {"stage": "}"}}, f"{path}:3: dataset_dir"),
        ("dataset", ["a", "b"], f"{path}:4: dataset"),
    ]
    assert read(_write(tmp_path, "{}", "empty.json")) == []


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfstage: sft\r\nseed: 1\r\n")
    assert [(e.key, e.value) for e in read(path)] == [("stage", "sft"), ("seed", 1)]


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    path = _write(tmp_path, "<<: &base {seed: 1, lora_rank: 2}\nseed: 3\n")
    assert {e.key: e.value for e in read(path)} == {"seed": 3, "lora_rank": 2}


@pytest.mark.parametrize(
    ("name", "text", "line", "what"),
    [
        ("a.yaml", "stage: sft\nseed: 1\nstage: rm\n", 3, "stage is written twice"),
        ("a.yaml", "dataset_dir:\n  a: 1\n  a: 2\n", 3, "a is written twice"),
        ("a.yaml", "stage: sft\n\tseed: 1\n", 2, "not valid YAML"),
        ("a.yaml", "stage: sft\noutput_dir: a: b\n", 2, "not valid YAML"),
        ("a.yaml", "dataset: [a, b\nstage: sft\n", 2, "not valid YAML"),
        ("a.yaml", "stage: sft\n---\nstage: rm\n", 2, "not valid YAML"),
        ("a.yaml", "- stage\n- sft\n", 1, "not a list of `key: value` lines"),
        ("a.json", '{\n  "stage": "sft",\n  "seed": 1,\n}\n', 4, "not valid JSON"),
        ("a.json", '{\n  "stage": "sft"\n  "seed": 1\n}\n', 3, "not valid JSON"),
        ("a.json", '{\n  "seed": 1,\n  "seed": 1\n}\n', 3, "seed is written twice"),
    ],
)
def test_malformed_files_are_errors_with_their_line(tmp_path: Path, name: str, text: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(_write(tmp_path, text, name))
    assert what in caught.value.what
    assert f"{name}:{line}" in caught.value.where


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file") as caught:
        read(tmp_path / "none.yaml")
    assert str(tmp_path.absolute()) in caught.value.where
    (tmp_path / "wide.yaml").write_text("stage: sft", encoding="utf-16")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(tmp_path / "wide.yaml")
    with pytest.raises(ConfigError, match="empty"):
        read(_write(tmp_path, "# nothing\n"))
    with pytest.raises(ConfigError, match="not a JSON object"):
        read(_write(tmp_path, "[1]", "list.json"))
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path)


def test_words_of_the_command_line() -> None:
    words = [
        "lora_rank=4",
        "--learning_rate",
        "2e-5",
        "--max-steps=-1",
        "--bf16",
        "--output_dir",
        r"E:\a b",
        "seed=1",
        "seed=2",
    ]
    assert {e.key: e.value for e in overrides(words)} == {
        "lora_rank": 4,
        "learning_rate": "2e-5",
        "max_steps": -1,
        "bf16": True,
        "output_dir": r"E:\a b",
        "seed": 2,
    }
    assert [(e.value, e.text) for e in overrides(["--do_train", "stage=rm"])] == [(True, "true"), ("rm", "rm")]
    assert overrides(["dataset=[a, b]"])[0].value == ["a", "b"]
    assert overrides(["template=[x"])[0].value == "[x"  # no YAML: text
    assert overrides(["val_size="])[0].value is None
    assert overrides(["run_name=a=b"])[0].value == "a=b"
    assert overrides(["seed=1"])[0].where == "command line: seed"
    with pytest.raises(ConfigError, match="cannot read 'seed'"):
        overrides(["seed", "1"])


def test_a_dict_is_entries_too() -> None:
    (entry,) = from_mapping({"seed": 1})
    assert (entry.key, entry.value, entry.where, entry.text) == ("seed", 1, "argument: seed", None)
