"""What is measured: the works, their sizes, and their prompts. Plain Python, since every peer's environment imports it.

A work is done by one engine in one process (`engines/NAME.py WORK`), which prints one JSON line: `seconds` of the work without loading
and warm-up, the `tokens` it drew or read, and what else it knows. `ours.py` and `peers.py` start those processes in turn.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["decode", "prefill", "scoring", "sft", "rm", "ppo", "group"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One thing to do.

    Attributes:
        rows: prompts, rows or pairs in all.
        k: completions of each prompt.
        prompt: tokens of a prompt, template included; a range where they differ.
        new: tokens of an answer, at most.
        batch: rows (prompts) of an optimizer step.
        buffer: minibatches of a rollout batch.
        epochs: passes over a rollout batch.
        critic: of PPO.
        data: random words, whose prompts have nothing in common but the template, or the text-to-SQL rows of the examples, where
            prompts that are asked of one schema begin alike.
    """

    name: str
    kind: Kind
    rows: int
    k: int = 1
    prompt: tuple[int, int] = (64, 64)
    new: int = 48
    batch: int = 16
    buffer: int = 1
    epochs: int = 1
    critic: str = "head"
    data: Literal["words", "sql"] = "words"


SQL_ROWS = Path(__file__).resolve().parent.parent / "examples" / "text2sql" / "data" / "rw_data.json"
SQL = 55
"""Tokens of such a prompt, on average."""

WORKS = {
    work.name: work
    for work in (
        *(Work(name=f"decode-{n}", kind="decode", rows=n) for n in (1, 16, 64, 256)),
        Work(name="prefill", kind="prefill", rows=16, prompt=(400, 400), new=1),
        Work(name="scoring", kind="scoring", rows=64, prompt=(64, 64), new=48),
        Work(name="sft", kind="sft", rows=64, prompt=(22, 28), new=15),
        Work(name="rm", kind="rm", rows=64, prompt=(22, 28), new=15),
        Work(name="ppo-head", kind="ppo", rows=64, prompt=(21, 30), new=32, batch=8, epochs=4),
        Work(name="ppo-adapter", kind="ppo", rows=64, prompt=(21, 30), new=32, batch=8, epochs=4, critic="adapter"),
        Work(name="group-8x8", kind="group", rows=8, k=8, prompt=(400, 400), new=48, batch=8),
        Work(name="group-16x4", kind="group", rows=16, k=4, prompt=(43, 47), new=32, batch=16),
        Work(name="sft-sql", kind="sft", rows=64, prompt=(SQL, SQL), new=24, data="sql"),
        Work(name="rm-sql", kind="rm", rows=64, prompt=(SQL, SQL), new=24, data="sql"),
        Work(name="ppo-sql", kind="ppo", rows=64, prompt=(SQL, SQL), new=32, batch=8, epochs=4, data="sql"),
        Work(name="group-sql", kind="group", rows=16, k=4, prompt=(SQL, SQL), new=32, batch=16, data="sql"),
        # for one GPU (gpu.py): a published log's batch on a small model, and the article's settings on a large one
        *(Work(name=f"gpu-decode-{n}", kind="decode", rows=n, prompt=(256, 256), new=256) for n in (1, 8, 32, 256)),
        Work(name="gpu-ppo", kind="ppo", rows=256, prompt=(100, 110), new=239, batch=64, buffer=4),
        Work(name="gpu-article", kind="ppo", rows=16, prompt=(100, 400), new=512, batch=8, epochs=4, critic="adapter"),
    )
}

GPU_WORKS = tuple(name for name in WORKS if name.startswith("gpu-"))

# Words of one token each in the default model's vocabulary when a space stands before them, so that lengths can be chosen.
_LIST = """water tree house light river stone bread cloud table paper green small large north south night morning music garden winter
summer window school market letter story animal people number system energy history city road"""
WORDS = _LIST.split()

CHATML_FRAME = 8
"""Tokens that chatml puts around one user message, the header of the answer included; a word more or less is within the range."""


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def questions(work: Work, seed: int = 0, tokens_a_word: float = 1.0) -> list[str]:
    """User messages whose prompts have the lengths that the work asks for; asking for a list, so that answers go on.

    Args:
        tokens_a_word: of the model's tokenizer; one for the default model.
    """
    if work.data == "sql":
        return [row["instruction"] for row in _sql(work)]
    rng = random.Random(seed)
    asked = []
    for _ in range(work.rows):
        words = (rng.randint(*work.prompt) - CHATML_FRAME) / tokens_a_word
        # eight tokens of request and of a first word that has no space before it; at the end, since prompts that begin alike
        # would be cheaper for us than for others
        asked.append(f"{sentence(rng, max(1, round(words) - 8))} go on with this list of words")
    return asked


def answers(work: Work, seed: int, tokens_a_word: float = 1.0) -> list[str]:
    """The answers to learn (seed 1), and worse ones to the same questions (seed 2)."""
    if work.data == "sql":
        return [row["chosen" if seed == 1 else "rejected"] for row in _sql(work)]
    rng = random.Random(1000 + seed)
    return [sentence(rng, max(1, round((work.new - 2) / tokens_a_word))) for _ in range(work.rows)]


def _sql(work: Work) -> list[dict[str, str]]:
    """The first rows of the examples' preference data, in the file's order, which is random."""
    rows: list[dict[str, str]] = json.loads(SQL_ROWS.read_text(encoding="utf-8"))
    return rows[: work.rows]


def chatml(question: str) -> str:
    """The prompt as text, for engines that are given no template."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def write_data(work: Work, folder: Path, tokens_a_word: float = 1.0) -> Path:
    """The rows as files that both trimtab and LLaMA-Factory read: `rows` (alpaca) and `pairs` (alpaca, ranking); returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = questions(work, tokens_a_word=tokens_a_word)
    chosen, rejected = answers(work, 1, tokens_a_word), answers(work, 2, tokens_a_word)
    rows = [{"instruction": q, "input": "", "output": a} for q, a in zip(asked, chosen, strict=True)]
    pairs = [
        {"instruction": q, "input": "", "chosen": a, "rejected": b}
        for q, a, b in zip(asked, chosen, rejected, strict=True)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    info = {
        "rows": {"file_name": "rows.json"},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def timed(run: Callable[[], int], warmups: int = 1, repeats: int = 3) -> dict[str, Any]:
    """Run, `warmups` times unmeasured and then `repeats` times; `run` returns its tokens. The median, and all of them."""
    for _ in range(warmups):
        run()
    seconds, tokens = [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds)[len(seconds) // 2], "all_seconds": seconds, "tokens": tokens}


def report(engine: str, work: Work, figures: dict[str, Any]) -> None:
    """The one line that a measuring process prints for its starter."""
    print("ROW " + json.dumps({"engine": engine, "work": work.name, "size": asdict(work), **figures}), flush=True)
