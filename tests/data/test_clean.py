"""`data clean` on sets with planted faults: every one found, nothing else removed."""

from __future__ import annotations

import json
import logging
import random

import pytest

from trimtab.cli import main
from trimtab.data import similar, source, sql_text
from trimtab.data.clean import clean

CITIES = ["北京", "上海", "广州", "深圳", "成都", "杭州", "武汉", "西安", "南京", "重庆"]
THINGS = {"订单": "orders", "客户": "customers", "员工": "staff", "商品": "goods", "退货": "returns"}


def good_rows(count=150):
    """Questions from templates, alike but for a city, a table or a number: none of them is a fault."""
    rows = []
    for city in CITIES:
        for thing, table in THINGS.items():
            for year in (2021, 2022, 2023):
                rows.append(
                    {
                        "instruction": f"{year}年在{city}一共有多少条{thing}记录，请按月份统计出来？",
                        "input": "",
                        "output": f"SELECT month, count(*) FROM {table} WHERE city = '{city}' AND year = {year} GROUP BY month",
                    }
                )
    return rows[:count]


def spec_of(path, **given):
    options = {"dataset_dir": str(path.parent), "formatting": None, "ranking": None, "columns": ()}
    return source.find(str(path), **{**options, **given})


def planted(found):
    return sorted((fault.kind, fault.origin.row) for fault in found.faults)


def test_every_planted_fault_is_found_and_nothing_else_removed(write):
    rows = good_rows()
    faults = [
        ("empty", {"instruction": "", "input": "", "output": "SELECT 1"}),
        ("empty", {"instruction": "　 \n", "input": "", "output": "SELECT 1"}),  # an ideographic blank
        ("empty", {"instruction": "各省的销售额是多少？", "input": "", "output": "  "}),
        ("empty", {"instruction": "各省的利润是多少？", "input": "", "output": None}),
        ("duplicate", dict(rows[3])),
        ("duplicate", {**rows[4], "instruction": rows[4]["instruction"].replace("2022", "２０２２")}),
        ("near-duplicate", {**rows[5], "instruction": rows[5]["instruction"].replace("请", "请你")}),
        ("near-duplicate", {**rows[6], "output": rows[6]["output"].lower().replace(" where", "\n where") + ";"}),
        ("unparsable SQL", {"instruction": "哪个仓库最大？", "input": "", "output": "SELECT name FROM WHERE size"}),
        ("unparsable SQL", {"instruction": "哪个仓库最小？", "input": "", "output": "抱歉，我不知道"}),
        ("unparsable SQL", {"instruction": "仓库有几个？", "input": "", "output": "SELECT count（*） FROM depot"}),
        ("conflict", {"instruction": "库存最多的商品？", "input": "", "output": "SELECT max(stock) FROM goods"}),
        (
            "conflict",
            {
                "instruction": "库存最多的商品？",
                "input": "",
                "output": "SELECT name FROM goods ORDER BY stock DESC LIMIT 1",
            },
        ),
        ("unreadable", "not an object"),
    ]
    rows += [row for _, row in faults]
    expected = sorted((kind, 151 + place) for place, (kind, _) in enumerate(faults))
    path = write("dirty.json", rows)
    found = clean(spec_of(path))
    assert found.sql
    assert planted(found) == expected
    assert [origin.row for origin, _ in found.kept] == list(range(1, 151))
    assert [value for _, value in found.kept] == good_rows()


def test_the_order_of_rows_does_not_hide_faults(write):
    """Shuffled, with the faults in between: of two equal rows the later one goes."""
    rows = [*good_rows(60), *good_rows(10)]
    random.Random(7).shuffle(rows)
    found = clean(spec_of(write("d.json", rows)))
    assert [fault.kind for fault in found.faults] == ["duplicate"] * 10
    assert all(fault.origin.row > fault.other.row for fault in found.faults)
    assert len({json.dumps(value) for _, value in found.kept}) == len(found.kept) == 60


