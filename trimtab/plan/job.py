"""What a stage does to its model, in numbers: which roles there are, how many tokens pass through each, how many steps.

Read from a config alone (any object whose attributes are the YAML keys), so that a plan costs no import of torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.models.layout import spared
from trimtab.types import TokenRow

PAIRS = ("rm", "dpo", "orpo", "simpo")
_REFERENCE_FREE_LOSSES = ("orpo", "simpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of the rows of a stage, the template's included; of a pair, one of its two rows.

    Attributes:
        rows: rows, pairs or prompts of the training set; None where it could not be read.
        prompt, answer: mean tokens; longest: tokens of the longest row (of the longest prompt, in online stages).
        alike: of the prompts' tokens of an optimizer step, the share that is not computed, since another prompt begins with them.
        source: where these numbers come from.
    """

    rows: int | None
    prompt: float
    answer: float
    longest: int
    alike: float = 0.0
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Attributes:
    trained: what is trained: adapters, the model's weights, or those of some layers.
    bits: of a packed base; None: not packed.
    compute: bytes of a number in the products.
    rows, group: rows (pairs, prompts) of an optimizer step; completions of each prompt.
    rollout: prompts of a rollout batch; 0 in offline stages.
    updates: passes over each row or completion.
    reference, critic, reward: the roles beside the policy: "" (none), "adapter" (on the base or its copy), "head", "model".
    old: the policy scores what it wrote before the update does.
    frozen_copy: is there a frozen copy of the starting weights (full, freeze)?
    judges: how many reward models.
    share: of the weights that is trained.
    shared: may rows lie in memory with what they have in common there once? (A model whose attention forbids it is not known here.)
    scored: does the stage read log-probabilities (the output head), or rewards?
    new: most tokens of an answer that the policy writes.
    """

    stage: str
    trained: str
    rank: int
    targets: tuple[str, ...]
    bits: int | None
    compute: int
    pure: bool
    rows: int
    group: int
    rollout: int
    updates: int
    reference: str
    old: bool
    critic: str
    reward: str
    frozen_copy: bool
    scored: bool
    new: int
    lengths: Lengths
    evaluates: bool
    judges: int = 0
    share: float = 1.0
    shared: bool = True
    max_steps: int = 0
    epochs: float = 1.0

    @property
    def online(self) -> bool:
        return self.rollout > 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row that passes through the model."""
        return self.lengths.longest + (self.new if self.online else 0)

    @property
    def rows_of_an_entry(self) -> int:
        return 2 if self.stage in PAIRS else 1

    @property
    def entries(self) -> int:
        """Rows of a step: an optimizer step, or a rollout batch."""
        return self.rollout * self.group if self.online else self.rows * self.rows_of_an_entry

    @property
    def prompt_tokens(self) -> float:
        """Tokens of the prompts of a step, as they are computed."""
        if not self.shared:
            return self.entries * self.lengths.prompt
        return (self.rollout if self.online else self.rows) * self.lengths.prompt * (1 - self.lengths.alike)

    @property
    def step_tokens(self) -> float:
        """Tokens of the rows of a step, as they are computed."""
        return self.prompt_tokens + self.entries * self.lengths.answer

    def steps(self) -> int | None:
        """Steps of the run; None where the rows are not known."""
        if self.max_steps > 0:
            return self.max_steps
        if self.lengths.rows is None:
            return None
        size = self.rollout if self.online else self.rows
        return max(1, math.ceil(self.epochs * math.ceil(self.lengths.rows / size)))


