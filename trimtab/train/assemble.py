"""From a config to everything that a loop works with: tokenizer, template, data, base model, roles."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab.config import StageConfig
from trimtab.data import templates
from trimtab.data.loader import StageData, load_data
from trimtab.data.tokenizer import load_tokenizer
from trimtab.engine.generator import ForwardGenerator
from trimtab.errors import AdapterError, ConfigError
from trimtab.models import lora
from trimtab.models.forward import Layout, choose_layout
from trimtab.models.heads import WEIGHTS as HEAD_WEIGHTS
from trimtab.models.heads import HeadRecord, ValueHead, load_head
from trimtab.models.load import base_fingerprint, decoder, load_base, resolve_model, same_base
from trimtab.models.roles import Roles
from trimtab.rewards import readout_tail
from trimtab.rundir import read_json
from trimtab.train.device import default_micro_batch_tokens, pick_device, pick_dtype
from trimtab.train.progress import say
from trimtab.types import Completion

BASE_RECORD = "base_model.json"
"""Beside a saved adapter: the fingerprint of the base it belongs to."""

POLICY, REFERENCE, CRITIC, REWARD = "policy", "reference", "critic", "reward"


@dataclass(slots=True, kw_only=True)
class Session:
    """What the loops share.

    Attributes:
        budget: tokens of a micro-batch, padding counted.
        layout: how rows of one prompt are computed together.
        base: the name written into adapters as their base.
        contains: hashes of the adapters that the trained policy was built on, for the record beside it.
        record: how the scores of the reward model in this session are read.
        tail: what follows the end marker in rows that it scores; empty unless it is read at the last token.
    """

    config: Any
    tokenizer: Any
    template: templates.Template
    data: StageData[Any]
    roles: Roles
    device: torch.device
    dtype: torch.dtype
    budget: int
    layout: Layout
    base: str
    fingerprint: dict[str, Any]
    contains: list[str] = field(default_factory=list)
    record: HeadRecord | None = None
    tail: tuple[int, ...] = ()

    def text(self, completion: Completion) -> str:
        """The completion as text, without its stop token."""
        ids = list(completion.token_ids)
        if ids and ids[-1] in self.template.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def generator(self, role: str = POLICY) -> ForwardGenerator:
        """An engine on the training weights."""
        return ForwardGenerator(
            roles=self.roles,
            role=role,
            stop_ids=self.template.stop_ids,
            decode=lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
        )


def load_text_side(config: Any) -> tuple[Any, templates.Template]:
    """The tokenizer and the chat template of a file."""
    tokenizer = load_tokenizer(resolve_model(config), config)
    template = templates.get(
        config.template, tokenizer, default_system=config.default_system, enable_thinking=config.enable_thinking
    )
    return tokenizer, template


def load_parts(
    config: Any, text: tuple[Any, templates.Template] | None = None
) -> tuple[Roles, Any, templates.Template, torch.device, torch.dtype, str, dict[str, Any]]:
    """Base model, tokenizer and template of any file, training or not; `text` is what `load_text_side` gave, if it was asked.

    Returns:
        roles (none defined yet), tokenizer, template, device, compute type, name of the base, its fingerprint.
    """
    folder = resolve_model(config)
    tokenizer, template = text or load_text_side(config)
    device = pick_device(use_cpu=config.use_cpu)
    dtype, line = pick_dtype(config.compute_dtype, device)
    if line:
        say(line)
    model = load_base(folder, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code)
    return (
        Roles(model=model),
        tokenizer,
        template,
        device,
        dtype,
        str(config.model_name_or_path),
        dict(base_fingerprint(folder)),
    )


def assemble(config: StageConfig) -> Session:
    """Load data first (cheap, and most mistakes are there), then the model, then define the stage's roles."""
    tokenizer, template = load_text_side(config)
    data = load_data(config, tokenizer, template)
    roles, _, _, device, dtype, base, fingerprint = load_parts(config, (tokenizer, template))
    if config.full_determinism:
        torch.use_deterministic_algorithms(True)
    record = _define_roles(config, roles, fingerprint, template)
    shared, why = choose_layout(roles.model, "auto")
    if config.stage in ("rm", "ppo"):
        say(f"layout {shared}: {why}")
    if config.gradient_checkpointing:
        checkpoint_layers(roles)
    return Session(
        config=config,
        tokenizer=tokenizer,
        template=template,
        data=data,
        roles=roles,
        device=device,
        dtype=dtype,
        budget=config.micro_batch_tokens or default_micro_batch_tokens(device),
        layout=shared,
        base=base,
        fingerprint=fingerprint,
        contains=[h for p in config.adapter_name_or_path for h in (lora.file_hash(Path(p)), *contained(Path(p)))],
        record=record,
        tail=readout_tail(template, tokenizer, record.readout) if record is not None else (),
    )


