"""The key table: every key has a state, a type and a help; every one behaves as its state says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.config import dump_resolved, explain, load
from trimtab.config.document import PAGE, page
from trimtab.config.keys import ALIASES, IGNORED, KEYS, OFF, REFUSED, REFUSED_VALUES, REMOVED, SETTERS, Key
from trimtab.config.stages import EVERYWHERE, MODELS, ONLINE
from trimtab.config.training_arguments import TRAINING_ARGUMENTS, TRANSFORMERS_VERSION
from trimtab.errors import ConfigError

pytestmark = pytest.mark.contract

_MUST: dict[str, dict[str, Any]] = {
    "pt": {"dataset": "d", "output_dir": "o", "do_train": True},
    "sft": {"dataset": "d", "output_dir": "o", "do_train": True},
    "rm": {"dataset": "d", "output_dir": "o", "do_train": True},
    "dpo": {"dataset": "d", "output_dir": "o", "do_train": True},
    "kto": {"dataset": "d", "output_dir": "o", "do_train": True},
    "orpo": {"dataset": "d", "output_dir": "o", "do_train": True},
    "simpo": {"dataset": "d", "output_dir": "o", "do_train": True},
    **{stage: {"dataset": "d", "output_dir": "o", "do_train": True, "reward_model": "r"} for stage in ONLINE},
    "infer": {"dataset": "d", "output_dir": "o"},
}


# Keys whose default differs between online stages; the table shows ppo's, and tests/config/test_online.py names the others'.
_OWN_DEFAULTS = (
    *("ppo_epochs", "group_size", "kl_coef", "kl_placement", "kl_estimator", "baseline", "advantage_norm"),
    *("ratio_level", "loss_reduction"),
)


_SQL = {"reward_model_type": "sql", "reward_model": []}


def _minimal(kind: str) -> dict[str, Any]:
    return {"model_name_or_path": "m", **_MUST[kind], **({} if kind == "infer" else {"stage": kind})}


def _sample(key: Key) -> Any:
    """A value other than the default, of the key's type."""
    chosen = {
        "temperature": 0.5,
        "interleave_probs": [0.25],
        "eval_strategy": "no",
        "early_stopping_steps": None,
        "load_best_model_at_end": False,
        "val_size": 0.25,
        "eval_dataset": [],
        "warmup_ratio": 0.25,
        "reward_model_type": "full",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "lr_scheduler_type": "constant",
        "quantization_bit": 8,
        "reward_weights": [0.25, -1.0, 2.0],
        "dual_clip": 3.0,
    }
    if key.name in chosen:
        return chosen[key.name]
    if key.name == "dataset_dir":
        return {"d": {"file_name": "d.json"}}
    kinds = key.kind.split(" | ")
    if kinds == ["bool"]:
        return not key.default
    if kinds == ["int"]:
        return 7
    if kinds == ["float"]:
        return 0.25
    if kinds == ["str"]:
        return "some/where"
    if key.kind.startswith("list of str"):
        return ["a", "b"]
    return kinds[-1]


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_every_key_has_a_state_a_type_and_a_help() -> None:
    for name, key in KEYS.items():
        assert key.name == name
        assert key.state in ("acted on", "alias", "ignored", "refused", "removed")
        assert key.kind, name
        assert len(key.help) > 5, name
        assert bool(key.stages) == (key.state in ("acted on", "alias")), name
        assert set(key.stages) <= set(EVERYWHERE), name
        assert bool(key.instead) == (key.state in ("refused", "alias")), name


def test_no_key_stands_twice() -> None:
    acted_on = [name for name, key in KEYS.items() if key.state == "acted on"]
    names = [*acted_on, *ALIASES, *(row[0] for row in IGNORED), *(row[0] for row in REFUSED), *REMOVED]
    assert [name for name in names if names.count(name) > 1] == []
    assert len(names) == len(KEYS)
    assert set(OFF) <= {row[0] for row in REFUSED}
    assert set(SETTERS) <= set(ALIASES)
    assert {key for key, _ in REFUSED_VALUES} <= set(acted_on)


def test_every_field_of_the_training_arguments_is_in_the_table() -> None:
    assert set(TRAINING_ARGUMENTS) <= set(KEYS)
    assert len(TRAINING_ARGUMENTS) == 119
    for name, default in TRAINING_ARGUMENTS.items():
        key = KEYS[name]
        if key.state == "acted on" and name not in ("optim", "greater_is_better"):
            assert (key.default or None) == (default or None), name


