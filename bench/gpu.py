"""One GPU in one run: `python bench/gpu.py [--shapes 0.5b 7b] [--out FILE]`. Random weights of known shapes, no network, no hub.

Measured: what the device gives (matrix products at the model's shapes, memory bandwidth), decoding at several batch sizes, a PPO step
of 256 prompts on the small shape and the article's PPO settings on the large one, with peak memory. Decoding and each training work have
a process of their own: one that runs out of memory does not take the others along. Weights lie in memory (/dev/shm) where that exists.

On a CPU, `--shapes tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from run import HERE, machine, measure_all, ours
from works import WORKS

# hidden, MLP, layers, query heads, key heads, vocabulary, tied
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (64, 128, 2, 4, 2, 300, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),  # Qwen2.5-0.5B
    "7b": (3584, 18944, 28, 28, 4, 152064, False),  # Qwen2-7B
}
WORKS_OF = {
    "tiny": ("gpu-decode-1,gpu-decode-8", "ppo-head"),
    "0.5b": ("gpu-decode-1,gpu-decode-32,gpu-decode-256", "gpu-ppo"),
    "7b": ("gpu-decode-1,gpu-decode-8,gpu-decode-32", "gpu-article"),
}
RAM = Path("/dev/shm")


def make(shape: str, folder: Path) -> Path:
    """A folder with random weights of a shape and the byte-level tokenizer of the tests' models."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trimtab.models.tiny import tiny_tokenizer

    hidden, wide, layers, heads, keys, vocabulary, tied = SHAPES[shape]
    tokenizer = tiny_tokenizer("qwen2")
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768, rope_theta=1e6,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    # made in its type: 7 B parameters in float32 would not fit on a card of 24 GB
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device("cuda" if cuda else "cpu"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def device_rates(shape: str) -> dict[str, float]:
    """Matrix products of 8192 rows with the MLP's weights, in TFLOP/s; a copy of 2 GiB (64 MiB on a CPU), in GB/s read and written."""
    hidden, wide, *_ = SHAPES[shape]
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    a, w = torch.randn(8192, hidden, device=device, dtype=dtype), torch.randn(wide, hidden, device=device, dtype=dtype)
    source = torch.empty((1 << 31) if cuda else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def rate(run: Any, amount: float, repeats: int) -> float:
        run()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if cuda:
            torch.cuda.synchronize()
        return amount * repeats / (time.perf_counter() - start)

    return {
        "products_tflops": rate(lambda: torch.nn.functional.linear(a, w), 2 * 8192 * hidden * wide, 20) / 1e12,
        "bandwidth_gb": rate(lambda: target.copy_(source), 2 * source.numel(), 10) / 1e9,
    }


def weights(shape: str) -> int:
    """Parameters that a token's forward pass multiplies, the output head with them."""
    hidden, wide, layers, heads, keys, vocabulary, _ = SHAPES[shape]
    size = hidden // heads
    return layers * (2 * hidden * hidden + 2 * hidden * keys * size + 3 * hidden * wide) + vocabulary * hidden


def held_against(row: dict[str, Any], shape: str, rates: dict[str, float]) -> dict[str, float]:
    """Percent of the bandwidth limit for decoding, of the matrix limit for the update of a PPO step."""
    work, n = WORKS[row["work"]], weights(shape)
    if work.kind == "decode":
        least = (work.new - 1) * 2 * n / (rates["bandwidth_gb"] * 1e9)  # bfloat16 weights are read once a token
        return {
            "tokens_per_second": row["tokens"] / row["seconds"],
            "percent_of_bandwidth": 100 * least / row["seconds"],
        }
    update = row["parts"].get("seconds/update")
    found = {"samples_per_second": work.rows / row["seconds"]}
    if update:
        answers = work.batch * work.buffer * work.new
        tokens = work.batch * work.buffer * sum(work.prompt) / 2 + answers
        head = SHAPES[shape][0] * SHAPES[shape][5]
        # forward and input gradients, 2 N a token each; the critic has no output head, the policy's is read at answers
        policy, critic = (n - head) * tokens + head * answers, (n - head) * tokens * (work.critic == "adapter")
        floating = 4 * work.epochs * (policy + critic)
        found["percent_of_products"] = 100 * floating / (rates["products_tflops"] * 1e12) / update
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["0.5b", "7b"], choices=list(SHAPES))
    parser.add_argument("--works", default="", help="only works whose names hold this")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    asked = parser.parse_args()
    rows = []
    roomy = RAM.is_dir() and shutil.disk_usage(RAM).free > 20 * 2**30
    with tempfile.TemporaryDirectory(dir=RAM if roomy else None) as name:
        for shape in asked.shapes:
            rates = device_rates(shape)
            print(json.dumps({"shape": shape, **rates}), flush=True)
            folder = make(shape, Path(name) / shape)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            for works in (own for own in WORKS_OF[shape] if asked.works in own):
                for row in measure_all([*ours(works), "--model", str(folder)]):
                    rows.append({"shape": shape, **row, "held_against": held_against(row, shape, rates)})
                    print(json.dumps({k: v for k, v in rows[-1].items() if k != "size"}), flush=True)
                    asked.out.parent.mkdir(parents=True, exist_ok=True)
                    asked.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
