"""Which weights play which role in a stage.

| | trained | reference | critic | reward |
|---|---|---|---|---|
| `lora` | an adapter on the base | the stack as it was at the start, on the base | an adapter on the base | an adapter on the base |
| `full`, `freeze` | the base's own weights | one frozen copy of the base | an adapter on the copy | an adapter on the copy |

So LoRA needs one set of weights and the others two, not four. A reward model of its own base (`reward_model_type: full`) and a
reference that the file names (`ref_model`) add one each.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.data.templates import Template
from trimtab.errors import AdapterError, ConfigError
from trimtab.models import lora
from trimtab.models.heads import WEIGHTS as HEAD_WEIGHTS
from trimtab.models.heads import HeadRecord, ValueHead, load_head
from trimtab.models.load import resolve_model, same_base
from trimtab.models.masters import Masters, trained_names
from trimtab.models.roles import CRITIC, POLICY, REFERENCE, REWARD, Roles
from trimtab.rundir import read_json
from trimtab.train.progress import say

BASE_RECORD = "base_model.json"
"""Beside a saved adapter: the fingerprint of the base it belongs to."""


# ------------------------------------------------------------------------------------------------------------ adapters


def stack_adapters(roles: Roles, paths: tuple[str, ...], fingerprint: dict[str, Any]) -> tuple[str, ...]:
    """Load adapter folders, frozen, in order; returns their names.

    Raises:
        AdapterError: an adapter that does not fit, or one that already holds another of them: what we save is the whole policy
            as one adapter, so naming it and what it was trained from would add the latter twice.
    """
    names = []
    hashes = [lora.file_hash(Path(path)) for path in paths]
    for i, path in enumerate(paths):
        twice = [p for p, h in zip(paths, hashes, strict=True) if h and h in contained(Path(path))]
        if twice:
            raise AdapterError(
                f"{path!r} already contains {twice[0]!r}",
                where=str(Path(path) / BASE_RECORD),
                why="it was trained on top of that adapter and was saved with it, as one; both together would add it twice",
                remedy=f"adapter_name_or_path: {path}",
            )
        name = f"adapter{i}"
        _check_base(Path(path), fingerprint)
        lora.load_adapter(roles.model, name, Path(path), roles.switch)
        names.append(name)
    return tuple(names)


def contained(folder: Path) -> list[str]:
    """Hashes of the adapters that went into the one in `folder`; empty for an adapter of another tool."""
    return list(read_json(folder / BASE_RECORD, {}).get("contains", []))


def load_reward_role(roles: Roles, folder: Path, fingerprint: dict[str, Any], *, model: PreTrainedModel) -> HeadRecord:
    """Load a reward model's adapter and head onto `model` as the role `reward`; returns how it is read."""
    _check_base(folder, fingerprint)
    lora.load_adapter(model, REWARD, folder, roles.switch)
    head, record = load_head(folder, model.config.get_text_config().hidden_size)
    roles.define(REWARD, REWARD, head=head, model=model)
    return record


def _check_base(folder: Path, fingerprint: dict[str, Any]) -> None:
    """The adapter's record of its base against this base, by content; an adapter without one is checked by shape on loading."""
    record = read_json(folder / BASE_RECORD, {})
    if not record:
        if (folder / lora.CONFIG).is_file():
            say(f"{folder}: no record of its base model (saved by another tool); only shapes can be compared")
    elif not same_base(record, fingerprint):
        raise AdapterError(
            f"the adapter in {str(folder)!r} was trained on another base model",
            where=str(folder / BASE_RECORD),
            why="the tensors that it recorded of its base are not those of model_name_or_path",
            remedy="set model_name_or_path to the base that the adapter was trained on",
        )


