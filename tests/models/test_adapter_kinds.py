"""DoRA and whole modules beside an adapter, against plain peft: values, gradients, files both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trimtab.config import load
from trimtab.engine.generator import Engine
from trimtab.errors import AdapterError, ConfigError
from trimtab.models import lora
from trimtab.models.copies import add_copies, copied
from trimtab.models.dora import row_lengths
from trimtab.models.folder import ADAPTER_CONFIG
from trimtab.models.forward import score_tokens
from trimtab.models.load import head_weight
from trimtab.models.roles import Roles
from trimtab.models.tiny import Family, tiny_model
from trimtab.rundir import RunFolder
from trimtab.serve.export import export
from trimtab.train.assemble import assemble
from trimtab.types import Example, Origin, Prompt, Sampling, TokenRow

pytestmark = pytest.mark.unit

IDS = torch.tensor([[20, 31, 42, 53, 64, 75], [9, 290, 18, 27, 36, 45]])
KINDS: dict[str, tuple[Family, dict[str, Any]]] = {
    "dora": ("qwen2", {"use_dora": True}),  # with biases
    "whole": ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "tied": ("qwen2", {"modules_to_save": ["embed_tokens"]}),  # the head stays what it was
    "both": ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
}


def by_peft(kind: str) -> Any:
    """A peft model whose trainable parameters have all been moved."""
    family, settings = KINDS[kind]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model: Any = peft.get_peft_model(tiny_model(family), config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def as_ours(kind: str, folder: Path, *, trainable: bool = False) -> Roles:
    model = tiny_model(KINDS[kind][0]).requires_grad_(False)
    roles = Roles(model=model)
    lora.load_adapter(model, "p", folder, roles.switch, trainable=trainable)
    roles.define("policy", "p")
    return roles


def logits(roles: Roles) -> Tensor:
    with torch.no_grad(), roles.enter("policy"):
        return roles.model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_of_peft_computes_here_as_there_and_back_again(kind: str, tmp_path: Path) -> None:
    there = by_peft(kind)
    there.save_pretrained(tmp_path / "theirs")
    roles = as_ours(kind, tmp_path / "theirs")
    with torch.no_grad():
        expected = there(IDS).logits
    torch.testing.assert_close(logits(roles), expected, rtol=1e-5, atol=1e-5)
    lora.save_adapter(roles.model, ["p"], tmp_path / "ours", base="base")
    again = peft.PeftModel.from_pretrained(tiny_model(KINDS[kind][0]), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    mine, theirs = (load_file(tmp_path / name / lora.WEIGHTS) for name in ("ours", "theirs"))
    assert mine.keys() == theirs.keys()
    settings = json.loads((tmp_path / "ours" / ADAPTER_CONFIG).read_text())
    assert settings["use_dora"] == KINDS[kind][1].get("use_dora", False)
    saved = {name.rsplit(".", 1)[-1] for name in settings["modules_to_save"] or []}
    every = {"input_layernorm", "post_attention_layernorm", "norm"}  # peft's "norm" is every name that ends so
    assert saved - every == set(KINDS[kind][1].get("modules_to_save", [])) - every


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    there = by_peft(kind)
    there.save_pretrained(tmp_path)
    there(IDS).logits.square().mean().backward()
    expected = {}
    for name, parameter in there.named_parameters():
        if parameter.grad is not None:
            short = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            expected[short.replace("_vector", "").removesuffix(".weight")] = parameter.grad
    roles = as_ours(kind, tmp_path, trainable=True)
    with roles.enter("policy"):
        roles.model(IDS).logits.square().mean().backward()
    found = {name.split("/", 1)[1].removesuffix(".weight"): p for name, p in roles.trainable("policy").items()}
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in roles.model.parameters())  # the base learns nothing


def test_lengths_of_rows_by_hand() -> None:
    # W = [[3, 0], [0, 1]], s B A = 2 [[0], [1]] [[0, 1]] = [[0, 0], [0, 2]]: rows (3, 0) and (0, 3)
    w, a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]])
    assert row_lengths(w, a, b, 2.0).tolist() == [3.0, 3.0]
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*shape, generator=generator) for shape in ((5, 4), (2, 4), (5, 2)))
    torch.testing.assert_close(row_lengths(w, a, b, 0.7), (w + 0.7 * b @ a).norm(dim=1))


def test_a_new_dora_adapter_changes_nothing() -> None:
    model = tiny_model("qwen2")
    before = model(IDS).logits
    roles = Roles(model=model)
    found = lora.inject(model, ["all"], roles.switch)
    lora.new_adapter(model, "p", paths=found, rank=4, alpha=8, rslora=False, seed=0, dora=True)
    roles.define("policy", "p")
    torch.testing.assert_close(logits(roles), before, rtol=1e-5, atol=1e-5)


def test_a_copy_acts_in_its_role_alone() -> None:
    model = tiny_model("qwen2").requires_grad_(False)
    roles = Roles(model=model)
    before = model(IDS).logits
    add_copies(model, "p", ["embed_tokens"], roles.switch)
    roles.define("policy", "p")
    roles.define("reference")
    (module,) = copied(model).values()
    with torch.no_grad():
        module.copies["p"].weight.add_(1.0)
    assert not torch.allclose(logits(roles), before)
    with torch.no_grad(), roles.enter("reference"):
        assert torch.equal(roles.model(IDS).logits, before)
    with roles.enter("policy"):  # tied weights: a copy of the embedding leaves the head alone
        assert torch.equal(head_weight(model), module.base.weight)


def test_a_copy_on_top_of_another_starts_where_that_stands() -> None:
    model = tiny_model("llama").requires_grad_(False)
    roles = Roles(model=model)
    add_copies(model, "below", ["lm_head"], roles.switch)
    (module,) = copied(model).values()
    with torch.no_grad():
        module.copies["below"].weight.fill_(0.5)
    add_copies(model, "top", ["lm_head"], roles.switch, below=("below",))
    assert bool((module.copies["top"].weight == 0.5).all())
    lora.inject(model, ["all"], roles.switch)
    assert isinstance(module.base, nn.Linear)  # the head gets no low-rank adapter by way of its copy


@pytest.mark.parametrize(
    ("target", "says"),
    [("nothing", "has no 'nothing'"), ("mlp", "a group of layers"), ("q_proj", "low-rank adapter already")],
)
def test_what_cannot_be_copied_is_told(target: str, says: str) -> None:
    model = tiny_model("llama")
    roles = Roles(model=model)
    lora.inject(model, ["all"], roles.switch)
    with pytest.raises(AdapterError) as caught:
        add_copies(model, "p", [target], roles.switch)
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ end to end

MORE = {"use_dora": True, "additional_target": "embed_tokens,norm", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def odd(run_sft: Callable[..., RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_sft(tmp_path_factory.mktemp("odd") / "run", **MORE).path


@pytest.fixture(scope="module")
def sft_keys(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    rows = [{"instruction": q, "output": q.upper()} for q in ("a", "b c", "tell me d", "e f", "g", "h i")]
    info = tmp_path_factory.mktemp("data")
    (info / "qa.json").write_text(json.dumps(rows), encoding="utf-8")

    def make(output: Path, **more: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(tiny_folder("qwen2")), "stage": "sft", "do_train": True, "template": "chatml",
            "dataset": "qa", "dataset_dir": {"qa": {"file_name": str(info / "qa.json")}}, "output_dir": str(output),
            "per_device_train_batch_size": 3, "max_steps": 3, "compute_dtype": "float32", "use_cpu": True, "logging_steps": 1,
            **more,
        }  # fmt: skip

    return make


@pytest.fixture(scope="module")
def run_sft(sft_keys: Callable[..., dict[str, Any]]) -> Callable[..., RunFolder]:
    from trimtab.pipeline import run_exp

    return lambda output, **more: run_exp(sft_keys(output, **more))


def test_a_trained_one_is_peft_s_and_exports_as_one_model(
    odd: Path, sft_keys: Callable[..., dict[str, Any]], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = str(tiny_folder("qwen2"))
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), odd).eval()
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    session = assemble(load(sft_keys(tmp_path / "x", adapter_name_or_path=str(odd))))
    with torch.no_grad():
        expected = plain(IDS).logits
        assert (expected - start(IDS).logits).abs().max() > 1e-2
        torch.testing.assert_close(logits(session.roles), expected, rtol=1e-4, atol=1e-4)
        out = export(
            load(
                {
                    "model_name_or_path": base,
                    "template": "chatml",
                    "adapter_name_or_path": str(odd),
                    "export_dir": str(tmp_path / "whole"),
                }
            )
        )
        whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(whole(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert whole.config.tie_word_embeddings is False


def test_training_goes_on_from_one_and_moves_every_part(
    odd: Path, run_sft: Callable[..., RunFolder], tmp_path: Path
) -> None:
    further = run_sft(tmp_path / "run", adapter_name_or_path=str(odd), learning_rate=1e-2)
    old, new = (load_file(folder / lora.WEIGHTS) for folder in (odd, further.path))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("more", [{"use_dora": True}, {}])
def test_dora_is_not_stacked(
    more: dict[str, Any], odd: Path, sft_keys: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="DoRA adapter, which cannot be stacked"):
        assemble(load(sft_keys(tmp_path / "x", adapter_name_or_path=str(odd), create_new_adapter=True, **more)))


class Odd(nn.Linear):
    """A layer whose weight is no matrix: rows halved on paper, doubled again in its own forward, as packed layers unpack theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


