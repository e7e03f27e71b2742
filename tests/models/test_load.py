"""From a name to a frozen base: every way a folder or a hub can fail, and what makes two bases the same."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.errors import ModelError
from trimtab.models import folder
from trimtab.models.folder import resolve_model
from trimtab.models.load import (
    base_fingerprint,
    check_plain_head,
    decoder,
    head_bias,
    head_weight,
    load_base,
    same_base,
)
from trimtab.models.tiny import FAMILIES, Family, make_tiny, tiny_model

pytestmark = pytest.mark.unit


@dataclass(frozen=True, kw_only=True)
class Source:
    model_name_or_path: str
    cache_dir: str | None = None
    model_revision: str = "main"
    hf_hub_token: str | None = None
    ms_hub_token: str | None = None

    def origin(self, key: str) -> str:
        return f"sft.yaml:3: {key}"


@pytest.fixture
def own(tmp_path: Path, tiny_folder: Callable[..., Path]) -> Path:
    """A tiny llama folder that a test may break."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "own"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- a name to a folder


def test_packaged_name(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    monkeypatch.setattr(folder, "fetch", lambda name: own if name == "smollm2-135m-instruct" else None)
    assert resolve_model(Source(model_name_or_path="smollm2-135m-instruct")) == own


def test_local_folder_relative_and_home(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(Source(model_name_or_path=str(own))) == own
    monkeypatch.chdir(own.parent)
    assert resolve_model(Source(model_name_or_path="own")) == Path("own")
    monkeypatch.setenv("HOME", str(own.parent))
    monkeypatch.setenv("USERPROFILE", str(own.parent))
    assert resolve_model(Source(model_name_or_path="~/own")) == own


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "~/none/at/all", r"E:\models\qwen", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError) as caught:
        resolve_model(Source(model_name_or_path=name))
    assert caught.value.where == "sft.yaml:3: model_name_or_path"
    assert str(Path(name).expanduser().absolute()) in caught.value.why
    assert "'smollm2-135m-instruct'" in caught.value.remedy


def test_hub_id_offline_names_the_default_model() -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(Source(model_name_or_path="Some-Org/Some-Model-7B"))
    assert "Some-Org/Some-Model-7B" in caught.value.what
    assert "HF_HUB_OFFLINE" in caught.value.why
    assert "'smollm2-135m-instruct'" in caught.value.remedy


def test_hub_id_nearly_the_default_model() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m-instruct'"):
        resolve_model(Source(model_name_or_path="SmolLM2-135M-instruct"))


def test_hub_gets_revision_cache_and_token(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(own)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = Source(model_name_or_path="org/model", cache_dir="/cache", model_revision="v2", hf_hub_token="secret")
    assert resolve_model(source) == own
    assert len(calls) == 1  # safetensors were found, so nothing pickled is fetched
    assert {key: calls[0][key] for key in ("name", "revision", "cache_dir", "token")} == {
        "name": "org/model",
        "revision": "v2",
        "cache_dir": "/cache",
        "token": "secret",
    }
    assert "*.bin" not in calls[0]["allow_patterns"]


def test_hub_falls_back_to_pickled_weights(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    asked_for_pickles: list[bool] = []

    def snapshot_download(_name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked_for_pickles.append("*.bin" in allow_patterns)
        if asked_for_pickles[-1]:
            torch.save(tensors, own / "pytorch_model.bin")
        return str(own)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model(Source(model_name_or_path="org/model")) == own
    assert asked_for_pickles == [False, True]


@pytest.mark.parametrize("by", ["variable", "token"])
def test_modelscope(by: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(own)

    module = types.ModuleType("modelscope.hub.snapshot_download")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub", types.ModuleType("modelscope.hub"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", module)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if by == "variable":
        monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    token = "secret" if by == "token" else None
    assert resolve_model(Source(model_name_or_path="org/model", cache_dir="/c", ms_hub_token=token)) == own
    # Its main branch is called master.
    assert calls == [{"name": "org/model", "revision": "master", "cache_dir": "/c", "token": token}]


def test_modelscope_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with pytest.raises(ModelError) as caught:
        resolve_model(Source(model_name_or_path="org/model"))
    assert "trimtab[modelscope]" in caught.value.remedy


# ---------------------------------------------------------------------------------------------------------- broken folders


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def torn_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def torn_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")


def torn_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_config, "no config.json"),
        (an_adapter, "adapter_name_or_path"),
        (torn_config, "is not JSON"),
        (no_weights, "no weights"),
        (torn_weights, "model.safetensors is broken"),
        (missing_shard, "1 of 2 weight files are missing"),
        (torn_index, "model.safetensors.index.json is broken"),
    ],
)
def test_broken_folder(damage: Callable[[Path], None], says: str, own: Path) -> None:
    damage(own)
    with pytest.raises(ModelError) as caught:
        resolve_model(Source(model_name_or_path=str(own)))
    assert says in str(caught.value)
    assert caught.value.remedy
    with pytest.raises(ModelError):
        load_base(own, dtype=torch.float32, device="cpu")


def test_a_file_is_not_a_folder(own: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        resolve_model(Source(model_name_or_path=str(own / "config.json")))


def test_unknown_architecture(own: Path) -> None:
    edit_config(own, model_type="no_such_model", architectures=["NoSuchModel"])
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_base(own, dtype=torch.float32, device="cpu")


def test_missing_tensors_are_not_filled_with_noise(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_base(own, dtype=torch.float32, device="cpu")
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.what


# ---------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_base_is_frozen_and_in_its_type(family: Family, tiny_folder: Callable[..., Path]) -> None:
    model = load_base(tiny_folder(family), dtype=torch.bfloat16, device="cpu")
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_hidden_times_head(family: Family, tiny_folder: Callable[..., Path]) -> None:
    model = load_base(tiny_folder(family), dtype=torch.float32, device="cpu")
    ids = torch.tensor([[5, 70, 1, 299, 12]])
    hidden = decoder(model)(input_ids=ids).last_hidden_state
    assert hidden.shape == (1, 5, 64)
    assert head_weight(model).shape == (300, 64)
    assert head_bias(model) is None
    torch.testing.assert_close(hidden @ head_weight(model).T, model(ids).logits)
    tied = family != "llama"
    assert (head_weight(model) is model.get_input_embeddings().weight) == tied


def test_pickled_weights_load_as_tensors_only(own: Path) -> None:
    reference = load_base(own, dtype=torch.float32, device="cpu")
    torch.save(load_file(own / "model.safetensors"), own / "pytorch_model.bin")
    (own / "model.safetensors").unlink()
    pickled = load_base(own, dtype=torch.float32, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), pickled.parameters(), strict=True))


def test_a_pickle_that_would_run_code_is_refused(own: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (own / "model.safetensors").unlink()
    torch.save({"a": Payload()}, own / "pytorch_model.bin")
    with pytest.raises(ModelError, match="hold more than tensors"):
        load_base(own, dtype=torch.float32, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_head_bias_is_part_of_the_head() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(
        PhiConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    bias = head_bias(model)
    assert bias is not None
    assert bias.shape == (40,)
    check_plain_head(model)


def test_scaled_logits_are_refused() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    check_plain_head(GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=1.0)).eval())
    with pytest.raises(ModelError, match="not a plain linear map"):
        check_plain_head(GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=2.0)).eval())