def test_leaks_are_found_by_question_and_by_likeness(write):
    rows = good_rows(30)
    held = [
        {
            **rows[2],
            "instruction": rows[2]["instruction"].replace("，", ","),
            "output": "SELECT 7",
        },  # the same question
        {**rows[9], "instruction": rows[9]["instruction"].replace("请", "麻烦")},  # nearly, with the same answer
        {**rows[11], "instruction": rows[11]["instruction"].replace("20", "19"), "output": "SELECT 3"},  # another year
    ]
    path = write("train.json", rows)
    found = clean(spec_of(path), held_out=spec_of(write("held.json", held)))
    assert [(f.kind, f.origin.row, f.other.row) for f in found.faults] == [("leak", 3, 1), ("leak", 10, 2)]


def test_likeness_is_no_fault_of_different_requests(write):
    """Answers in words: questions that differ in a year, though their answers are the same, are two questions."""
    rows = [
        {"instruction": f"请问在{year}年的时候公司里面有没有发生过重大安全事故？", "output": "没有"}
        for year in (2021, 2022)
    ]
    path = write("d.json", [*rows, {**rows[0], "instruction": rows[0]["instruction"].replace("请问", "请问一下")}])
    assert planted(clean(spec_of(path))) == [("near-duplicate", 3)]


def test_two_alike_rows_are_no_leak_of_each_other(write):
    rows = good_rows(2)
    alike = {**rows[0], "instruction": rows[0]["instruction"].replace("请", "请你")}
    held = write("held.json", [{"instruction": "谁是经理？", "output": "SELECT 1"}])
    found = clean(spec_of(write("d.json", [*rows, alike])), held_out=spec_of(held))
    assert planted(found) == [("near-duplicate", 3)]


def test_a_schema_in_every_prompt_makes_no_duplicates(write):
    schema = "CREATE TABLE t (" + ", ".join(f"column_{i} INT" for i in range(60)) + ")"
    rows = [
        {"instruction": f"largest {name}?", "input": schema, "output": f"SELECT max({name}) FROM t"}
        for name in ("size", "price", "weight", "height", "depth")
    ]
    assert clean(spec_of(write("d.json", rows))).faults == ()


def test_over_long_rows_need_a_counter(write):
    path = write("d.json", good_rows(5))
    assert "lengths" in clean(spec_of(path)).skipped[0]
    found = clean(spec_of(path), tokens=lambda example: 10 + example.origin.row, cutoff_len=13)
    assert planted(found) == [("over-long", 4), ("over-long", 5)]


def test_preferences(write):
    rows = [
        {"instruction": "a question", "chosen": "one", "rejected": "two"},
        {"instruction": "a question", "chosen": "two", "rejected": "one"},  # the same pair the other way round
        {"instruction": "a question", "chosen": "one", "rejected": "three"},  # another pair
        {"instruction": "b question", "chosen": "one", "rejected": ""},
        {"instruction": "c question", "chosen": "SELECT 1", "rejected": "rubbish"},
    ]
    found = clean(spec_of(write("d.json", rows)))
    assert planted(found) == [("conflict", 1), ("conflict", 2), ("empty", 4)]
    kept = clean(spec_of(write("d.json", rows)), conflicts=False)
    assert planted(kept) == planted(found)
    assert [origin.row for origin, _ in kept.kept] == [1, 2, 3, 5]


def test_scores_are_part_of_a_row(write):
    """One question may have several scored answers, and an answer one score."""
    rows = [
        {"instruction": "a question", "output": "one", "score": 0.1},
        {"instruction": "a question", "output": "one", "score": 0.9},  # the same answer is worth two things
        {"instruction": "a question", "output": "two", "score": 0.3},
        {"instruction": "a question", "output": "two", "score": 0.3},
        {"instruction": "a question", "output": "three", "score": ""},
        {"instruction": "b question", "output": "one", "score": 0.1},
        {"instruction": "b  question", "output": "One.", "score": 0.2},  # the same but for what does not matter
    ]
    found = clean(spec_of(write("d.json", rows), columns=("score=score",)))
    assert planted(found) == [*(("conflict", n) for n in (1, 2, 6, 7)), ("duplicate", 4)]
    assert [(f.origin.row, f.other.row) for f in found.faults if f.kind == "conflict"][:2] == [(1, 2), (2, 1)]
    kept = clean(spec_of(write("d.json", rows), columns=("score=score",)), conflicts=False)
    assert [origin.row for origin, _ in kept.kept] == [1, 2, 3, 5, 6, 7]


