"""Data sets that are missing, malformed, of another kind, or empty by the time they are needed."""

from __future__ import annotations

import io
from typing import Any

import pytest

from tests.bad_input.conftest import PAIRS, ROWS, Place

pytestmark = pytest.mark.e2e

CHAT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
OPENAI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


# file name, content, words of the message
FILES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "empty json": ("rows.json", "", ("rows.json is empty",)),
    "blank json": ("rows.json", " \n\n ", ("rows.json is empty",)),
    "empty list": ("rows.json", [], ("0 read",)),
    "null": ("rows.json", "null", ("dataset",)),
    "number": ("rows.json", "3", ("dataset",)),
    "object of lists": ("rows.json", {"instruction": ["a"], "output": ["b"]}, ("dataset",)),
    "list of lists": ("rows.json", [[1, 2], [3, 4]], ("not an object",)),
    "list of strings": ("rows.json", ["a", "b"], ("not an object",)),
    "comma": ("rows.json", '[{"instruction": "a", "output": "b"},\n]', ("rows.json:2",)),
    "no comma": ("rows.json", '[{"instruction": "a", "output": "b"}\n{"instruction": "c"}]', ("rows.json:2",)),
    "cut": ("rows.json", '[{"instruction": "a",\n "output": "b', ("rows.json:2",)),
    "single quotes": ("rows.json", "[{'instruction': 'a'}]", ("rows.json:1",)),
    "latin-1": ("rows.json", '[{"instruction": "caf\xe9", "output": "b"}]'.encode("latin-1"), ("UTF-8", "rows.json:1")),
    "gbk": ("rows.json", '[\n{"instruction": "查询", "output": "b"}]'.encode("gbk"), ("UTF-8", "rows.json:2")),
    "utf-16 cut": ("rows.json", '[{"instruction": "a"}]'.encode("utf-16")[:-1], ("rows.json",)),
    "utf-16 without mark": ("rows.json", '[{"instruction": "a"}]'.encode("utf-16-le"), ("rows.json",)),
    "nul": ("rows.json", b"\0" * 100, ("rows.json",)),
    "control character": ("rows.json", '[{"instruction": "a\x01b", "output": "c"}]', ("rows.json:1",)),
    "nan text": ("rows.json", '[{"instruction": NaN, "output": NaN}]', ("dataset",)),
    "deep": ("rows.json", "[" * 100000, ("rows.json",)),
    "huge number": ("rows.json", '[{"instruction": ' + "9" * 5000 + "}]", ("rows.json",)),
    "lone surrogate": ("rows.json", '[{"instruction": "\\ud800", "output": "\\udfff"}]', ("dataset",)),
    "jsonl line": ("rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": \n', ("rows.jsonl:2",)),
    "jsonl list": ("rows.jsonl", '[{"instruction": "a", "output": "b"}]', ("not an object",)),
    "jsonl pretty": ("rows.jsonl", '{\n "instruction": "a"\n}\n', ("rows.jsonl:1",)),
    "jsonl gbk": ("rows.jsonl", '{"instruction": "查询"}\n'.encode("gbk"), ("rows.jsonl:1",)),
    "jsonl empty": ("rows.jsonl", "", ("0 read",)),
    "jsonl deep": ("rows.jsonl", '{"instruction": ' + "[" * 100000 + "\n", ("rows.jsonl",)),
    "csv empty": ("rows.csv", "", ("0 read",)),
    "csv header alone": ("rows.csv", "instruction,output\n", ("0 read",)),
    "csv ragged": ("rows.csv", "instruction,output\na,b\na,b,c\n", ("rows.csv:3", "3 cells")),
    "csv short": ("rows.csv", "instruction,output\na\n", ("rows.csv:2", "1 cell")),
    "csv quote": ("rows.csv", 'instruction,output\na,"b\nc,d\n', ("rows.csv",)),
    "csv quote inside": ("rows.csv", 'instruction,output\na,"b"c\n', ("rows.csv:2",)),
    "csv semicolons": ("rows.csv", "instruction;output\na;b\n", ("dataset",)),
    "csv columns": ("rows.csv", "question,answer\na,b\n", ("dataset",)),
    "csv twice": ("rows.csv", "instruction,instruction,output\na,b,c\n", ("instruction", "rows.csv:1")),
    "tsv with commas": ("rows.tsv", "instruction,output\na,b\n", ("dataset",)),
    "parquet broken": ("rows.parquet", b"PAR1nothingPAR1", ("rows.parquet",)),
    "parquet cut": ("rows.parquet", parquet(ROWS)[:200], ("rows.parquet",)),
    "parquet text": ("rows.parquet", "a,b\n", ("rows.parquet",)),
    "parquet columns": ("rows.parquet", parquet([{"x": 1}]), ("dataset",)),
    "parquet empty": ("rows.parquet", b"", ("rows.parquet",)),
    "arrow broken": ("rows.arrow", b"ARROW1\0\0nothing", ("rows.arrow",)),
    "arrow empty": ("rows.arrow", b"", ("rows.arrow",)),
    "excel": ("rows.xlsx", b"PK\x03\x04", (".xlsx",)),
    "no suffix": ("rows", "[]", ("rows",)),
    "gzip": ("rows.json.gz", b"\x1f\x8b", (".gz",)),
    "txt empty": ("rows.txt", "", ("0 read",)),
    "wrong columns": ("rows.json", [{"question": "a", "answer": "b"}], ("instruction", "question")),
    "no answers": ("rows.json", [{"instruction": "a"}], ("dataset",)),
    "null answers": ("rows.json", [{"instruction": "a", "output": None}], ("dataset",)),
    "empty answers": ("rows.json", [{"instruction": "a", "output": ""}], ("dataset",)),
    "empty everything": ("rows.json", [{"instruction": "", "output": ""}], ("dataset",)),
    "answers lists": ("rows.json", [{"instruction": "a", "output": ["b"]}], ("not text",)),
    "questions objects": ("rows.json", [{"instruction": {"a": 1}, "output": "b"}], ("not text",)),
    "preferences in sft": ("rows.json", PAIRS, ("dataset",)),
}