def checkpoint_layers(roles: Roles) -> None:
    """Recompute activations in the backward pass. Only the layers' own flag is set to training: dropout stays off.

    And only while gradients are wanted: a checkpointed layer of transformers drops the key/value cache that it is given, so
    sampling between two updates must find the layers as they are in evaluation.
    """
    roles.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    layers = [module for module in roles.model.modules() if hasattr(module, "gradient_checkpointing")]

    def follow(module: torch.nn.Module, inputs: Any) -> None:
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    decoder(roles.model).register_forward_pre_hook(follow)


# --------------------------------------------------------------------------------------------------------------- roles


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


def load_reward_role(roles: Roles, folder: Path, fingerprint: dict[str, Any], role: str = REWARD) -> HeadRecord:
    """Load a reward model's adapter and head as `role`; returns how it is read."""
    _check_base(folder, fingerprint)
    lora.load_adapter(roles.model, role, folder, roles.switch)
    head, record = load_head(folder, roles.model.config.get_text_config().hidden_size)
    roles.define(role, role, head=head)
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


def _define_roles(
    config: Any, roles: Roles, fingerprint: dict[str, Any], template: templates.Template
) -> HeadRecord | None:
    """Adapters, heads and roles of a training stage.

    The trained adapter continues the last of `adapter_name_or_path` or, with `create_new_adapter` (or when there is none), is
    new on top of all of them. The reference is the policy as it is now: the same stack with a frozen copy of where it starts.
    """
    model = roles.model
    hidden = model.config.get_text_config().hidden_size
    stack = stack_adapters(roles, config.adapter_name_or_path, fingerprint)
    if stack and not config.create_new_adapter:
        *below, start = stack
        lora.copy_adapter(model, start, "trained", trainable=True)
        policy, reference = (*below, "trained"), stack
    else:
        targets = lora.inject(model, config.lora_target, roles.switch)
        lora.new_adapter(
            model,
            "trained",
            paths=_wanted(config.lora_target, targets),
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            rslora=config.use_rslora,
            seed=config.seed,
        )
        policy, reference = (*stack, "trained"), stack
    if config.stage == "rm":
        head = ValueHead(hidden, seed=config.seed)
        last = Path(config.adapter_name_or_path[-1]) if stack and not config.create_new_adapter else None
        if last is not None and (last / HEAD_WEIGHTS).is_file():
            head, _ = load_head(last, hidden, trainable=True)
            say(f"the reward model in {last} is trained further, its head included")
        roles.define(REWARD, *policy, head=head)
        return HeadRecord(
            readout=config.reward_readout,
            template=template.name,
            default_system=config.default_system,
            cutoff_len=config.cutoff_len,
        )
    if config.stage != "ppo":
        roles.define(POLICY, *policy)
        return None
    if not config.reward_model:
        raise ConfigError(
            "stage: ppo needs a reward_model", where=config.origin("reward_model"), remedy="train one with stage: rm"
        )
    roles.define(REFERENCE, *reference)
    record = load_reward_role(roles, Path(config.reward_model), fingerprint)
    for what, trained, here in (
        ("template", record.template, template.name),
        ("default_system", record.default_system, config.default_system),
    ):
        if record.template is not None and trained != here:
            say(
                f"the reward model was trained with {what} {trained!r}, this run has {here!r}: its scores are of unfamiliar text"
            )
    if config.critic == "head":
        roles.define(POLICY, *policy, head=ValueHead(hidden))
    else:
        roles.define(POLICY, *policy)
        lora.copy_adapter(model, REWARD, CRITIC, trainable=True)
        critic = ValueHead(hidden)
        reward_head = roles.specs[REWARD].head
        assert reward_head is not None
        critic.load_state_dict(reward_head.state_dict())
        roles.define(CRITIC, CRITIC, head=critic)
    return record


def _wanted(targets: tuple[str, ...], found: dict[str, lora.LoraLinear]) -> list[str]:
    if tuple(targets) == ("all",):
        return list(found)
    return [path for path in found if any(path == t or path.endswith("." + t) for t in targets)]
