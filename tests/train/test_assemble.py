"""Roles from config: which adapters stand under the policy, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.config import load
from trimtab.errors import AdapterError
from trimtab.pipeline import run_exp
from trimtab.train.assemble import BASE_RECORD, assemble, contained

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def chain(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft`, and `more`: a new adapter trained on top of it."""
    folder = tmp_path_factory.mktemp("chain")
    run_exp(keys("sft", folder / "sft"))
    run_exp(keys("sft", folder / "more", adapter_name_or_path=str(folder / "sft"), create_new_adapter=True, seed=7))
    return folder


def test_an_adapter_and_what_it_was_trained_on_are_not_added_together(chain: Path, keys: Keys) -> None:
    assert len(contained(chain / "more")) == 1
    both = f"{chain / 'sft'},{chain / 'more'}"
    with pytest.raises(AdapterError, match="already contains") as caught:
        assemble(load(keys("sft", chain / "x", adapter_name_or_path=both)))
    assert str(chain / "more") in caught.value.remedy


def test_the_saved_stack_is_the_sum_of_its_parts(chain: Path, keys: Keys) -> None:
    session = assemble(load(keys("sft", chain / "x", adapter_name_or_path=str(chain / "more"))))
    # rank 4 and rank 4, side by side in one adapter of rank 8
    layer = session.roles.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.adapters["adapter0"].a.shape[0] == 8
    assert (chain / "more" / BASE_RECORD).is_file()


def test_a_reward_model_is_trained_further_with_its_head(
    keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_exp(keys("rm", tmp_path / "rm"))
    first = assemble(load(keys("rm", tmp_path / "x", adapter_name_or_path=str(tmp_path / "rm"))))
    fresh = assemble(load(keys("rm", tmp_path / "x")))
    assert "head included" in capsys.readouterr().out
    old, new = first.roles.specs["reward"].head, fresh.roles.specs["reward"].head
    assert old is not None and new is not None
    assert not torch.equal(old.summary.weight, new.summary.weight)
    assert all(parameter.requires_grad for parameter in old.parameters())
