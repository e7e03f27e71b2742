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

from trimtab.algos import ALGORITHMS
from trimtab.data.templates import Template
from trimtab.data.tokenizer import load_tokenizer
from trimtab.errors import AdapterError, ConfigError, ModelError
from trimtab.models import lora
from trimtab.models.copies import add_copies
from trimtab.models.folder import ADAPTER_CONFIG, resolve_model
from trimtab.models.heads import WEIGHTS as HEAD_WEIGHTS
from trimtab.models.heads import HeadRecord, ValueHead, load_head
from trimtab.models.load import base_fingerprint, load_base, same_base
from trimtab.models.masters import Masters, trained_names
from trimtab.models.roles import CRITIC, POLICY, REFERENCE, REWARD, Roles
from trimtab.rundir import read_json
from trimtab.train.progress import say

BASE_RECORD = "base_model.json"
"""Beside a saved adapter: the fingerprint of the base it belongs to."""


REFRESHED = "refreshed"
"""The reference's own copy of the trained adapter, where the reference is refreshed."""


# ------------------------------------------------------------------------------------------------------------ adapters


def stack_adapters(
    roles: Roles,
    paths: tuple[str, ...],
    fingerprint: dict[str, Any],
    *,
    model: PreTrainedModel | None = None,
    prefix: str = "adapter",
) -> tuple[str, ...]:
    """Load adapter folders, frozen, in order, onto the roles' own model or onto `model`; returns their names.

    Raises:
        AdapterError: an adapter that does not fit, or one that already holds another of them: what we save is the whole policy
            as one adapter, so naming it and what it was trained from would add the latter twice.
    """
    names = []
    hashes = [lora.file_hash(Path(path)) for path in paths]
    for i, path in enumerate(paths):
        if hashes[i] and hashes[i] in hashes[:i]:
            raise AdapterError(
                f"{path!r} is named twice",
                where=str(Path(path)),
                why=f"its weights are those of {paths[hashes.index(hashes[i])]!r}, and would be added twice",
                remedy="name each adapter once",
            )
        twice = [p for p, h in zip(paths, hashes, strict=True) if h and h in contained(Path(path))]
        if twice:
            raise AdapterError(
                f"{path!r} already contains {twice[0]!r}",
                where=str(Path(path) / BASE_RECORD),
                why="it was trained on top of that adapter and was saved with it, as one; both together would add it twice",
                remedy=f"adapter_name_or_path: {path}",
            )
        name = f"{prefix}{i}"
        _check_base(Path(path), fingerprint)
        lora.load_adapter(model or roles.model, name, Path(path), roles.switch)
        names.append(name)
        if len(paths) > 1 and lora.is_dora(model or roles.model, name):
            raise _unstackable(f"the adapter {path!r}", path)
    return tuple(names)


def _unstackable(what: str, where: str) -> AdapterError:
    return AdapterError(
        f"{what} is a DoRA adapter, which cannot be stacked with others",
        where=where,
        why="it scales the rows of the weight that it was trained on, and products of other adapters add to that weight",
        remedy="merge the adapters below it into the base (trimtab export with an export_dir), and name that folder in "
        "model_name_or_path",
    )


def contained(folder: Path) -> list[str]:
    """Hashes of the adapters that went into the one in `folder`; empty for an adapter of another tool."""
    return list(read_json(folder / BASE_RECORD, {}).get("contains", []))


def load_reward_role(
    roles: Roles, folder: Path, fingerprint: dict[str, Any], *, model: PreTrainedModel, role: str = REWARD
) -> HeadRecord:
    """Load a reward model's adapter and head onto `model` as the role `reward`, or another; returns how it is read."""
    _check_base(folder, fingerprint)
    lora.load_adapter(model, role, folder, roles.switch)
    head, record = load_head(folder, model.config.get_text_config().hidden_size)
    roles.define(role, role, head=head, model=model)
    return record


def member_roles(count: int) -> list[str]:
    """Names of the roles of an ensemble of so many reward models: `reward`, `reward2`, `reward3` ..."""
    return [REWARD, *(f"{REWARD}{number}" for number in range(2, count + 1))][:count]


def _check_base(folder: Path, fingerprint: dict[str, Any]) -> None:
    """The adapter's record of its base against this base, by content; an adapter without one is checked by shape on loading."""
    record = read_json(folder / BASE_RECORD, {})
    if not record:
        if (folder / ADAPTER_CONFIG).is_file():
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
class Parts:
    """What the base came with: its tokenizer and template, device, compute type, fingerprint."""

    tokenizer: Any
    template: Template
    device: torch.device
    dtype: torch.dtype
    fingerprint: dict[str, Any]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Defined:
    """What else is known once the roles are defined.

    Attributes:
        record: how the scores of the stage's reward model are read; None without one.
        fresh_critic: the critic does not start from a reward model: it knows nothing yet and is warmed up.
    """

    record: HeadRecord | None = None
    fresh_critic: bool = False


