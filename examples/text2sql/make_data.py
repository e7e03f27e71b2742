"""Write the example data: `python examples/text2sql/make_data.py [FOLDER]`. The same seed gives the same bytes.

What is held out is decided before a row exists: whole schemas (schemas.py), whole templates and one phrasing of each of the
others (questions.py), and a part of every column's literals (schemas.py).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from queries import DEMO_MISTAKES, MISTAKES, Query, spoil
from questions import HELD_OUT_TEMPLATES, TEMPLATES, Cannot, Draw, Template
from schemas import HELD_OUT_SCHEMAS, SCHEMAS, Schema

SEED = 20
HERE = Path(__file__).resolve().parent
Row = dict[str, Any]

SEEN = [schema for schema in SCHEMAS if schema.name not in HELD_OUT_SCHEMAS]
UNSEEN = [schema for schema in SCHEMAS if schema.name in HELD_OUT_SCHEMAS]
TRAINED = [template for name, template in TEMPLATES.items() if name not in HELD_OUT_TEMPLATES]
KEPT = [template for name, template in TEMPLATES.items() if name in HELD_OUT_TEMPLATES]
CHINESE = 0.34

# The demo: easy questions on one table, and how often each is asked.
DEMO = {
    "where_text": 3,
    "where_number": 3,
    "two_columns": 2,
    "count_text": 2,
    "count_number": 2,
    "aggregate": 1,
    "top_one": 1,
    "ordered": 1,
    "distinct": 1,
    "group_count": 1,
}
DEMO_TABLES = {
    "library": "book",
    "shop": "product",
    "company": "employee",
    "hotel": "room",
    "影院": "电影",
    "餐馆": "菜",
}
DEMO_CHINESE = 0.2


def question(
    rng: random.Random, schema: Schema, template: Template, *, unseen: str = "", only: str = "", spare: float = 0.3
) -> Row:
    """One row: the tables that the query needs (with chance `spare` one more) and the question, then the SQL.

    Args:
        unseen: "phrasing" or "literal": what of the row comes from the held-out side; "" nothing.
        only: draw from this table alone.

    Raises:
        Cannot: the template does not fit the schema.
    """
    tables = tuple(table for table in schema.tables if not only or table.name == only)
    words, query = template.build(Draw(rng, schema, tables, held_out=unseen == "literal"))
    phrase = rng.choice(template.phrasings(schema.language, held_out=unseen == "phrasing"))
    used = tables_of(query)
    others = [table.name for table in schema.tables if table.name not in used]
    if others and rng.random() < spare:
        used.append(rng.choice(others))
    lines = [table.line for table in schema.tables if table.name in used]
    asked = phrase.format(**words)
    return {
        "instruction": "\n".join([*lines, asked[0].upper() + asked[1:]]),
        "input": "",
        "output": query.sql + ";",
        "schema": schema.name,
        "template": template.name,
        "level": template.level,
        "language": schema.language,
        "query": query,
        **({"unseen": unseen} if unseen else {}),
    }


def tables_of(query: Query) -> list[str]:
    names = [query.table, *(table for table, _ in query.joins)]
    for predicate in query.where:
        if isinstance(predicate.right, Query):
            names += tables_of(predicate.right)
    return list(dict.fromkeys(names))


def full_row(
    rng: random.Random, schemas: list[Schema], templates: list[Template], unseen: tuple[str, ...] = ("",)
) -> Row:
    while True:
        language = "zh" if rng.random() < CHINESE else "en"
        schema = rng.choice([schema for schema in schemas if schema.language == language])
        template = rng.choice(templates)
        side = rng.choice(unseen) if template.literal else unseen[0]
        try:
            return question(rng, schema, template, unseen=side)
        except Cannot:
            continue


def demo_row(rng: random.Random, unseen: tuple[str, ...] = ("",)) -> Row:
    language = "zh" if rng.random() < DEMO_CHINESE else "en"
    schema = rng.choice([schema for schema in SEEN if schema.language == language and schema.name in DEMO_TABLES])
    template = TEMPLATES[rng.choices(list(DEMO), list(DEMO.values()))[0]]
    side = rng.choice(unseen) if template.literal and len(unseen) > 1 else unseen[0]
    return question(rng, schema, template, unseen=side, only=DEMO_TABLES[schema.name], spare=0.0)


def distinct_rows(count: int, draw: Any, taken: set[str]) -> list[Row]:
    """`count` rows of new prompts, in random order; their prompts are added to `taken`."""
    rows: list[Row] = []
    while len(rows) < count:
        row = draw()
        if row["instruction"] not in taken:
            taken.add(row["instruction"])
            rows.append(row)
    return rows


def pairs(rng: random.Random, rows: list[Row], kinds: Any = MISTAKES) -> list[Row]:
    """Preference rows: the right answer and one spoilt by a mistake of these kinds."""
    schemas = {schema.name: schema for schema in SCHEMAS}
    made = []
    for row in rows:
        wrong, mistake = spoil(rng, row["query"], schemas[row["schema"]], kinds)
        kept = {key: value for key, value in row.items() if key != "output"}
        made.append({**kept, "chosen": row["output"], "rejected": wrong, "mistake": mistake})
    return made


def make() -> dict[str, list[Row]]:
    """All sets, name -> rows."""
    taken: set[str] = set()
    rng = random.Random(f"{SEED} demo")
    demo = distinct_rows(1200 + 600 + 600 + 120 + 100, lambda: demo_row(rng), taken)
    rng.shuffle(demo)  # questions without a literal run out early, so the order of drawing is not that of the pool
    sets = {
        "demo_sft": demo[:1200],
        "demo_rw": pairs(rng, demo[1200:1800], DEMO_MISTAKES),
        "demo_ppo": demo[1800:2400],
        "demo_eval": demo[2400:2520],
        "demo_rw_eval": pairs(rng, demo[2520:], DEMO_MISTAKES),
    }
    # The full sets may share training prompts with the demo's, never its held-out ones.
    taken = {row["instruction"] for row in demo[2400:]}
    rng = random.Random(f"{SEED} full")
    full = distinct_rows(2200 + 1400 + 1000 + 20, lambda: full_row(rng, SEEN, TRAINED), taken)
    rng.shuffle(full)
    sets |= {
        "train_clean": full[:2200],
        "rw_data": pairs(rng, full[2200:3600]),
        "ppo_prompts": full[3600:4600],
        "tuning_sample": full[4600:],
    }
    taken |= {row["instruction"] for row in demo}
    rng = random.Random(f"{SEED} held out")
    both = ("phrasing", "literal")
    sets["heldout_questions"] = distinct_rows(240, lambda: full_row(rng, SEEN, TRAINED, both), taken)
    sets["heldout_templates"] = distinct_rows(240, lambda: full_row(rng, SEEN, KEPT), taken)
    sets["heldout_schemas"] = distinct_rows(240, lambda: full_row(rng, UNSEEN, TRAINED), taken)
    sets["heldout_rw"] = pairs(
        rng,
        distinct_rows(120, lambda: full_row(rng, SEEN, TRAINED, both), taken)
        + distinct_rows(60, lambda: full_row(rng, SEEN, KEPT), taken)
        + distinct_rows(60, lambda: full_row(rng, UNSEEN, TRAINED), taken),
    )
    rng = random.Random(f"{SEED} demo, held out")
    sets["demo_heldout"] = distinct_rows(1000, lambda: demo_row(rng, both), taken)
    return {
        name: [{"id": f"{name}-{i}", **{k: v for k, v in row.items() if k != "query"}} for i, row in enumerate(rows, 1)]
        for name, rows in sets.items()
    }


# The two rows that the Chinese article on this pipeline prints; their database is not known.
ARTICLE = [
    {
        "id": "article-1",
        "instruction": "查看备案有效期在今天之后的委托信息",
        "input": "",
        "output": "SELECT * FROM 委托备案信息 WHERE TO_DATE(备案有效期, 'YYYY-MM-DD') > NOW();",
        "language": "zh",
    },
    {
        "id": "article-2",
        "instruction": "哪些镇名拥有重点旅游村?",
        "input": "",
        "output": "SELECT DISTINCT 镇名 FROM 镇名休闲农业园区休闲农庄重点旅游村 WHERE 重点旅游村 IS NOT NULL;",
        "language": "zh",
    },
]


def write_rows(path: Path, rows: list[Row]) -> None:
    """A JSON array with one row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


def write(folder: Path) -> None:
    """Every file of `data/`, dataset_info.json and schemas.json among them."""
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {}
    for name, rows in {**make(), "article": ARTICLE}.items():
        write_rows(folder / f"{name}.json", rows)
        info[name] = {"file_name": f"{name}.json"}
        if "chosen" in rows[0]:
            info[name] |= {
                "ranking": True,
                "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
            }
    (folder / "dataset_info.json").write_text(
        json.dumps(info, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n"
    )
    write_rows(
        folder / "schemas.json",
        [
            {
                "name": schema.name,
                "language": schema.language,
                "held_out": schema.name in HELD_OUT_SCHEMAS,
                "ddl": [table.ddl for table in schema.tables],
                "lines": [table.line for table in schema.tables],
            }
            for schema in SCHEMAS
        ],
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "data")
