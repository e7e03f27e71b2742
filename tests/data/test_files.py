"""Files to rows: every kind, byte-order marks, line ends, numbers from 1, and errors that name file and line."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from trimtab.data.files import read_rows
from trimtab.errors import DataError

pytestmark = pytest.mark.unit

TWO = [{"instruction": "问题", "output": "SELECT 1"}, {"instruction": "b", "output": ""}]


def both(path):
    return [(origin.row, row) for origin, row in read_rows(path)]


def test_json_list(write):
    path = write("a.json", TWO)
    found = list(read_rows(path))
    assert [row for _, row in found] == TWO
    assert str(found[1][0]) == f"{path}:2"


def test_json_that_holds_lines(write):
    assert both(write("a.json", '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_json_of_one_object_is_one_row(write):
    assert both(write("a.json", {"a": 1})) == [(1, {"a": 1})]


def test_jsonl_skips_blank_lines_and_keeps_line_separators_inside_strings(write):
    assert both(write("a.jsonl", '{"a": "x\u2028y"}\n\n{"a": 2}')) == [(1, {"a": "x\u2028y"}), (2, {"a": 2})]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_encodings_and_line_ends(write, codec, end):
    text = end.join(['{"问": "答"}', '{"问": "二"}', ""])
    assert both(write("a.jsonl", text.encode(codec))) == [(1, {"问": "答"}), (2, {"问": "二"})]


def test_csv_with_chinese_columns_bom_crlf_quotes_and_newlines(write):
    text = '\ufeff问题,答案\r\n"有几个,镇?","SELECT ""x""\r\nFROM t"\r\n二,\r\n'
    assert both(write("a.csv", text)) == [
        (1, {"问题": "有几个,镇?", "答案": 'SELECT "x"\nFROM t'}),
        (2, {"问题": "二", "答案": ""}),
    ]


def test_tsv(write):
    assert both(write("a.tsv", "a\tb\n1,5\t2\n")) == [(1, {"a": "1,5", "b": "2"})]


def test_txt_is_one_row_per_line(write):
    assert both(write("a.txt", "one\r\n\r\nthree\r\n")) == [(1, {"text": "one"}), (3, {"text": "three"})]


def test_parquet_and_arrow(tmp_path):
    table = pyarrow.Table.from_pylist(TWO)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, opener in (("f.arrow", pyarrow.ipc.new_file), ("s.arrow", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as sink, opener(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "f.arrow", "s.arrow"):
        assert both(tmp_path / name) == [(1, TWO[0]), (2, TWO[1])]


def test_folder_reads_its_data_files_by_name(write, tmp_path):
    write("set/b.jsonl", '{"n": 2}')
    write("set/a.json", [{"n": 0}, {"n": 1}])
    write("set/README.md", "not data")
    found = list(read_rows(tmp_path / "set"))
    assert [row["n"] for _, row in found] == [0, 1, 2]
    assert found[2][0].row == 1


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', 3),
        ("a.json", "[1]]", 1),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', 3),
        ("a.csv", 'a,b\n1,2\n"x\ny",3\n1,2,3\n', 5),
        ("a.csv", 'a,b\n1,"2" x\n', 2),
        ("a.json", b'[{"a": "\n\xce\xca"}]', 2),
    ],
)
def test_malformed_files_name_file_and_line(write, name, content, line):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}:{line}"
    assert f"line {line}" in caught.value.what
    assert caught.value.remedy


def test_missing_unknown_and_empty(write, tmp_path):
    with pytest.raises(DataError, match="not found") as caught:
        list(read_rows(tmp_path / "no.json"))
    assert str((tmp_path / "no.json").resolve()) in caught.value.where
    with pytest.raises(DataError, match="unknown kind"):
        list(read_rows(write("a.xls", "")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        list(read_rows(tmp_path / "empty"))
    assert both(write("a.csv", "")) == []
