# ruff: noqa: E501  # a query is read best on one line
"""`trimtab sql build` and `explain`: rows get databases on which their gold is right and its mutants are wrong."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.sql.test_schema import spider
from trimtab.cli import main
from trimtab.databases import COLUMNS
from trimtab.errors import DataError
from trimtab.evals.predictions import labelled
from trimtab.serve.execution import built_rows
from trimtab.sql.canonical import canonical_sql
from trimtab.sql.fill import PROFILES, ideas, rows
from trimtab.sql.gold_mutants import mutants
from trimtab.sql.infer import Condition, analyse, complete
from trimtab.sql.judge import Database, Judge
from trimtab.sql.probes import probes
from trimtab.sql.schema import Column, Schema, from_ddl, from_sqlite

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[2] / "examples" / "text2sql" / "data"
Row = dict[str, Any]


def save(folder: Path, listed: list[Any], name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(listed, ensure_ascii=False), encoding="utf-8")
    return path


def ask(output: str, instruction: str = "?", **more: Any) -> Row:
    return {"instruction": instruction, "input": "", "output": output, **more}


def built(out: Path, name: str = "rows") -> list[Row]:
    found: list[Row] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return found


def database_of(row: Row, out: Path) -> Database:
    return Database(
        paths=tuple(str(out / p) for p in row["database"]),
        dialect=row["dialect"],
        quoted_values=row.get("quoted_values", False),
    )


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())


# ------------------------------------------------------------------------------------------------------ values and rows


@pytest.mark.parametrize(
    ("column", "condition", "there"),
    [
        (Column(name="n", kind="integer"), ("=", (5,), ""), {(5, True), (4, False), (6, False)}),
        (Column(name="n", kind="integer"), (">", (5,), ""), {(6, True), (5, False)}),
        (Column(name="n", kind="integer"), ("between", (3, 8), ""), {(3, True), (8, True), (2, False), (9, False), (5, True)}),
        (Column(name="x", kind="real"), ("<", (0.5,), ""), {(0.4, True), (0.5, False), (0.6, False)}),
        (Column(name="d", kind="date"), (">=", ("2024-03-01",), ""), {("2024-03-01", True), ("2024-02-29", False)}),
        (Column(name="d", kind="date"), ("=", ("2022",), "format:%Y"), {("2022-01-01", True), ("2022-12-31", True), ("2021-12-31", False)}),
        (Column(name="d", kind="date"), ("=", (2,), "month"), {("2023-02-01", True), ("2023-03-01", False)}),
        (Column(name="t", kind="timestamp"), (">", ("2024-01-01 00:00:00",), ""), {("2024-01-01 00:00:01", True), ("2024-01-01", False)}),
        (Column(name="d", kind="text", pattern="%Y/%m/%d"), ("<", ("2024-01-01",), "parse:%Y/%m/%d"), {("2023/12/31", True), ("2024/01/01", False)}),
        (Column(name="s", kind="text"), ("=", ("Ab",), ""), {("Ab", True), ("aB", False), ("Abx", False), ("xAb", False)}),
        (Column(name="s", kind="text"), ("=", ("ab",), "lower"), {("AB", True), ("abx", False)}),
        (Column(name="s", kind="text"), ("like", ("王%",), ""), {("王", True), ("王x", True), ("x王", False)}),
        (Column(name="s", kind="text"), ("=", (3,), "length"), {("xxx", True), ("xx", False)}),
        (Column(name="s", kind="text"), ("in", ("a", "b"), ""), {("a", True), ("b", True), ("ax", False)}),
    ],
)  # fmt: skip
def test_values_on_both_sides_of_a_condition(
    column: Column, condition: tuple[str, tuple[Any, ...], str], there: set[Any]
) -> None:
    op, values, wrap = condition
    found = set(probes(column, Condition(place=(0, column.name), op=op, values=values, wrap=wrap), 1))
    assert there <= found
    turned = set(probes(column, Condition(place=(0, column.name), op=op, values=values, wrap=wrap, negated=True), 1))
    assert {(value, not truth) for value, truth in there} <= turned


def test_rows_have_keys_partners_nulls_and_twins() -> None:
    schema = from_ddl(
        "CREATE TABLE a (id INT PRIMARY KEY, x INT NOT NULL, s TEXT); CREATE TABLE b (id INT PRIMARY KEY, a_id INT REFERENCES a, d DATE)",
        "sqlite",
    )
    assert schema is not None
    facts = [
        analyse(
            "SELECT b.d FROM b JOIN a ON b.a_id = a.id WHERE a.x = 4 AND a.s LIKE 'q%'",
            "sqlite",
            schema,
            lambda _: None,
        )
    ]
    idea = ideas(schema, facts, 1)
    for profile in PROFILES:
        filled = rows(schema, idea, profile, "seed 0 0")
        assert filled == rows(schema, idea, profile, "seed 0 0")
        ids = [r[0] for r in filled["a"]]
        assert len(ids) == len(set(ids)) <= profile.rows + 4
        assert {r[1] for r in filled["b"]} <= {None, *ids}  # a declared key has a partner
        assert None not in [r[1] for r in filled["a"]]
        assert set(ids) - {r[1] for r in filled["b"]}  # a parent without children
        there = {(x, s[:1]) for _, x, s in filled["a"] if s is not None}
        assert (4, "q") in there
    nulls = rows(schema, idea, next(p for p in PROFILES if p.name == "nulls"), "seed")
    assert None in [r[1] for r in nulls["b"]]
    assert len({r[1:] for r in nulls["b"]}) < len(nulls["b"])


# ---------------------------------------------------------------------------------------------------------------- build


@pytest.fixture(scope="module")
def article(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("article") / "out"
    assert main(["sql", "build", str(DATA / "article.json"), "--dialect", "postgres", "--output", str(out)]) == 0
    return out


def test_the_articles_rows(article: Path, judge: Judge) -> None:
    original = json.loads((DATA / "article.json").read_text(encoding="utf-8"))
    found = built(article, "article")
    assert [{k: v for k, v in row.items() if k not in COLUMNS} for row in found] == original
    for row in found:
        assert row["unverified"] is None
        assert row["mutants_killed"] == row["mutants_total"] > 0
        assert all(not Path(p).is_absolute() and "\\" not in p for p in row["database"])
        database = database_of(row, article)
        assert judge.judge(row["output"], row["output"], database).kind == "equal"
    wrong = [
        "SELECT * FROM 委托备案信息 WHERE TO_DATE(备案有效期, 'YYYY-MM-DD') < NOW()",
        "SELECT * FROM 委托备案信息 WHERE TO_DATE(备案有效期, 'YYYY-MM-DD') > NOW() - INTERVAL '1 day'",
        "SELECT * FROM 委托备案信息",
    ]
    for answer in wrong:
        assert judge.judge(answer, found[0]["output"], database_of(found[0], article)).kind == "wrong_rows"
    assert judge.judge(
        found[1]["output"].replace("DISTINCT ", ""), found[1]["output"], database_of(found[1], article)
    ).kind == "wrong_multiplicity"  # fmt: skip
    entry = json.loads((article / "dataset_info.json").read_text(encoding="utf-8"))["article"]
    assert entry == {"file_name": "article.json", "sql_dialect": "postgres"}
    report = json.loads((article / "report.json").read_text(encoding="utf-8"))
    assert (report["rows"], report["verifiable"], report["kill_rate"]) == (2, 2, 1.0)
    assert "| 委托备案信息 | inferred | 1 | 1 | 1 | 1 | 100.0 % |" in (article / "report.md").read_text(
        encoding="utf-8"
    )


def test_a_sample_of_the_example(tmp_path: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    """With DDL and from the prompts alone: gold equals gold on every verifiable row, and mutants die; twice, the same bytes."""
    wanted = ("hotel", "餐馆")
    listed = [r for r in json.loads((DATA / "train_clean.json").read_text(encoding="utf-8")) if r["schema"] in wanted][
        :20
    ]
    path = save(tmp_path, listed)
    ways: dict[str, list[str]] = {
        "ddl": ["--ddl", str(DATA / "schemas.json")],
        "again": ["--ddl", str(DATA / "schemas.json")],
        "prompt": [],
    }
    for name, words in ways.items():
        out = tmp_path / name
        assert main(["sql", "build", str(path), "--output", str(out), "--seed", "3", *words]) == 0
        found = built(out)
        assert [r["id"] for r in found] == [r["id"] for r in listed]
        assert all(r["unverified"] is None for r in found)
        assert sum(r["mutants_killed"] for r in found) >= 0.97 * sum(r["mutants_total"] for r in found)
        verdicts = judge.judge_many([(r["output"], r["output"], database_of(r, out)) for r in found])
        assert {v.kind for v in verdicts} == {"equal"}
    first, second = tmp_path / "ddl", tmp_path / "again"
    assert (first / "rows.json").read_bytes() == (second / "rows.json").read_bytes()
    instances = sorted(p.name for p in (first / "instances").iterdir())
    assert instances == sorted(p.name for p in (second / "instances").iterdir())
    assert all(dump(first / "instances" / p) == dump(second / "instances" / p) for p in instances)
    assert "20 verifiable (100.0 %)" in capsys.readouterr().out


def test_a_count_is_what_the_judge_says(article: Path, judge: Judge) -> None:
    for row in built(article, "article"):
        database = database_of(row, article)
        schema = from_sqlite(Path(database.paths[-1]), Schema(name="x", tables=()))
        gold = row["output"].rstrip(";")
        kinds = [judge.judge(m.sql, row["output"], database).kind for m in mutants(gold, "postgres", schema)]
        assert len(kinds) == row["mutants_total"]
        assert not {"equal", "unverified"} & set(kinds)


UNVERIFIED = [
    ("SELECT a FROM t WHERE a > 3 AND a < 2", "empty gold result on all instances"),
    ("SELECT a FROM t LIMIT 2", "LIMIT without total order"),
    ("SELECT missing FROM t", "gold cannot be executed: unknown_identifier: no such column: missing"),
    ("SELECT a FROM nowhere", "gold cannot be executed: unknown_identifier: no such table: nowhere"),
    ("SELECT random() FROM t", "gold cannot be executed: exec_error"),
    ("SELEC a FROM t", "gold cannot be executed: parse_error"),
    ("DELETE FROM t", "gold cannot be executed: write_attempt"),
    ("SELECT GROUP_CONCAT(b) FROM t", "not deterministic: another order of scanning gives other rows"),
    ("", "no gold query"),
]


def test_rows_that_cannot_be_judged_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.sql").write_text("CREATE TABLE t (a INTEGER, b TEXT);", encoding="utf-8")
    path = save(tmp_path, [*(ask(gold) for gold, _ in UNVERIFIED), ask("SELECT a FROM t")])
    out = tmp_path / "out"
    assert main(["sql", "build", str(path), "--ddl", str(tmp_path / "t.sql"), "--output", str(out)]) == 0
    *bad, good = built(out)
    for row, (gold, reason) in zip(bad, UNVERIFIED, strict=True):
        assert (row["unverified"] or "").startswith(reason), gold
        assert (row["mutants_killed"], row["mutants_total"]) == (0, 0)
    assert good["unverified"] is None
    assert bad[-1]["database"] == []
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["unverified"]["LIMIT without total order"] == [2]
    assert "unverified, LIMIT without total order: 1: row 2" in capsys.readouterr().out


def test_ddl_in_prompts_and_columns(tmp_path: Path) -> None:
    ddl = "CREATE TABLE 学生 (学号 INT PRIMARY KEY, 姓名 VARCHAR(9), 成绩 INT);"
    listed = [
        ask("SELECT 姓名 FROM 学生 WHERE 成绩 > 60;", f"{ddl}\n及格的学生?"),
        ask("SELECT AVG(成绩) FROM 学生;", f"{ddl}\n平均成绩?"),
    ]
    out = tmp_path / "prompts"
    assert (
        main(
            [
                "sql",
                "build",
                str(save(tmp_path, listed)),
                "--output",
                str(out),
                "--dialect",
                "mysql",
                "--instances",
                "2",
            ]
        )
        == 0
    )
    found = built(out)
    assert found[0]["database"] == found[1]["database"] == ["instances/学生-0.sqlite", "instances/学生-1.sqlite"]
    assert (
        dump(out / found[0]["database"][0])[1]
        == 'CREATE TABLE "学生" ("学号" INTEGER NOT NULL, "姓名" TEXT, "成绩" INTEGER, PRIMARY KEY ("学号"));'
    )
    listed = [ask("SELECT x FROM t WHERE y = 'q'", context="CREATE TABLE t (x INT, y TEXT)")]
    out = tmp_path / "columns"
    assert main(["sql", "build", str(save(tmp_path, listed)), "--output", str(out), "--schema-column", "context"]) == 0
    assert built(out)[0]["unverified"] is None


def test_a_spider_folder_of_a_third_party(tmp_path: Path, judge: Judge) -> None:
    folder = spider(tmp_path)
    listed = [
        {"question": "Names of old singers?", "query": "SELECT name FROM singer WHERE age > 40", "db_id": "stage"},
        {"question": "Adele's concerts in 2015?", "db_id": "stage",
         "query": "SELECT COUNT(*) FROM concert AS c JOIN singer AS s ON c.singer_id = s.id WHERE s.name = \"Adele\" AND strftime('%Y', c.held) = '2015'"},
    ]  # fmt: skip
    out = tmp_path / "out"
    assert (
        main(["sql", "build", str(save(tmp_path, listed, "dev.json")), "--spider", str(folder), "--output", str(out)])
        == 0
    )
    found = built(out, "dev")
    assert [r["database"][0] for r in found] == ["../database/stage/stage.sqlite"] * 2  # what came with it, first
    assert [r["unverified"] for r in found] == [None, None]
    assert [r.get("quoted_values") for r in found] == [None, True]
    for row in found:
        assert judge.judge(row["query"], row["query"], database_of(row, out)).kind == "equal"
    entry = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))["dev"]
    assert entry["columns"] == {"prompt": "question", "response": "query", "query": "evidence"}
    # The file alone is read as its entry says, and a prediction needs no label: its place says what it is about.
    data = built_rows(str(out / "dev.json"), "elsewhere")
    assert [e.response.content for e in data if e.response] == [r["query"] for r in found]
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps({"predict": r["query"]}) + "\n" for r in found), encoding="utf-8")
    assert main(["eval", str(predictions), "--data", str(out / "dev.json")]) == 0
    texts, rows_, without = labelled(predictions, data)
    assert (texts, [e.origin.row for e in rows_], without) == ([r["query"] for r in found], [1, 2], 0)
    predictions.write_text(json.dumps({"predict": "SELECT 1"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 predictions on 2 rows"):
        labelled(predictions, data)
    predictions.write_text(json.dumps({"predict": "SELECT 1", "row": "dev.json:2"}) + "\n", encoding="utf-8")
    assert labelled(predictions, data)[1][0].origin.row == 2


def test_one_query_on_two_schemas(tmp_path: Path, judge: Judge) -> None:
    """The same text, other tables: each row is judged on its own."""
    listed = [ask("SELECT a FROM t WHERE a > 5", f"t({columns})\n?") for columns in ("a", "a, b INTEGER", "b")]
    out = tmp_path / "out"
    assert main(["sql", "build", str(save(tmp_path, listed)), "--output", str(out)]) == 0
    found = built(out)
    assert [r["database"][0] for r in found] == [
        "instances/t-0.sqlite",
        "instances/t_2-0.sqlite",
        "instances/t_3-0.sqlite",
    ]
    assert [r["unverified"] for r in found[:2]] == [None, None]
    assert "no such column: a" in found[2]["unverified"]
    assert found[0]["mutants_total"] < found[1]["mutants_total"]  # b for a
    for row in found[:2]:
        assert judge.judge(row["output"], row["output"], database_of(row, out)).kind == "equal"


def test_an_entry_and_a_config(tmp_path: Path) -> None:
    save(tmp_path, [{"q": "a?", "a": "SELECT TOP 1 n FROM t ORDER BY n", "label": 1}], "mine.json")
    info = {"shop": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}, "sql_dialect": "tsql"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"stage: sft\nmodel_name_or_path: some/model\ndataset: shop\ndataset_dir: {tmp_path.as_posix()}\noutput_dir: out\n",
        encoding="utf-8",
    )
    for name, words in (("shop", ["--dataset_dir", str(tmp_path)]), (str(config), [])):
        out = tmp_path / f"out {Path(name).stem}"
        assert main(["sql", "build", name, "--output", str(out), "--instances", "1", *words]) == 0
        (row,) = built(out, "shop")
        assert (row["dialect"], row["unverified"], row["label"]) == ("tsql", None, 1)
        assert json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))["shop"] == {
            **info["shop"],
            "file_name": "shop.json",
        }


def test_several_sets_share_their_databases(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path, [ask(f"SELECT {name} FROM t", schema="t(id, one, two)")], f"{name}.json")
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.json"} for name in ("one", "two")}), encoding="utf-8"
    )
    out = tmp_path / "out"
    assert main(["sql", "build", "one, two", "--dataset_dir", str(tmp_path), "--output", str(out)]) == 0
    assert list(json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))) == ["one", "two"]
    assert built(out, "one")[0]["database"] == built(out, "two")[0]["database"]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    def run(words: list[str]) -> str:
        assert main(["sql", *words]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return run


def test_mistakes_are_told(tmp_path: Path, fails: Callable[[list[str]], str]) -> None:
    path = str(save(tmp_path, [ask("SELECT a FROM t", schema="y")]))
    out = str(tmp_path / "out")
    text = tmp_path / "no.sql"
    text.write_text("SELECT 1", encoding="utf-8")
    broken = tmp_path / "no.json"
    broken.write_text("[", encoding="utf-8")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("", encoding="utf-8")
    schemas = save(tmp_path, [{"name": "x", "ddl": ["CREATE TABLE t (a INT)"]}], "schemas.json")
    bare = tmp_path / "bare.yaml"
    bare.write_text("model_name_or_path: some/model\n", encoding="utf-8")
    odd = str(save(tmp_path, ["SELECT 1"], "odd.json"))
    empty = str(save(tmp_path, [{"instruction": "a", "answer": "SELECT 1"}], "empty.json"))
    told = {
        ("build", "gone.json"): "data file not found",
        ("build", path, "--output", str(full)): "is not empty",
        ("build", path, "--output", str(full / "x")): "is a file",
        ("build", path, "--output", out, "--dialect", "postgre"): "unknown SQL dialect 'postgre'; did you mean 'postgres'?",
        ("build", path, "--output", out, "--ddl", "gone.sql"): "gone.sql does not exist",
        ("build", path, "--output", out, "--ddl", str(text)): "no CREATE TABLE can be read",
        ("build", path, "--output", out, "--ddl", str(broken)): "no schema can be read",
        ("build", path, "--output", out, "--spider", str(full)): "tables.json",
        ("build", path, "--output", out, "--ddl", str(schemas)): "no schema is called 'y'",
        ("build", path, "--output", out, "--schema-column", "base"): "no text in column 'base'",
        ("build", str(bare), "--output", out): "names no data set",
        ("build", odd, "--output", out): "a row is not an object",
        ("build", empty, "--output", out): "no row of empty has a gold query",
    }  # fmt: skip
    for words, message in told.items():
        assert message in fails(list(words)), words
    assert not Path(out).exists()
    assert (full / "x").read_text(encoding="utf-8") == ""


# -------------------------------------------------------------------------------------------------------------- explain


def test_explain(article: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(article / "article.json")
    assert main(["sql", "explain", file, "2"]) == 0
    shown = capsys.readouterr().out
    assert "哪些镇名拥有重点旅游村?" in shown
    assert "5 of 5 told from gold" in shown
    wrong = "SELECT 镇名 FROM 镇名休闲农业园区休闲农庄重点旅游村 WHERE 重点旅游村 IS NOT NULL"
    assert main(["sql", "explain", file, "2", "--answer", f"```sql\n{wrong}\n```"]) == 0
    shown = capsys.readouterr().out
    assert "wrong_multiplicity on instances/" in shown
    assert "is not gold's" in shown
    golds = [row["output"] for row in built(article, "article")]
    lines = [{"prompt": "", "predict": p, "label": g} for p, g in zip(["no idea", golds[1]], golds, strict=True)]
    predictions = tmp_path / "generated_predictions.jsonl"
    predictions.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    for number, verdict in (("1", "format_error"), ("2", "equal")):
        assert main(["sql", "explain", file, number, "--predictions", str(predictions)]) == 0
        assert f"verdict:    {verdict}" in capsys.readouterr().out


def test_explain_names_what_is_still_alive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An instance on which a mutant is right, and a row that nothing can be said of."""
    with closing(sqlite3.connect(tmp_path / "one.sqlite")) as db:
        db.executescript("CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1), (9);")
    listed = [
        ask(
            "SELECT a FROM t WHERE a > 5",
            database=["one.sqlite"],
            dialect="sqlite",
            unverified=None,
            mutants_killed=2,
            mutants_total=6,
        ),
        ask("SELECT a FROM t WHERE a > 50", database="one.sqlite", unverified="empty gold result on all instances"),
    ]
    path = str(save(tmp_path, listed))
    assert main(["sql", "explain", path, "1"]) == 0
    assert "alive: SELECT a FROM t WHERE a >= 5" in capsys.readouterr().out
    assert main(["sql", "explain", path, "2", "--answer", "SELECT b FROM t"]) == 0
    shown = capsys.readouterr().out
    assert "unknown_identifier" in shown
    assert "unverified: empty gold result" in shown


