"""dataset_info.json and whole stages: options, mixing, splits, orders, counts and errors."""

from __future__ import annotations

import json

import pytest

from trimtab.data import order, templates
from trimtab.data.info import find
from trimtab.data.inspect import histogram, inspect, spans, summary
from trimtab.data.loader import batches, epoch_order, load_data
from trimtab.data.tokenizer import load_tokenizer
from trimtab.errors import DataError, ModelError
from trimtab.types import Pair, Prompt, TokenRow

pytestmark = pytest.mark.unit


def rows(n, start=0):
    return [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(start, start + n)]


def preferences(n):
    return [{"instruction": f"q{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(n)]


@pytest.fixture
def load(tokenizer, config, tmp_path):
    chatml = templates.get("chatml", tokenizer)

    def run(**given):
        return load_data(config(**{"dataset_dir": str(tmp_path), **given}), tokenizer, chatml)

    return run


def asked(examples):
    return [example.prompt[-1].content for example in examples]


# --------------------------------------------------------------------------------------------------- dataset_info.json


def test_entry_with_every_option(write, tmp_path):
    write("a.json", [])
    entry = {
        "file_name": "a.json",
        "formatting": "sharegpt",
        "ranking": True,
        "subset": "s",
        "split": "test",
        "folder": "f",
        "num_samples": 3,
        "columns": {"messages": "chat", "system": None},
        "tags": {"role_tag": "role"},
    }
    write("dataset_info.json", {"x": entry})
    (spec,) = find(["x"], str(tmp_path))
    assert spec.path == tmp_path / "a.json"
    assert (spec.formatting, spec.layout.ranking, spec.num_samples) == ("sharegpt", True, 3)
    assert (spec.subset, spec.split, spec.folder) == ("s", "test", "f")
    assert spec.layout.columns == {"messages": "chat"}
    assert spec.layout.tags == {"role_tag": "role"}
    assert spec.note == ""


def test_inline_mapping_and_online(write, tmp_path):
    path = write("a.jsonl", '{"instruction": "q"}')
    (spec,) = find(["x"], {"x": {"file_name": str(path)}})
    assert (spec.path, spec.formatting, spec.split) == (path, "alpaca", "train")
    (hub,) = find(["someone/some-set"], "ONLINE")
    assert (hub.hf_hub_url, hub.path) == ("someone/some-set", None)


def test_a_file_without_an_entry_is_read_with_a_note(write, tmp_path, load):
    write("rows.jsonl", "\n".join(json.dumps(row) for row in rows(2)))
    data = load()
    assert len(data.train) == 2
    assert any("no entry in dataset_info.json" in note for note in data.report.notes)
    write("pairs.json", preferences(1))
    assert find(["pairs"], str(tmp_path))[0].layout.ranking
    write("chat.json", [{"messages": []}])
    assert find(["chat.json"], str(tmp_path))[0].formatting == "openai"
    write("doc.txt", "text")
    assert find(["doc"], str(tmp_path))[0].formatting == "text"


def test_a_ranking_without_an_entry_is_guessed(write, tmp_path, load):
    """By its column, as chosen and rejected are; a flag of that name, or a pair beside it, is not one."""
    write("rows.json", [{"instruction": "q", "ranked": ["x", "y", "z"]}])
    data = load(stage="rm", rm_loss="listwise")
    assert [len(row.answers) for row in data.train] == [3]
    assert any("read as alpaca, ranking" in note for note in data.report.notes)
    write("table.csv", 'instruction,ranked\nq,"[""x"", ""y""]"\n')
    assert find(["table"], str(tmp_path))[0].layout.columns == {"ranked": "ranked"}
    write("flag.json", [{"instruction": "q", "output": "a", "ranked": True}])
    assert not find(["flag"], str(tmp_path))[0].layout.ranking
    write("both.json", [{**preferences(1)[0], "ranked": ["x", "y"]}])
    assert find(["both"], str(tmp_path))[0].layout.columns == {}


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"file": "a.json"}, "did you mean 'file_name'"),
        ({"file_name": "b.json"}, "b.json does not exist"),
        ({"formatting": "alpaca"}, "no source"),
        ({"script_url": "x"}, "script_url"),
        ({"file_name": "a.json", "formatting": "alpacca"}, "did you mean 'alpaca'"),
        ({"file_name": "a.json", "columns": {"promt": "q"}}, "did you mean 'prompt'"),
        ({"file_name": "a.json", "tags": {"speaker": "q"}}, "unknown key 'speaker'"),
        ({"file_name": "a.json", "columns": {"images": "pics"}}, "has images"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples is 0"),
    ],
)
def test_entries_that_cannot_be_right(write, tmp_path, entry, what):
    write("a.json", [])
    write("dataset_info.json", {"x": entry})
    with pytest.raises(DataError, match=what) as caught:
        find(["x"], str(tmp_path))
    assert "dataset_info.json: x" in caught.value.where


