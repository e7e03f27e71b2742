"""From entries to one typed config: aliases, states of keys, types and ranges, what must fit together, the notes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trimtab.config import dialect
from trimtab.config.dialect import Entry
from trimtab.config.keys import KEYS, REFUSED_VALUES, SETTERS, Key, nullable
from trimtab.config.stages import (
    MODELS,
    PAIR_LOSSES,
    STAGES,
    DpoConfig,
    GroupConfig,
    GrpoConfig,
    Integer,
    KtoConfig,
    OnlineConfig,
    OnlineDpoConfig,
    PreferenceConfig,
    Real,
    RmConfig,
    StageConfig,
    Text,
)
from trimtab.errors import ConfigError
from trimtab.registry import nearest

# Keys that settle the same thing: an override of one of them takes the file's others out of play.
_TOGETHER = (
    {"compute_dtype", "bf16", "fp16", "infer_dtype"},
    {"gradient_checkpointing", "disable_gradient_checkpointing"},
    {"warmup_steps", "warmup_ratio"},
)
# Keys of stage dpo that only some of its losses read.
_READ_BY = {
    "dpo_label_smoothing": ("sigmoid", "robust", "exo"),
    "pref_bco_weight": PAIR_LOSSES,
    "ld_alpha": PAIR_LOSSES,
    "pref_length_normalized": PAIR_LOSSES,
}
_KINDS: dict[str, TypeAdapter[Any]] = {
    "bool": TypeAdapter(bool | None),
    "int": TypeAdapter(Integer | None),
    "float": TypeAdapter(Real | None),
    "str": TypeAdapter(Text | None),
}


def load(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), *, stage: str | None = None
) -> StageConfig:
    """Read a config and check it: the door through which every run comes.

    Args:
        source: a YAML or JSON file, or a dict with the same keys.
        overrides: `key=value` (or `--key value`) words, which win over the file.
        stage: the stage to read it for, whatever the file says; "infer" to chat, predict or export with a training file.

    Returns:
        The frozen model of the stage; an `InferConfig` when the file does not train.

    Raises:
        ConfigError: all mistakes of the file in one error, each with its place.
    """
    if isinstance(source, Mapping):
        name, entries = "the given dict", dialect.from_mapping(source)
    else:
        name, entries = str(source), dialect.read(Path(source))
    words = dialect.overrides(overrides)
    problems: list[ConfigError] = []
    notes: list[str] = []
    given = _merge(entries, words, problems)
    if stage == "infer":
        given.pop("do_train", None)
    kind = _stage(given, stage, problems)
    model = MODELS[kind]
    values = _values(given, kind, problems, notes)
    origins = {key: given[key].where for key in values}
    _precision(given, kind, values, origins, problems, notes)
    config = _build(model, values, origins, problems)
    if config is None:
        raise _together(problems, name)
    at_default = model.model_fields.keys() - values.keys()  # written as null
    config._origins.update({key: entry.where for key, entry in given.items() if key not in at_default} | origins)
    config._given.update({key: entry.value for key, entry in given.items()})
    problems.extend(_misfits(config, name))
    if problems:
        raise _together(problems, name)
    config._notes = (*notes, *_differences(config))
    return config


def _together(problems: list[ConfigError], name: str) -> ConfigError:
    """One error of them all, those with a line number first, in the order of the file."""
    if len(problems) == 1:
        return problems[0]

    def line(problem: ConfigError) -> float:
        found = re.search(r":(\d+): ", problem.where)
        return int(found.group(1)) if found else math.inf

    problems = sorted(problems, key=line)
    return ConfigError(f"{len(problems)} mistakes in {name}\n" + "\n".join(map(str, problems)))


def _merge(entries: list[Entry], words: list[Entry], problems: list[ConfigError]) -> dict[str, Entry]:
    """File and command line as one, under canonical names where a name is only a spelling."""
    overridden = {_canonical(word.key) for word in words}
    for group in _TOGETHER:
        if overridden & group:
            overridden |= group
    given: dict[str, Entry] = {}
    for entry in [*(e for e in entries if _canonical(e.key) not in overridden), *words]:
        key = _canonical(entry.key)
        if key in given and given[key].value != entry.value:
            problems.append(
                ConfigError(
                    f"{entry.key} and {given[key].key} are two names of one key, with different values",
                    where=entry.where,
                    remedy="delete one of them",
                )
            )
        given[key] = entry
    return given


def _canonical(name: str) -> str:
    row = KEYS.get(name)
    renamed = row is not None and row.state == "alias" and name not in SETTERS
    return row.instead if row is not None and renamed else name


def _stage(given: dict[str, Entry], asked: str | None, problems: list[ConfigError]) -> str:
    """The name of the model to build. A stage that does not exist is reported, and the rest read as sft's."""
    written = given.get("stage")
    name = str(written.value).lower() if written and written.value is not None else "sft"
    if name not in STAGES:
        guess = nearest(name, STAGES)
        why, instead = REFUSED_VALUES.get(("stage", name), ("", ""))
        problems.append(
            ConfigError(
                f"there is no stage {name!r}" + (f"; did you mean {guess!r}?" if guess and not why else ""),
                where=written.where if written else "",
                why=why or f"the stages are {', '.join(STAGES[:-1])} and {STAGES[-1]}",
                remedy=instead or "set stage to one of them",
            )
        )
        name = "sft"
    if written is not None:
        given["stage"] = replace(written, value=name, text=name)
    if asked is not None:
        if asked not in MODELS:
            raise ConfigError(f"there is no stage {asked!r}", remedy=f"choose one of: {', '.join(MODELS)}")
        if asked != "infer" and written is not None and name != asked:
            given["stage"] = Entry(key="stage", value=asked, where=f"argument: {asked}")
        return asked
    return name if "do_train" in given and _switch(given["do_train"].value) else "infer"


