"""Formats into one another and back; rows that a format cannot hold; files of every kind."""

from __future__ import annotations

import json

import pytest

from trimtab.cli import main
from trimtab.data import source
from trimtab.data.convert import convert
from trimtab.data.files import read_rows
from trimtab.data.formats import FORMATS
from trimtab.data.formats.layout import Layout
from trimtab.data.info import find
from trimtab.data.write import write_rows

ALPACA = [
    {"instruction": "问一", "input": "更多", "output": "答一", "难度": 3},
    {"instruction": "two", "output": "b", "system": "Be brief.", "history": [["q", "a"], ["r", "c"]]},
]
RANKED = [{"instruction": "q", "input": "", "chosen": "好", "rejected": "bad", "id": 7}]
CALLING = [
    {
        "conversations": [
            {"from": "human", "value": "rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "x"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "no"},
        ],
        "tools": '[{"name": "weather"}]',
    }
]


@pytest.fixture
def spec(write):
    def find(rows, name="rows.json", **given):
        path = write(name, rows)
        options = {"dataset_dir": str(path.parent), "formatting": None, "ranking": None, "columns": ()}
        return source.find(str(path), **{**options, **given})

    return find


def meaning(rows, entry):
    """What trimtab reads in rows with the entry that was printed for them."""
    layout = Layout(ranking=entry.get("ranking", False), columns=entry["columns"])
    read = FORMATS.load(entry["formatting"])
    examples = [read(row, layout, None) for row in rows]
    return [(e.prompt, e.response, e.chosen, e.rejected, e.label, e.tools) for e in examples]


def judged(rows, spec):
    """What a reward model learns from in rows read with the columns of a data set."""
    examples = [FORMATS.load(spec.formatting)(row, spec.layout, None) for row in rows]
    return [(e.prompt, e.response, e.chosen, e.rejected, e.ranked, e.margin, e.score) for e in examples]


NAMED = ("system=system", "history=history", "tools=tools")


@pytest.mark.parametrize("rows", [ALPACA, RANKED])
@pytest.mark.parametrize("target", ["sharegpt", "openai", "alpaca"])
def test_there_and_back_means_the_same(spec, rows, target):
    first = spec(rows, columns=NAMED)
    there = convert(first, target)
    assert there.dropped == ()
    options = tuple(f"{meaning}={name}" for meaning, name in there.entry["columns"].items())
    back = convert(spec(list(there.rows), "there.json", formatting=target, columns=options), "alpaca")
    layout = Layout(ranking=rows is RANKED, columns={w.split("=")[0]: w.split("=")[1] for w in NAMED})
    read = FORMATS.load("alpaca")
    expected = [read(row, layout, None) for row in rows]
    want = [(e.prompt, e.response, e.chosen, e.rejected, e.label, e.tools) for e in expected]
    assert meaning(there.rows, there.entry) == want
    assert meaning(back.rows, back.entry) == want
    assert there.entry.get("ranking", False) == (rows is RANKED)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("target", ["sharegpt", "openai", "alpaca"])
def test_preferences_mean_the_same_in_every_kind_of_file(spec, tmp_path, target, suffix):
    """Answers are message objects, which a table holds as JSON text; an answer that is JSON itself stays what it is."""
    answers = ["好", '{"role": "x"}', "[1]", '{"name": "f", "content": 1}', 'two\n"lines"\t', "[" * 100_000]
    rows = [{"instruction": "q", "chosen": answer, "rejected": "bad"} for answer in answers]
    there = convert(spec(rows), target)
    path = tmp_path / f"there{suffix}"
    write_rows(path, there.rows)
    read = [row for _, row in read_rows(path)]
    assert meaning(read, there.entry) == meaning(there.rows, there.entry)
    assert [chosen.content for _, _, chosen, _, _, _ in meaning(read, there.entry)] == answers


def test_a_call_as_the_better_answer_survives_a_table(spec, tmp_path):
    call = {"from": "function_call", "value": '[{"name": "weather", "arguments": {}}]'}
    row = {"conversations": CALLING[0]["conversations"][:1], "chosen": call, "rejected": {"from": "gpt", "value": "no"}}
    there = convert(spec([row]), "openai")
    write_rows(tmp_path / "there.csv", there.rows)
    ((_, _, chosen, rejected, _, _),) = meaning([r for _, r in read_rows(tmp_path / "there.csv")], there.entry)
    assert (chosen.role, json.loads(chosen.content)) == ("function", json.loads(call["value"]))
    assert (rejected.role, rejected.content) == ("assistant", "no")


RANKINGS = [{"instruction": "q", "best": ["x", "y", "z"]}, {"instruction": "r", "best": ["好", "b"]}]
MARGINS = [
    {"instruction": "q", "chosen": "a", "rejected": "b", "lead": 0.5},
    {"instruction": "r", "chosen": "a", "rejected": "b", "lead": None},
]
SCORES = [{"instruction": "q", "output": "a", "worth": -1.5}, {"instruction": "q", "output": "b", "worth": 0.0}]


@pytest.mark.parametrize(
    ("rows", "options", "entry"),
    [
        (RANKINGS, {"columns": ("ranked=best",), "ranking": True}, {"ranked": "ranked"}),
        (MARGINS, {"columns": ("margin=lead",)}, {"margin": "margin", "chosen": "chosen"}),
        (SCORES, {"columns": ("score=worth",)}, {"score": "score"}),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("target", ["sharegpt", "openai", "alpaca"])
def test_rankings_margins_and_scores_survive(spec, tmp_path, rows, options, entry, target, suffix):
    first = spec(rows, **options)
    there = convert(first, target)
    assert entry.items() <= there.entry["columns"].items()
    write_rows(tmp_path / f"there{suffix}", there.rows)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": f"there{suffix}", **there.entry}}))
    (second,) = find(["x"], str(tmp_path))
    assert judged([row for _, row in read_rows(second.path)], second) == judged(rows, first)


def test_a_ranking_with_a_call_has_no_place_in_alpaca(spec):
    answers = [{"from": "gpt", "value": "a"}, {"from": "function_call", "value": "{}"}, {"from": "gpt", "value": "c"}]
    row = {"conversations": [{"from": "human", "value": "q"}], "ranked": answers}
    lost = convert(spec([row], columns=("ranked=ranked",), ranking=True), "alpaca")
    assert [dropped.reason for dropped in lost.dropped] == ["a function turn"]


def test_a_column_carried_along_is_not_read_as_one_of_ours(spec):
    """`score` and `system` mean nothing to the source, so the entry does not name them; nor do they mix with what it writes."""
    row = {"instruction": "q", "output": "a", "score": "high", "system": "s"}
    assert convert(spec([row]), "openai").entry["columns"] == {"messages": "messages"}
    assert convert(spec([row]), "openai").rows[0]["score"] == "high"
    mixed = [{**row, "setting": "one"}, {**row, "setting": ""}]
    there = convert(spec(mixed, columns=("system=setting",)), "alpaca")
    assert [prompt[0].content for prompt, *_ in meaning(there.rows, there.entry)] == ["one", "q"]


def test_unknown_columns_are_carried_along(spec):
    assert convert(spec(ALPACA, columns=NAMED), "openai").rows[0]["难度"] == 3
    assert convert(spec(RANKED), "sharegpt").rows[0]["id"] == 7


def test_exact_rows(spec):
    assert convert(spec(RANKED), "sharegpt").rows[0] == {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "bad"},
        "id": 7,
    }
    assert convert(spec(ALPACA, columns=NAMED), "openai").rows[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "b"},
    ]


def test_tools_and_calls(spec):
    there = convert(spec(CALLING, columns=("tools=tools",)), "openai")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "x"}}}
    assert there.rows[0]["messages"][1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert there.rows[0]["messages"][2] == {"role": "tool", "content": "sunny"}
    lost = convert(spec(CALLING), "alpaca")
    assert lost.rows == ()
    assert lost.dropped[0].reason == "a function turn"


def test_a_label_survives(spec):
    rows = [{"instruction": "q", "output": "a", "kto_tag": True}, {"instruction": "r", "output": "b", "kto_tag": False}]
    there = convert(spec(rows), "openai")
    assert [row["kto_tag"] for row in there.rows] == [True, False]
    assert there.entry["columns"]["kto_tag"] == "kto_tag"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_is_read_back(tmp_path, suffix):
    rows = [{"a": '一,"二"\n三', "b": "x"}, {"a": "\t", "b": ""}]
    path = tmp_path / f"rows{suffix}"
    write_rows(path, rows)
    assert [row for _, row in read_rows(path)] == rows
    assert list(tmp_path.iterdir()) == [path]


def test_the_command(write, capsys, tmp_path):
    path = write("rows.json", RANKED)
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(path), "--to", "sharegpt", "--output", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["chosen"]["value"] == "好"
    assert '"ranking": true' in capsys.readouterr().out
    assert main(["data", "convert", str(path), "--to", "sharegtp", "--output", str(tmp_path / "b.json")]) == 2
    assert "did you mean 'sharegpt'" in capsys.readouterr().err
    assert main(["data", "convert", str(path), "--to", "openai", "--output", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
