"""From a config to everything that a loop works with: tokenizer, template, data, base model, roles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from trimtab.config import StageConfig
from trimtab.data import templates
from trimtab.data.loader import StageData, load_data
from trimtab.data.tokenizer import load_tokenizer
from trimtab.engine.generator import Engine
from trimtab.errors import ConfigError
from trimtab.evals import EVALS
from trimtab.models import block, lora
from trimtab.models.budget import Budget
from trimtab.models.folder import check_writers, resolve_model
from trimtab.models.forward import choose_layout
from trimtab.models.heads import HeadRecord
from trimtab.models.layout import Layout, prefix
from trimtab.models.load import Packing, base_fingerprint, decoder, load_base
from trimtab.models.neftune import add_noise
from trimtab.models.roles import CRITIC as CRITIC
from trimtab.models.roles import POLICY as POLICY
from trimtab.models.roles import REFERENCE as REFERENCE
from trimtab.models.roles import REWARD as REWARD
from trimtab.models.roles import Roles
from trimtab.ops import native
from trimtab.plan import Estimate, Lengths, job_of, settle, shape_of
from trimtab.plan.estimate import FEWEST
from trimtab.plan.job import alike, worst_case
from trimtab.rewards import Reward, readout_tail
from trimtab.rewards.api import ApiReward
from trimtab.rewards.function import FunctionReward
from trimtab.rewards.length import LengthPenalty
from trimtab.rewards.lookup import load_functions
from trimtab.rewards.mixture import Mixture
from trimtab.rewards.model import EnsembleReward, ModelReward
from trimtab.sql.cached import shared_judge
from trimtab.train.device import pick_device, pick_dtype, spares_a_copy, this_machine
from trimtab.train.execution import EXECUTED, declared_rows, execution_reward, judged_rows
from trimtab.train.memory import PeakMemory
from trimtab.train.progress import say
from trimtab.train.weights import BASE_RECORD as BASE_RECORD
from trimtab.train.weights import Parts, define_roles, member_roles
from trimtab.train.weights import contained as contained
from trimtab.train.weights import stack_adapters as stack_adapters
from trimtab.types import Completion, TokenRow


@dataclass(slots=True, kw_only=True)
class Session:
    """What the loops share.

    Attributes:
        room: tokens of a micro-batch, padding counted; fewer after out-of-memory. `budget` is their number now.
        memory: peaks of memory by phase; planned: the plan of a training run.
        layout: how rows lie in memory in every forward pass (`models/forward.py`).
        base: the name written into adapters as their base.
        contains: hashes of the adapters that the trained policy was built on, for the record beside it.
        record: how the scores of the reward model in this session are read.
        tail: what follows the end marker in rows that it scores; empty unless it is read at the last token.
        fresh_critic: the critic does not start from a reward model.
        functions: the Python functions that reward, as the file names them.
    """

    config: Any
    tokenizer: Any
    template: templates.Template
    data: StageData[Any]
    roles: Roles
    device: torch.device
    dtype: torch.dtype
    room: Budget
    memory: PeakMemory
    layout: Layout
    base: str
    fingerprint: dict[str, Any]
    contains: list[str] = field(default_factory=list)
    record: HeadRecord | None = None
    tail: tuple[int, ...] = ()
    fresh_critic: bool = False
    functions: tuple[FunctionReward, ...] = ()
    planned: Estimate | None = None

    @property
    def budget(self) -> int:
        return self.room.tokens

    @budget.setter
    def budget(self, tokens: int) -> None:
        self.room.tokens = tokens

    def text(self, completion: Completion) -> str:
        """The completion as text, without its stop token."""
        ids = list(completion.token_ids)
        if ids and ids[-1] in self.template.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def reward(self) -> Mixture:
        """What scores answers: the reward model, server or execution and the functions by weight, and the price of length."""
        config = self.config
        learned = config.reward_model or config.reward_model_type == "sql"
        sources: list[Reward] = [self._reward_model()] if learned else []
        sources += self.functions
        weights = config.reward_weights or (1.0,) * len(sources)
        weighted = list(zip(weights, sources, strict=True))
        if config.reward_length_penalty:
            weighted.append((1.0, LengthPenalty(coef=config.reward_length_penalty, free=config.reward_length_free)))
        return Mixture(weighted)

    def _reward_model(self) -> Reward:
        config = self.config
        if config.reward_model_type == "sql":
            return execution_reward(config)
        if config.reward_model_type == "api":
            return ApiReward(
                config.reward_model[0],
                lambda ids: str(self.tokenizer.decode(list(ids), skip_special_tokens=False)),
                timeout=config.reward_timeout,
                retries=config.reward_retries,
                where=config.origin("reward_model"),
            )
        members = [
            ModelReward(self.roles, budget=self.room, layout=self.layout, role=role)
            for role in member_roles(len(config.reward_model))
        ]
        if len(members) == 1:
            return members[0]
        return EnsembleReward(members, kind=config.reward_ensemble, coef=config.reward_ensemble_coef)

    def generator(self, role: str = POLICY) -> Engine:
        """An engine on the training weights."""
        return Engine(
            roles=self.roles,
            role=role,
            stop_ids=self.template.stop_ids,
            decode=lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            packing=spares_a_copy(self.roles.of(role)),
            slots=FEWEST if self.planned is None else self.planned.slots,
            say=say,
        )


def load_text_side(config: Any) -> tuple[Any, templates.Template]:
    """The tokenizer and the chat template of a file."""
    tokenizer = load_tokenizer(resolve_model(config), config)
    template = templates.get(
        config.template,
        tokenizer,
        default_system=config.default_system,
        enable_thinking=config.enable_thinking,
        tools=config.tool_format,
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
    wanted = "bfloat16" if config.pure_bf16 and config.compute_dtype == "auto" else config.compute_dtype
    dtype, line = pick_dtype(wanted, device)
    if line:
        say(line)
    if device.type == "cpu" and native.why_not():
        say(f"the kernels in C are not used ({native.why_not()}): torch computes the same, more slowly")
    # weights that are trained start from all the digits of their files
    exact = config.do_train and config.finetuning_type != "lora"
    model = load_base(
        folder,
        dtype=torch.float32 if exact else dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
        packing=_packing(config, device),
    )
    return (
        Roles(model=model),
        tokenizer,
        template,
        device,
        dtype,
        str(config.model_name_or_path),
        dict(base_fingerprint(folder)),
    )


def _packing(config: Any, device: torch.device) -> Packing | None:
    """The base in 4 or 8 bits, where the file asks for it.

    Raises:
        ConfigError: not on a CUDA device.
    """
    if config.quantization_bit is None:
        return None
    if device.type != "cuda":
        raise ConfigError(
            f"quantization_bit: {config.quantization_bit} needs a CUDA device",
            where=config.origin("quantization_bit"),
            why=f"this run is on {device.type}, where packed weights are unpacked for every product: slower, and no smaller at work",
            remedy="leave quantization_bit out; compute_dtype: bfloat16 halves the memory where the CPU multiplies it",
        )
    return Packing(config.quantization_bit, config.quantization_type, config.double_quantization)


def assemble(config: StageConfig, *, earlier: Mapping[str, Any] | None = None) -> Session:
    """Load data first (cheap, and most mistakes are there), then the model, then define the stage's roles.

    Args:
        earlier: the manifest of the run that this one goes on with: it keeps the micro-batch and the checkpointing that were
            decided then, since sums in another order differ in their last digits.
    """
    for task in config.eval_tasks:
        EVALS.row(task, where=config.origin("eval_tasks"))
    check_writers(config)
    functions = load_functions(
        getattr(config, "reward_funcs", ()),
        timeout=getattr(config, "reward_timeout", 60.0),
        where=config.origin("reward_funcs"),
    )
    tokenizer, template = load_text_side(config)
    data = load_data(config, tokenizer, template)
    judge = shared_judge(config.sql_workers)  # its processes start with their first query
    if getattr(config, "reward_model_type", None) == "sql":
        data = judged_rows(data, judge)
    elif any(name in EXECUTED for name in getattr(config, "reward_funcs", ()) if isinstance(name, str)):
        data = declared_rows(data)
    for function in functions:
        function.check([*data.train_examples, *data.eval_examples])
    planned = plan_run(config, data, earlier or {})
    import transformers.models.auto.modeling_auto  # noqa: F401 - code is no part of what a run holds

    memory = PeakMemory(pick_device(use_cpu=config.use_cpu))
    with memory.phase("load"):
        roles, _, _, device, dtype, base, fingerprint = load_parts(config, (tokenizer, template))
        if config.full_determinism:
            # cuBLAS reads this when it starts; a sum over the vocabulary that has no deterministic kernel is told, not refused
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        parts = Parts(tokenizer=tokenizer, template=template, device=device, dtype=dtype, fingerprint=fingerprint)
        defined = define_roles(config, roles, parts)
    record = defined.record
    noisy = config.stage in ("pt", "sft") and bool(config.neftune_noise_alpha)
    # the size of the noise is that of a row in its own sequence, as users of other trainers know it
    for model in roles.models():
        block.install(model)
    layout, why = choose_layout(roles.models(), "padded" if noisy else config.layout)
    say(f"layout {layout}: {why}")
    if noisy:
        add_noise(roles.model, config.neftune_noise_alpha or 0.0)
    if planned.checkpointing:
        checkpoint_layers(roles)
        if config.gradient_checkpointing is None:
            say("gradient_checkpointing: on, since the activations would not fit into the memory that is free")
    return Session(
        config=config,
        tokenizer=tokenizer,
        template=template,
        data=data,
        roles=roles,
        device=device,
        dtype=dtype,
        room=Budget(planned.budget, say),
        memory=memory,
        planned=planned,
        layout=layout,
        base=base,
        fingerprint=fingerprint,
        contains=[h for p in config.adapter_name_or_path for h in (lora.file_hash(Path(p)), *contained(Path(p)))],
        record=record,
        fresh_critic=defined.fresh_critic,
        functions=functions,
        tail=readout_tail(template, tokenizer, record.readout) if record is not None else (),
    )


def plan_run(config: Any, data: StageData[Any], earlier: Mapping[str, Any]) -> Estimate:
    """The plan of this run on this machine, with the rows as they are; what the file leaves open is decided here."""
    device = pick_device(use_cpu=config.use_cpu)
    dtype, _ = pick_dtype(config.compute_dtype, device)
    lengths = _lengths(config, data)
    job = job_of(config, lengths, bfloat16=dtype != torch.float32)
    budget, recompute = config.micro_batch_tokens, config.gradient_checkpointing
    if recompute is None:
        recompute = earlier.get("gradient_checkpointing")
    return settle(
        job,
        shape_of(resolve_model(config)),
        this_machine(device),
        checkpointing=recompute,
        budget=budget or earlier.get("micro_batch_tokens"),
    )


def _lengths(config: Any, data: StageData[Any]) -> Lengths:
    """Lengths of the rows of a run."""
    rows = data.train
    if not rows:  # a stream
        return worst_case(config)
    texts = [text for row in rows for text in getattr(row, "answers", (row,))]
    prompts = [text.scored[0] if isinstance(text, TokenRow) else len(text.token_ids) for text in texts]
    whole = [len(text.token_ids) for text in texts]
    online = hasattr(config, "rollout_size")
    written = mean(w - p for w, p in zip(whole, prompts, strict=True))
    if online:
        answers = [len(e.response.content) for e in data.train_examples if e.response is not None]
        # bytes of the data's own answers, as many tokens as a policy that imitates them writes
        written = min(config.answer_limit, mean(answers) / 3) if answers else config.answer_limit
    return Lengths(
        rows=len(data.packs or rows),
        prompt=mean(prompts),
        answer=written,
        longest=max(whole),
        alike=0.0 if data.packs else alike(_prompts(rows), config.batch_size),
        source="the rows of this run",
    )


def _prompts(rows: Sequence[Any]) -> list[tuple[int, ...]]:
    """The prompt of each row, pair or list of answers."""
    first = [next(iter(getattr(row, "answers", (row,)))) for row in rows]
    return [prefix(row) if isinstance(row, TokenRow) else row.token_ids for row in first]


def checkpoint_layers(roles: Roles) -> None:
    """Recompute activations in the backward pass. Only the layers' own flag is set to training: dropout stays off.

    And only while gradients are wanted: a checkpointed layer of transformers drops the key/value cache that it is given, so
    sampling between two updates must find the layers as they are in evaluation.
    """
    for model in roles.models():
        _checkpoint_layers_of(model)


def _checkpoint_layers_of(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def follow(module: torch.nn.Module, inputs: Any) -> None:
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    decoder(model).register_forward_pre_hook(follow)
