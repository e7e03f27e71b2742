"""`trimtab export FILE`: base and adapters as one ordinary model folder that any tool loads.

    W' = W + sum over adapters  s B A          in float32, then rounded once to the type of the model's own files

Rounding may lose much of a young adapter: in bfloat16 a weight moves by no less than 1/256 of itself. How much is left is said.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.config import StageConfig
from trimtab.data.templates.jinja import apply
from trimtab.data.templates.slots import SlotTemplate
from trimtab.data.templates.template import Template
from trimtab.errors import ConfigError, RunError, TemplateError
from trimtab.models import lora
from trimtab.models.copies import copied
from trimtab.models.folder import resolve_model
from trimtab.models.heads import save_head
from trimtab.models.packaged import quiet_unless_watched
from trimtab.rundir import is_disk_full, read_json
from trimtab.serve.model import Served, find_served, load_served
from trimtab.train.assemble import REWARD
from trimtab.train.progress import say
from trimtab.types import Message

FAINT = 0.9  # a smaller share of the change that survives rounding is worth a line


def export(config: StageConfig) -> Path:
    """Write the merged model of a file into its export_dir, whole or not at all; returns that folder.

    With it go the tokenizer, its chat template, the generation config (the template's end of turn among its stop tokens) and, of a
    reward model, the value head with its record.

    Args:
        config: read are the model and adapters, export_dir, export_size (GB of the largest shard), template; compute_dtype, when
            written, is the type of the weights.

    Raises:
        ConfigError: no export_dir.
        RunError: export_dir is not empty or cannot be written, or the disk is full.
        TrimtabError: a model or adapter that cannot be used.
    """
    if config.export_dir is None:
        raise ConfigError(
            "export needs an export_dir",
            where="export_dir",
            remedy="name a folder for the merged model: export_dir: FOLDER",
        )
    target = Path(config.export_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(
            f"export_dir {str(target)!r} is not empty",
            where=config.origin("export_dir"),
            why="a model mixed with older files may load as neither",
            remedy="choose another export_dir, or empty that one",
        )
    for note in config.notes:
        say(note)
    # in float32 and in ordinary memory, whatever the file computes in
    served = load_served(
        find_served(config.model_copy(update={"compute_dtype": "float32", "use_cpu": True, "quantization_bit": None}))
    )
    dtype = _dtype(config)
    kept = merge(served.roles.model, served.adapters, dtype)
    name = str(dtype).removeprefix("torch.")
    if kept < FAINT:
        say(
            f"{kept:.0%} of the adapters' change is left after rounding to {name}: chat and predict with the adapter beside its base "
            "keep all of it, and so does an export with compute_dtype: float32"
        )
    temporary = target.absolute().with_name(f"{target.absolute().name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        _write(served, temporary, dtype, f"{config.export_size}GB")
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except Exception as error:
        if isinstance(error, OSError) or is_disk_full(error):
            raise RunError(
                f"the model could not be written to {target.absolute()}",
                where=config.origin("export_dir"),
                why=str(error),
                remedy="free some space, or choose another export_dir",
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"exported ({name}): {target}")
    return target


@torch.no_grad()
def merge(model: nn.Module, adapters: tuple[str, ...], dtype: torch.dtype) -> float:
    """Add the adapters to the weights and put plain linear layers back; the whole model is then of type `dtype`.

    Returns:
        how much of the change D survives the rounding, <round(W + D) - W, D> / <D, D> over all layers; 1 without a change.
    """
    along = size = 0.0
    for path, layer in lora.layers(model).items():
        before = layer.weight.detach().float()
        change = torch.zeros_like(before)
        for name in adapters:
            if name in layer.adapters:
                adapter: Any = layer.adapters[name]
                change += adapter.scale * (adapter.b @ adapter.a)
                if adapter.magnitude is not None:
                    turned = before + change
                    change = adapter.magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True) - before
        after = (before + change).to(dtype)
        along += float(((after.float() - before).double() * change).sum())
        size += float((change.double() ** 2).sum())
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(after, requires_grad=False), layer.bias
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    whole: Any = model
    apart = copied(model)
    for path, module in apart.items():
        own = module.base
        for name in adapters:
            if name in module.copies:
                for key, value in module.copies[name].named_parameters():
                    setattr(own, key, nn.Parameter(value.detach().to(dtype), requires_grad=False))
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, own)
    if apart and whole.get_output_embeddings().weight is not whole.get_input_embeddings().weight:
        whole.config.tie_word_embeddings = False  # one of the two was trained alone
    model.to(dtype)
    return along / size if size else 1.0


def _dtype(config: StageConfig) -> torch.dtype:
    """The type that the file asks for, else that of the model's own weights."""
    if config.written("compute_dtype") and config.compute_dtype != "auto":
        return getattr(torch, config.compute_dtype)  # type: ignore[no-any-return]
    settings: Any = config
    written = read_json(resolve_model(settings) / "config.json", {})
    found = getattr(torch, str(written.get("dtype") or written.get("torch_dtype")), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def _write(served: Served, folder: Path, dtype: torch.dtype, shard: str) -> None:
    model: Any = served.roles.model
    model.config.dtype = dtype
    end = served.template.end_of_turn_id
    stops = model.generation_config.eos_token_id
    listed = [] if stops is None else list(stops) if isinstance(stops, list | tuple) else [stops]
    if end not in listed:  # or other tools would write on after the answer
        model.generation_config.eos_token_id = [*listed, end]
    with quiet_unless_watched():
        model.save_pretrained(folder, max_shard_size=shard)
    tokenizer = served.tokenizer
    if not tokenizer.chat_template and isinstance(served.template, SlotTemplate):
        tokenizer.chat_template = as_jinja(served.template)
        say(f"the tokenizer has no chat template of its own: {served.template.name} is written as one")
    elif not same_rendering(served.template, tokenizer):
        say(
            f"the tokenizer's own chat template is kept; it renders otherwise than {served.template.name}, which this file names"
        )
    tokenizer.save_pretrained(str(folder))
    head = served.roles.specs[REWARD].head if served.record is not None else None
    if head is not None and served.record is not None:
        save_head(head, folder, served.record)


def same_rendering(template: Template, tokenizer: Any) -> bool:
    """Whether the tokenizer's own chat template writes a small dialogue as `template` does."""
    dialogue = [
        Message(role="system", content="s"),
        Message(role="user", content="u"),
        Message(role="assistant", content="a"),
        Message(role="user", content="v"),
    ]
    try:
        for messages in (dialogue, dialogue[1:]):
            own = apply(tokenizer, messages, True, True)
            if own != template.text(messages, add_generation_prompt=True):
                return False
    except TemplateError:
        return False
    return True


def as_jinja(template: SlotTemplate) -> str:
    """A template of fixed strings in the language of tokenizers' chat templates."""

    def text(value: str) -> str:
        return "{{ " + repr(value) + " }}" if value else ""

    def slot(role: str, before: str, after: str) -> str:
        content = "{{ message['content'] }}"
        return f"message['role'] == '{role}' %}}{text(before)}{content}{text(after)}"

    roles = {"system": "system", "user": "user", "observation": "tool"}
    cases = [slot(roles[role], *around) for role, around in template.slots.items() if role in roles]
    cases.append(slot("assistant", template.header, template.end_marker + template.after_end))
    default = ""
    if template.default_system:
        before, after = template.slots["system"]
        default = (
            "{% if not messages or messages[0]['role'] != 'system' %}"
            + text(before + template.default_system + after)
            + "{% endif %}"
        )
    return (
        text(template.prefix)
        + default
        + "{% for message in messages %}{% if "
        + "{% elif ".join(cases)
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + text(template.header)
        + "{% endif %}"
    )
