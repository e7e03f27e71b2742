"""Answer every row of a data file with a fine-tuned model, and log each answer.

    pip install -r examples/article/requirements.txt
    python examples/article/infer.py [CONFIG] [ROWS]

CONFIG is the inference YAML (predict.yaml beside this script: change its paths to yours); ROWS is a JSON list of alpaca rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from loguru import logger

from trimtab import ChatModel

HERE = Path(__file__).parent


def main(config: Path, rows: Path) -> None:
    args = yaml.safe_load(config.read_text(encoding="utf-8"))
    data = json.loads(rows.read_text(encoding="utf-8"))
    questions = ["\n".join(part for part in (row["instruction"], row.get("input")) if part) for row in data]
    messages = [{"role": "user", "content": question} for question in questions]
    logger.info("{} questions from {}", len(messages), rows)
    # several messages that are all the user's are answered one by one
    for message, response in zip(messages, ChatModel(args).chat(messages), strict=True):
        logger.info("question: {}", message["content"])
        print(response.response_text)


if __name__ == "__main__":
    defaults = [HERE / "predict.yaml", HERE.parent / "text2sql" / "data" / "article.json"]
    given = [Path(word) for word in sys.argv[1:]]
    main(*given, *defaults[len(given) :])