@pytest.mark.parametrize("name", list(FILES))
def test_files(place: Place, name: str) -> None:
    file, content, told = FILES[name]
    place.data(content, file)
    place.refused("train", place.file(), told=told)


INFO: dict[str, tuple[Any, tuple[str, ...]]] = {
    "missing name": ({"other": {"file_name": "rows.json"}}, ("unknown data set 'qa'", "other")),
    "near name": ({"qa2": {"file_name": "rows.json"}}, ("did you mean 'qa2'?",)),
    "empty": ("", ("dataset_info.json",)),
    "list": ([{"qa": 1}], ("dataset_info.json",)),
    "comma": ('{"qa": {"file_name": "rows.json"},\n}', ("dataset_info.json:2",)),
    "binary": (b"\xff\xfe\x00\xd8", ("dataset_info.json",)),
    "gbk": ('{"数据": {}}'.encode("gbk"), ("dataset_info.json",)),
    "deep": ("[" * 100000, ("dataset_info.json",)),
    "entry text": ({"qa": "rows.json"}, ("qa",)),
    "entry null": ({"qa": None}, ("qa",)),
    "entry list": ({"qa": ["rows.json"]}, ("qa",)),
    "entry empty": ({"qa": {}}, ("no source",)),
    "no file": ({"qa": {"file_name": "none.json"}}, ("none.json", "does not exist")),
    "file a number": ({"qa": {"file_name": 5}}, ("file_name",)),
    "file a list": ({"qa": {"file_name": ["rows.json"]}}, ("file_name",)),
    "file nul": ({"qa": {"file_name": "a\0.json"}}, ("qa",)),
    "misspelt": ({"qa": {"file_nam": "rows.json"}}, ("file_name",)),
    "formatting": ({"qa": {"file_name": "rows.json", "formatting": "alpacca"}}, ("did you mean 'alpaca'?",)),
    "formatting number": ({"qa": {"file_name": "rows.json", "formatting": 3}}, ("formatting",)),
    "formatting list": ({"qa": {"file_name": "rows.json", "formatting": ["alpaca"]}}, ("formatting",)),
    "formatting of others": ({"qa": {"file_name": "rows.json", "formatting": "sharegpt"}}, ("conversations",)),
    "column": ({"qa": {"file_name": "rows.json", "columns": {"prmpt": "q"}}}, ("did you mean 'prompt'?",)),
    "column not there": ({"qa": {"file_name": "rows.json", "columns": {"prompt": "q"}}}, ("'q'",)),
    "column number": ({"qa": {"file_name": "rows.json", "columns": {"prompt": 3}}}, ("columns",)),
    "column list": ({"qa": {"file_name": "rows.json", "columns": {"prompt": ["a"]}}}, ("columns",)),
    "columns a list": ({"qa": {"file_name": "rows.json", "columns": ["prompt"]}}, ("columns",)),
    "columns text": ({"qa": {"file_name": "rows.json", "columns": "prompt"}}, ("columns",)),
    "tag": ({"qa": {"file_name": "rows.json", "tags": {"rol_tag": "r"}}}, ("did you mean 'role_tag'?",)),
    "tag number": ({"qa": {"file_name": "rows.json", "tags": {"role_tag": 4}}}, ("tags",)),
    "tag list": ({"qa": {"file_name": "rows.json", "tags": {"role_tag": ["a"]}}}, ("tags",)),
    "tags a list": ({"qa": {"file_name": "rows.json", "tags": ["x"]}}, ("tags",)),
    "images": ({"qa": {"file_name": "rows.json", "columns": {"images": "x"}}}, ("images",)),
    "ranking": ({"qa": {"file_name": "rows.json", "ranking": True}}, ("dataset",)),
    "ranking text": ({"qa": {"file_name": "rows.json", "ranking": "maybe"}}, ("ranking",)),
    "num_samples": ({"qa": {"file_name": "rows.json", "num_samples": 0}}, ("num_samples",)),
    "num_samples text": ({"qa": {"file_name": "rows.json", "num_samples": "all"}}, ("num_samples",)),
    "num_samples true": ({"qa": {"file_name": "rows.json", "num_samples": True}}, ("num_samples",)),
    "script": ({"qa": {"script_url": "x.py"}}, ("script_url",)),
    "hub offline": ({"qa": {"hf_hub_url": "someone/something"}}, ("someone/something",)),
    "modelscope": ({"qa": {"ms_hub_url": "someone/something"}}, ("someone/something",)),
    "hub a number": ({"qa": {"hf_hub_url": 3}}, ("hf_hub_url",)),
    "empty folder": ({"qa": {"file_name": "nothing"}}, ("no data files",)),
}


