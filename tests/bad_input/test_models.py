"""Model and adapter folders that are damaged, of another model, or not what they are named as."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.conftest import Place

pytestmark = pytest.mark.e2e

Damage = Callable[[Path], None]


def edit(name: str, **values: Any) -> Damage:
    """Change keys of a JSON file; None deletes one."""

    def damage(folder: Path) -> None:
        given = {**json.loads((folder / name).read_text(encoding="utf-8")), **values}
        (folder / name).write_text(json.dumps({k: v for k, v in given.items() if v is not None}), encoding="utf-8")

    return damage


def several(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def write(name: str, text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return damage


def without(*beginnings: str) -> Damage:
    """Delete the files whose names begin so."""

    def damage(folder: Path) -> None:
        for file in folder.iterdir():
            if file.name.startswith(beginnings):
                file.unlink()

    return damage


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, metadata={"format": "pt"})

    return damage


def fill(part: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Every tensor whose name holds `part` gets this value in its first place."""

    def change(held: dict[str, torch.Tensor]) -> None:
        for name, tensor in held.items():
            if part in name:
                tensor.view(-1)[0] = value

    return change


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(held: dict[str, torch.Tensor]) -> None:
        del held[next(name for name in held if part in name)]

    return change


def cut(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    return damage


MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (without("config.json"), "no config.json"),
    "config is no JSON": (write("config.json", "{"), "not JSON"),
    "config is a list": (write("config.json", "[1]"), "not a JSON object"),
    "no weights": (without("model.safetensors"), "no weights"),
    "weights cut": (cut("model.safetensors"), "broken"),
    "index without a map": (
        several(without("model.safetensors"), write("model.safetensors.index.json", "[]")),
        "is broken",
    ),
    "shard missing": (
        several(
            without("model.safetensors"),
            write("model.safetensors.index.json", '{"weight_map": {"a": "model-00001.safetensors"}}'),
        ),
        "missing",
    ),
    "no tokenizer": (without("tokenizer", "vocab", "merges"), "no tokenizer"),
    "tokenizer damaged": (write("tokenizer.json", "{}"), "no tokenizer could be loaded"),
    "nan weights": (tensors("model.safetensors", fill("embed_tokens", float("nan"))), "not finite"),
    "other shapes": (edit("config.json", hidden_size=32), "transformers cannot load"),
    "unknown architecture": (edit("config.json", model_type="nonesuch"), "transformers cannot load"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_damaged_models(name: str, place: Place) -> None:
    damage, told = MODELS[name]
    folder = place.root / "model"
    shutil.copytree(place.keys["model_name_or_path"], folder)
    damage(folder)
    place.refused("train", place.file(model_name_or_path=str(folder)), told=told)


ADAPTERS: dict[str, tuple[Damage, str]] = {
    "config is no JSON": (write("adapter_config.json", "{"), "not JSON"),
    "config is a list": (write("adapter_config.json", "[]"), "damaged"),
    "rank is a word": (edit("adapter_config.json", r="eight"), "r is 'eight'"),
    "alpha is 0": (edit("adapter_config.json", lora_alpha=0), "lora_alpha is 0"),
    "pattern is a list": (edit("adapter_config.json", rank_pattern=["q_proj"]), "rank_pattern"),
    "another rank": (edit("adapter_config.json", r=64, rank_pattern={}), "the rank of"),
    "another kind": (edit("adapter_config.json", peft_type="IA3"), "this adapter is IA3"),
    "no weights": (without("adapter_model.safetensors"), "is not"),
    "weights cut": (cut("adapter_model.safetensors"), "adapter_model.safetensors"),
    "half a pair": (tensors("adapter_model.safetensors", drop("lora_B")), "one of the two matrices"),
    "nan": (tensors("adapter_model.safetensors", fill("lora_A", float("nan"))), "NaN or infinity"),
}


@pytest.fixture(scope="module")
def adapter(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trimtab.pipeline import run_exp

    root = tmp_path_factory.mktemp("adapter")
    (root / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]), encoding="utf-8")
    return run_exp(
        {
            "model_name_or_path": str(tiny_folder("qwen2")), "stage": "sft", "do_train": True, "template": "chatml",
            "dataset": "qa", "dataset_dir": {"qa": {"file_name": str(root / "rows.json")}}, "output_dir": str(root / "run"),
            "max_steps": 1, "logging_steps": 1, "lora_rank": 2, "compute_dtype": "float32", "use_cpu": True,
        }
    ).path  # fmt: skip


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_damaged_adapters(name: str, place: Place, adapter: Path) -> None:
    damage, told = ADAPTERS[name]
    folder = place.root / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder)
    place.refused("train", place.file(adapter_name_or_path=str(folder)), told=told)


def test_an_adapter_named_twice(place: Place, adapter: Path) -> None:
    place.refused("train", place.file(adapter_name_or_path=f"{adapter},{adapter}"), told="named twice")


def test_a_chat_template_that_is_no_jinja(place: Place) -> None:
    folder = place.root / "model"
    shutil.copytree(place.keys["model_name_or_path"], folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] ", encoding="utf-8")
    told = "chat template is broken"
    place.refused("train", place.file(model_name_or_path=str(folder), template=None), told=told)