def test_unknown_names_and_broken_info(write, tmp_path):
    with pytest.raises(DataError, match="unknown data set 'rows'") as caught:
        find(["rows"], str(tmp_path))
    assert str((tmp_path / "dataset_info.json").resolve()) in caught.value.where
    write("dataset_info.json", {"train_clean": {"file_name": "x"}})
    with pytest.raises(DataError, match="did you mean 'train_clean'"):
        find(["train_claen"], str(tmp_path))
    path = write("dataset_info.json", '{\n"x": {,}\n}')
    with pytest.raises(DataError, match="line 2") as caught:
        find(["x"], str(tmp_path))
    assert caught.value.where == f"{path}:2"


def test_hub_sets_without_the_package(load, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as if not installed
    with pytest.raises(DataError, match="needs the package datasets") as caught:
        load(dataset=("someone/some-set",), dataset_dir="ONLINE")
    assert "pip install datasets" in caught.value.remedy
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with pytest.raises(DataError, match="needs the package modelscope"):
        load(dataset=("someone/some-set",), dataset_dir="ONLINE")


def test_hub_sets_through_the_package(load, monkeypatch):
    """The entry's options reach `datasets`, and its failures come back as ours."""
    seen = {}

    class Datasets:
        @staticmethod
        def load_dataset(**given):
            seen.update(given)
            if given["name"] == "broken":
                raise ConnectionError("no route\nto host")
            return rows(2)

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    entry = {"hf_hub_url": "someone/some-set", "subset": "s", "split": "test", "folder": "f"}
    data = load(dataset=("x",), dataset_dir={"x": entry}, hf_hub_token="t")
    assert [str(e.origin) for e in data.train_examples] == ["someone/some-set:1", "someone/some-set:2"]
    assert seen == {
        "path": "someone/some-set", "name": "s", "data_dir": "f", "split": "test", "cache_dir": None, "token": "t"
    }  # fmt: skip
    with pytest.raises(DataError, match="could not be loaded") as caught:
        load(dataset=("x",), dataset_dir={"x": {**entry, "subset": "broken"}})
    assert caught.value.why == "ConnectionError: no route"


# -------------------------------------------------------------------------------------------------------------- stages


def test_sft_rows_and_examples_stay_together(write, load, tokenizer):
    write("rows.json", rows(5))
    data = load()
    assert asked(data.train_examples) == ["q0", "q1", "q2", "q3", "q4"]
    for row, example in zip(data.train, data.train_examples, strict=True):
        assert isinstance(row, TokenRow)
        assert example.response.content in tokenizer.decode(row.token_ids)
    assert (data.report.train, data.report.eval, data.report.dropped) == (5, 0, ())


def test_rm_needs_ranking(write, load):
    write("rows.json", rows(3))
    with pytest.raises(DataError, match="not a set of preferences") as caught:
        load(stage="rm")
    assert '"ranking": true' in caught.value.remedy
    write("pairs.json", preferences(3))
    data = load(stage="rm", dataset=("pairs",))
    assert all(isinstance(row, Pair) for row in data.train)
    assert data.report.scored[0] == len(data.train[0].chosen.scored) + len(data.train[0].rejected.scored)


def test_ranking_data_serves_sft_and_ppo(write, load, tokenizer):
    write("pairs.json", preferences(3))
    sft = load(dataset=("pairs",))
    assert tokenizer.decode([sft.train[0].token_ids[i] for i in sft.train[0].scored]) == "good0<|im_end|>\n"
    ppo = load(stage="ppo", dataset=("pairs",))
    assert [type(p) for p in ppo.train] == [Prompt] * 3
    assert tokenizer.decode(ppo.train[1].token_ids) == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"


def test_ppo_prompts_are_numbered_by_place_and_keep_the_gold_answer(write, load):
    write("rows.json", [*rows(4), {"instruction": "", "output": "x"}, *rows(4, 4)])
    data = load(stage="ppo", val_size=3)
    assert [p.index for p in data.train] == [0, 1, 2, 3, 4]
    assert [p.index for p in data.eval] == [0, 1, 2]
    assert data.eval_prompts == data.eval
    for prompt, example in zip(data.train, data.train_examples, strict=True):
        assert prompt.example is example
        assert prompt.example.response.content == "a" + prompt.example.prompt[-1].content[1:]


def test_pt_every_token_a_label(write, load):
    write("doc.txt", "7777\n\n88\n")
    data = load(stage="pt", dataset=("doc",), cutoff_len=3)
    assert [len(row.token_ids) for row in data.train] == [3, 2, 3]
    assert [example.origin.row for example in data.train_examples] == [1, 1, 3]
    assert data.eval_prompts == []


def test_kto_rows_marked_unwanted_are_not_imitated(write, load):
    write("rows.json", [{**row, "kto_tag": i == 0} for i, row in enumerate(rows(3))])
    data = load()
    assert asked(data.train_examples) == ["q0"]
    assert {row.reason for row in data.report.dropped} == {"the answer is marked as unwanted"}


def test_report_adds_up(write, load):
    write(
        "rows.json",
        [
            *rows(3),
            rows(1)[0],
            {"instruction": "", "output": "x"},
            {"instruction": "q"},
            7,
            {"instruction": "z" * 99, "output": "a"},
        ],
    )
    report = load(cutoff_len=40).report
    assert report.sets[0].read == 8
    assert [(str(d.origin).rpartition(":")[2], d.reason) for d in report.dropped] == [
        ("5", "empty prompt"),
        ("7", "not an object"),
        ("6", "no answer to learn from"),
    ]
    assert report.train == 5 == report.sets[0].read - len(report.dropped)
    assert (report.cut, report.duplicates) == (1, 1)
    assert report.lost > 0
    assert max(report.lengths) == 40
    text = "\n".join(report.lines())
    assert "8 rows read, 3 dropped, 5 to train on" in text
    assert "rows.json:5" in text


def test_columns_that_are_there_but_not_named_are_mentioned(write, load):
    write("rows.json", [{**row, "system": "s"} for row in rows(2)])
    data = load()
    assert data.report.sets[0].unread_columns == ("system",)
    assert any("columns system are not read" in note for note in data.report.notes)


def test_nothing_left_says_the_arithmetic(write, load):
    write("rows.json", [{"question": "q"}, {"question": "r"}])
    write("dataset_info.json", {"rows": {"file_name": "rows.json"}})
    with pytest.raises(DataError, match="2 read - 2 dropped = 0") as caught:
        load()
    assert "2 empty prompt (first: " in caught.value.why
    assert "no column 'instruction'" in caught.value.why
    write("none.json", [])
    with pytest.raises(DataError, match="0 read - 0 dropped = 0"):
        load(dataset=("none",))


@pytest.mark.parametrize("stage", ["sft", "pt", "dpo", "kto"])
def test_no_room_points_at_cutoff_len(write, load, stage):
    labelled = [{**row, "kto_tag": True} for row in rows(2)]
    write("rows.json", preferences(2) if stage == "dpo" else labelled)
    with pytest.raises(DataError, match="2 read - 2 dropped = 0") as caught:
        load(stage=stage, cutoff_len=1)
    assert "raise cutoff_len, which is 1" in caught.value.remedy
    assert "formatting" not in caught.value.remedy
    write("bad.json", [{"x": 1}])  # and where anything else is wrong, it does not
    with pytest.raises(DataError) as caught:
        load(stage=stage if stage != "dpo" else "sft", dataset=("rows", "bad"), cutoff_len=1)
    assert "columns" in caught.value.remedy


def test_a_text_of_one_token_is_counted(write, config, make, special, tmp_path):
    plain = make(special["chatml"], None, None)  # no end-of-text token that would be the second
    write("rows.jsonl", '{"text": "a"}\n{"text": "a longer text"}\n')
    report = load_data(config(stage="pt", dataset_dir=str(tmp_path)), plain, templates.get("chatml", plain)).report
    assert (report.train, [dropped.reason for dropped in report.dropped]) == (1, ["a text of one token"])


# ------------------------------------------------------------------------------------------- sizes, splits and mixtures


def test_max_samples_cuts_each_set(write, load):
    write("a.json", rows(5))
    write("b.json", rows(5, 10))
    assert asked(load(dataset=("a", "b"), max_samples=2).train_examples) == ["q0", "q1", "q10", "q11"]
    assert asked(load(dataset="a, b", max_samples=1).train_examples) == ["q0", "q10"]


def test_num_samples(write, load):
    write("a.json", rows(5))
    some = {"a": {"file_name": "a.json", "num_samples": 3}}
    write("dataset_info.json", some)
    first = asked(load(dataset=("a",)).train_examples)
    assert len(set(first)) == 3
    assert first == asked(load(dataset=("a",)).train_examples)
    some["a"]["num_samples"] = 12  # two whole rounds and two more
    write("dataset_info.json", some)
    many = asked(load(dataset=("a",)).train_examples)
    assert sorted(many.count(f"q{i}") for i in range(5)) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize(("val_size", "held"), [(0.25, 3), (0.3, 3), (4, 4), (1, 1), (0.01, 1)])
def test_val_size(write, load, val_size, held):
    write("rows.json", rows(10))
    data = load(val_size=val_size)
    assert (len(data.train), len(data.eval)) == (10 - held, held)
    together = asked(data.train_examples) + asked(data.eval_examples)
    assert sorted(together) == [f"q{i}" for i in range(10)]
    assert [p.example for p in data.eval_prompts] == data.eval_examples
    assert asked(load(val_size=val_size).eval_examples) == asked(data.eval_examples)
    assert asked(load(val_size=4, seed=1).eval_examples) != asked(load(val_size=4, data_seed=2, seed=1).eval_examples)


def test_val_size_must_leave_both_parts(write, load):
    write("rows.json", rows(3))
    with pytest.raises(DataError, match="leaves 0 rows to train on and holds out 3"):
        load(val_size=3)


def test_eval_dataset_and_overlap(write, load):
    write("rows.json", rows(3))
    write("held.json", rows(2, 2))
    data = load(eval_dataset=("held",))
    assert asked(data.eval_examples) == ["q2", "q3"]
    assert data.report.overlap == 1  # q2 is trained on as well
    assert load(dataset=(), eval_dataset=("held",)).train == []
    with pytest.raises(DataError, match="val_size is 1 and eval_dataset is held"):
        load(eval_dataset=("held",), val_size=1)
    write("bad.json", [{"x": 1}])
    with pytest.raises(DataError, match="no rows left"):
        load(eval_dataset=("bad",))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("interleave_under", [(0, 0), (1, 0), (0, 1), (1, 1)]),
        ("interleave_over", [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 2)]),
        ("interleave_once", [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)]),
    ],
)
def test_interleave_in_turn(strategy, expected):
    assert order.interleave([2, 3], strategy, None, seed=0) == expected