@pytest.mark.parametrize("name", list(INFO))
def test_dataset_info(place: Place, name: str) -> None:
    content, told = INFO[name]
    (place.root / "data" / "nothing").mkdir()
    place.write("data/dataset_info.json", content)
    place.refused("train", place.file(), told=told)


def dialogues(*rows: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"conversations": row, **more} for row in rows]


DIALOGUES: dict[str, tuple[str, list[Any], tuple[str, ...]]] = {
    "order": ("sharegpt", dialogues([CHAT[1], CHAT[0]]), ("rows.json",)),
    "two questions": ("sharegpt", dialogues([CHAT[0], CHAT[0], CHAT[1]]), ("rows.json",)),
    "role": ("sharegpt", dialogues([{"from": "alien", "value": "q"}, CHAT[1]]), ("alien",)),
    "no role": ("sharegpt", dialogues([{"value": "q"}, CHAT[1]]), ("rows.json",)),
    "no content": ("sharegpt", dialogues([{"from": "human"}, CHAT[1]]), ("rows.json",)),
    "content null": ("sharegpt", dialogues([{"from": "human", "value": None}, CHAT[1]]), ("rows.json",)),
    "content list": ("sharegpt", dialogues([{"from": "human", "value": ["q"]}, CHAT[1]]), ("rows.json",)),
    "question alone": ("sharegpt", dialogues([CHAT[0]]), ("rows.json",)),
    "empty": ("sharegpt", dialogues([]), ("rows.json",)),
    "null": ("sharegpt", dialogues(None), ("rows.json",)),
    "text": ("sharegpt", dialogues("hello"), ("rows.json",)),
    "object": ("sharegpt", dialogues({"from": "human"}), ("rows.json",)),
    "strings": ("sharegpt", dialogues(["q", "a"]), ("rows.json",)),
    "openai tags": ("sharegpt", dialogues(OPENAI), ("rows.json",)),
    "openai in messages": ("sharegpt", [{"messages": OPENAI}], ("conversations",)),
    "sharegpt as openai": ("openai", [{"messages": CHAT}], ("rows.json",)),
    "openai role": ("openai", [{"messages": [{"role": "x", "content": "q"}]}], ("rows.json",)),
    "openai pictures": (
        "openai",
        [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, OPENAI[1]]}],
        ("rows.json",),
    ),
    "history": ("alpaca", [{"instruction": "a", "output": "b", "history": "c"}], ("rows.json",)),
    "history triples": ("alpaca", [{"instruction": "a", "output": "b", "history": [[1, 2, 3]]}], ("rows.json",)),
}