def test_the_committed_training_arguments_are_those_of_the_installed_version() -> None:
    import transformers

    if not transformers.__version__.startswith(TRANSFORMERS_VERSION + "."):
        pytest.skip(f"written for transformers {TRANSFORMERS_VERSION}")
    installed = {}
    for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        installed[field.name] = getattr(default, "value", default)
    assert installed == TRAINING_ARGUMENTS


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_minimal_file_has_the_defaults_of_the_table(kind: str) -> None:
    config = load(_minimal(kind))
    assert type(config) is MODELS[kind]
    assert [note.split(":")[0] for note in config.notes] == {
        "pt": ["pt"],
        **{stage: ["reference"] for stage in ("dpo", "kto", *ONLINE)},
    }.get(kind, [])
    for name in type(config).model_fields:
        if name not in _minimal(kind) and name not in ("lora_alpha", "kl_coef", "stage"):
            if kind not in ONLINE or kind == "ppo" or name not in _OWN_DEFAULTS:
                assert getattr(config, name) == KEYS[name].default, name
            assert config.origin(name) == "default"


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_key_that_is_acted_on_round_trips(kind: str) -> None:
    for name in MODELS[kind].model_fields:
        if name in ("stage", "do_train"):
            continue
        if kind == "online_dpo" and (name.startswith("kl_") or name == "entropy_coef"):
            continue  # refused there: tests/algos/test_online_dpo.py
        key = KEYS[name]
        beside: dict[str, Any] = {
            "interleave_probs": {"dataset": "d", "mix_strategy": "interleave_over"},
            "reward_model_adapters": {"reward_model_type": "full"},
            "reward_ensemble": {"reward_model": ["a", "b"]},
            "reward_ensemble_coef": {"reward_model": ["a", "b"], "reward_ensemble": "mean_minus_std"},
            "reward_weights": {"reward_funcs": ["a", "b"]},
            "reward_length_free": {"reward_length_penalty": 0.25},
            **dict.fromkeys(("sql_reward_equal", "sql_reward_executes", "sql_reward_else", "sql_partial_credit"), _SQL),
            "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
            "streaming": {"max_steps": 5},
            "loss_reduction": {"ratio_level": "token"},
            "overlong_buffer": {"max_new_tokens": 1000},
            "policy_objective": {"ratio_level": "token"},
        }.get(name, {})
        given = {**_minimal(kind), name: _sample(key), **beside}
        config = load(given)
        assert _as_json(getattr(config, name)) == given[name], name
        assert config.origin(name) == f"argument: {name}"
        dumped = dump_resolved(config)
        again = load(dumped)
        assert dump_resolved(again) == dumped, name
        assert type(again) is type(config)
        if key.secret:
            assert dumped[name] is None
        # the same from the command line, as text
        text = given[name]
        if text is not None and not isinstance(text, (dict, list)):
            word = f"{name}={str(text).lower() if isinstance(text, bool) else text}"
            assert getattr(load({**_minimal(kind), **beside}, [word]), name) == text, name


@pytest.mark.parametrize("key", [k for k in KEYS.values() if k.state == "ignored"], ids=lambda k: k.name)
def test_ignored_keys_are_silent_at_their_default_and_told_elsewhere(key: Key) -> None:
    quiet = load({**_minimal("sft"), key.name: key.default})
    assert quiet.notes == ()
    value = {"bool": not key.default, "int": 77, "float": 7.5, "str": "x", "any": {"a": 1}}[key.kind]
    (note,) = load({**_minimal("sft"), key.name: value}).notes
    assert note == f"argument: {key.name}: ignored: {key.help}"


@pytest.mark.parametrize("key", [k for k in KEYS.values() if k.state == "refused"], ids=lambda k: k.name)
@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "ppo"])  # the table does not ask for the stage
def test_refused_keys_pass_at_their_off_values_and_are_refused_elsewhere(key: Key, stage: str) -> None:
    for off in (None, key.default, *key.off):
        config = load({**_minimal(stage), key.name: off})
        assert dump_resolved(config) == dump_resolved(load(_minimal(stage)))
    value = {"bool": not key.default, "int": 4, "float": 7.5, "str": "x", "any": {"a": 1}}[key.kind]
    with pytest.raises(ConfigError) as caught:
        load({**_minimal(stage), key.name: value})
    assert caught.value.exit_code == 2
    assert caught.value.where == f"argument: {key.name}"
    assert caught.value.why == key.help
    assert key.instead in caught.value.remedy


@pytest.mark.parametrize(("name", "value"), list(REFUSED_VALUES))
def test_refused_values_name_what_to_use(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({**_minimal("ppo"), name: value})
    assert caught.value.why == REFUSED_VALUES[name, value][0]
    assert REFUSED_VALUES[name, value][1] in caught.value.remedy


@pytest.mark.parametrize("name", list(REMOVED))
def test_removed_keys_are_accepted_with_a_line(name: str) -> None:
    (note,) = load({**_minimal("sft"), name: True}).notes
    assert name in note
    assert KEYS[name].help in note


def test_the_committed_page_is_current() -> None:
    committed = Path(__file__).parents[2] / PAGE
    assert committed.read_text(encoding="utf-8") == page(), "run: python -m trimtab.config.document"


def test_the_page_names_every_key() -> None:
    text = page()
    assert [name for name in KEYS if f"| `{name}` |" not in text] == []


def test_explain_says_the_state_of_every_key() -> None:
    odd = {"overwrite_cache": True, "fp16": True, "hf_hub_token": "abc", "mask_history": True, "shift_attn": False}
    config = load({**_minimal("rm"), **odd})
    rows = {row.key: row for row in explain(config)}
    assert set(type(config).model_fields) <= set(rows)
    assert rows["overwrite_cache"].state.startswith("ignored: ")
    assert rows["fp16"].state == "alias of compute_dtype"
    assert (rows["compute_dtype"].value, rows["compute_dtype"].origin) == ("float16", "argument: fp16")
    assert rows["hf_hub_token"].value == "***"
    assert rows["mask_history"].state == "not read by stage rm"
    assert rows["shift_attn"].state == "at its off value"
    assert rows["learning_rate"].origin == "default"
    assert dump_resolved(config)["hf_hub_token"] is None
    assert "abc" not in str(dump_resolved(config))


def test_every_refused_key_has_its_reason_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "differences.md").read_text(encoding="utf-8")
    table = page.partition("## Keys that are refused, and why")[2].splitlines()
    first = " ".join(line.split("|")[1] for line in table if line.startswith("| `"))
    values = {"optim", "greedy", "cosine_warmup_with_min_lr"}  # keys and values of keys that are acted on
    assert set(re.findall("`([a-z0-9_]+)`", first)) - values == {k.name for k in KEYS.values() if k.state == "refused"}