def _switch(value: Any) -> bool:
    try:
        return bool(_KINDS["bool"].validate_python(value))
    except ValidationError:
        return False  # reported with the other types


def _values(given: dict[str, Entry], kind: str, problems: list[ConfigError], notes: list[str]) -> dict[str, Any]:
    """The values for the model's fields; every other key is explained in `notes` or `problems`."""
    fields = MODELS[kind].model_fields
    values: dict[str, Any] = {}
    unread: list[str] = []
    for name, entry in given.items():
        row = KEYS.get(name)
        if row is None:
            problems.append(_unknown(entry))
        elif row.state == "removed":
            notes.append(f"{entry.where}: no longer a key, not read: {row.help}")
        elif row.state in ("ignored", "refused"):
            _state(row, entry, problems, notes)
        elif row.state == "acted on":
            if kind not in row.stages and entry.value not in (None, row.default):
                unread.append(entry.key)
            if name in fields:
                value = _as_written(entry, fields[name].annotation)
                if value is not None or nullable(fields[name].annotation):
                    values[name] = value
            else:
                _check_elsewhere(name, entry, problems)
    if unread and kind != "infer":
        notes.append(f"not read by stage {kind}: {', '.join(unread)}")
    return values


def _as_written(entry: Entry, annotation: Any) -> Any:
    """Where a name is wanted, the text as written: `no` is false and `1.10` is 1.1 to YAML."""
    value = entry.value
    if isinstance(value, str) and value.strip().lower() in ("none", "null") and nullable(annotation):
        return None
    if entry.text is None or value is None or isinstance(value, (str, list, dict)):
        return value
    wants = KEYS[_canonical(entry.key)].kind
    scalar = {"int", "float", "bool"} & set(wants.split(" | "))
    return value if scalar or wants.startswith("list of float") else entry.text


def _check_elsewhere(name: str, entry: Entry, problems: list[ConfigError]) -> None:
    """A key of another stage is not read here, but a wrong value of it is still a mistake."""
    owner = next(model for model in MODELS.values() if name in model.model_fields)
    value = _as_written(entry, owner.model_fields[name].annotation)
    if value is not None:
        _build(owner, {name: value}, {name: entry.where}, problems)


def _unknown(entry: Entry) -> ConfigError:
    guess = nearest(entry.key, KEYS)
    return ConfigError(
        f"unknown key {entry.key!r}" + (f"; did you mean {guess!r}?" if guess else ""),
        where=entry.where,
        why="a key that nobody reads would be a setting silently lost",
        remedy="correct or delete it; docs/configuration.md lists every key",
    )


