"""LoRA against plain peft: the same logits, both ways, and stacks that become one adapter on the raw base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.errors import AdapterError
from trimtab.models import lora
from trimtab.models.folder import ADAPTER_CONFIG
from trimtab.models.roles import Roles
from trimtab.models.tiny import FAMILIES, Family, tiny_model

pytestmark = pytest.mark.unit

IDS = torch.tensor([[20, 31, 42, 53, 64, 75], [9, 290, 18, 27, 36, 45]])


def ours(model: Any, *adapters: str) -> Tensor:
    """Logits with these adapters active."""
    roles = Roles(model=model)
    for layer in lora.layers(model).values():
        layer.switch = roles.switch
    roles.define("x", *adapters)
    with torch.no_grad(), roles.enter("x"):
        return model(IDS).logits


def in_peft(folder: Path, family: Family) -> Tensor:
    """Logits of plain peft on the raw base."""
    model = peft.PeftModel.from_pretrained(tiny_model(family), folder).eval()
    with torch.no_grad():
        return model(IDS).logits


def made(family: Family, *ranks: int, targets: list[str] | None = None) -> tuple[Any, list[str]]:
    """A tiny model with one adapter per rank, B drawn as well as A."""
    model = tiny_model(family)
    switch = lora.Switch()
    names = []
    for i, rank in enumerate(ranks):
        found = lora.inject(model, targets or ["all"], switch)
        lora.new_adapter(model, f"a{i}", paths=found, rank=rank, alpha=3.0 * rank, rslora=False, seed=i)
        generator = torch.Generator().manual_seed(100 + i)
        for layer in found.values():
            b = layer.adapters[f"a{i}"].b
            b.data = torch.randn(b.shape, generator=generator) * 0.05
        names.append(f"a{i}")
    return model, names


def saved_by_peft(folder: Path, family: Family, **settings: Any) -> Tensor:
    """Save a peft adapter with random A and B; its logits."""
    wanted: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **wanted)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_ours_has_the_same_logits_in_peft(family: Family, tmp_path: Path) -> None:
    model, names = made(family, 4)
    lora.save_adapter(model, names, tmp_path, base="somewhere")
    plain = tiny_model(family)(IDS).logits
    assert (ours(model, *names) - plain).abs().max() > 0.05  # it does something
    torch.testing.assert_close(in_peft(tmp_path, family), ours(model, *names), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 7}},
        # two patterns match the same module: peft takes the first
        {"alpha_pattern": {"layers.0.self_attn.v_proj": 20, "v_proj": 5}},
    ],
    ids=["plain", "rslora", "patterns", "one module", "first pattern"],
)
def test_an_adapter_of_peft_has_the_same_logits_here(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = saved_by_peft(tmp_path / "theirs", "qwen2", **settings)
    model = tiny_model("qwen2")
    lora.load_adapter(model, "p", tmp_path / "theirs", lora.Switch())
    torch.testing.assert_close(ours(model, "p"), expected, atol=1e-5, rtol=0)
    # and saved again by us, it is the same adapter still
    lora.save_adapter(model, ["p"], tmp_path / "again", base="b")
    torch.testing.assert_close(in_peft(tmp_path / "again", "qwen2"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_is_saved_as_one_adapter_on_the_raw_base(family: Family, tmp_path: Path) -> None:
    model, names = made(family, 4, 2)
    saved_by_peft(tmp_path / "theirs", family, use_rslora=True, rank_pattern={"q_proj": 3})  # covers some layers only
    switch = next(iter(lora.layers(model).values())).switch
    lora.load_adapter(model, "p", tmp_path / "theirs", switch)
    stack = [*names, "p"]
    expected = ours(model, *stack)
    lora.save_adapter(model, stack, tmp_path / "one", base="b")
    torch.testing.assert_close(in_peft(tmp_path / "one", family), expected, atol=1e-5, rtol=0)
    fresh = tiny_model(family)
    lora.load_adapter(fresh, "one", tmp_path / "one", lora.Switch())
    torch.testing.assert_close(ours(fresh, "one"), expected, atol=1e-5, rtol=0)
    ranks = {a.shape[0] for key, a in load_file(tmp_path / "one" / lora.WEIGHTS).items() if "lora_A" in key}
    assert ranks == {4 + 2, 4 + 2 + 3, 4 + 2 + 4}


def test_products_of_active_adapters_add() -> None:
    linear = nn.Linear(2, 2, bias=True)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([10.0, 20.0]))
    layer = lora.LoraLinear(linear, lora.Switch(active=("one", "two", "of another layer")))
    layer.adapters["one"] = lora.Adapter(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]), 2.0, trainable=True)
    layer.adapters["two"] = lora.Adapter(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [3.0]]), 0.5, trainable=True)
    # x = (1, 1): W x + b = (13, 27); one: 2 * (1 + 1) * (1, 0) = (4, 0); two: 0.5 * 1 * (1, 3) = (0.5, 1.5)
    assert layer(torch.tensor([[[1.0, 1.0]]])).tolist() == [[[17.5, 28.5]]]
    layer.switch.active = ()
    assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [[13.0, 27.0]]


def test_a_new_adapter_changes_nothing_and_its_seed_decides() -> None:
    model = tiny_model("qwen2")
    before = model(IDS).logits
    found = lora.inject(model, ["all"], lora.Switch())
    for name, seed in (("x", 1), ("same", 1), ("other", 2)):
        lora.new_adapter(model, name, paths=found, rank=4, alpha=8, rslora=False, seed=seed)
    assert torch.equal(ours(model, "x"), before)
    layer = next(iter(found.values()))
    a = {name: layer.adapters[name].a for name in ("x", "same", "other")}
    assert torch.equal(a["x"], a["same"])
    assert not torch.equal(a["x"], a["other"])
    assert float(a["x"].detach().abs().max()) <= 64**-0.5  # Kaiming-uniform with a = sqrt 5: within 1 / sqrt(in)
    assert layer.adapters["x"].scale == 2.0


def test_targets() -> None:
    model = tiny_model("llama")
    found = lora.inject(model, ["q_proj", "layers.1.mlp.up_proj"], lora.Switch())
    assert sorted(found) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    every = lora.inject(model, ["all"], lora.Switch())
    assert len(every) == 14  # seven in each of two layers; never the output head
    assert "lm_head" not in every
    with pytest.raises(AdapterError, match="w_pack"):
        lora.inject(model, ["w_pack"], lora.Switch())


def test_the_base_keeps_its_names_and_its_weights() -> None:
    model = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.inject(model, ["all"], lora.Switch())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pickled_weights_are_read_as_plain_tensors(tmp_path: Path) -> None:
    expected = saved_by_peft(tmp_path, "qwen2")
    state = load_file(tmp_path / lora.WEIGHTS)
    (tmp_path / lora.WEIGHTS).unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    model = tiny_model("qwen2")
    lora.load_adapter(model, "p", tmp_path, lora.Switch())
    torch.testing.assert_close(ours(model, "p"), expected, atol=1e-5, rtol=0)


class Opened:
    """What an unpickler would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code in a weight file ran",))


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by_peft(tmp_path, "qwen2")
    (tmp_path / lora.WEIGHTS).unlink()
    torch.save({"x": Opened()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        lora.load_adapter(tiny_model("qwen2"), "p", tmp_path, lora.Switch())
    assert "ran" not in capsys.readouterr().out


def edit(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | settings), encoding="utf-8")


def rename(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor] | None]) -> None:
    state = load_file(folder / lora.WEIGHTS)
    changed = [change(key, tensor) for key, tensor in state.items()]
    save_file({k: v.contiguous() for k, v in filter(None, changed)}, folder / lora.WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: edit(f, peft_type="IA3"), "IA3"),
        (lambda f: edit(f, use_qalora=True), "use_qalora"),
        (lambda f: edit(f, use_dora=True), "magnitudes of"),
        (lambda f: edit(f, modules_to_save=["embed_tokens"]), "embed_tokens"),
        (lambda f: edit(f, bias="all"), "bias"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("{", encoding="utf-8"), "not JSON"),
        (lambda f: (f / ADAPTER_CONFIG).unlink(), "no adapter in"),
        (lambda f: (f / lora.WEIGHTS).unlink(), "is not"),
        (lambda f: (f / lora.WEIGHTS).write_bytes(b"torn"), "broken adapter file"),
        (lambda f: rename(f, lambda k, v: (k.replace("layers.1", "layers.9"), v)), "not trained on this base"),
        (lambda f: rename(f, lambda k, v: (k, v[:, :-1]) if "lora_A" in k else (k, v)), "not trained on this base"),
        (lambda f: rename(f, lambda k, v: None if "layers.1.mlp.down_proj.lora_B" in k else (k, v)), "not trained on"),
        (lambda f: rename(f, lambda k, v: (k.replace("lora_A", "lora_embedding_A"), v)), "not a LoRA matrix"),
    ],
)
def test_adapters_that_do_not_fit_say_why(spoil: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path, "qwen2")
    spoil(tmp_path)
    model = tiny_model("qwen2")
    with pytest.raises(AdapterError) as caught:
        lora.load_adapter(model, "p", tmp_path, lora.Switch())
    assert says in str(caught.value)
    assert caught.value.where
    assert caught.value.remedy