def test_an_answer_that_is_wanted_and_unwanted_is_a_conflict(write):
    rows = [
        {"instruction": "a question", "output": "one", "kto_tag": True},
        {"instruction": "a question", "output": "one", "kto_tag": False},
        {"instruction": "a question", "output": "two", "kto_tag": False},
        {"instruction": "b question", "output": "one", "kto_tag": True},
        {"instruction": "b question", "output": "two", "kto_tag": True},
        {"instruction": "b question", "output": "two", "kto_tag": True},
    ]
    assert planted(clean(spec_of(write("d.json", rows)))) == [("conflict", 1), ("conflict", 2), ("duplicate", 6)]


def test_answers_that_are_the_same_are_no_preference(write, capsys):
    rows = [
        {"instruction": "a question", "chosen": "one", "rejected": "one"},
        {"instruction": "a question", "chosen": "one", "rejected": "two"},
        {"instruction": "b question", "chosen": "one", "rejected": "one "},  # training tells these apart
    ]
    path = write("d.json", rows)
    assert planted(clean(spec_of(path))) == [("equal answers", 1)]
    assert main(["data", "clean", str(path)]) == 0
    assert "equal answers: 1" in capsys.readouterr().out
    assert json.loads(path.with_name("d.removed.jsonl").read_text(encoding="utf-8"))["fault"] == "equal answers"


def test_margins_and_rankings(write):
    pairs = [
        {"instruction": "a question", "chosen": "one", "rejected": "two", "margin": 1},
        {"instruction": "a question", "chosen": "one", "rejected": "two", "margin": 2},
        {"instruction": "b question", "chosen": "one", "rejected": "two", "margin": 1},
    ]
    found = clean(spec_of(write("pairs.json", pairs), columns=("margin=margin",)))
    assert planted(found) == [("conflict", 1), ("conflict", 2)]
    rankings = [["x", "y", "z"], ["x", "z"], ["x", "w", "z"], ["y", "v", "x"], ["u", "u", "z"], ["x", "", "z"]]
    rows = [{"instruction": "a question", "ranked": answers} for answers in rankings]
    found = clean(spec_of(write("d.json", rows)))
    assert planted(found) == [("conflict", 1), ("conflict", 4), ("empty", 6), ("equal answers", 5)]


def test_a_ranking_under_another_name(write):
    rows = [{"instruction": "a question", "best": ["x", "y"]}, {"instruction": "b question", "best": ["x"]}]
    found = clean(spec_of(write("d.json", rows), columns=("ranked=best",)))
    assert planted(found) == [("unreadable", 2)]


def test_a_leak_is_one_whatever_its_label(write):
    row = {"instruction": "which town has the most bridges over the river?", "output": "one", "kto_tag": True}
    held = {"instruction": "so which town has the most bridges over the river?", "output": "one", "kto_tag": False}
    found = clean(spec_of(write("d.json", [row])), held_out=spec_of(write("held.json", [held])))
    assert planted(found) == [("leak", 1)]


def test_empty_turns_of_a_dialogue(write):
    def dialogue(first, answer, second="two?", tag="human"):
        turns = [("human", first), ("gpt", answer), (tag, second), ("gpt", f"so {first}")]
        return {"conversations": [{"from": who, "value": text} for who, text in turns]}

    rows = [
        dialogue("a?", "one"),
        dialogue("b?", "one", "　"),
        dialogue("c?", " \n"),
        dialogue("d?", "one", "", "observation"),  # a tool that found nothing
    ]
    assert planted(clean(spec_of(write("d.json", rows)))) == [("empty", 2), ("empty", 3)]
    history = [{"instruction": "now?", "output": "yes", "history": [["then?", ""]]}]
    assert planted(clean(spec_of(write("h.json", history), columns=("history=history",)))) == [("empty", 1)]
    asks = [
        {
            "messages": [
                {"role": "user", "content": "a?"},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": "b?"},
            ]
        }
    ]
    assert planted(clean(spec_of(write("asks.json", asks)))) == [("empty", 1)]


def test_questions_without_answers_are_not_empty(write):
    rows = [{"instruction": f"ask about {word}"} for word in ("towns", "rivers", "towns")]
    assert planted(clean(spec_of(write("d.json", rows)))) == [("duplicate", 3)]


