"""TRL on training works: `on_trl.py FOLDER WORK`, in an environment of its own. Seconds of a pass, or of a group step."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from works import WORKS, Work, answers, chatml, questions, report


def passes(trainer: Any, length: int) -> dict[str, Any]:
    """Train, and the seconds of each `length` steps but the first."""
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **other: Any) -> None:
            marks.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    found = [marks[i] - marks[i - length] for i in range(2 * length - 1, len(marks), length)]
    return {"seconds": sorted(found)[len(found) // 2], "all_seconds": found}


def main() -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder, work = sys.argv[1], WORKS[sys.argv[2]]
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    dtype = torch.bfloat16 if fast else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    asked = questions(work)
    with tempfile.TemporaryDirectory() as out:
        common: dict[str, Any] = {
            "output_dir": out, "per_device_train_batch_size": work.batch, "learning_rate": 1e-5, "report_to": "none",
            "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "bf16": fast,
            "gradient_checkpointing": False, "disable_tqdm": True,
        }  # fmt: skip
        steps = -(-work.rows // work.batch)
        if work.kind == "sft":
            from trl import SFTConfig, SFTTrainer

            data = [
                {"prompt": chatml(q), "completion": f"{a}<|im_end|>\n"}
                for q, a in zip(asked, answers(work, 1), strict=True)
            ]
            trainer: Any = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), processing_class=tokenizer, peft_config=lora,
                args=SFTConfig(num_train_epochs=4, **common), train_dataset=Dataset.from_list(data),
            )  # fmt: skip
        elif work.kind == "rm":
            from trl import RewardConfig, RewardTrainer

            data = [
                {"chosen": f"{chatml(q)}{a}<|im_end|>", "rejected": f"{chatml(q)}{b}<|im_end|>"}
                for q, a, b in zip(asked, answers(work, 1), answers(work, 2), strict=True)
            ]
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
            model.config.pad_token_id = tokenizer.pad_token_id
            trainer = RewardTrainer(
                model=model, processing_class=tokenizer, peft_config=lora, args=RewardConfig(num_train_epochs=4, **common),
                train_dataset=Dataset.from_list(data),
            )  # fmt: skip
        else:
            trainer = _rloo(work, folder, tokenizer, lora, common, asked, dtype)
            steps = 1
        figures = passes(trainer, steps)
    report("TRL", work, figures)


def _rloo(
    work: Work, folder: str, tokenizer: Any, lora: Any, common: dict[str, Any], asked: list[str], dtype: Any
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import RLOOConfig, RLOOTrainer

    def length(completions: list[str], **other: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    # all rows in one batch where 24 GB hold its logits, else in batches whose gradients add up: one optimizer step either way
    total = work.rows * work.k
    at_once = total if work.prompt[1] < 100 else work.k
    common = {**common, "per_device_train_batch_size": at_once, "gradient_accumulation_steps": total // at_once}
    args = RLOOConfig(
        num_generations=work.k, max_completion_length=work.new, beta=0.05, max_steps=3 if at_once == total else 2, temperature=1.0,
        num_iterations=1, steps_per_generation=total // at_once, **common,
    )  # fmt: skip
    return RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), reward_funcs=length, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": chatml(q)} for q in asked]), peft_config=lora,
    )  # fmt: skip


if __name__ == "__main__":
    main()