def test_explain_refuses(
    article: Path, tmp_path: Path, fails: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(article / "article.json")
    predictions = tmp_path / "p.jsonl"

    def predicted(*lines: Row) -> list[str]:
        predictions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return ["explain", file, "1", "--predictions", str(predictions)]

    assert "unknown kind of file" in fails(["explain", "x.sqlite", "1"])
    assert "data file not found" in fails(["explain", "gone.json", "1"])
    assert "has no row 3" in fails(["explain", file, "3"])
    assert "has no databases" in fails(["explain", str(DATA / "article.json"), "1"])
    assert "1 predictions for 2 rows" in fails(predicted({"predict": "SELECT 1"}))
    assert "no text under predict" in fails(predicted({"answer": "x"}, {"predict": "x"}))
    assert "answers another row" in fails(predicted({"predict": "x", "label": "SELECT 1"}, {"predict": "x"}))
    moved = tmp_path / "article.json"
    shutil.copy(file, moved)
    assert "is not there" in fails(["explain", str(moved), "1"])
    rows = json.loads(moved.read_text(encoding="utf-8"))
    rows[0]["database"] = ["postgresql://reader@host/db"]
    moved.write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr("trimtab.sql.rows.find_spec", lambda _: None)
    assert "pip install 'trimtab[postgres]'" in fails(["explain", str(moved), "1"])


def test_a_canonical_twin_is_no_mutant(judge: Judge) -> None:
    """What is counted as alive differs from gold in more than spelling."""
    assert canonical_sql("SELECT a FROM t ORDER BY a ASC") == canonical_sql("SELECT a FROM t ORDER BY a")
    schema = complete(
        None, [f for f in [analyse("SELECT a FROM t WHERE a = 1", "sqlite", None, lambda _: None)] if f is not None]
    )
    assert all(
        canonical_sql(m.sql) != canonical_sql("SELECT a FROM t WHERE a = 1")
        for m in mutants("SELECT a FROM t WHERE a = 1", "sqlite", schema)
    )
