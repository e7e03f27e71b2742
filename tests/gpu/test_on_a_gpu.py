"""What only a GPU can show: `python -m pytest -m gpu tests/gpu`. The references are the CPU's own results and transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.test_generator import NEVER, engine, policy, prompt, texts
from tests.models.test_attention import forest
from trimtab.engine import between, generator, graphs
from trimtab.engine.blocks import why_not
from trimtab.engine.generator import Engine
from trimtab.models import attention, block, lora
from trimtab.models.attention import Trees
from trimtab.models.forward import choose_layout, score_tokens
from trimtab.models.roles import Roles
from trimtab.models.tiny import FAMILIES, Family
from trimtab.types import Sampling, TokenRow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ROWS = [prompt(i, *range(20 + i, 24 + i + 7 * (i % 5))) for i in range(13)]
SAMPLING = Sampling(max_new_tokens=150, seed=4)
"""Long enough for several recorded sizes."""
STOPS = (3, 4, 5)


def on_gpu(family: Family = "qwen2", dtype: torch.dtype = torch.float32) -> Roles:
    roles = policy(family)
    roles.model.to("cuda", dtype)
    for layer in lora.layers(roles.model).values():  # adapters are no submodules of the base
        for adapter in layer.adapters.values():
            adapter.cuda()
    return roles


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers_on_100_prompts(family: Family) -> None:
    """In float32, except where transformers' own two best logits are within 1e-5."""
    roles = on_gpu(family)
    assert why_not(roles.model, ("x",)) == ""
    generator_ = torch.Generator().manual_seed(0)
    prompts = [
        prompt(i, *torch.randint(5, 200, (int(n),), generator=generator_).tolist())
        for i, n in enumerate(torch.randint(1, 40, (100,), generator=generator_))
    ]
    done = engine(roles).generate(prompts, Sampling(temperature=0.0, max_new_tokens=24))
    with torch.no_grad(), roles.enter("policy"):
        for row, completion in zip(prompts, done, strict=True):
            ids = torch.tensor([[*row.token_ids, *completion.token_ids]], device="cuda")
            logits = roles.model(input_ids=ids, use_cache=False).logits[0, len(row.token_ids) - 1 : -1]
            best = logits.topk(2, dim=-1)
            sure = best.values[:, 0] - best.values[:, 1] > 1e-5
            drawn = torch.tensor(completion.token_ids, device="cuda")
            assert torch.equal(drawn[sure], best.indices[sure, 0])


def test_steps_are_recorded_and_replayed_and_the_texts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = on_gpu()
    recorded: list[int] = []
    plain = graphs.recorder

    def counting(device: torch.device) -> Any:
        record = plain(device)
        assert record is not None, graphs._refused

        def wrapped(run: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], Tensor]:
            replay, first = record(run)

            def counted() -> Tensor:
                recorded[-1] += 1
                return replay()

            recorded.append(0)
            return counted, first

        return wrapped

    monkeypatch.setattr(generator.graphs, "recorder", lambda device: None)
    without = engine(roles, STOPS, slots=8).generate(ROWS, SAMPLING)
    monkeypatch.setattr(generator.graphs, "recorder", counting)
    said: list[str] = []
    replayed = engine(roles, STOPS, slots=8, say=said.append).generate(ROWS, SAMPLING)
    assert texts(replayed) == texts(without)
    assert not said, said
    assert len(recorded) >= 2, recorded
    assert sum(recorded) > 50, recorded
    for function in (between.add_rms_plain, between.silu_mul_plain, between.turn_and_store):
        assert not function.broken, (function.__name__, function.broken)  # type: ignore[attr-defined]


def test_texts_are_those_of_the_cpu() -> None:
    """At equal seeds, in float32: almost always, since sums come in another order."""
    here = Engine(roles=policy(), role="policy", stop_ids=NEVER).generate(ROWS, Sampling(max_new_tokens=20, seed=9))
    there = engine(on_gpu()).generate(ROWS, Sampling(max_new_tokens=20, seed=9))
    same = sum(a == b for a, b in zip(texts(here), texts(there), strict=True))
    assert same >= len(ROWS) - 1, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_agrees_with_the_scorer(dtype: torch.dtype) -> None:
    roles = on_gpu(dtype=dtype)
    choose_layout([roles.model])
    drawn = engine(roles).generate(ROWS, Sampling(max_new_tokens=40, seed=2), k=2)
    rows = []
    for c in drawn:
        ids = ROWS[c.prompt_index].token_ids
        rows.append(TokenRow(token_ids=(*ids, *c.token_ids), scored=tuple(range(len(ids), len(ids) + 40))))
    for layout in ("padded", "packed", "shared"):
        with torch.no_grad(), roles.enter("policy"):
            scored = score_tokens(roles.model, rows, layout=layout)
        assert scored.logp is not None
        away = (torch.tensor([c.logprobs for c in drawn], device="cuda") - scored.logp).abs()
        assert float(away.mean()) < (1e-4 if dtype == torch.float32 else 0.05), (layout, float(away.mean()))