def _state(row: Key, entry: Entry, problems: list[ConfigError], notes: list[str]) -> None:
    """An ignored or refused key: its type is checked, its off value is passed, the rest is said."""
    value = entry.value
    if isinstance(value, str) and value.strip().lower() in ("none", "null", ""):
        value = None
    if row.kind in _KINDS:
        if row.kind == "str" and isinstance(value, bool) and entry.text is not None:
            value = entry.text
        try:
            value = _KINDS[row.kind].validate_python(value)
        except ValidationError:
            problems.append(_wrong(row.name, entry.where, value, f"it must be {_article(row.kind)}", row.help))
            return
    if value is None or value == [] or value == row.default or value in row.off:
        return
    if row.state == "ignored":
        if not (row.default is None and value is False) and value != ["none"]:
            notes.append(f"{entry.where}: ignored: {row.help}")
        return
    problems.append(
        ConfigError(
            f"{row.name}: {_shown(row, value)} is not supported",
            where=entry.where,
            why=row.help,
            remedy=("" if row.instead.startswith("leave") else "use ") + row.instead,
        )
    )


def _article(kind: str) -> str:
    return {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}[kind]


def _shown(row: Key | None, value: Any) -> str:
    text = "***" if row is not None and row.secret else repr(value)
    return {"True": "true", "False": "false", "None": "null"}.get(text, text)


def _wrong(name: str, where: str, value: Any, why: str, help: str) -> ConfigError:
    return ConfigError(
        f"{name}: {_shown(KEYS.get(name), value)} cannot be used",
        where=where,
        why=why,
        remedy=f"correct it; {name} is: {help}",
    )


def _precision(
    given: dict[str, Entry],
    kind: str,
    values: dict[str, Any],
    origins: dict[str, str],
    problems: list[ConfigError],
    notes: list[str],
) -> None:
    """bf16, fp16, infer_dtype and disable_gradient_checkpointing, each a value of another key."""
    switches: dict[str, bool] = {}
    for name in ("bf16", "fp16", "disable_gradient_checkpointing"):
        if name in given:
            entry = given[name]
            try:
                switches[name] = bool(_KINDS["bool"].validate_python(entry.value))
            except ValidationError:
                problems.append(_wrong(name, entry.where, entry.value, "it must be true or false", KEYS[name].help))
    asked = {"bf16": "bfloat16", "fp16": "float16"}
    wanted = [(name, dtype) for name, dtype in asked.items() if switches.get(name)]
    if "infer_dtype" in given:
        entry = given["infer_dtype"]
        dtype = str(entry.value).lower()
        if dtype not in ("auto", "none", "float32", "float16", "bfloat16"):
            problems.append(
                _wrong(
                    "infer_dtype",
                    entry.where,
                    entry.value,
                    "it must be auto, float32, bfloat16 or float16",
                    KEYS["infer_dtype"].help,
                )
            )
        elif dtype not in ("auto", "none") and kind == "infer" and values.get("compute_dtype") in (None, "auto"):
            wanted = [("infer_dtype", dtype)]
        elif dtype not in ("auto", "none"):
            notes.append(f"{entry.where}: not read: {KEYS['infer_dtype'].help}")
    if len(wanted) == 2:
        problems.append(
            ConfigError("bf16 and fp16 are both true", where=given["fp16"].where, remedy="keep one of them, or neither")
        )
    for name, dtype in wanted[:1]:
        if values.get("compute_dtype") not in (None, "auto", dtype):
            problems.append(
                ConfigError(
                    f"{name} asks for {dtype} and compute_dtype for {values['compute_dtype']}",
                    where=given[name].where,
                    remedy="keep one of them",
                )
            )
        values["compute_dtype"] = dtype
        origins["compute_dtype"] = given[name].where
    if switches.get("disable_gradient_checkpointing"):
        where = given["disable_gradient_checkpointing"].where
        if values.get("gradient_checkpointing") is True:
            problems.append(
                ConfigError(
                    "gradient checkpointing is switched on and off", where=where, remedy="keep one of the two keys"
                )
            )
        values["gradient_checkpointing"] = False
        origins["gradient_checkpointing"] = where


def _build(
    model: type[StageConfig], values: dict[str, Any], origins: dict[str, str], problems: list[ConfigError]
) -> StageConfig | None:
    """The model of these values, or None with every wrong value reported."""
    good = {name: value for name, value in values.items() if (name, str(value)) not in REFUSED_VALUES}
    for name in (name for name in values if name not in good):
        why, instead = REFUSED_VALUES[name, str(values[name])]
        problems.append(
            ConfigError(
                f"{name}: {values[name]} is not supported", where=origins[name], why=why, remedy=f"use {instead}"
            )
        )
    try:
        return model.model_validate(good)
    except ValidationError as error:
        seen: set[str] = set()
        for item in error.errors(include_url=False):
            name = str(item["loc"][0])
            if item["type"] == "default_factory_not_called" or name in seen:
                continue
            seen.add(name)
            row = KEYS[name]
            problems.append(_wrong(name, origins[name], values[name], _reason(row, item), row.help))
        return None