@pytest.mark.parametrize("dressed", ["bom", "crlf", "plain"])
def test_files_as_they_come(write, dressed):
    """Byte-order mark, Windows line ends, Chinese column names and broken lines, each reported with its row."""
    lines = [json.dumps({"问题": f"第{n}个问题是什么东西", "答案": "x" * n}, ensure_ascii=False) for n in (1, 2, 3)]
    text = "\n".join([lines[0], '{"问题": "断', lines[1], "", lines[2]])
    data = {"bom": "\ufeff" + text, "crlf": text.replace("\n", "\r\n"), "plain": text}[dressed]
    path = write("d.jsonl", data.encode("utf-8"))
    found = clean(spec_of(path, columns=("prompt=问题", "response=答案")), sql=False)
    assert planted(found) == [("unreadable", 2)]
    assert [origin.row for origin, _ in found.kept] == [1, 3, 4]


def test_a_folder_whose_first_line_is_broken(write, tmp_path):
    """Rows of several files, each with its own numbers; the layout is that of the first row that can be read."""
    write(
        "set/a.jsonl",
        'broken {"x\n{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n',
    )
    write("set/b.jsonl", '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    assert main(["data", "clean", str(tmp_path / "set")]) == 0
    removed = [json.loads(line) for line in (tmp_path / "set.removed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["fault"], row["file"][-7:], row["row"]) for row in removed] == [
        ("unreadable", "a.jsonl", 1),
        ("duplicate", "b.jsonl", 1),
    ]
    assert removed[0]["data"] == 'broken {"x'  # the whole line


def test_a_file_that_is_not_there(capsys):
    assert main(["data", "clean", "nowhere.jsonl"]) == 2
    assert "data file not found: nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.csv", "d.txt"])
@pytest.mark.parametrize("words", [["clean"], ["convert", "--to", "openai", "--output", "x.jsonl"]])
def test_an_empty_file_is_called_empty(write, capsys, name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = write(name, b"")
    assert main(["data", words[0], str(path), *words[1:]]) == 2
    told = capsys.readouterr().err
    assert "is empty" in told and "malformed" not in told
    assert list(tmp_path.iterdir()) == [path]


def test_a_list_without_rows_is_empty_too(write, capsys):
    path = write("d.json", [])
    assert main(["data", "clean", str(path)]) == 2
    assert "d is empty: it holds no rows" in capsys.readouterr().err


def test_csv_with_a_row_too_wide(write):
    path = write("d.csv", "instruction,output\na?,b\nc,d,e\nf?,g\n")
    found = clean(spec_of(path))
    assert planted(found) == [("unreadable", 2)]
    assert "line 3" in found.faults[0].detail


def test_the_command_leaves_the_file_and_writes_three(write, capsys):
    path = write("问答.csv", "instruction,output\nwhat?,that\nwhat?,that\nwho?,she\n")
    before = path.read_bytes()
    assert main(["data", "clean", str(path)]) == 0
    assert path.read_bytes() == before
    assert path.with_name("问答.clean.csv").read_text(encoding="utf-8") == "instruction,output\nwhat?,that\nwho?,she\n"
    removed = path.with_name("问答.removed.jsonl").read_text(encoding="utf-8")
    assert json.loads(removed)["row"] == 2
    report = json.loads(path.with_name("问答.report.json").read_text(encoding="utf-8"))
    assert (report["read"], report["kept"], report["faults"]["duplicate"]) == (3, 2, 1)
    assert [row["row"] for row in report["kept_rows"]] == [1, 3]
    assert "duplicate: 1" in capsys.readouterr().out
    assert main(["data", "clean", str(path)]) == 2  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--column", "promt=问题"], "did you mean prompt"),
        (["--dialect", "mysqll"], "unknown SQL dialect"),
        (["--format", "alpacca"], "unknown formatting"),
        (["--output", "x.xlsx"], "unknown kind of file"),
    ],
)
def test_wrong_options_end_with_one_message(write, capsys, words, message):
    path = write("d.json", good_rows(3))
    assert main(["data", "clean", str(path), *words]) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- its parts