def test_dropout_acts_on_the_side_path_only_and_only_when_asked() -> None:
    model, (name,) = made("qwen2", 4)
    layer = next(iter(lora.layers(model).values()))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    layer.switch.active = (name,)
    still = layer(x)
    layer.switch.dropout = 0.5
    torch.manual_seed(0)
    dropped = layer(x)
    torch.manual_seed(0)
    side = torch.nn.functional.dropout(x, 0.5)
    adapter = layer.adapters[name]
    expected = (
        torch.nn.functional.linear(x, layer.weight, layer.bias) + adapter.scale * side @ adapter.a.T @ adapter.b.T
    )
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped, still)


def test_the_scale_of_a_new_adapter() -> None:
    model = tiny_model("qwen2")
    found = lora.inject(model, ["q_proj"], lora.Switch())
    lora.new_adapter(model, "x", paths=found, rank=4, alpha=8, rslora=False, seed=0)
    lora.new_adapter(model, "rs", paths=found, rank=4, alpha=8, rslora=True, seed=0)
    layer = next(iter(found.values()))
    assert (layer.adapters["x"].scale, layer.adapters["rs"].scale) == (2.0, 4.0)  # 8 / 4 and 8 / sqrt(4)


def test_an_adapter_on_the_output_head_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    width, words = model.config.hidden_size, model.config.vocab_size
    state = {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(2, width),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(words, 2),
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}', encoding="utf-8")
    with pytest.raises(AdapterError, match="output head"):
        lora.load_adapter(model, "a", tmp_path, lora.Switch())