def _reason(row: Key, item: Any) -> str:
    """pydantic's message in a config reader's words."""
    if " | " in row.kind and item["type"] == "literal_error":
        choices = row.kind.split(" | ")
        guess = nearest(str(item["input"]), choices)
        return f"it must be one of {', '.join(choices)}" + (f"; did you mean {guess!r}?" if guess else "")
    if item["type"] == "value_error":
        reason = str(item["ctx"]["error"])
        return f"it must be a number (written as {row.kind})" if "could not convert" in reason else reason
    message: str = item["msg"]
    for theirs, ours in (
        ("Input should be a valid boolean, unable to interpret input", "it must be true or false"),
        ("Input should be a valid boolean", "it must be true or false"),
        ("Input should be a valid integer, got a number with a fractional part", "it must be a whole number"),
        ("Input should be a valid integer", "it must be a whole number"),
        ("Input should be a valid number", "it must be a number"),
        ("Input should be a valid string", "it must be text"),
        ("Input should be a valid tuple", "it must be a list, or text with commas"),
        ("Input should be", "it must be"),
    ):
        if message.startswith(theirs):
            return ours + message.removeprefix(theirs)
    return message


def _misfits(config: StageConfig, name: str) -> list[ConfigError]:
    """Values that are right one by one and wrong together, and what is missing."""
    problems: list[ConfigError] = []

    def missing(key: str, example: str, needs: str) -> None:
        problems.append(
            ConfigError(
                f"{key} is missing", where=name, why=f"{needs} needs {KEYS[key].help}", remedy=f"add {key}: {example}"
            )
        )

    def wrong(key: str, what: str, why: str, remedy: str) -> None:
        problems.append(ConfigError(f"{key}: {what}", where=config._origins.get(key, name), why=why, remedy=remedy))

    if config.streaming and config.do_train and config.stage in ("pt", "sft"):
        if config.max_steps <= 0:
            missing("max_steps", "1000", "a stream has no end of its own: streaming")
        if 0 < config.val_size < 1:
            wrong(
                "val_size",
                f"{config.val_size:g} of a stream",
                "its rows are not counted",
                "a number of rows, or eval_dataset",
            )
        if config.mix_strategy != "concat":
            wrong(
                "mix_strategy", f"{config.mix_strategy} of a stream", "its sets are read one after the other", "concat"
            )
        for key in ("packing", "neat_packing", "tokenized_path"):
            if getattr(config, key):
                wrong(key, "with streaming", "it needs all rows at once", "delete one of the two")
    held_out = config.val_size > 0 or bool(config.eval_dataset)
    if config.model_name_or_path is None:
        missing("model_name_or_path", "smollm2-135m-instruct", "every run")
    if config.do_train and not config.dataset:
        missing("dataset", "NAME (as in dataset_info.json)", f"stage {config.stage}")
    if config.do_train and config.output_dir is None:
        missing("output_dir", "FOLDER", f"stage {config.stage}")
    if (config.do_predict or config.do_eval) and config.do_infer:
        if not (config.dataset or config.eval_dataset):
            missing("eval_dataset", "NAME (as in dataset_info.json)", "do_predict" if config.do_predict else "do_eval")
        if config.output_dir is None:
            missing("output_dir", "FOLDER", "do_predict" if config.do_predict else "do_eval")
    if config.val_size > 0 and config.eval_dataset:
        wrong(
            "val_size", f"{config.val_size:g} beside eval_dataset", "held-out rows come from one of them",
            "delete val_size (or set it to 0), or delete eval_dataset",
        )  # fmt: skip
    if config.val_size >= 1 and config.val_size != int(config.val_size):
        wrong(
            "val_size", f"{config.val_size} rows", "from 1 on it counts rows", "a whole number, or a fraction below 1"
        )
    if config.do_train and config.eval_strategy != "no" and not held_out:
        wrong(
            "eval_strategy", f"{config.eval_strategy} without held-out rows", "there is nothing to evaluate",
            "set val_size (0.1 holds out a tenth) or eval_dataset, or eval_strategy: 'no'",
        )  # fmt: skip
    for key in ("load_best_model_at_end", "early_stopping_steps"):
        if config.do_train and getattr(config, key) and config.eval_strategy == "no":
            wrong(key, "needs evaluations", "checkpoints are ranked by them", "set eval_strategy: steps and val_size")
    if config.do_train and not config.lora_target and config.finetuning_type == "lora":
        wrong("lora_target", "no layer is named", "nothing would be trained", "lora_target: all")
    if config.do_train and config.max_steps <= 0 and config.num_train_epochs > 1e6:
        wrong(
            "num_train_epochs", f"{config.num_train_epochs:g}", "that many passes over the data would not end",
            "write how many passes you want, for example 3, or max_steps",
        )  # fmt: skip
    if config.load_best_model_at_end and config.save_only_model:
        wrong(
            "load_best_model_at_end", "needs whole checkpoints", "save_only_model leaves out the weights in full precision",
            "delete one of the two",
        )  # fmt: skip
    if config.load_best_model_at_end and config.save_strategy == "no":
        wrong("load_best_model_at_end", "needs checkpoints", "save_strategy is no", "set save_strategy: steps")
    if config.interleave_probs and config.mix_strategy == "concat":
        wrong("interleave_probs", "needs mixing", "mix_strategy is concat", "set mix_strategy: interleave_under")
    if config.interleave_probs and len(config.interleave_probs) != len(config.dataset):
        wrong(
            "interleave_probs", f"{len(config.interleave_probs)} shares for {len(config.dataset)} data sets",
            "each data set of `dataset` has a share", "write one number per data set",
        )  # fmt: skip
    if config.quantization_bit is not None and config.do_train:
        for key, on in (("finetuning_type", config.finetuning_type != "lora"), ("use_dora", config.use_dora)):
            if on:
                wrong(
                    "quantization_bit", f"with {key}: {str(getattr(config, key)).lower()}",
                    "packed weights cannot be trained, and their rows have no exact lengths", "plain LoRA on a packed base",
                )  # fmt: skip
    if problem := _course_problem(config.lr_scheduler_type, config.lr_scheduler_kwargs or {}):
        wrong("lr_scheduler_kwargs", *problem)
    if config.loraplus_lr_ratio is not None and config.do_train and config.finetuning_type != "lora":
        wrong(
            "loraplus_lr_ratio",
            f"with finetuning_type: {config.finetuning_type}",
            "it is for LoRA's B",
            "learning_rate",
        )
    if config.do_train and config.finetuning_type != "lora" and config.adapter_name_or_path:
        wrong(
            "adapter_name_or_path", f"an adapter with finetuning_type: {config.finetuning_type}",
            "the weights themselves are trained, and the adapter is not in them",
            "merge it first (trimtab export with an export_dir), and name that folder in model_name_or_path",
        )  # fmt: skip
    if (
        config.do_train
        and config.finetuning_type != "lora"
        and config.output_dir is not None
        and config.model_name_or_path is not None
        and Path(config.output_dir).absolute() == Path(config.model_name_or_path).absolute()
    ):
        wrong(
            "output_dir",
            "it is the folder of the model",
            "the trained model would be written over it",
            "another folder",
        )
    if isinstance(config, RmConfig):
        unread = {"listwise": ("rm_label_smoothing",), "pointwise": ("rm_label_smoothing", "center_rewards_coef")}
        for key in unread.get(config.rm_loss, ()):
            if getattr(config, key):
                wrong(
                    key, f"{getattr(config, key):g} with rm_loss {config.rm_loss}", "that loss does not read it, and it would be a "
                    "setting silently lost", "delete it, or set rm_loss: pairwise",
                )  # fmt: skip
    if isinstance(config, DpoConfig):
        for key, losses in _READ_BY.items():
            if config.pref_loss not in losses and getattr(config, key) not in (None, False, 0, 0.0):
                wrong(
                    key, f"{getattr(config, key)} with pref_loss {config.pref_loss}", "that loss does not read it, and it "
                    "would be a setting silently lost", f"delete it, or set pref_loss to one of: {', '.join(losses)}",
                )  # fmt: skip
        if config.ld_alpha is not None and (config.pref_length_normalized or config.pref_loss == "ipo_avg"):
            wrong(
                "ld_alpha", "beside log-ratios per token", "each is a way to take the length out", "keep one of the two"
            )
    if isinstance(config, PreferenceConfig) and config.stage in ("orpo", "simpo"):
        asked = config.given.get("pref_loss")
        if asked not in (None, config.stage):
            wrong(
                "pref_loss", f"{asked} with stage {config.stage}", f"stage {config.stage} is that loss",
                f"stage: dpo with pref_loss: {asked}, or delete pref_loss",
            )  # fmt: skip
    if isinstance(config, KtoConfig) and config.do_train and config.kto_chosen_weight + config.kto_rejected_weight == 0:
        wrong("kto_chosen_weight", "0, and kto_rejected_weight too", "nothing would be learnt", "set one of them to 1")
    if isinstance(config, GroupConfig) and config.do_train:
        if config.group_size < 2 and (config.baseline != "none" or config.advantage_norm == "group"):
            wrong(
                "group_size", f"{config.group_size} with baseline: {config.baseline}, advantage_norm: {config.advantage_norm}",
                "an answer alone is its own mean: every advantage would be 0", "4 or more; or baseline: none and "
                "advantage_norm: batch",
            )  # fmt: skip
        plain = type(config).model_fields["loss_reduction"].default
        if config.ratio_level != "token" and config.loss_reduction != plain:
            wrong(
                "loss_reduction", f"{config.loss_reduction} with ratio_level: {config.ratio_level}", "there is one loss per answer: "
                "its mean is over answers", "delete it, or ratio_level: token",
            )  # fmt: skip
        if isinstance(config, GrpoConfig) and config.policy_objective == "cispo" and config.ratio_level != "token":
            wrong(
                "ratio_level", f"{config.ratio_level} with policy_objective: cispo", "its weights are those of tokens",
                "ratio_level: token",
            )  # fmt: skip
    if isinstance(config, OnlineDpoConfig):
        for key in ("kl_coef", "kl_target", "kl_placement", "kl_estimator", "kl_horizon", "entropy_coef"):
            if getattr(config, key) != type(config).model_fields[key].default:
                wrong(
                    key, f"{getattr(config, key)} with stage online_dpo", "pref_beta alone holds the policy to the reference",
                    "delete it, and set pref_beta",
                )  # fmt: skip
        if config.group_size < 2:
            wrong("group_size", f"{config.group_size}", "an answer alone has none to be compared with", "4 or more")
    if isinstance(config, OnlineConfig):
        if config.ref_update_every and config.do_train:
            if config.finetuning_type != "lora":
                wrong(
                    "ref_update_every", f"{config.ref_update_every} with finetuning_type: {config.finetuning_type}",
                    "the frozen copy that is the reference also carries the reward's and the critic's adapters, which were trained "
                    "on it as it is", "finetuning_type: lora, or delete it",
                )  # fmt: skip
            if config.ref_model or config.ref_model_adapters:
                wrong(
                    "ref_update_every", "beside a reference that the file names", "that one is a model of its own and is never changed",
                    "delete one of the two",
                )  # fmt: skip
            if config.use_dora or config.additional_target:
                wrong(
                    "ref_update_every", "with use_dora or additional_target", "the reference is refreshed by copying low-rank factors",
                    "delete one of the two",
                )  # fmt: skip
        if config.overlong_buffer and config.do_train and config.overlong_buffer >= config.answer_limit:
            wrong(
                "overlong_buffer", f"{config.overlong_buffer}, with answers of at most {config.answer_limit} tokens",
                "every answer would be penalised", "a fifth of max_new_tokens",
            )  # fmt: skip
        sources = config.reward_sources
        if not sources:
            missing(
                "reward_model", "FOLDER (output_dir of a run with stage rm), or reward_funcs: FILE.py:NAME, or reward_model_type: sql",
                f"stage {config.stage}",
            )  # fmt: skip
        if config.reward_weights and len(config.reward_weights) != len(sources):
            wrong(
                "reward_weights", f"{len(config.reward_weights)} weights for {len(sources)} sources of reward",
                f"the sources are {', '.join(sources)}", "one weight for each, in this order, or none",
            )  # fmt: skip
        worth = ("sql_reward_equal", "sql_reward_executes", "sql_reward_else")
        others = [key for key in worth if getattr(config, key) != KEYS[key].default]
        if config.reward_model_type == "sql":
            if config.reward_model:
                wrong(
                    "reward_model", f"{', '.join(config.reward_model)} with reward_model_type: sql", "queries are run in its place",
                    "delete it; or, for both, reward_model_type: lora and reward_funcs: sql_execution, with reward_weights",
                )  # fmt: skip
            if config.sql_partial_credit and others:
                wrong(
                    others[0], f"{getattr(config, others[0]):g} with sql_partial_credit", "its grades stand in their place",
                    "delete one of the two",
                )  # fmt: skip
            elif config.sql_reward_equal <= max(config.sql_reward_executes, config.sql_reward_else):
                wrong(
                    "sql_reward_equal", f"{config.sql_reward_equal:g}, and a wrong answer has "
                    f"{max(config.sql_reward_executes, config.sql_reward_else):g}", "nothing would be gained by being right",
                    "more than sql_reward_executes and sql_reward_else",
                )  # fmt: skip
        elif others or config.sql_partial_credit:
            key = others[0] if others else "sql_partial_credit"
            wrong(
                key, f"with reward_model_type: {config.reward_model_type}", "only reward_model_type: sql reads it",
                "reward_model_type: sql, without a reward_model",
            )  # fmt: skip
        if config.reward_length_free and not config.reward_length_penalty:
            wrong(
                "reward_length_free", f"{config.reward_length_free} without reward_length_penalty", "no token costs anything",
                "reward_length_penalty: 0.01, or delete reward_length_free",
            )  # fmt: skip
        models = ", ".join(config.reward_model)
        served = any(name.startswith(("http://", "https://")) for name in config.reward_model)
        if config.reward_model and config.reward_model_type != "sql" and served != (config.reward_model_type == "api"):
            wrong(
                "reward_model_type", f"{config.reward_model_type} with reward_model: {models}",
                "a reward server has a URL, a reward model a folder",
                "reward_model_type: api" if served else "give the server's URL in reward_model (http://HOST:PORT/PATH)",
            )  # fmt: skip
        if len(config.reward_model) > 1 and config.reward_model_type not in ("lora", "sql"):
            wrong(
                "reward_model", f"{len(config.reward_model)} of them with reward_model_type: {config.reward_model_type}",
                "an ensemble is made of adapters on one base", "reward_model_type: lora, or name one of them",
            )  # fmt: skip
        if len(set(config.reward_model)) < len(config.reward_model):
            wrong("reward_model", f"{models}: one of them twice", "it would count twice", "name each once")
        if config.reward_ensemble != "mean" and len(config.reward_model) < 2:
            wrong(
                "reward_ensemble", f"{config.reward_ensemble} of {len(config.reward_model)} reward models",
                "there is nothing to combine", "name several adapters in reward_model, or delete it",
            )  # fmt: skip
        if config.reward_ensemble_coef != 1 and config.reward_ensemble != "mean_minus_std":
            wrong(
                "reward_ensemble_coef", f"{config.reward_ensemble_coef:g} with reward_ensemble: {config.reward_ensemble}",
                "only mean_minus_std reads it", "reward_ensemble: mean_minus_std, or delete it",
            )  # fmt: skip
        if config.reward_model_adapters and config.reward_model_type != "full":
            wrong(
                "reward_model_adapters", f"with reward_model_type: {config.reward_model_type}",
                "they stand on a reward model of its own", "reward_model_type: full, or name the adapter in reward_model",
            )  # fmt: skip
        if config.temperature == 0:
            wrong("temperature", "0 in rollouts", "the likeliest answer is always the same: nothing to compare", "1.0")
    return problems