def test_interleave_with_probabilities():
    """Under ends with the first empty set; over when each was used up; once uses every row once; shares follow probs."""
    under = order.interleave([1000, 1000], "interleave_under", [0.8, 0.2], seed=3)
    first = sum(which == 0 for which, _ in under)
    assert first == 1000
    assert 0.75 < first / len(under) < 0.85
    over = order.interleave([5, 50], "interleave_over", [0.5, 0.5], seed=3)
    assert {row for which, row in over if which == 1} == set(range(50))
    assert sum(which == 0 for which, _ in over) > 5
    once = order.interleave([5, 50], "interleave_once", [0.9, 0.1], seed=3)
    assert sorted(once) == [(0, i) for i in range(5)] + [(1, i) for i in range(50)]
    assert once == order.interleave([5, 50], "interleave_once", [0.9, 0.1], seed=3)
    assert once != order.interleave([5, 50], "interleave_once", [0.9, 0.1], seed=4)


def test_mix_strategy_in_a_stage(write, load):
    write("a.json", rows(2))
    write("b.json", rows(3, 10))
    data = load(dataset=("a", "b"), mix_strategy="interleave_once")
    assert asked(data.train_examples) == ["q0", "q10", "q1", "q11", "q12"]
    with pytest.raises(DataError, match="interleave_probs has 1 numbers for 2"):
        load(dataset=("a", "b"), mix_strategy="interleave_once", interleave_probs=(1.0,))
    write("b.json", [{"x": 1}])
    with pytest.raises(DataError, match="'b' has no usable rows"):
        load(dataset=("a", "b"), mix_strategy="interleave_under")