ROWS_ALONE = [(9, 0), (4, 0), (31, 0), (17, 0), (3, 0)]
SHARING = [(5, 0), (3, 1), (1, 1), (4, 2), (2, 0), (40, 0), (17, 1), (9, 2), (30, 2), (12, 0)]


def against_a_dense_mask(trees: Trees, dtype: torch.dtype, tolerance: float, size: int = 64) -> None:
    """Output and gradients of what the GPU computes, against one dense mask in float32."""
    trees.device = torch.device("cuda")
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, trees.n, size, generator=drawn).to("cuda", dtype).requires_grad_() for heads in (4, 2, 2)
    )
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    got = attention.tree_attention(q, k, v, trees, 0.3)
    want = F.scaled_dot_product_attention(*wide, attn_mask=trees.mask(), scale=0.3, enable_gqa=True).transpose(1, 2)
    pull = torch.randn(want.shape, generator=drawn).cuda()
    found = torch.autograd.grad((got.float() * pull).sum(), (q, k, v))
    wanted = torch.autograd.grad((want * pull).sum(), wide)
    for name, a, b in (("out", got, want), *zip("qkv", found, wanted, strict=True)):
        error = float((a.float() - b).norm() / b.norm())
        assert error < tolerance, (name, error)


def test_rows_go_through_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention._flash_is_right("cuda:0", torch.bfloat16)
    monkeypatch.setattr(attention, "_flex_attention", lambda: pytest.fail("rows alone need no trees"))
    against_a_dense_mask(forest(ROWS_ALONE), torch.bfloat16, 1e-2)


@pytest.mark.parametrize("nodes", [ROWS_ALONE, SHARING])
def test_one_mask_computes_them_in_float32(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_flex_attention", lambda: None)
    against_a_dense_mask(forest(nodes), torch.float32, 1e-5)


@pytest.mark.slow
def test_trees_go_through_flex_attention() -> None:
    """Compiled: takes half a minute."""
    against_a_dense_mask(forest(SHARING), torch.bfloat16, 1e-2)
    against_a_dense_mask(forest([(7, 0), (5, 1), (5, 1), (5, 1), *SHARING]), torch.bfloat16, 1e-2)
    against_a_dense_mask(forest(SHARING), torch.float32, 1e-3)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gradients_are_those_of_the_cpu(layout: Any) -> None:
    rows = [TokenRow(token_ids=tuple(range(20 + i, 40 + 3 * i)), scored=tuple(range(9, 20 + 2 * i))) for i in range(5)]
    found = []
    for roles in (policy(), on_gpu()):
        block.install(roles.model)
        choose_layout([roles.model])
        with roles.enter("policy"):
            scores = score_tokens(roles.model, rows, layout=layout)
            assert scores.logp is not None and scores.entropy is not None
            (scores.logp.sum() + 0.1 * scores.entropy.sum()).backward()
        found.append({name: p.grad.cpu() for name, p in roles.trainable("policy").items() if p.grad is not None})
    here, there = found
    assert here.keys() == there.keys() and here
    for name, grad in here.items():
        assert float((grad - there[name]).norm()) <= 1e-4 * float(grad.norm()) + 1e-7, name


def test_a_run_of_each_stage_learns_on_the_gpu(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """SFT, reward model, PPO with both critics and RLOO, in the type that the card likes; memory is told beside the plan."""
    import json

    from trimtab import run_exp

    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} {i}"} for i in range(12)]
    pairs = [{"instruction": f"say {i}", "input": "", "chosen": f"{i}", "rejected": "no"} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "rows": {"file_name": "rows.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    common = {
        "model_name_or_path": str(tiny_folder("qwen2")), "do_train": True, "finetuning_type": "lora", "lora_target": "all",
        "template": "chatml", "dataset_dir": str(tmp_path), "cutoff_len": 128, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 3, "save_strategy": "no",
    }  # fmt: skip

    def run(name: str, **keys: Any) -> Any:
        done = run_exp({**copy.deepcopy(common), "output_dir": str(tmp_path / name), **keys})
        manifest = done.manifest()
        assert manifest["hardware"]["device"] == "cuda", manifest["hardware"]
        losses = [row["loss"] for row in done.metrics() if row["kind"] == "train"]
        assert losses and all(abs(loss) < 100 for loss in losses)
        return done

    sft = run("sft", stage="sft", dataset="rows")
    rm = run("rm", stage="rm", dataset="pairs", adapter_name_or_path=str(sft.path))
    online = {
        "adapter_name_or_path": str(sft.path),
        "reward_model": str(rm.path),
        "dataset": "rows",
        "max_new_tokens": 12,
    }
    for critic in ("head", "adapter"):
        run(f"ppo-{critic}", stage="ppo", critic=critic, ppo_epochs=2, **online)
    run("rloo", stage="rloo", group_size=2, layout="packed", **online)
    run("dpo", stage="dpo", dataset="pairs", layout="packed", adapter_name_or_path=str(sft.path))
