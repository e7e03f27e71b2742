"""From a file to the model that it serves: base, adapters, and a value head if the model is a reward model.

A file for inference names its adapters. A training file serves what it trained, from its own output_dir. Whether a value head beside
an adapter makes it a reward model:

    stage: rm in the file                        a reward model; a missing head is an error
    a head with our record (`value_head.json`)   what the record says: a reward model, or a policy with its critic's head
    a head without one, another stage            either: other tools leave one beside a policy too, so it may write and score
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from trimtab.config import StageConfig
from trimtab.data.templates import Template
from trimtab.engine.generator import Engine, Kept
from trimtab.errors import ModelError, RunError
from trimtab.models.folder import ADAPTER_CONFIG, read_adapter, resolve_model
from trimtab.models.heads import RECORD, WEIGHTS, HeadRecord, load_head
from trimtab.models.roles import Roles
from trimtab.rewards import readout_tail
from trimtab.rundir import read_json
from trimtab.train.assemble import POLICY, REWARD, load_parts, stack_adapters
from trimtab.train.device import default_micro_batch_tokens, spares_a_copy
from trimtab.train.progress import say


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a file serves, before anything is loaded.

    Attributes:
        config: the file; for a reward model with the template, system message and length that it was trained with.
        folders: adapter folders, stacked in this order.
        home: where the value head would be: the last adapter, or the base.
        scores, writes: what the model may be asked for.
    """

    config: StageConfig
    folders: tuple[str, ...]
    home: Path
    scores: bool
    writes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A loaded model. Its roles are `policy` and, where there is a record, `reward`.

    Attributes:
        adapters: names of the stacked adapters.
        record: how scores are read; None without a value head.
        writes: it may be asked for answers (a reward model may not).
        kept: what its engines prepare of the weights, once.
    """

    config: StageConfig
    roles: Roles
    tokenizer: Any
    template: Template
    device: torch.device
    dtype: torch.dtype
    base: str
    fingerprint: dict[str, Any]
    adapters: tuple[str, ...]
    record: HeadRecord | None
    writes: bool
    kept: Kept = field(default_factory=Kept)

    @property
    def tail(self) -> tuple[int, ...]:
        """What follows the end marker in rows that are scored."""
        return () if self.record is None else readout_tail(self.template, self.tokenizer, self.record.readout)

    @property
    def budget(self) -> int:
        """Tokens of one scoring pass."""
        return self.config.micro_batch_tokens or default_micro_batch_tokens(self.device)

    @property
    def window(self) -> int | None:
        """Most tokens of prompt and answer that the model was made for."""
        return getattr(self.roles.model.config.get_text_config(), "max_position_embeddings", None)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def generator(self) -> Engine:
        """The engine that writes answers.

        Raises:
            ModelError: this is a reward model.
        """
        if not self.writes:
            raise ModelError(
                "this is a reward model: it scores answers and writes none",
                where=self.config.origin("adapter_name_or_path"),
                why="its adapter was trained for its value head, and text from it would mean nothing",
                remedy="use get_scores, or name the adapter of an sft or ppo run",
            )
        return Engine(
            roles=self.roles,
            role=POLICY,
            stop_ids=self.template.stop_ids,
            decode=lambda ids: self.decode(ids),
            packing=spares_a_copy(self.roles.of(POLICY)),
            kept=self.kept,
        )


def find_served(config: StageConfig) -> Source:
    """Which adapters and head a file means.

    Raises:
        TrimtabError: an adapter that is not there or is of a kind we do not compute, or nothing trained yet.
    """
    config = _trained_weights(config)
    folders = adapter_folders(config)
    for folder in folders:
        read_adapter(Path(folder))  # now: the base takes its time to load
    home = Path(folders[-1]) if folders else resolve_model(cast(Any, config))
    scores, writes = _uses(config, home)
    return Source(
        config=_as_trained(config, home) if scores else config,
        folders=folders,
        home=home,
        scores=scores,
        writes=writes,
    )


def load_served(source: Source) -> Served:
    """Load it.

    Raises:
        TrimtabError: a model, adapter or head that cannot be found or does not fit.
    """
    config = source.config
    roles, tokenizer, template, device, dtype, base, fingerprint = load_parts(config)
    names = stack_adapters(roles, source.folders, fingerprint)
    roles.define(POLICY, *names)
    record = None
    if source.scores:
        head, record = load_head(source.home, roles.model.config.get_text_config().hidden_size)
        if not (source.home / RECORD).is_file():
            say(
                f"{source.home}: a value head without our record: read at the last token of the whole rendered dialogue"
            )
        if config.written("reward_readout"):
            record = replace(record, readout=config.reward_readout)
        roles.define(REWARD, *names, head=head)
    return Served(
        config=config,
        roles=roles,
        tokenizer=tokenizer,
        template=template,
        device=device,
        dtype=dtype,
        base=base,
        fingerprint=fingerprint,
        adapters=names,
        record=record,
        writes=source.writes,
    )


def _trained_weights(config: StageConfig) -> StageConfig:
    """A training file whose own weights were trained serves the model folder in its output_dir."""
    folder = Path(config.output_dir or "")
    if config.do_infer or config.finetuning_type == "lora" or not (folder / "config.json").is_file():
        return config
    say(f"the model that this file trained: {folder}")
    return config.model_copy(update={"model_name_or_path": str(folder), "do_train": False})


def adapter_folders(config: StageConfig) -> tuple[str, ...]:
    """The adapters of an inference file, or the one that a training file has left in its output_dir.

    Raises:
        RunError: the training file has not been trained yet.
    """
    if config.do_infer:
        return config.adapter_name_or_path
    trained = config.output_dir or ""
    if not (Path(trained) / ADAPTER_CONFIG).is_file():
        raise RunError(
            f"nothing has been trained in {trained!r} yet",
            where=config.origin("output_dir"),
            why="a file with do_train: true serves the model that it trained",
            remedy="train it first, or write do_train=false to use the model and adapters that the file names",
        )
    say(f"the model that this file trained: {trained}")
    return (trained,)


def _uses(config: StageConfig, home: Path) -> tuple[bool, bool]:
    """(scores, writes) by the table at the top of this file."""
    if config.stage == "rm":
        return True, False
    if not any((home / name).is_file() for name in (WEIGHTS, "value_head.bin")):
        return False, True
    recorded = read_json(home / RECORD, {})
    if recorded.get("purpose") == "critic":
        return False, True
    return True, not recorded


def _as_trained(config: StageConfig, home: Path) -> StageConfig:
    """The file with the template, system message and length that the reward model was trained with, where it names none."""
    recorded = read_json(home / RECORD, {})
    update = {}
    for key in ("template", "default_system", "cutoff_len"):
        value = recorded.get(key)
        if value is None or value == getattr(config, key):
            continue
        if config.written(key):
            say(f"{config.origin(key)}: {getattr(config, key)!r}; this reward model was trained with {value!r}")
        else:
            update[key] = value
    return config.model_copy(update=update)
