"""The columns of a built row, and verdicts that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sql.built import built
from trimtab.errors import DataError
from trimtab.sql.cached import CachedJudge, same_statement, shared_judge
from trimtab.sql.judge import Database, Judge
from trimtab.sql.rows import is_built, moved, row_of, sql_row
from trimtab.types import Example, Origin

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("built")).parent


def read(folder: Path, **columns: Any) -> Any:
    return sql_row({"database": "databases/shop-0.sqlite", **columns}, folder, where="shop.json:3")


def test_paths_start_at_the_data_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = json.loads((folder / "shop.json").read_text(encoding="utf-8"))[1]
    found = row_of(Example(origin=Origin(file=str(folder / "shop.json"), row=2), columns=row))
    assert found.database.paths == tuple(str(folder / "databases" / f"shop-{i}.sqlite") for i in range(2))
    assert (found.killed, found.total, found.weight, found.unverified) == (2, 4, 0.5, None)
    monkeypatch.chdir(folder.parent)
    assert sql_row(row, folder.name, where="").database.paths == found.database.paths  # absolute from here on
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert read(Path("elsewhere"), database="~/databases/shop-0.sqlite").database.paths == found.database.paths[:1]
    assert read(folder, database=found.database.paths[0]).database.paths == found.database.paths[:1]


def test_cells_of_tables_and_servers(folder: Path) -> None:
    both = json.dumps(["databases/shop-0.sqlite", "databases/shop-1.sqlite"])
    assert read(folder, database=both) == read(folder, database=json.loads(both))
    address = "postgresql://reader@host/db"
    assert read(folder, database=[address], dialect="postgres").database == Database(
        paths=(address,), dialect="postgres"
    )
    assert read(folder, dialect=None, mutants_total="", quoted_values="true").database.quoted_values
    assert read(folder).weight == 1.0  # nobody counted
    assert read(folder, mutants_killed="3", mutants_total="4").weight == 0.75


def test_a_row_that_nobody_judges_needs_no_database(folder: Path) -> None:
    found = sql_row({"unverified": "gold fails"}, folder, where="")
    assert found.unverified == "gold fails" and found.database.paths == ()
    assert read(folder, database="gone.sqlite", unverified="gold fails").unverified == "gold fails"


def test_columns_move_with_their_row(folder: Path, tmp_path: Path) -> None:
    row = json.loads((folder / "shop.json").read_text(encoding="utf-8"))[0]
    there = moved(row, folder, tmp_path / "deep" / "er")
    assert set(there) == {"database", "dialect", "unverified", "mutants_killed", "mutants_total"}
    again = sql_row(there, tmp_path / "deep" / "er", where="").database
    assert again == sql_row(row, folder, where="").database
    assert not Path(there["database"][0]).is_absolute() and "\\" not in there["database"][0]
    assert moved({"output": "SELECT 1", "dialect": "mysql"}, folder, tmp_path) == {}
    assert moved({"database": "concerts"}, folder, tmp_path) == {}  # a name of something else
    assert moved({"database": "databases/shop-0.sqlite"}, folder, folder)["database"] == ["databases/shop-0.sqlite"]
    assert moved({"database": "postgresql://host/db"}, folder, tmp_path)["database"] == ["postgresql://host/db"]
    assert moved({"database": "gone.sqlite", "unverified": None}, folder, folder)["database"] == ["gone.sqlite"]


@pytest.mark.parametrize(
    ("columns", "built"),
    [
        ({"database": "a", "unverified": None}, True),
        ({"database": None, "unverified": "gold fails"}, True),
        ({"unverified": "gold fails"}, True),
        ({"unverified": None}, False),
        ({"database": "a"}, False),
        ({}, False),
    ],
)
def test_what_a_builder_has_written(columns: dict[str, Any], built: bool) -> None:
    assert is_built(columns) is built


@pytest.mark.parametrize(
    ("columns", "message", "more"),
    [
        ({"database": None}, "this row has no 'database'", "trimtab sql build"),
        ({"database": "gone.sqlite"}, "no database file", "trimtab sql build"),
        ({"database": "[not json"}, "no database file", "trimtab sql build"),
        ({"database": 7}, "no path and no list of paths", "trimtab sql build"),
        ({"database": ["a", 7]}, "no path and no list of paths", "trimtab sql build"),
        ({"dialect": "klingon"}, "unknown dialect 'klingon'", "postgres"),
        ({"mutants_killed": "many"}, "'mutants_killed' is no count", "trimtab sql build"),
        ({"mutants_total": -1}, "'mutants_total' is no count", "trimtab sql build"),
    ],
)
def test_what_is_wrong_with_a_row(columns: dict[str, Any], message: str, more: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(folder, **columns)
    assert more in caught.value.remedy and caught.value.where == "shop.json:3"


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("SELECT  a\nFROM t", "select A from T", True),
        ("SELECT a -- why\nFROM t", "select a from t", True),
        ("SELECT a -- FROM t", "SELECT a --\nFROM t", False),
        ("SELECT 'A'", "SELECT 'a'", False),
        ('SELECT "A"', 'SELECT "a"', False),
        ("SELECT É", "SELECT é", False),
        ("SELECT a ; -- done", "SELECT a", True),
        ("SELECT a; DROP TABLE t", "SELECT a", False),
        ("SELECT a /* x */", "SELECT a", False),
        ("SELECT a b", "SELECT ab", False),
    ],
)
def test_statements_that_are_one(left: str, right: str, same: bool) -> None:
    assert (same_statement(left, "sqlite") == same_statement(right, "sqlite")) is same


def test_a_verdict_is_asked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (Database(paths=(str(folder / "databases" / f"shop-{i}.sqlite"),)) for i in range(2))
    gold = "SELECT name FROM t WHERE n = 2"
    ran: list[Any] = []
    with Judge(workers=2) as judge:
        monkeypatch.setattr(
            Judge, "judge_many", lambda self, tasks: ran.extend(tasks) or [self.judge(*t) for t in tasks]
        )
        cached = CachedJudge(judge)
        tasks = [("select name from t where n > 1", gold, one), ("SELECT  name FROM t WHERE n > 1;", gold, one)]
        tasks += [("SELECT name FROM t WHERE n > 1", gold, other), ("no", gold, one), ("x" * 30_000, gold, one)]
        first = cached.verdicts(tasks)
        kinds = ["equal", "equal", "wrong_rows", "format_error", "format_error"]
        assert [verdict.kind for verdict, _ in first] == kinds
        assert [known for _, known in first] == [False, True, False, False, True]
        assert len(ran) == 3
        again = cached.verdicts(tasks[::-1])
        assert [verdict.kind for verdict, _ in again] == kinds[::-1] and all(known for _, known in again)
        assert len(ran) == 3 and (cached.asked, cached.found) == (10, 7)
        assert cached.why_unverified(gold, one) is None
        assert "no rows" in str(cached.why_unverified("SELECT name FROM t WHERE n > 9", one))
        assert "gold" in str(cached.why_unverified("SELECT gone FROM t", one))


def test_too_many_verdicts_are_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.sql.cached.MOST", 1)
    database = Database(paths=(str(folder / "databases" / "shop-0.sqlite"),))
    with Judge() as judge:
        cached = CachedJudge(judge)
        for query in ("SELECT 1", "SELECT 2", "SELECT 3"):
            cached.verdict(query, "SELECT 1", database)
        assert cached.verdicts([("SELECT 1", "SELECT 1", database)])[0][1] is False


def test_a_statement_too_long_is_not_cut_into_pieces(folder: Path) -> None:
    database = Database(paths=(str(folder / "databases" / "shop-0.sqlite"),))
    with Judge() as judge:
        assert CachedJudge(judge).verdict("SELECT " + "1," * 12_000 + "1", "SELECT 1", database).kind == "parse_error"


def test_there_is_one_judge_with_as_many_processes_as_asked_for() -> None:
    first = shared_judge(2)
    assert shared_judge() is first and shared_judge(2) is first
    other = shared_judge(1)
    assert other is not first and other.judge.workers == 1 and shared_judge() is other
