"""Kill -9 a training process at random moments, resume it, and compare with the run that was never stopped.

    python tests/resume/kills.py --stage ppo --kills 20 --seed 7

Every process is a real one that dies by SIGKILL. A moment is one of two kinds, half of each:

    time    so many seconds after its start, drawn over the length of a whole run: inside set-up, steps, evaluations
    file    at the n-th thing it does to a file of its run folder (open, rename, remove, mkdir), n drawn over those of a whole run:
            inside saves, rotation, the final save; seen by an audit hook, so that a seed gives the same moment again

A resumed process is killed again half of the time, up to three times. Then it runs to its end, and everything but times must be
equal to the last bit: metrics, samples, trainer log, results, the checkpoints there are, and every tensor of the last one and of
the final model. Processes are forked from a server that has imported torch, where the system can fork.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["trimtab.pipeline", "trimtab.train.online", "trimtab.train.offline", "trimtab.report.plots", "transformers"]
QUESTIONS = ["a", "b c", "tell me d", "is it e or f", "g", "the h", "i j k", "say l", "m n", "what is o", "p", "the q"]
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}

# Everything that is state: dropout, a controller, running moments, a best model, rotation, evaluation off the save steps.
COMMON: dict[str, Any] = {
    "do_train": True,
    "template": "chatml",
    "cutoff_len": 64,
    "lora_rank": 4,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_steps": 7,
    "logging_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_on_start": True,
    "compute_dtype": "float32",
    "use_cpu": True,
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {
        "dataset": "qa", "eval_dataset": "qa_eval", "lora_dropout": 0.2, "load_best_model_at_end": True, "eval_steps": 2,
        "eval_tasks": "exact_match", "max_new_tokens": 4, "plot_loss": True,
    },
    "rm": {"dataset": "pairs", "eval_dataset": "pairs_eval", "center_rewards_coef": 0.01},
    "ppo": {
        "dataset": "qa", "eval_dataset": "qa_eval", "max_new_tokens": 6, "ppo_epochs": 2, "ppo_buffer_size": 2,
        "kl_target": 0.1, "kl_horizon": 20, "score_norm": True, "group_size": 2,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- in the process


def train(keys: dict[str, Any], log: str, die_at: int | None = None, count: Any = None) -> None:
    """Run a stage in this process; killed at its `die_at`-th event, or counting them into `count`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    folder = str(keys["output_dir"])
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not any(
            isinstance(a, (str, os.PathLike)) and str(a).startswith(folder) for a in arguments
        ):
            return
        seen += 1
        if count is not None:
            count.value = seen
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)

    sys.addaudithook(watch)
    from trimtab.pipeline import run_exp

    run_exp(keys, resume=bool(keys.pop("resume", False)))


def make_model(folder: str) -> None:
    from trimtab.models.tiny import make_tiny

    make_tiny("qwen2", Path(folder), 0)


# -------------------------------------------------------------------------------------------------------- the experiment