def test_a_layer_that_is_not_plain_computes_by_its_own_forward() -> None:
    model = tiny_model("qwen2").requires_grad_(False)
    with torch.no_grad():
        before = model(IDS).logits
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            odd = Odd(module.in_features, module.out_features, bias=module.bias is not None).requires_grad_(False)
            odd.weight.data, odd.bias = module.weight.data / 2, module.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, odd)
    roles = Roles(model=model)
    found = lora.inject(model, ["all"], roles.switch)
    lora.new_adapter(model, "p", paths=found, rank=4, alpha=8, rslora=False, seed=0)
    roles.define("policy", "p")
    torch.testing.assert_close(logits(roles), before)
    generator = Engine(roles=roles, role="policy", stop_ids=(1,))
    for parameter in roles.trainable("policy").values():
        parameter.data.add_(0.02)
    prompt = Prompt(index=0, token_ids=(20, 31, 42), example=Example(origin=Origin(file="f", row=1), prompt=()))
    (answer,) = generator.generate([prompt], Sampling(temperature=1.0, max_new_tokens=5, seed=0))
    row = TokenRow(token_ids=(20, 31, 42, *answer.token_ids), scored=tuple(range(3, 3 + len(answer.token_ids))))
    with torch.no_grad(), roles.enter("policy"):
        scored = score_tokens(roles.model, [row]).logp
    assert scored is not None
    assert scored[0].tolist() == pytest.approx(list(answer.logprobs), abs=1e-5)


def test_a_packed_base_needs_a_gpu(sft_keys: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        assemble(load(sft_keys(tmp_path / "x", quantization_bit=4)))
    assert load(sft_keys(tmp_path / "x", quantization_bit=16)).quantization_bit is None
    for more in ({"finetuning_type": "full"}, {"use_dora": True}):
        with pytest.raises(ConfigError, match="quantization_bit: with"):
            load(sft_keys(tmp_path / "x", quantization_bit=4, **more))