def test_normal_forms():
    assert similar.normal("ＡＢ　１２？ \n x") == "AB 12? x"
    assert similar.bare("你好，World！ 3") == "你好world3"
    assert similar.figures("第３季度 2.5 二十") == ("3", "2.5", "二十")
    assert similar.figures("一共多少") != similar.figures("二季度多少")
    assert similar.figures("查一下") == ()
    assert similar.shingles("abcd") == {"abc", "bcd"}
    assert similar.shingles("你好吗") == {"你好", "好吗"}
    assert similar.jaccard(similar.shingles("abcd"), similar.shingles("abce")) == 1 / 3


def test_near_pairs_are_those_of_all_pairs_compared():
    draw = random.Random(3)
    texts = ["".join(draw.choice("abcde") for _ in range(30)) for _ in range(20)]
    texts += [text[:28] + "xy" for text in texts[:10]]
    sets = [similar.shingles(text) for text in texts]
    expected = {(i, j) for j in range(len(texts)) for i in range(j) if similar.jaccard(sets[i], sets[j]) >= 0.75}
    assert len(expected) >= 10
    assert {(i, j) for i, j, _ in similar.near_pairs(texts, 0.75)} == expected


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("SELECT 1", True),
        ("```sql\nSELECT a FROM b;\n```", True),
        ("WITH x AS (SELECT 1) SELECT * FROM x", True),
        ("SELECT name FROM 员工表 WHERE 城市 = '北京，上海'", True),
        ("UPDATE t SET a = 1", True),
        ("SELECT (1", False),
        ("hello world", False),
        ("SELECT a FROM t WHERE b = '开", False),
        ("SELECT a， b FROM t", False),
        ("", False),
    ],
)
def test_what_is_sql(text, fine):
    assert (sql_text.fault(text) is None) == fine


@pytest.mark.parametrize(
    ("text", "dialect", "fine"),
    [
        ("SHOW TABLES", "mysql", True),
        ("SHOW TABLES", None, True),
        ("SHOW TABLES", "sqlite", False),  # it has no such statement
        ("Show all customers", "mysql", False),
        ("Show all customers", None, False),
        ("EXPLAIN SELECT 1", "mysql", True),
        ("EXPLAIN SELECT 1", None, True),
        ("EXPLAIN FORMAT=JSON SELECT 1", None, True),
        ("EXPLAIN QUERY PLAN SELECT 1", "sqlite", True),
        ("EXPLAIN (ANALYZE, BUFFERS) SELECT 1", "postgres", True),
        ("EXPLAIN SELECT a FROM", "postgres", False),
        ("Explain why this is so", None, False),
        ("DESCRIBE staff", "mysql", True),
        ("USE shop", "mysql", True),
        ("Use the table", "mysql", False),
        ("REPLACE INTO t (a) VALUES (1)", "mysql", True),
        ("REPLACE it by hand", "mysql", False),
        ("CALL report(2024)", "mysql", True),
        ("Call me later", "mysql", False),
        ("SET @a = 1", "mysql", True),
        ("TRUNCATE TABLE t", "mysql", True),
        ("PRAGMA table_info(t)", "sqlite", True),
        ("SHOW TABLES， now", "mysql", False),
    ],
)
def test_statements_that_are_no_queries(text, dialect, fine):
    assert (sql_text.fault(text, dialect) is None) == fine


def test_sqlglot_does_not_speak_for_us(write, capfd, caplog):
    """Its warning about a statement that it reads by the first word alone is in no log; the row is in the report."""
    rows = [{"instruction": "show", "output": "SHOW me it"}, {"instruction": "why", "output": "EXPLAIN SELECT 2"}]
    path = write("d.json", [*rows, {"instruction": "how many", "output": "SELECT 1"}])
    assert main(["data", "clean", str(path), "--sql", "--dialect", "mysql"]) == 0
    told = capfd.readouterr()
    assert "3 rows read, 1 removed, 2 kept" in told.out
    assert "unsupported syntax" not in told.out + told.err + caplog.text
    assert not logging.getLogger("sqlglot").disabled


def test_equal_statements_and_skeletons():
    assert sql_text.canonical("select a from t;") is not None
    assert sql_text.canonical("select a from t;") == sql_text.canonical("SELECT  a\nFROM t -- all")
    assert sql_text.canonical("SELECT a FROM t") != sql_text.canonical("SELECT b FROM t")
    assert sql_text.skeleton("SELECT a FROM t WHERE x = 'p' LIMIT 3") == sql_text.skeleton(
        "select a from t where x='q' limit 5"
    )
