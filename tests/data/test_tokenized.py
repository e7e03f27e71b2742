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


def refused(load, **given):
    with pytest.raises(DataError, match="made of something else") as caught:
        load(**given)
    return caught.value.why


def test_a_file_of_the_same_name_elsewhere_is_refused_unless_it_is_equal(load, write, tmp_path):
    load()
    there = write("elsewhere/rows.json", ROWS)
    assert len(load(dataset_dir=str(there.parent)).train) == 9
    write("elsewhere/rows.json", [{**row, "output": "no"} for row in ROWS])
    assert f"{there} has changed since, or is not the file" in refused(load, dataset_dir=str(there.parent))


def test_another_entry_for_the_same_file_is_refused_even_when_the_file_is_gone(load, write, tmp_path):
    entry = {"file_name": "rows.json"}
    write("dataset_info.json", {"rows": entry})
    load()
    write("dataset_info.json", {"rows": {**entry, "columns": {"prompt": "output", "response": "instruction"}}})
    assert "columns of data set 'rows' differs: {} there, {'prompt': 'output'" in refused(load)
    (tmp_path / "rows.json").unlink()
    assert "columns of data set 'rows' differs" in refused(load)
    write("dataset_info.json", {"rows": entry})
    assert len(load().train) == 9


def test_a_file_more_in_a_folder_is_refused(load, write):
    write("many/a.json", ROWS)
    write("many/notes.md", "no data")
    write("dataset_info.json", {"many": {"file_name": "many"}})
    load(dataset=("many",))
    write("many/notes.md", "nor now")
    load(dataset=("many",))
    write("many/b.json", ROWS)
    assert "many has changed since" in refused(load, dataset=("many",))


def test_two_words_that_change_places_are_another_tokenizer(config, make, special, jinja, write, tmp_path):
    write("rows.json", ROWS)
    first = make(special["chatml"], "<|endoftext|>", jinja["chatml"])
    settings = config(dataset_dir=str(tmp_path), tokenized_path=str(tmp_path / "saved"))
    load_data(settings, first, templates.get("chatml", first))
    first("long " * 9, truncation=True, max_length=4)  # leaves its mark in the tokenizer
    load_data(settings, first, templates.get("chatml", first))
    core = json.loads(first.backend_tokenizer.to_str())
    words = core["model"]["vocab"]
    words["Z"], words["Y"] = words["Y"], words["Z"]  # neither is in the texts that are encoded to tell templates apart
    other = type(first)(tokenizer_object=core_of(core), eos_token="<|endoftext|>")
    with pytest.raises(DataError, match="made of something else") as caught:
        load_data(settings, other, templates.get("chatml", other))
    assert caught.value.why == "tokenizer differs"


def core_of(core):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(core))


def test_a_chat_template_that_differs_between_turns_only_is_refused(config, make, special, jinja, write, tmp_path):
    write("rows.json", ROWS)
    between = "{% if not loop.first and m['role'] == 'user' %}\n{% endif %}<|im_start|>{{"
    settings = config(dataset_dir=str(tmp_path), tokenized_path=str(tmp_path / "saved"))
    ours, other = (
        make(special["chatml"], "<|endoftext|>", text)
        for text in (jinja["chatml"], jinja["chatml"].replace("<|im_start|>{{", between, 1))
    )
    load_data(settings, ours, templates.get("auto", ours))
    with pytest.raises(DataError, match="made of something else") as caught:
        load_data(settings, other, templates.get("auto", other))
    assert caught.value.why == "chat template differs"


def test_another_system_prompt_is_named(config, tokenizer, write, tmp_path):
    write("rows.json", ROWS)
    settings = config(dataset_dir=str(tmp_path), tokenized_path=str(tmp_path / "saved"))
    load_data(settings, tokenizer, templates.get("chatml", tokenizer, default_system="a"))
    with pytest.raises(DataError) as caught:
        load_data(settings, tokenizer, templates.get("chatml", tokenizer, default_system="b"))
    assert caught.value.why == "default_system differs: 'a' there, 'b' here"


def test_a_folder_of_something_else(load, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(DataError, match="does not hold tokenized rows"):
        load()
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["state.json"]
