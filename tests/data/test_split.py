"""Parts: every row once, sizes kept, no group on both sides, the same for the same seed."""

from __future__ import annotations

import pytest

from trimtab.cli import main
from trimtab.data import source
from trimtab.data.files import read_rows
from trimtab.data.split import split
from trimtab.errors import DataError

ROWS = [
    {"instruction": f"{year}年{city}的销售额？", "output": f"SELECT sum({column}) FROM s WHERE y = {year}", "库": city}
    for column in ("a", "b", "c", "d", "e")
    for city in ("北京", "上海", "广州")
    for year in (2020, 2021, 2022, 2023)
]


@pytest.fixture
def spec(write):
    path = write("rows.json", ROWS)
    return source.find(str(path), dataset_dir=str(path.parent), formatting=None, ranking=None, columns=())


def keys(parts, key):
    return {part: {key(value) for _, value in rows} for part, rows in parts.rows.items()}


def numbers(parts):
    return {part: [origin.row for origin, _ in rows] for part, rows in parts.rows.items()}


def disjoint(sets):
    listed = list(sets.values())
    return all(not a & b for i, a in enumerate(listed) for b in listed[i + 1 :])


def test_every_row_once_and_no_question_twice(spec):
    parts = split(spec, sizes={"val": 0.2, "test": 10})
    assert sorted(row for rows in numbers(parts).values() for row in rows) == list(range(1, 61))
    assert disjoint(keys(parts, lambda row: row["instruction"]))
    assert {part: len(rows) for part, rows in parts.rows.items()} == {"train": 40, "val": 10, "test": 10}
    assert parts.groups == 12  # questions: each is there once for every column


def test_by_template_keeps_statements_together(write):
    rows = [{**row, "instruction": f"{row['instruction']} {n}"} for n, row in enumerate(ROWS)]
    path = write("r.json", rows)
    spec = source.find(str(path), dataset_dir=str(path.parent), formatting=None, ranking=None, columns=())
    parts = split(spec, sizes={"val": 12}, by="template")
    assert parts.groups == 5
    assert disjoint(keys(parts, lambda row: row["output"].split(" WHERE")[0]))
    assert {len(rows) for rows in parts.rows.values()} == {12, 48}


def test_by_column(spec):
    parts = split(spec, sizes={"val": 20}, by="库")
    assert disjoint(keys(parts, lambda row: row["库"]))
    assert len(parts.rows["val"]) == 20


def test_the_seed_decides(spec):
    assert numbers(split(spec, sizes={"val": 15}, seed=1)) == numbers(split(spec, sizes={"val": 15}, seed=1))
    assert numbers(split(spec, sizes={"val": 15}, seed=1)) != numbers(split(spec, sizes={"val": 15}, seed=2))


def test_what_cannot_be_split(spec):
    with pytest.raises(DataError, match="no rows for val"):
        split(spec, sizes={"val": 5}, by="库")
    with pytest.raises(DataError, match="no column 'db'"):
        split(spec, sizes={"val": 5}, by="db")


def test_the_command(write, capsys):
    path = write("rows.json", ROWS)
    assert main(["data", "split", str(path), "--val", "10", "--by", "random", "--seed", "3"]) == 0
    parts = [[row for _, row in read_rows(path.with_name(f"rows_{part}.json"))] for part in ("train", "val")]
    assert (len(parts[0]), len(parts[1])) == (50, 10)
    assert "none of them in two parts" in capsys.readouterr().out