def test_capped_logits_are_refused() -> None:
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError) as caught:
        check_plain_head(model)
    assert "final_logit_softcapping" in caught.value.why


# --------------------------------------------------------------------------------------------------------- the same base?


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_of_folder_and_model_agree(family: Family, tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder(family)
    on_disk = base_fingerprint(folder)
    assert on_disk == base_fingerprint(load_base(folder, dtype=torch.float32, device="cpu"))
    assert on_disk == json.loads(json.dumps(on_disk))
    assert on_disk == base_fingerprint(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_another_type_is_the_same_base(
    dtype: torch.dtype, own: Path, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    model = load_base(own, dtype=dtype, device="cpu")
    assert same_base(base_fingerprint(own), base_fingerprint(model))
    assert not same_base(base_fingerprint(tiny_folder("llama", 1)), base_fingerprint(model))
    model.save_pretrained(tmp_path / "copy")
    assert same_base(base_fingerprint(tmp_path / "copy"), base_fingerprint(own))


def test_float16_and_bfloat16_copies_pass_on_shapes(own: Path) -> None:
    copies = [base_fingerprint(load_base(own, dtype=dtype, device="cpu")) for dtype in (torch.bfloat16, torch.float16)]
    assert same_base(*copies)


def test_shards_and_a_saved_tied_head_do_not_matter(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("qwen2"), tmp_path / "own"))
    fingerprint = base_fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert base_fingerprint(folder) == fingerprint


def test_pickled_copy_has_the_same_fingerprint(own: Path) -> None:
    fingerprint = base_fingerprint(own)
    torch.save(load_file(own / "model.safetensors"), own / "pytorch_model.bin")
    (own / "model.safetensors").unlink()
    assert base_fingerprint(own) == fingerprint


def test_another_base_is_another_base(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    llama = base_fingerprint(tiny_folder("llama"))
    assert same_base(llama, llama)
    assert not same_base(llama, base_fingerprint(tiny_folder("llama", 1)))
    assert not same_base(llama, base_fingerprint(tiny_folder("qwen2")))
    # Of qwen2's shape but one matrix: the same base trained a little further.
    folder = make_tiny("qwen2", tmp_path / "trained")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] *= 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not same_base(base_fingerprint(folder), base_fingerprint(tiny_folder("qwen2")))


def test_another_vocabulary_is_another_base(own: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(310)
    assert not same_base(base_fingerprint(own), base_fingerprint(model))