def test_epoch_orders_are_pure_permutations():
    assert epoch_order(5, seed=1, epoch=0, shuffle=False) == [0, 1, 2, 3, 4]
    first = epoch_order(100, seed=1, epoch=0)
    assert sorted(first) == list(range(100))
    assert first == epoch_order(100, seed=1, epoch=0)
    assert first != epoch_order(100, seed=1, epoch=1) != epoch_order(100, seed=2, epoch=1)
    assert epoch_order(0, 1, 0) == []
    # Recorded: a resumed run on another version must find the same order.
    assert epoch_order(8, seed=42, epoch=0) == [7, 1, 6, 4, 3, 5, 0, 2]


def test_batches_keep_the_last_partial_one():
    found = batches(7, 3, seed=1, epoch=2)
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert [index for batch in found for index in batch] == epoch_order(7, 1, 2)
    assert batches(2, 8, 0, 0, shuffle=False) == [[0, 1]]


# ------------------------------------------------------------------------------------------------------------- inspect


def test_summary_figures(write, load):
    write("rows.json", [*rows(4), rows(1)[0], {"instruction": ""}])
    data = load(val_size=1)
    figures = summary(data)
    assert (figures.read, figures.dropped, figures.train, figures.eval, figures.duplicates) == (6, 1, 4, 1, 1)
    ((reason, count, first),) = figures.reasons
    assert (reason, count) == ("empty prompt", 1)
    assert first[0].endswith("rows.json:6")
    assert figures.tokens == sum(len(row.token_ids) for row in (*data.train, *data.eval))
    assert figures.scored_share == pytest.approx(sum(len(r.scored) for r in (*data.train, *data.eval)) / figures.tokens)
    assert sum(count for _, _, count in figures.histogram) == 5