def define_roles(config: Any, roles: Roles, parts: Parts) -> Defined:
    """Make what is trained, and define the roles of a training stage."""
    algorithm = ALGORITHMS.load(config.stage).from_config(config)
    needs = getattr(algorithm, "needs", None)
    if config.finetuning_type == "lora":
        start = _start_lora(config, roles, parts.fingerprint)
    else:
        learned = needs is not None and needs.reward and config.reward_model and config.reward_model_type == "lora"
        beside = needs is not None and ((needs.critic and config.critic == "adapter") or learned)
        refers = needs is not None and needs.reference and not _names_reference(config)
        start = _start_weights(config, roles, parts.dtype, keep_start=beside or refers)
    if config.stage == "rm":
        return Defined(record=_define_reward_model(config, roles, start, parts.template))
    if needs is None:
        roles.define(POLICY, *start.policy)
        return Defined()
    # with adapters a reference costs no memory: runs without a KL penalty still report how far they went
    if needs.reference or (needs.reward and config.finetuning_type == "lora"):
        _define_reference(config, roles, start, parts)
    record = _define_reward(config, roles, start, parts) if needs.reward else None
    if record is not None:
        _compare_records(record, config, parts.template)
    if not needs.critic:
        roles.define(POLICY, *start.policy)
        return Defined(record=record)
    return Defined(record=record, fresh_critic=_define_critic(config, roles, start))


def _names_reference(config: Any) -> bool:
    return bool(config.ref_model or config.ref_model_adapters)


def _start_lora(config: Any, roles: Roles, fingerprint: dict[str, Any]) -> Start:
    """The trained adapter continues the last of `adapter_name_or_path` or, with `create_new_adapter` (or when there is none), is
    new on top of all of them. The reference is the policy as it is now: the same stack with a frozen copy of where it starts.
    """
    model = roles.model
    stack = stack_adapters(roles, config.adapter_name_or_path, fingerprint)
    if stack and not config.create_new_adapter:
        *below, start = stack
        lora.copy_adapter(model, start, "trained", trainable=True)
        add_copies(model, "trained", config.additional_target, roles.switch, below=stack)
        return Start(policy=(*below, "trained"), reference=stack, frozen=model)
    if config.use_dora and stack:
        raise _unstackable("the new adapter", config.origin("use_dora"))
    if stack and lora.is_dora(model, stack[0]):
        raise _unstackable(f"{config.adapter_name_or_path[0]!r}", config.origin("create_new_adapter"))
    _new_adapter(config, roles, model, "trained")
    add_copies(model, "trained", config.additional_target, roles.switch, below=stack)
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
        dora=config.use_dora,
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


# ------------------------------------------------------------------------------------------------- reference and reward


def _define_reference(config: Any, roles: Roles, start: Start, parts: Parts) -> None:
    """The policy as the stage finds it, or the model (its adapters stacked) that the file names."""
    if not _names_reference(config):
        adapters = start.reference
        if getattr(config, "ref_update_every", None):
            # the same function as the stack at the start, in an adapter that a refresh can write into
            lora.copy_adapter(start.frozen, start.policy[-1], REFRESHED, trainable=False)
            adapters = (*start.policy[:-1], REFRESHED)
        roles.define(REFERENCE, *adapters, model=start.frozen)
        return
    model, fingerprint = start.frozen, parts.fingerprint
    if config.ref_model:
        model, fingerprint = _other_model(config, "ref_model", parts)
    names = stack_adapters(roles, config.ref_model_adapters, fingerprint, model=model, prefix="ref")
    roles.define(REFERENCE, *names, model=model)


@torch.no_grad()
def refresh_reference(roles: Roles) -> None:
    """The reference becomes the policy of now (`ref_update_every`): its copy of the trained adapter takes that one's values."""
    model = roles.of(REFERENCE)
    trained = lora.parameters(model, roles.specs[POLICY].adapters[-1])
    for name, copied in lora.parameters(model, REFRESHED).items():
        copied.copy_(trained[name])


def _define_reward(config: Any, roles: Roles, start: Start, parts: Parts) -> HeadRecord | None:
    """The reward model that the file names, as the role `reward`; None where a server or functions score."""
    if not config.reward_model or config.reward_model_type == "api":
        return None
    if config.reward_model_type == "lora":
        return _define_members(config, roles, start, parts)
    folder = Path(config.reward_model[0]).expanduser()
    model, fingerprint = _other_model(config, "reward_model", parts)
    names = stack_adapters(roles, config.reward_model_adapters, fingerprint, model=model, prefix="reward")
    home = Path(config.reward_model_adapters[-1]) if names else folder
    head, record = load_head(home, model.config.get_text_config().hidden_size)
    roles.define(REWARD, *names, head=head, model=model)
    return record


