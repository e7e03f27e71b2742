"""transformers on decoding: `python bench/engines/on_transformers.py WORK [generate | continuous]`, LoRA through peft."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from works import WORKS, Work, chatml, questions, report, timed


def load(folder: str) -> tuple[Any, Any]:
    """The model with an adapter whose B is drawn, as in `ours.py`, and its tokenizer; bfloat16 where the CPU multiplies it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if fast else torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def generate(work: Work, folder: str) -> dict[str, Any]:
    import torch

    model, tokenizer = load(folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer([chatml(q) for q in questions(work)], return_tensors="pt", padding=True, add_special_tokens=False)

    def run() -> int:
        with torch.inference_mode():
            out = model.generate(
                **batch,
                max_new_tokens=work.new,
                min_new_tokens=work.new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
        read = int(batch["attention_mask"].sum())
        return read if work.kind == "prefill" else out[:, batch["input_ids"].shape[1] :].numel()

    return timed(run)


def continuous(work: Work, folder: str) -> dict[str, Any]:
    """Its continuous batching, `generate_batch`, on the merged model: it takes no peft wrapper."""
    from transformers import GenerationConfig

    model, tokenizer = load(folder)
    model = model.merge_and_unload()
    ids = [tokenizer.encode(chatml(q), add_special_tokens=False) for q in questions(work)]
    settings = GenerationConfig(
        max_new_tokens=work.new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
    )

    def run() -> int:
        out = model.generate_batch(inputs=ids, generation_config=settings, progress_bar=False)
        return sum(len(found.generated_tokens) for found in out.values())

    return timed(run, repeats=2)


def main() -> None:
    folder, work, how = sys.argv[1], WORKS[sys.argv[2]], sys.argv[3]
    figures = (generate if how == "generate" else continuous)(work, folder)
    report(f"transformers {how}", work, figures)


if __name__ == "__main__":
    main()
