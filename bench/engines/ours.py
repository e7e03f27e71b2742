"""trimtab on one work: `python bench/engines/ours.py WORK [--model FOLDER] [key=value ...]`; works of decoding may be joined by commas,
which loads the model once.

Training works run as a user's would, through `run_exp`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from works import WORKS, Work, chatml, questions, report, timed, write_data

DEFAULT = "smollm2-135m-instruct"
BYTES_A_WORD = 6.7
"""Tokens of a word in the byte-level tokenizer of the random models that gpu.py makes."""


def config(work: Work, stage: str, folder: Path, model: str, **keys: Any) -> dict[str, Any]:
    """The keys that every work has in common: LoRA of rank 8 on all linear layers, chatml, no evaluation, no checkpoints."""
    return {
        "model_name_or_path": model,
        "stage": stage,
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "template": "chatml",
        "dataset_dir": str(write_data(work, folder / "data", 1.0 if model == DEFAULT else BYTES_A_WORD)),
        "cutoff_len": 1024,
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": work.batch,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        **keys,
    }


@cache
def session_of(folder: Path, model: str) -> Any:
    """A loaded policy whose adapter is not zero: B is drawn, or the side path would be free for an engine that looks."""
    import torch

    from trimtab.config import load
    from trimtab.train.assemble import POLICY, assemble

    session = assemble(load(config(WORKS["sft"], "sft", folder, model, dataset="rows")))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in session.roles.trainable(POLICY).items():
        if "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return session


def prompt_ids(work: Work, session: Any) -> list[tuple[int, ...]]:
    """Prompts of exactly the longest length asked for."""
    ids = [session.tokenizer.encode(chatml(q), add_special_tokens=False) for q in questions(work)]
    return [tuple((row * (work.prompt[1] // len(row) + 1))[: work.prompt[1]]) for row in ids]


def decode(work: Work, folder: Path, model: str) -> dict[str, Any]:
    from dataclasses import replace

    from trimtab.types import Example, Origin, Prompt, Sampling

    session = session_of(folder, model)
    # no token ends an answer: equal work for every engine
    engine = replace(session.generator(), stop_ids=(-1,), slots=max(64, work.rows))
    example = Example(origin=Origin(file="bench", row=0))
    prompts = [Prompt(index=i, token_ids=ids, example=example) for i, ids in enumerate(prompt_ids(work, session))]
    sampling = Sampling(temperature=1.0, max_new_tokens=work.new, seed=1)

    def run() -> int:
        done = engine.generate(prompts, sampling, k=work.k)
        return sum(len(p.token_ids) for p in prompts) if work.kind == "prefill" else sum(len(c.token_ids) for c in done)

    return timed(run)


def scoring(work: Work, folder: Path, model: str) -> dict[str, Any]:
    import torch

    from trimtab.models.forward import score_tokens
    from trimtab.models.layout import plan
    from trimtab.train.assemble import POLICY
    from trimtab.types import TokenRow

    session = session_of(folder, model)
    rows = []
    for ids in prompt_ids(work, session):
        scored = tuple(range(len(ids), len(ids) + work.new))
        rows.append(TokenRow(token_ids=(*ids, *range(100, 100 + work.new)), scored=scored))

    def run() -> int:
        for chunk in plan(rows, session.budget, layout=session.layout):
            with torch.no_grad(), session.roles.enter(POLICY):
                score_tokens(session.roles.model, [rows[i] for i in chunk], layout=session.layout)
        return sum(len(row.token_ids) for row in rows)

    return timed(run)


def training(work: Work, folder: Path, model: str, overrides: list[str]) -> dict[str, Any]:
    """Seconds of one pass over the rows (of one step, for groups), the first pass not counted."""
    from trimtab import run_exp

    if work.kind in ("sft", "rm"):
        keys = config(
            work, work.kind, folder, model, dataset={"sft": "rows", "rm": "pairs"}[work.kind], num_train_epochs=4
        )
    elif work.kind == "ppo":
        rm = run_exp(config(work, "rm", folder / "rm", model, dataset="pairs", max_steps=1))
        keys = config(
            work, "ppo", folder, model, dataset="rows", reward_model=str(rm.path), ppo_epochs=work.epochs,
            ppo_buffer_size=work.buffer, critic=work.critic,
            critic_warmup_steps=0, max_new_tokens=work.new, num_train_epochs=2, kl_coef=0.05,
        )  # fmt: skip
    else:
        reward = folder / "reward.py"
        reward.write_text("def length(prompt, completion):\n    return float(len(completion))\n", encoding="utf-8")
        keys = config(
            work, "rloo", folder, model, dataset="rows", reward_funcs=f"{reward}:length", group_size=work.k, max_new_tokens=work.new,
            max_steps=3, kl_coef=0.05,
        )  # fmt: skip
    run = run_exp(keys, overrides=overrides)
    rows = [row for row in run.metrics() if row["kind"] == "train"]
    marks = [row["seconds"] for row in rows]
    length = -(-work.rows // (work.batch * work.buffer))
    passes = [marks[i] - marks[i - length] for i in range(2 * length - 1, len(marks), length)]
    measured = run.manifest()["measured"]
    return {
        "seconds": sorted(passes)[len(passes) // 2],
        "all_seconds": passes,
        "tokens": (rows[-1]["tokens"] - rows[-1 - length]["tokens"]),
        "parts": {name: rows[-1][name] for name in rows[-1] if name.startswith("seconds/")},
        "peak_memory_bytes": measured["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", type=lambda text: [WORKS[name] for name in text.split(",")])
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for work in asked.works:
            if work.kind in ("decode", "prefill"):
                figures = decode(work, folder, asked.model)
            elif work.kind == "scoring":
                figures = scoring(work, folder, asked.model)
            else:
                figures = training(work, folder, asked.model, asked.overrides)
            report("trimtab", work, figures)


if __name__ == "__main__":
    main()
