"""LLaMA-Factory 0.9.3 with trl 0.9.6 on training works: `on_llamafactory.py FOLDER WORK`, in an environment of its own.

The last pair of versions whose PPO runs. float32, as it chooses on a CPU; the value head is on the policy's trunk.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from works import WORKS, Work, report, write_data


def keys(work: Work, stage: str, folder: str, out: Path, **own: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": folder, "stage": stage, "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
        "lora_target": "all", "template": "default", "dataset_dir": str(write_data(work, out / "data")), "cutoff_len": 1024,
        "output_dir": str(out / stage), "overwrite_output_dir": True, "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-5, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "preprocessing_num_workers": 1, **own,
    }  # fmt: skip


def readable(folder: str, out: Path) -> str:
    """The model with a tokenizer class that transformers 4 knows; weights are linked. (It reads another rotary base; time is the same.)"""
    out.mkdir()
    for file in Path(folder).iterdir():
        if file.name != "tokenizer_config.json":
            (out / file.name).symlink_to(file.resolve())
    told = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return str(out)


def main() -> None:
    from llamafactory.train.tuner import run_exp

    folder, work = sys.argv[1], WORKS[sys.argv[2]]
    spent: list[float] = []

    def clocked(owner: Any, name: str) -> None:
        """Time what `owner.name` takes: the loop, without loading and tokenising."""
        inner = getattr(owner, name)

        def outer(*args: Any, **other: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **other)
            finally:
                spent.append(time.perf_counter() - start)

        setattr(owner, name, outer)

    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        folder = readable(folder, out / "model")
        if work.kind == "ppo":
            from llamafactory.train.ppo.trainer import CustomPPOTrainer

            run_exp(keys(work, "rm", folder, out, dataset="pairs", max_steps=1))
            clocked(CustomPPOTrainer, "ppo_train")
            run_exp(
                keys(
                    work, "ppo", folder, out, dataset="rows", reward_model=str(out / "rm"), ppo_epochs=work.epochs,
                    max_new_tokens=work.new, num_train_epochs=1, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                )
            )  # fmt: skip
        else:
            from transformers import Trainer

            clocked(Trainer, "_inner_training_loop")
            run_exp(
                keys(
                    work, work.kind, folder, out, dataset={"sft": "rows", "rm": "pairs"}[work.kind], num_train_epochs=2
                )
            )
            spent[-1] /= 2
    report("LLaMA-Factory", work, {"seconds": spent[-1], "all_seconds": spent[-1:]})


if __name__ == "__main__":
    main()
