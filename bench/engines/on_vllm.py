"""vLLM's CPU build on decoding: `python bench/engines/on_vllm.py FOLDER WORK`, in an environment of its own, the base without an adapter.

Without, because its LoRA kernels do not run on every CPU; that is to its advantage.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from works import WORKS, chatml, questions, report, timed

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    import torch
    from vllm import LLM, SamplingParams

    folder, work = sys.argv[1], WORKS[sys.argv[2]]
    dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    model = LLM(
        model=folder, dtype=dtype, max_model_len=1024, max_num_seqs=max(64, work.rows), enable_prefix_caching=False
    )
    prompts = [chatml(question) for question in questions(work)]
    # no seed: a generator for each request has no offset on a CPU, and vLLM 0.32 asks for it
    settings = SamplingParams(temperature=1.0, max_tokens=work.new, ignore_eos=True)

    def run() -> int:
        done = model.generate(prompts, settings, use_tqdm=False)
        read = sum(len(d.prompt_token_ids) for d in done)
        return read if work.kind == "prefill" else sum(len(d.outputs[0].token_ids) for d in done)

    report("vLLM CPU", work, timed(run))


if __name__ == "__main__":
    main()
