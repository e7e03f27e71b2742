"""`streaming`: all rows once a pass, the same for the same seed, from anywhere again, and never the whole file in memory."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from trimtab.config import load as load_config
from trimtab.data import files, stream, templates
from trimtab.data.inspect import show
from trimtab.data.loader import load_data
from trimtab.errors import ConfigError, DataError

ROWS = [{"instruction": f"问题 {n}", "output": f"答 {n}"} for n in range(20)]


@pytest.fixture
def load(config, write, tokenizer):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    lines.insert(5, '{"instruction": "no answer"}')
    folder = write("rows.jsonl", "\r\n".join(lines)).parent

    def go(**given):
        settings = {
            "dataset_dir": str(folder),
            "streaming": True,
            "buffer_size": 6,
            "disable_shuffling": False,
            **given,
        }
        return load_data(config(**settings), tokenizer, templates.get("chatml", tokenizer))

    return go


def taken(data, count):
    return [example.origin.row for example in data.stream.take(count)[1]]


def test_every_row_once_a_pass_in_another_order_each(load):
    data = load()
    passes = [taken(data, 20) for _ in range(3)]
    usable = [row for row in range(1, 22) if row != 6]
    assert [sorted(one) for one in passes] == [usable] * 3
    assert len({tuple(one) for one in passes}) == 3
    assert passes[0] != usable
    assert [taken(load(), 20), taken(load(seed=1), 20)] == [passes[0], taken(load(seed=1), 20)]
    assert taken(load(seed=1), 20) != passes[0]
    assert taken(load(disable_shuffling=True), 20) == usable
    assert all(row <= place + 7 for place, row in enumerate(passes[0]))  # none is drawn before it can be in the buffer


def test_the_rows_are_those_of_the_whole_set(load):
    whole = load(streaming=False)
    known = {example.origin: row for row, example in zip(whole.train, whole.train_examples, strict=True)}
    rows, examples = load().stream.take(20)
    assert rows == [known[example.origin] for example in examples]


def test_rows_that_cannot_be_used_are_said_a_few_times(load):
    data = load()
    data.stream.take(100)
    assert len(data.stream.complaints) == 3
    assert "rows.jsonl:6" in data.stream.complaints[0] and "no answer" in data.stream.complaints[0]
    assert set(data.stream.dropped) == {"no answer to learn from"}
    assert data.stream.dropped.total() in (4, 5)  # of five passes the last may stop before it


def test_a_run_does_not_begin_with_counts_of_nothing(load):
    first = load().report.lines()[0]
    assert first == "data: rows to train on are read as they come"
    assert load(val_size=8).report.lines()[0] == f"{first}, 7 held out (1 dropped)"
    out = io.StringIO()
    show(load(), None, rows=0, console=Console(file=out, width=200))
    assert "as they come, 0 held out" in out.getvalue() and "0 read" not in out.getvalue()


@pytest.mark.parametrize("stage", ["sft", "pt"])
@pytest.mark.parametrize("before", [0, 1, 7, 19, 20, 21, 45])
def test_from_anywhere_again(load, stage, before):
    """pt with short pieces: a checkpoint may stand in the middle of a text."""
    given = {"stage": stage, "cutoff_len": 4 if stage == "pt" else 64}
    straight = load(**given)
    straight.stream.take(before)
    state = straight.stream.state()
    ahead = straight.stream.take(30)
    resumed = load(**given)
    resumed.stream.seek(json.loads(json.dumps(state)))
    assert resumed.stream.take(30) == ahead


def test_held_out_rows_are_the_first_and_never_drawn(load):
    data = load(val_size=4)
    assert [example.origin.row for example in data.eval_examples] == [1, 2, 3, 4]
    assert not {1, 2, 3, 4} & set(taken(data, 60))


def test_a_set_without_rows_ends_with_the_reason(load, write):
    write("rows.jsonl", '{"instruction": "no answer"}\n')
    with pytest.raises(DataError, match="a whole pass over the data") as caught:
        load().stream.take(1)
    assert "1 no answer to learn from" in caught.value.why


def test_no_more_of_the_file_is_read_than_needed(load, monkeypatch):
    read = []
    lines = files.read_lines

    def counted(path):
        for line in lines(path):
            read.append(line)
            yield line

    monkeypatch.setattr(files, "read_lines", counted)
    load(buffer_size=3).stream.take(2)
    assert len(read) <= 5 + 1  # three in the buffer, two drawn; one more to guess the columns


def test_shuffling_through_a_buffer():
    assert list(stream.shuffled(iter(range(5)), 1, 0, 0)) == [0, 1, 2, 3, 4]
    assert sorted(stream.shuffled(iter(range(50)), 7, 3, 0)) == list(range(50))
    assert next(stream.shuffled(iter(range(10**9)), 4, 3, 0)) < 4  # without end, and still an answer


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_are_those_of_the_whole_text(tmp_path, ending, encoding):
    path = tmp_path / "t.txt"
    path.write_bytes(ending.join(["一", "", "two\u2028three", "four"]).encode(encoding))
    assert list(files.read_lines(path)) == files.read_text(path).split("\n") == ["一", "", "two\u2028three", "four"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_steps": -1}, "max_steps is missing"),
        ({"val_size": 0.1}, "val_size: 0.1 of a stream"),
        ({"neat_packing": True}, "neat_packing: with streaming"),
        ({"tokenized_path": "x"}, "tokenized_path: with streaming"),
        ({"mix_strategy": "interleave_under"}, "mix_strategy"),
    ],
)
def test_what_a_stream_cannot_do(given, words):
    keys = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": "m",
        "dataset": "d",
        "output_dir": "o",
        "streaming": True,
    }
    load_config({**keys, "max_steps": 5})
    with pytest.raises(ConfigError, match=words):
        load_config({**keys, "max_steps": 5, **given})