# --------------------------------------------------------------------------------------------------------------- roles


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a stage starts.

    Attributes:
        policy, reference: adapters of the policy (the trained one last, if an adapter is trained) and of the policy as it is now.
        frozen: what carries the reference, and reward and critic adapters: the base under the adapters, or a copy of the trained
            model's starting weights.
    """

    policy: tuple[str, ...]
    reference: tuple[str, ...]
    frozen: PreTrainedModel


def define_roles(
    config: Any, roles: Roles, fingerprint: dict[str, Any], template: Template, dtype: torch.dtype
) -> HeadRecord | None:
    """Make what is trained, and define the roles of a training stage; returns how its reward model is read, if it has one."""
    online = config.stage not in ("pt", "sft", "rm")
    if config.finetuning_type == "lora":
        start = _start_lora(config, roles, fingerprint)
    else:
        start = _start_weights(config, roles, dtype, keep_start=online)
    if config.stage == "rm":
        return _define_reward_model(config, roles, start, template)
    if not online:
        roles.define(POLICY, *start.policy)
        return None
    if not config.reward_model:
        raise ConfigError(
            "stage: ppo needs a reward_model", where=config.origin("reward_model"), remedy="train one with stage: rm"
        )
    roles.define(REFERENCE, *start.reference, model=start.frozen)
    record = load_reward_role(roles, Path(config.reward_model), fingerprint, model=start.frozen)
    _compare_records(record, config, template)
    _define_critic(config, roles, start)
    return record


def _start_lora(config: Any, roles: Roles, fingerprint: dict[str, Any]) -> Start:
    """The trained adapter continues the last of `adapter_name_or_path` or, with `create_new_adapter` (or when there is none), is
    new on top of all of them. The reference is the policy as it is now: the same stack with a frozen copy of where it starts.
    """
    model = roles.model
    stack = stack_adapters(roles, config.adapter_name_or_path, fingerprint)
    if stack and not config.create_new_adapter:
        *below, start = stack
        lora.copy_adapter(model, start, "trained", trainable=True)
        return Start(policy=(*below, "trained"), reference=stack, frozen=model)
    _new_adapter(config, roles, model, "trained")
    return Start(policy=(*stack, "trained"), reference=stack, frozen=model)


def _start_weights(config: Any, roles: Roles, dtype: torch.dtype, *, keep_start: bool) -> Start:
    """The base's own weights are trained; `keep_start` keeps a frozen copy of them, which shares whatever is not trained."""
    model: Any = roles.model
    names = trained_names(
        model,
        config.finetuning_type,
        layers=config.freeze_trainable_layers,
        modules=config.freeze_trainable_modules,
        extra=config.freeze_extra_modules,
    )
    roles.masters = Masters(model, names, dtype, pure=config.pure_bf16)
    model.config.dtype = dtype
    frozen = model
    if keep_start:
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        frozen = copy.deepcopy(model, shared)
        frozen.requires_grad_(False)
    roles.masters.collect()
    return Start(policy=(), reference=(), frozen=frozen)


def _new_adapter(config: Any, roles: Roles, model: Any, name: str) -> None:
    targets = lora.inject(model, config.lora_target, roles.switch)
    lora.new_adapter(
        model,
        name,
        paths=_wanted(config.lora_target, targets),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        seed=config.seed,
    )


def _wanted(targets: tuple[str, ...], found: dict[str, lora.LoraLinear]) -> list[str]:
    if tuple(targets) == ("all",):
        return list(found)
    return [path for path in found if any(path == t or path.endswith("." + t) for t in targets)]


def _define_reward_model(config: Any, roles: Roles, start: Start, template: Template) -> HeadRecord:
    """Stage rm: the trained weights with a head; that of the model it continues, if that is a reward model."""
    hidden = roles.model.config.get_text_config().hidden_size
    head = ValueHead(hidden, seed=config.seed)
    continued = config.adapter_name_or_path[-1:] if not config.create_new_adapter else ()
    last = Path(continued[0]) if continued else resolve_model(config) if roles.masters is not None else None
    if last is not None and (last / HEAD_WEIGHTS).is_file():
        head, _ = load_head(last, hidden, trainable=True)
        say(f"the reward model in {last} is trained further, its head included")
    roles.define(REWARD, *start.policy, head=head)
    return HeadRecord(
        readout=config.reward_readout,
        template=template.name,
        default_system=config.default_system,
        cutoff_len=config.cutoff_len,
    )


def _compare_records(record: HeadRecord, config: Any, template: Template) -> None:
    for what, trained, here in (
        ("template", record.template, template.name),
        ("default_system", record.default_system, config.default_system),
    ):
        if record.template is not None and trained != here:
            say(
                f"the reward model was trained with {what} {trained!r}, this run has {here!r}: its scores are of unfamiliar text"
            )


def _define_critic(config: Any, roles: Roles, start: Start) -> None:
    """The policy, and the critic: a head on it, or an adapter that starts as the reward model's with its head."""
    hidden = roles.model.config.get_text_config().hidden_size
    if config.critic == "head":
        roles.define(POLICY, *start.policy, head=ValueHead(hidden))
        return
    roles.define(POLICY, *start.policy)
    lora.copy_adapter(start.frozen, REWARD, CRITIC, trainable=True)
    critic = ValueHead(hidden)
    reward_head = roles.specs[REWARD].head
    assert reward_head is not None
    critic.load_state_dict(reward_head.state_dict())
    roles.define(CRITIC, CRITIC, head=critic, model=start.frozen)