# The settings of each course of the learning rate, and of which one is needed.
_COURSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cosine": (("num_cycles",), ()),
    "cosine_with_restarts": (("num_cycles",), ()),
    "cosine_with_min_lr": (("num_cycles", "min_lr", "min_lr_rate"), ("min_lr", "min_lr_rate")),
    "polynomial": (("lr_end", "power"), ()),
    "inverse_sqrt": (("timescale",), ()),
    "warmup_stable_decay": (
        ("num_decay_steps", "num_stable_steps", "decay_type", "min_lr_ratio"),
        ("num_decay_steps",),
    ),
}


def _course_problem(kind: str, given: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What is wrong with `lr_scheduler_kwargs`, why, and what to do; None if nothing is."""
    known, needed = _COURSES.get(kind, ((), ()))
    for name, value in given.items():
        if name not in known:
            return (
                f"{kind} has no {name!r}",
                "nobody would read it",
                f"choose from: {', '.join(known)}" if known else "{}",
            )
        if name == "decay_type":
            if value not in ("linear", "cosine", "1-sqrt"):
                return f"decay_type: {value!r}", "there is no such curve", "linear, cosine or 1-sqrt"
            continue
        try:
            float(value)
        except (TypeError, ValueError):
            return f"{name}: {value!r}", "it must be a number", f"{name}: 1"
    if needed and sum(name in given for name in needed) != 1:
        what = " or ".join(needed)
        return (
            f"{kind} needs {what}",
            f"given: {', '.join(given) or 'nothing'}",
            "lr_scheduler_kwargs: {" + needed[0] + ": ...}",
        )
    return None


LORA_KEYS = ("lora_rank", "lora_alpha", "lora_target", "use_rslora", "use_dora")
FREEZE_KEYS = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")


def _unread_lora(config: StageConfig) -> str:
    """Keys of a new adapter that are written where none is made; empty if there are none."""
    if config.finetuning_type != "lora":
        written = [key for key in (*LORA_KEYS, "lora_dropout", "additional_target") if config.written(key)]
        return f"{', '.join(written)}: not read with finetuning_type: {config.finetuning_type}" if written else ""
    if not config.adapter_name_or_path or config.create_new_adapter:
        return ""
    written = [key for key in LORA_KEYS if config.written(key)]
    if not written:
        return ""
    return (
        f"{', '.join(written)}: not read, since the adapter of adapter_name_or_path goes on as it was made; "
        "create_new_adapter: true makes a new one with them"
    )


def _differences(config: StageConfig) -> list[str]:
    """Lines about keys that act otherwise here than where the file may come from, given what is written."""
    lines: list[str] = []
    if config.warmup_steps > 0 and config.warmup_ratio > 0:
        lines.append("warmup_steps acts, warmup_ratio does not: both are written")
    if config.do_train and (unread := _unread_lora(config)):
        lines.append(unread)
    if config.do_train and config.finetuning_type != "freeze":
        frozen = [key for key in FREEZE_KEYS if config.written(key)]
        if frozen:
            lines.append(f"{', '.join(frozen)}: not read with finetuning_type: {config.finetuning_type}")
    if config.do_train and config.create_new_adapter and not config.adapter_name_or_path:
        lines.append("create_new_adapter: there is none to go on with, so the adapter is new in any case")
    if config.lora_dropout > 0 and config.stage not in ("pt", "sft") and config.do_train:
        lines.append(
            f"lora_dropout: not applied in stage {config.stage}: rewards and probabilities are scored without it"
        )
    if config.pure_bf16 and config.finetuning_type == "lora" and config.do_train:
        lines.append("pure_bf16: products in bfloat16; adapters keep their float32 masters, which are small")
    if config.stage == "pt" and config.do_train and not config.packing:
        lines.append("pt: each text is a row of its own, in pieces of cutoff_len tokens; packing: true joins them")
    if isinstance(config, DpoConfig):
        if config.pref_loss == "ipo":
            lines.append("pref_loss: ipo sums log-ratios over tokens, as its paper does; ipo_avg is the form per token")
        if config.pref_loss != "simpo" and config.written("simpo_gamma"):
            lines.append(f"simpo_gamma: not read by pref_loss {config.pref_loss}")
        if config.pref_loss == "exo" and config.dpo_label_smoothing == 0:
            lines.append("dpo_label_smoothing: 0.001 in pref_loss exo, where 0 would make the loss infinite")
    if isinstance(config, OnlineConfig):
        graded = "sql_partial_credit" if config.sql_partial_credit else "sql_graded"
        if graded == "sql_partial_credit" or graded in config.reward_funcs:
            lines.append(
                f"warning: {graded}: part of the reward for wrong answers, which policies have learnt to collect (queries that overlap "
                "with the right one, or run and say little): watch the share of right answers, not the reward"
            )
        filters = [
            k for k in ("do_sample", "top_k", "top_p", "min_p", "repetition_penalty") if getattr(config, k) is not None
        ]
        if filters:
            lines.append(
                f"{', '.join(filters)}: applied in chat, predict and sampled evaluation; rollouts use the temperature "
                f"alone ({config.rollout_temperature:g}), so that the KL to the reference is that of the policy itself"
            )
    refers = isinstance(config, OnlineConfig | KtoConfig) or (
        isinstance(config, DpoConfig) and config.pref_loss in PAIR_LOSSES
    )
    if refers and config.do_train:
        named = (getattr(config, "ref_model", None), *getattr(config, "ref_model_adapters", ()))
        lines.append(
            f"reference: {', '.join(filter(None, named)) or 'the policy at the start of this stage, adapters included'}"
        )
    return lines