def job_of(config: Any, lengths: Lengths, *, bfloat16: bool) -> Job:
    """The job of a training config.

    Args:
        bfloat16: does the machine multiply it? `compute_dtype: auto` is bfloat16 where it does.
    """
    online = hasattr(config, "rollout_size")
    full = config.finetuning_type != "lora"
    half = bfloat16 and config.compute_dtype != "float32"
    named = bool(getattr(config, "ref_model", None) or getattr(config, "ref_model_adapters", ()))
    critic = str(getattr(config, "critic", "")) if online else ""
    reward = ""
    models = getattr(config, "reward_model", None) or ()
    if online and models:
        reward = {"lora": "adapter", "full": "model", "api": ""}[config.reward_model_type]
    refers = _refers(config, online)
    reference = "" if not refers else "model" if getattr(config, "ref_model", None) else "adapter"
    return Job(
        stage=config.stage,
        trained=config.finetuning_type,
        rank=config.lora_rank,
        targets=tuple(config.lora_target),
        bits=config.quantization_bit,
        compute=2 if half else 4,
        pure=bool(config.pure_bf16),
        rows=config.batch_size,
        group=int(getattr(config, "group_size", 1)),
        rollout=int(config.rollout_size) if online else 0,
        updates=int(getattr(config, "ppo_epochs", 1)) if online else 1,
        reference=reference,
        old=online and _scores_old(config, half),
        critic=critic,
        reward=reward,
        judges=1 if isinstance(models, str) else len(models),
        frozen_copy=full and ((refers and not named) or critic == "adapter" or reward == "adapter"),
        scored=config.stage != "rm",
        new=config.answer_limit if online or config.eval_tasks else 0,
        lengths=lengths,
        evaluates=bool(config.do_eval or config.eval_strategy != "no" or config.eval_on_start),
        max_steps=max(0, config.max_steps),
        epochs=float(config.num_train_epochs),
        # noise on embeddings wants padded rows (`train/assemble.py`)
        shared=config.layout in ("auto", "shared") and not getattr(config, "neftune_noise_alpha", None),
    )


def _scores_old(config: Any, half: bool) -> bool:
    """Is there a pass for the old log-probabilities? (`train/rollout.py` says when there is none.)"""
    one_step = config.ppo_epochs == 1 and config.rollout_size <= config.batch_size
    credited = config.stage != "online_dpo" and bool(config.kl_coef) and config.kl_placement == "reward"
    return not one_step or getattr(config, "critic", "") == "head" or (half and credited)


def _refers(config: Any, online: bool) -> bool:
    """Does the stage compare with a reference?"""
    if online:
        return config.finetuning_type == "lora" or config.stage in ("ppo", "online_dpo") or bool(config.kl_coef)
    if config.stage == "dpo":
        return config.pref_loss not in _REFERENCE_FREE_LOSSES
    return bool(config.stage == "kto")


def alike(prompts: Sequence[Sequence[int]], size: int) -> float:
    """The share of the prompts' tokens that a step of so many prompts does not compute, since another of its prompts begins with them: the
    mean over steps of a shuffled sample.

    Args:
        prompts: token ids of each.
    """
    sample = [TokenRow(token_ids=tuple(ids), scored=(len(ids),)) for ids in prompts if ids]
    random.Random(0).shuffle(sample)
    sample = sample[:SAMPLE]
    total = sum(len(row.token_ids) for row in sample)
    return sum(spared(sample[at : at + size]) for at in range(0, len(sample), size)) / total if total else 0.0


SAMPLE = 1024
"""Prompts that are looked at, at most."""


def worst_case(config: Any, rows: int | None = None, prompt: float | None = None) -> Lengths:
    """Lengths where there is nothing to read: every row as long as `cutoff_len` allows, or as the user says."""
    longest = int(config.cutoff_len)
    online = hasattr(config, "rollout_size")
    given = min(float(prompt), longest) if prompt is not None else float(longest)
    if online:
        source = (
            "cutoff_len and max_new_tokens, the longest possible" if prompt is None else "as given, and max_new_tokens"
        )
        return Lengths(rows=rows, prompt=given, answer=float(config.answer_limit), longest=longest, source=source)
    source = "cutoff_len, the longest possible" if prompt is None else "as given"
    return Lengths(
        rows=rows,
        prompt=given * 0.75,
        answer=given * 0.25,
        longest=longest,
        source=f"{source}, a quarter of it the answer",
    )
