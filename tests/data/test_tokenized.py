"""`tokenized_path`: what is loaded is what was encoded, and nothing made of other data or settings is used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trimtab.data import loader, templates
from trimtab.data.loader import load_data
from trimtab.errors import DataError

ROWS = [{"instruction": f"问题 {n}", "output": f"答 {n}", "difficulty": n} for n in range(9)]
PAIRS = [{"instruction": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(5)]
LABELLED = [{"instruction": f"q {n}", "output": "a", "kto_tag": n % 2 == 0} for n in range(5)]


@pytest.fixture
def load(config, write, tokenizer, tmp_path):
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("labelled", LABELLED)):
        write(f"{name}.json", rows)

    def go(name="chatml", **given):
        settings = {"dataset_dir": str(tmp_path), "tokenized_path": str(tmp_path / "saved"), **given}
        return load_data(config(**settings), tokenizer, templates.get(name, tokenizer))

    return go


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"val_size": 2, "neat_packing": True, "cutoff_len": 60},
        {"stage": "pt"},
        {"stage": "ppo", "val_size": 3},
        {"stage": "rm", "dataset": ("pairs",), "val_size": 1},
        {"stage": "kto", "dataset": ("labelled",)},
    ],
)
def test_loaded_is_what_was_encoded(load, monkeypatch, given):
    plain = load(tokenized_path=None, **given)
    made = load(**given)
    assert made == plain
    monkeypatch.setattr(loader, "read_data", lambda *rest: pytest.fail("encoded again"))
    found = load(**given)
    assert "tokenized rows of" in found.report.notes[-1]
    assert replace(found, report=plain.report) == plain
    assert replace(found.report, notes=plain.report.notes) == plain.report


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cutoff_len": 100}, "cutoff_len differs: 2048 there, 100 here"),
        ({"name": "qwen"}, "template differs"),
        ({"stage": "ppo"}, "stage differs"),
        ({"val_size": 2}, "val_size differs"),
        ({"seed": 1}, "seed differs"),
        ({"mask_history": True}, "mask_history differs"),
    ],
)
def test_other_settings_are_refused(load, changed, why):
    load()
    with pytest.raises(DataError, match="made of something else") as caught:
        load(**changed)
    assert why in caught.value.why


def test_another_tokenizer_and_changed_data_are_refused(load, make, special, jinja, config, write, tmp_path):
    load()
    other = make([*special["chatml"], "<|new|>"], "<|endoftext|>", jinja["chatml"])
    settings = config(dataset_dir=str(tmp_path), tokenized_path=str(tmp_path / "saved"))
    with pytest.raises(DataError, match="made of something else"):
        load_data(settings, other, templates.get("chatml", other))
    write("rows.json", ROWS[:8])
    with pytest.raises(DataError, match="made of something else") as caught:
        load()
    assert "rows.json has changed since" in caught.value.why
    (tmp_path / "rows.json").unlink()  # carried to a machine without the data
    assert len(load().train) == 9


def test_a_folder_of_something_else(load, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(DataError, match="does not hold tokenized rows"):
        load()
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["state.json"]