@pytest.mark.parametrize("name", list(DIALOGUES))
def test_dialogues(place: Place, name: str) -> None:
    formatting, rows, told = DIALOGUES[name]
    columns = {"history": "history"} if formatting == "alpaca" else {}
    place.data(rows, formatting=formatting, columns=columns)
    place.refused("train", place.file(), told=told)


PREFERENCES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "not ranking": (PAIRS, {}, ("ranking",)),
    "plain rows": (ROWS, {"ranking": True}, ("chosen",)),
    "no rejected": ([{"instruction": "a", "chosen": "b"}], {"ranking": True}, ("rejected",)),
    "rejected null": ([{"instruction": "a", "chosen": "b", "rejected": None}], {"ranking": True}, ("rejected",)),
    "equal": ([{"instruction": "a", "chosen": "b", "rejected": "b"}], {"ranking": True}, ("rows.json",)),
    "lists": ([{"instruction": "a", "chosen": ["b"], "rejected": ["c"]}], {"ranking": True}, ("rows.json",)),
}


@pytest.mark.parametrize("name", list(PREFERENCES))
def test_preferences(place: Place, name: str) -> None:
    rows, entry, told = PREFERENCES[name]
    place.data(rows, **entry)
    place.refused("train", place.file(stage="rm"), told=told)


KEYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown set": ({"dataset": "qaa"}, ("did you mean 'qa'?",)),
    "one of two": ({"dataset": "qa,none"}, ("none",)),
    "eval set": ({"eval_dataset": "none"}, ("none",)),
    "no folder": ({"dataset_dir": "/nowhere/at/all"}, ("/nowhere/at/all",)),
    "folder a file": ({"dataset_dir": "{root}/data/rows.json"}, ("rows.json",)),
    "inline without it": ({"dataset_dir": {"other": {"file_name": "x.json"}}}, ("other",)),
    "online, offline": ({"dataset_dir": "ONLINE", "dataset": "someone/something"}, ("someone/something",)),
    "cutoff too small": ({"cutoff_len": 1}, ("cutoff_len",)),
    "cutoff small": ({"cutoff_len": 3}, ("cutoff_len",)),
    "val_size all": ({"val_size": 0.99}, ("val_size",)),
}


@pytest.mark.parametrize("name", list(KEYS))
def test_keys(place: Place, name: str) -> None:
    keys, told = KEYS[name]
    keys = {k: v.format(root=place.root) if isinstance(v, str) else v for k, v in keys.items()}
    place.refused("train", place.file(**keys), told=told)


def test_a_text_set_for_sft(place: Place) -> None:
    place.data("one line\ntwo lines\n", "rows.txt")
    place.refused("train", place.file(), told="dataset")


def test_unreadable_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is unreadable: the system's refusal is imitated where bytes are read."""
    from pathlib import Path

    read = Path.read_bytes

    def denied(self: Path) -> bytes:
        if self.name == "rows.json" and not self.parent.name.startswith("test"):
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    file = place.file()
    monkeypatch.setattr(Path, "read_bytes", denied)
    from trimtab.cli import main

    assert main(["train", file]) == 2
    error = place.capsys.readouterr().err
    assert "rows.json" in error and "Permission denied" in error and "do:" in error
    assert not (place.root / "out").exists()