def test_histogram_bins_are_round_and_complete():
    assert histogram(()) == ()
    assert histogram((7,)) == ((7, 7, 1),)
    # 3..118 spans 12 bins of ten: 0-9 ... 110-119
    found = histogram((3, 9, 10, 118))
    assert [b for b in found if b[2]] == [(0, 9, 2), (10, 19, 1), (110, 119, 1)]
    assert len(found) == 12


def test_spans_mark_the_trained_text(write, load, tokenizer):
    write("rows.json", rows(1))
    assert spans(load().train[0], tokenizer) == [
        ("<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n", False),
        ("a0<|im_end|>\n", True),
    ]
    assert [trained for _, trained in spans(load(stage="ppo").train[0], tokenizer)] == [False]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "pt"])
def test_inspect_prints(write, tokenizer, config, tmp_path, stage):
    from rich.console import Console

    write("pairs.json", [*preferences(3), {"instruction": ""}])
    console = Console(record=True, width=100, quiet=False, file=(tmp_path / "out.txt").open("w", encoding="utf-8"))
    template = templates.get("chatml", tokenizer)
    inspect(config(stage=stage, dataset=("pairs",), dataset_dir=str(tmp_path)), tokenizer, template, console=console)
    text = console.export_text()
    console.file.close()
    for word in ("pairs.json", "empty prompt", "lengths", "cut to cutoff_len", "q0"):
        assert word in text


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_load_tokenizer_gives_a_pad_token_and_changes_no_ids(tokenizer, tmp_path):
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "tok")
    loaded = load_tokenizer(tmp_path / "tok")
    assert loaded.pad_token == "<|endoftext|>"
    assert len(loaded) == len(tokenizer)
    text = "<|im_start|>user\n问?<|im_end|>\n"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert loaded.chat_template == tokenizer.chat_template


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        load_tokenizer(tmp_path / "nothing")
    assert "model_name_or_path" in caught.value.remedy