def _define_members(config: Any, roles: Roles, start: Start, parts: Parts) -> HeadRecord:
    """Reward adapters on the frozen base, each a role of its own; what they say of how they are read must agree.

    Raises:
        ConfigError: a whole model in place of an adapter.
        AdapterError: members that are read at different tokens.
    """
    records: list[HeadRecord] = []
    for name, role in zip(config.reward_model, member_roles(len(config.reward_model)), strict=True):
        folder = Path(name).expanduser()
        if (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"the reward model {str(folder)!r} is a whole model, not an adapter",
                where=config.origin("reward_model"),
                why="reward_model_type is lora",
                remedy="reward_model_type: full",
            )
        records.append(load_reward_role(roles, folder, parts.fingerprint, model=start.frozen, role=role))
        if records[-1].readout != records[0].readout:
            raise AdapterError(
                f"the reward models {config.reward_model[0]!r} and {name!r} are read at different tokens",
                where=config.origin("reward_model"),
                why=f"one at {records[0].readout}, the other at {records[-1].readout} (reward_readout when they were trained)",
                remedy="make an ensemble of models that are read alike",
            )
    for record in records[1:]:
        _compare_records(record, config, parts.template)
    return records[0]


@dataclass(frozen=True, slots=True)
class _Other:
    """A model that a key other than model_name_or_path names, as `resolve_model` wants it."""

    config: Any
    key: str

    @property
    def model_name_or_path(self) -> str:
        named = getattr(self.config, self.key)
        return str(named[0] if isinstance(named, tuple) else named)

    @property
    def cache_dir(self) -> str | None:
        return self.config.cache_dir  # type: ignore[no-any-return]

    @property
    def model_revision(self) -> str:
        return "main"  # model_revision is that of model_name_or_path

    @property
    def hf_hub_token(self) -> str | None:
        return self.config.hf_hub_token  # type: ignore[no-any-return]

    @property
    def ms_hub_token(self) -> str | None:
        return self.config.ms_hub_token  # type: ignore[no-any-return]

    def origin(self, key: str) -> str:
        return str(self.config.origin(self.key if key == "model_name_or_path" else key))


def _other_model(config: Any, key: str, parts: Parts) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A frozen model of its own, and its fingerprint. It reads the same token ids as the policy, so it must mean the same by them.

    Raises:
        ModelError: no such model, a broken one, or one with another tokenizer.
    """
    folder = resolve_model(_Other(config, key))
    theirs: Any = load_tokenizer(folder, config)
    known = theirs.get_vocab()
    for token, number in parts.tokenizer.get_vocab().items():
        if known.get(token) != number:
            raise ModelError(
                f"{key} has another tokenizer than model_name_or_path",
                where=config.origin(key),
                why=f"it reads the policy's token ids, and {token!r} is {number} to the policy and {known.get(token)} to it",
                remedy="use a model of the same family, or a reward server (reward_model_type: api), which is sent text",
            )
    model = load_base(folder, dtype=parts.dtype, device=parts.device, trust_remote_code=config.trust_remote_code)
    return model, dict(base_fingerprint(folder))


def _compare_records(record: HeadRecord, config: Any, template: Template) -> None:
    for what, trained, here in (
        ("template", record.template, template.name),
        ("default_system", record.default_system, config.default_system),
    ):
        if record.template is not None and trained != here:
            say(
                f"the reward model was trained with {what} {trained!r}, this run has {here!r}: its scores are of unfamiliar text"
            )


def _define_critic(config: Any, roles: Roles, start: Start) -> bool:
    """The policy, and the critic; returns whether the critic starts from nothing.

    A head on the policy (`critic: head`), or an adapter and head of its own. Those start as the reward model's where that is an
    adapter on the same weights, else as the policy's own adapter (a new one, where weights are trained) with a head of zeros.
    """
    hidden = roles.model.config.get_text_config().hidden_size
    if config.critic == "head":
        roles.define(POLICY, *start.policy, head=ValueHead(hidden))
        return True
    roles.define(POLICY, *start.policy)
    critic = ValueHead(hidden)
    reward = roles.specs.get(REWARD)
    if reward is not None and reward.head is not None and roles.of(REWARD) is start.frozen:
        lora.copy_adapter(start.frozen, REWARD, CRITIC, trainable=True)
        critic.load_state_dict(reward.head.state_dict())
        roles.define(CRITIC, CRITIC, head=critic, model=start.frozen)
        return False
    if start.policy:
        *below, trained = start.policy
        lora.copy_adapter(start.frozen, trained, CRITIC, trainable=True)
    else:
        below = []
        _new_adapter(config, roles, start.frozen, CRITIC)
    roles.define(CRITIC, *below, CRITIC, head=critic, model=start.frozen)
    return True
