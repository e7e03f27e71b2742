"""A tiny base, an adapter that changes it, and a reward model, as trained runs would leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.models import lora
from trimtab.models.heads import HeadRecord, ValueHead, save_head
from trimtab.models.load import base_fingerprint, load_base
from trimtab.models.roles import Roles
from trimtab.rundir import write_json
from trimtab.train.assemble import BASE_RECORD

TinyFolder = Callable[..., Path]


def make_adapter(base: Path, folder: Path, seed: int, size: float = 0.05) -> Path:
    """An adapter on every linear layer whose B is not zero."""
    roles = Roles(model=load_base(base, dtype=torch.float32, device="cpu"))
    found = lora.inject(roles.model, ("all",), roles.switch)
    lora.new_adapter(roles.model, "trained", paths=list(found), rank=4, alpha=8, rslora=False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.parameters(roles.model, "trained").items():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    lora.save_adapter(roles.model, ("trained",), folder, base=str(base))
    write_json(folder / BASE_RECORD, base_fingerprint(base))
    return folder


@pytest.fixture(scope="session")
def base(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("qwen2")


@pytest.fixture(scope="session")
def policy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("policy") / "sft", seed=1)


@pytest.fixture(scope="session")
def reward(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_adapter(base, tmp_path_factory.mktemp("reward") / "rm", seed=2)
    head = ValueHead(64, seed=3)
    with torch.no_grad():
        head.summary.bias.fill_(0.25)
    save_head(head, folder, HeadRecord(readout="stop", template="chatml", cutoff_len=256))
    return folder


@pytest.fixture
def args(base: Path, policy: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(policy),
        "template": "chatml",
        "finetuning_type": "lora",
        "compute_dtype": "float32",
        "use_cpu": True,
        "max_new_tokens": 12,
    }


@pytest.fixture
def reward_args(args: dict[str, Any], reward: Path) -> dict[str, Any]:
    return {**args, "adapter_name_or_path": str(reward), "stage": "rm"}