class Bench:
    """A folder with a tiny model, data, and the runs."""

    def __init__(self, root: Path, say: Callable[[str], None] = print) -> None:
        self.root, self.say = root, say
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(PRELOAD)
        data = root / "data"
        data.mkdir(parents=True)
        qa = [{"instruction": q, "output": q.upper()} for q in QUESTIONS]
        pairs = [{"instruction": q, "chosen": "yes" * (1 + i % 2), "rejected": "no"} for i, q in enumerate(QUESTIONS)]
        for name, rows in {"qa": qa[:8], "qa_eval": qa[8:], "pairs": pairs[:8], "pairs_eval": pairs[8:]}.items():
            (data / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        entries = {
            n: {"file_name": f"{n}.json", "ranking": "pairs" in n} for n in ("qa", "qa_eval", "pairs", "pairs_eval")
        }
        (data / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
        self.process(make_model, str(root / "model"))
        # what PPO starts from; no test of its own
        few = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        for stage in ("sft", "rm"):
            self.run(stage, root / f"base-{stage}", **few, eval_on_start=False, eval_dataset=None)

    def process(self, target: Callable[..., None], *arguments: Any) -> int:
        child = self.context.Process(target=target, args=arguments)
        child.start()
        child.join()
        return int(child.exitcode)

    def keys(self, stage: str, output: Path, **more: Any) -> dict[str, Any]:
        keys = {
            "stage": stage,
            **COMMON,
            **STAGES[stage],
            "model_name_or_path": str(self.root / "model"),
            "dataset_dir": str(self.root / "data"),
            "output_dir": str(output),
        }
        if stage == "ppo":
            keys |= {
                "adapter_name_or_path": str(self.root / "base-sft"),
                "reward_model": str(self.root / "base-rm"),
            }
        return keys | more

    def log(self, output: Path) -> Path:
        return output.with_name(output.name + ".log")

    def run(self, stage: str, output: Path, **more: Any) -> None:
        code = self.process(train, self.keys(stage, output, **more), str(self.log(output)))
        if code != 0:
            raise AssertionError(f"{output} ended with {code}:\n" + self.log(output).read_text(encoding="utf-8"))

    def straight(self, stage: str) -> tuple[Path, float, int]:
        """The run that is never killed, its seconds and its file events."""
        output = self.root / f"straight-{stage}"
        count = self.context.Value("i", 0)
        started = time.monotonic()
        code = self.process(train, self.keys(stage, output), str(self.log(output)), None, count)
        if code != 0:
            raise AssertionError(self.log(output).read_text(encoding="utf-8"))
        return output, time.monotonic() - started, count.value

    def kill(self, stage: str, number: int, seed: int, straight: tuple[Path, float, int]) -> str:
        """One run killed once or more and resumed to its end; raises AssertionError where it differs. Returns how it died."""
        expected, seconds, events = straight
        draw = random.Random(f"{seed}/{stage}/{number}")
        output = self.root / f"killed-{stage}-{number}"
        deaths: list[str] = []
        alive = True
        while alive and len(deaths) < 3 and (not deaths or draw.random() < 0.5):
            keys = self.keys(stage, output, resume=bool(deaths))
            at_file = draw.random() < 0.5
            # a resumed run is shorter: draw its moments from the first part more often
            share = draw.random() * (0.6 if deaths else 1.0)
            if at_file:
                event = max(1, round(share * events))
                child = self.context.Process(target=train, args=(keys, str(self.log(output)), event))
                child.start()
                child.join()
                deaths.append(f"file event {event}")
            else:
                child = self.context.Process(target=train, args=(keys, str(self.log(output))))
                child.start()
                child.join(share * seconds)
                child.kill()
                child.join()
                deaths.append(f"{share * seconds:.2f} s")
            alive = child.exitcode != 0
            if child.exitcode not in (0, -9):
                raise AssertionError(f"exit {child.exitcode}:\n" + self.log(output).read_text(encoding="utf-8"))
            if not alive:
                deaths[-1] += " (had finished)"
        self.run(stage, output, resume=True)
        differences = compare(expected, output)
        if differences:
            raise AssertionError(
                f"{output} differs from {expected}: {'; '.join(differences)}\n"
                + self.log(output).read_text(encoding="utf-8")
            )
        shutil.rmtree(output)
        return ", ".join(deaths)


def timeless(value: Any) -> Any:
    """Without what measures time, and with the folder's own name taken out of paths."""
    if isinstance(value, dict):
        out = ("seconds", "in_steps", "runtime", "per_second", "_time", "elapsed", "remaining")
        return {k: timeless(v) for k, v in value.items() if not any(word in k for word in out)}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.sep in value else value


def compare(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs."""
    from safetensors import safe_open

    found: list[str] = []
    trees = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    if trees[0] != trees[1]:
        found.append(f"files: {sorted(set(trees[0]) ^ set(trees[1]))}")
    for name in sorted(set(trees[0]) & set(trees[1])):
        one, two = a / name, b / name
        if name.endswith(".jsonl"):
            rows = [
                [timeless(json.loads(line)) for line in p.read_text(encoding="utf-8").splitlines()] for p in (one, two)
            ]
            if rows[0] != rows[1]:
                found.append(f"{name}: {len(rows[0])} and {len(rows[1])} rows")
        elif name.endswith(".safetensors"):
            with safe_open(one, framework="pt") as x, safe_open(two, framework="pt") as y:
                if sorted(x.keys()) != sorted(y.keys()):
                    found.append(f"{name}: other tensors")
                else:
                    found += [f"{name}: {k}" for k in x.keys() if not x.get_tensor(k).equal(y.get_tensor(k))]  # noqa: SIM118
        elif name.endswith(("_results.json", "state.json", "trainer_state.json")) and (
            timeless(json.loads(one.read_text("utf-8"))) != timeless(json.loads(two.read_text("utf-8")))
        ):
            found.append(name)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill training runs at random moments and resume them.")
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="which (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="killed runs per stage")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}: python tests/resume/kills.py --kills {given.kills} --seed {given.seed}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="trimtab-kills-") as scratch:
        bench = Bench(Path(scratch))
        for stage in given.stage or STAGES:
            straight = bench.straight(stage)
            print(f"{stage}: {straight[1]:.1f} s, {straight[2]} file events unkilled", flush=True)
            for number in range(given.kills):
                try:
                    print(
                        f"  {stage} {number}: killed at {bench.kill(stage, number, given.seed, straight)}: equal",
                        flush=True,
                    )
                except AssertionError as error:
                    failed += 1
                    print(f"  {stage} {number}: {error}", flush=True)
    print(f"{failed} differ" if failed else "all equal to the runs that were never killed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
