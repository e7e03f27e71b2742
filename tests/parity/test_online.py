"""RLOO, GRPO and its loss types: the first step of trimtab and of TRL on the same completions with the same rewards.

Ours draws them, in an ordinary first step; TRL is handed the ids where it would generate, and the rewards where it would ask for them. All
else is its own: advantages, losses, optimizer. The reference is another model, so that no KL is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parity.sides import (
    QUESTIONS,
    Step,
    arguments,
    difference,
    keys,
    load_theirs,
    our_step,
    their_step,
    tokenizer_of,
    write,
)
from trimtab.config import load
from trimtab.rundir import RunFolder
from trimtab.train import online
from trimtab.train.assemble import POLICY, assemble
from trimtab.train.online import OnlineTrainer
from trimtab.train.rollout import Collected

pytestmark = pytest.mark.parity

K, LIMIT = 4, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("parity"))


def spread(completion: str) -> float:
    """A reward that differs between answers and between prompts."""
    return sum(ord(c) % 7 for c in completion) / 10


def ours(stage: str, folder: Path, tmp_path: Path, patch: pytest.MonkeyPatch, **more: Any) -> tuple[Step, Collected]:
    given = keys(
        folder, stage, dataset="qa", output_dir=str(tmp_path), reward_funcs=[spread], group_size=K, max_new_tokens=LIMIT,
        ref_model=str(folder / "other"), missing_eos_penalty=0.0, per_device_train_batch_size=len(QUESTIONS), **{"ppo_epochs": 1, **more},
    )  # fmt: skip
    seen: list[Collected] = []
    collect = online.collect

    def watched(*args: Any, **kw: Any) -> Collected:
        seen.append(collect(*args, **kw))
        return seen[-1]

    patch.setattr(online, "collect", watched)
    trainer = OnlineTrainer(assemble(load(given)), RunFolder(tmp_path))
    step = our_step(trainer, trainer.parameters[POLICY], trainer.optimizers[POLICY])
    return step, seen[0]


def theirs(
    make: Callable[..., Any], config: Callable[..., Any], folder: Path, collected: Collected, **more: Any
) -> Step:
    from datasets import Dataset

    rollouts = collected.rollouts
    args = arguments(
        folder,
        per_device_train_batch_size=len(rollouts),
        num_generations=K,
        max_completion_length=LIMIT,
        temperature=1.0,
        **more,
    )
    trainer = make(
        model=load_theirs(folder),
        reward_funcs=lambda completions, **_: [r.reward for r in rollouts],
        args=config(**args),
        train_dataset=Dataset.from_list([{"prompt": "q"}] * len(rollouts)),
        processing_class=tokenizer_of(folder),
    )
    if trainer.beta:
        trainer.ref_model.load_state_dict(load_theirs(folder, "other").state_dict())
    prompts = [list(r.prompt.token_ids) for r in rollouts]
    answers = [list(r.completion.token_ids) for r in rollouts]
    texts = [r.text for r in rollouts]
    drawn = (
        (prompts, answers, texts)
        if make.__name__.startswith("RLOO")
        else (prompts, answers, None, texts, None, {}, None, None)
    )
    trainer._generate = lambda _: drawn
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "q"}] * len(rollouts))
    return their_step(trainer, inputs, passes=trainer.num_iterations)


def equal(name: str, a: Step, b: Step, record: Any) -> None:
    """Float32 sums in two orders; their advantages come from float32 rewards, ours too."""
    found = difference(a, b)
    record(name, found)
    assert found.loss < 1e-5
    assert found.gradient < 1e-3
    assert found.after < 1e-4


@pytest.mark.parametrize(("beta", "batch"), [(0.0, False), (0.3, False), (0.3, True)])
def test_rloo(
    beta: float, batch: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    from trl import RLOOConfig, RLOOTrainer

    step, collected = ours(
        "rloo", folder, tmp_path, monkeypatch, kl_coef=beta, advantage_norm="batch" if batch else "none"
    )
    found = theirs(RLOOTrainer, RLOOConfig, folder, collected, beta=beta, normalize_advantages=batch)
    equal(f"rloo, beta {beta:g}, normalised {batch}", step, found, record_property)


GRPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"kl_coef": 0.3}, {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False}),
    "bnpo": (
        {"kl_coef": 0.3, "loss_reduction": "token"},
        {"loss_type": "bnpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "dr_grpo": ({"preset": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}),
    "dapo": (
        {"preset": "dapo", "dynamic_sampling": False, "mask_truncated": False, "overlong_buffer": 0},
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0},
    ),
    "dapo, truncated masked": (
        {"preset": "dapo", "dynamic_sampling": False, "overlong_buffer": 0},
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True, "beta": 0.0},
    ),
    "cispo": ({"preset": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.0}),
    "gspo": ({"preset": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0}),
}


@pytest.mark.parametrize("name", list(GRPO))
def test_grpo(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    from trl import GRPOConfig, GRPOTrainer

    mine, yours = GRPO[name]
    step, collected = ours("grpo", folder, tmp_path, monkeypatch, **mine)
    equal(name, step, theirs(GRPOTrainer, GRPOConfig, folder, collected, **yours), record_property)


BOUNDS = {"clip_range_low": 0.01, "clip_range_high": 0.02}
THEIR_BOUNDS = {"epsilon": 0.01, "epsilon_high": 0.02}
MOVED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rloo": ("rloo", {"kl_coef": 0.3, **BOUNDS}, {"beta": 0.3, **THEIR_BOUNDS}),
    "grpo": (
        "grpo",
        {"kl_coef": 0.3, **BOUNDS},
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False, **THEIR_BOUNDS},
    ),
    "dual clip": (
        "grpo",
        {"kl_coef": 0.0, "clip_range": 0.01, "dual_clip": 1.02},
        {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.01, "delta": 1.02},
    ),
    "entropy": (
        "grpo",
        {"kl_coef": 0.0, "loss_reduction": "token", "entropy_coef": 0.2, **BOUNDS},
        {"loss_type": "bnpo", "beta": 0.0, "entropy_coef": 0.2, **THEIR_BOUNDS},
    ),
    "cispo": (
        "grpo",
        {"preset": "cispo", "cispo_cap": 1.005},
        {"loss_type": "cispo", "epsilon_high": 1.005, "beta": 0.0},
    ),
    "gspo": (
        "grpo",
        {"preset": "gspo"},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "beta": 0.0,
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
}


@pytest.mark.parametrize("name", list(MOVED))
def test_a_policy_that_has_moved(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """A second pass over the same answers, where ratios are not 1 and the bounds act: its gradient, and the parameters after both."""
    import trl

    stage, mine, yours = MOVED[name]
    step, collected = ours(stage, folder, tmp_path, monkeypatch, ppo_epochs=2, **mine)
    assert step.figures["clip_fraction"] > 0.02
    trainer, config = getattr(trl, f"{stage.upper()}Trainer"), getattr(trl, f"{stage.upper()}Config")
    found = theirs(trainer, config, folder, collected, num_iterations=2, **yours)
    equal(f"{name}, second pass", step, found, record_property)


def test_their_default_kl_is_our_k2(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL 1.16 multiplies k3 by the ratio: at ratio 1 the gradient of rho k3 is (e^-l - 1 + l) + (1 - e^-l) = l times that of log pi, k2's.

    GRPO's paper has k3 as it is, and so has our default.
    """
    from trl import GRPOConfig, GRPOTrainer

    step, collected = ours("grpo", folder, tmp_path, monkeypatch, kl_coef=0.3, kl_estimator="k2")
    found = theirs(GRPOTrainer, GRPOConfig, folder, collected, loss_type="grpo", beta=0.3)
    assert difference(step, found).gradient < 1e-3
    assert difference(step, found).after < 1e-4


def test_scaling_by_the_batch_differs_on_purpose(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take the group's mean off; TRL then divides by the deviation of the raw rewards of the batch, ours by that of what is left."""
    from trl import GRPOConfig, GRPOTrainer

    step, collected = ours("grpo", folder, tmp_path, monkeypatch, kl_coef=0.0, advantage_norm="batch")
    found = theirs(GRPOTrainer, GRPOConfig, folder, collected, loss_type="grpo", scale_rewards="batch", beta=0.0)
    raw = torch.tensor([r.reward for r in collected.rollouts])
    left = raw - raw.view(-1, K).mean(dim=1).repeat_interleave(K)
    scale = float((raw.std() + 1e-4) / (left.std() + 1e-4))
    assert scale > 1.02
    for name, gradient in step.gradients.items():
        assert torch.allclose(gradient, scale * found.gradients[name], rtol=1e-3, atol=1e-6), name
