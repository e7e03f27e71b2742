"""`load`: whole files as users have them, the errors of wrong ones, and what a resolved config answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.config import InferConfig, PpoConfig, PtConfig, RmConfig, SftConfig, dump_resolved, explain, load
from trimtab.config.stages import StageConfig
from trimtab.errors import ConfigError

pytestmark = pytest.mark.unit

ARTICLE = Path(__file__).parents[2] / "examples" / "article"
SFT: dict[str, Any] = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "dataset": "d", "output_dir": "o"}
PPO: dict[str, Any] = {**SFT, "stage": "ppo", "reward_model": "r"}


def _write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _error(source: Any, *words: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source, list(words))
    assert caught.value.exit_code == 2
    return caught.value


# --------------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    ("name", "model"), [("sft", SftConfig), ("rm", RmConfig), ("ppo", PpoConfig), ("predict", InferConfig)]
)
def test_the_articles_files_resolve_unchanged_but_for_paths(name: str, model: type[StageConfig]) -> None:
    path = ARTICLE / f"{name}.yaml"
    config = load(path)
    assert type(config) is model
    paths = ["model_name_or_path=smollm2-135m-instruct"]
    if name != "predict":
        paths += ["dataset_dir=examples/text2sql", "output_dir=out"]
    moved = load(path, paths)
    assert moved.origin("model_name_or_path") == "command line: model_name_or_path"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    changed = {word.split("=")[0] for word in paths}
    acted_on = [key for key in written if key in type(config).model_fields and key not in changed]
    for key in acted_on:
        value = getattr(moved, key)
        wanted: Any = written[key]
        if isinstance(value, tuple):
            wanted = (wanted,)
        assert value == (float(wanted) if isinstance(value, float) else wanted), key
        assert moved.origin(key).startswith(f"{path}:")


def test_the_articles_sft_file_in_numbers() -> None:
    config = load(ARTICLE / "sft.yaml")
    assert config.model_name_or_path == r"E:\PyCharm\PreTrainModel\qwen2_7b"
    assert config.eval_strategy == "steps"  # written as evaluation_strategy
    assert config.compute_dtype == "float16"  # written as fp16; what a CPU does about it is decided when training
    assert config.warmup(1000) == 100  # warmup_steps: 0.1
    assert (config.batch_size, config.lora_rank, config.lora_alpha) == (8, 8, 16)
    assert [config.interval(what, 900) for what in ("logging", "save", "eval")] == [10, 100, 100]  # type: ignore[arg-type]
    assert config.dataset == ("train_clean",)
    assert len(config.notes) == 1  # overwrite_cache


def test_the_articles_ppo_file_in_numbers() -> None:
    config = load(ARTICLE / "ppo.yaml")
    assert isinstance(config, PpoConfig)
    assert (config.batch_size, config.rollout_size, config.ppo_epochs) == (8, 8, 4)
    assert (config.kl_coef, config.kl_target, config.clip_range, config.gae_lambda) == (0.05, None, 0.2, 0.95)
    assert config.compute_dtype == "bfloat16"
    assert config.warmup(1005) == 101  # a share is rounded up
    assert config.rollout_sampling.temperature == 1.0
    assert (config.rollout_sampling.top_p, config.rollout_sampling.top_k) == (1.0, 0)
    assert (config.chat_sampling.temperature, config.chat_sampling.top_p, config.chat_sampling.top_k) == (0.95, 0.9, 0)
    assert config.rollout_sampling.max_new_tokens == config.answer_limit == 512
    assert any("top_k, top_p" in note and "KL" in note for note in config.notes)


FILES: dict[str, tuple[type[StageConfig], str]] = {
    "pt": (
        PtConfig,
        """
### model
model_name_or_path: org/model-1B
trust_remote_code: true
### method
stage: pt
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
### dataset
dataset: corpus
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/model-1b/lora/pretrain
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # one of none, wandb, tensorboard
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
""",
    ),
    "sft": (
        SftConfig,
        """
model_name_or_path: org/model-1B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target: all
deepspeed: configs/zero3.json
dataset: identity,alpaca_en_demo
template: qwen3_nothink
mask_history: true
enable_thinking: false
output_dir: saves/sft
eval_dataset: alpaca_en_demo
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 0.25
load_best_model_at_end: true
metric_for_best_model: eval_loss
greater_is_better: false
learning_rate: 1.0e-4
optim: adamw_torch
weight_decay: 0.01
disable_gradient_checkpointing: true
flash_attn: fa2
use_unsloth: false
swanlab_project: x
""",
    ),
    "rm": (
        RmConfig,
        """
model_name_or_path: org/model-1B
stage: rm
do_train: true
finetuning_type: lora
lora_target: all
dataset: dpo_en_demo
template: llama3
val_size: 0.1
output_dir: saves/reward
save_strategy: epoch
eval_strategy: epoch
pref_beta: 0.1
bf16: true
report_to: [tensorboard, wandb]
""",
    ),
    "ppo": (
        PpoConfig,
        """
model_name_or_path: org/model-1B
reward_model: saves/reward
reward_model_type: lora
stage: ppo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity
template: llama3
output_dir: saves/ppo
ppo_buffer_size: 2
ppo_target: 6.0
ppo_score_norm: true
ppo_whiten_rewards: true
top_k: 0
top_p: 0.9
max_new_tokens: 512
bf16: true
""",
    ),
    "infer": (
        InferConfig,
        """
model_name_or_path: org/model-1B
adapter_name_or_path: saves/sft,saves/ppo
template: llama3
infer_backend: huggingface
trust_remote_code: true
infer_dtype: bfloat16
do_sample: false
export_dir: out/merged
export_size: 5
export_device: cpu
export_legacy_format: false
""",
    ),
}


def test_files_of_every_stage_resolve(tmp_path: Path) -> None:
    configs: dict[str, Any] = {}
    for name, (model, text) in FILES.items():
        configs[name] = load(_write(tmp_path, text))
        assert type(configs[name]) is model
    pt, sft, rm, ppo, infer = configs.values()
    assert pt.learning_rate == 1e-4
    assert pt.lora_target == ("q_proj", "v_proj")
    assert pt.resume_from_checkpoint is None
    assert sft.dataset == ("identity", "alpaca_en_demo")
    assert sft.gradient_checkpointing is False
    assert (sft.lora_alpha, sft.interval("eval", 90)) == (16, 23)  # a quarter of 90 steps, rounded up
    assert [note.split(": ", 1)[1].split(":")[0] for note in sft.notes] == [
        "deepspeed",
        "flash_attn",
        "swanlab_project",
    ]
    assert rm.interval("save", 100) is None
    assert rm.interval("logging", 100) == 500
    assert (ppo.kl_target, ppo.kl_coef, ppo.score_norm, ppo.whiten_rewards, ppo.rollout_size) == (
        6,
        0.2,
        True,
        True,
        16,
    )
    assert infer.adapter_name_or_path == ("saves/sft", "saves/ppo")
    assert (infer.compute_dtype, infer.chat_sampling.temperature, infer.stage) == ("bfloat16", 0.0, "sft")


def test_a_json_file_and_a_dict_give_what_the_yaml_gives(tmp_path: Path) -> None:
    import json

    values = yaml.safe_load(FILES["ppo"][1])
    from_yaml = load(_write(tmp_path, FILES["ppo"][1]))
    from_json = load(_write(tmp_path, json.dumps(values, indent=1), "run.json"))
    assert dump_resolved(from_yaml) == dump_resolved(from_json) == dump_resolved(load(values))
    assert from_json.origin("lora_rank") == f"{tmp_path / 'run.json'}:8: lora_rank"


def test_a_training_file_serves_chat(tmp_path: Path) -> None:
    config = load(ARTICLE / "sft.yaml", stage="infer")
    assert type(config) is InferConfig
    assert config.do_infer
    assert config.template == "qwen"
    assert type(load(ARTICLE / "predict.yaml", ["stage=rm"])) is InferConfig
    assert load(ARTICLE / "predict.yaml", ["stage=rm"]).stage == "rm"
    assert type(load({**SFT, "stage": "rm"}, stage="sft")) is SftConfig


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("max_samples", "1e3", 1000),
        ("num_train_epochs", 3, 3.0),
        ("do_eval", "false", False),
        ("eval_strategy", False, "no"),
        ("save_strategy", "no", "no"),
        ("run_name", 2024, "2024"),
        ("dataset", "a, b ,c", ("a", "b", "c")),
        ("dataset", ["a", "b"], ("a", "b")),
        ("adapter_name_or_path", r"E:\a b\c", (r"E:\a b\c",)),
        ("resume_from_checkpoint", True, "auto"),
        ("resume_from_checkpoint", "auto", "auto"),
        ("resume_from_checkpoint", False, None),
        ("resume_from_checkpoint", "out/checkpoint-5", "out/checkpoint-5"),
        ("lora_rank", None, 8),
        ("template", "none", None),
        ("seed", "7", 7),
    ],
)
def test_values_are_taken_as_meant(key: str, value: Any, wanted: Any) -> None:
    assert getattr(load({**SFT, "val_size": 0, key: value}), key) == wanted


@pytest.mark.parametrize(
    ("line", "key", "wanted"),
    [
        ("eval_strategy: no", "eval_strategy", "no"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("run_name: 1.10", "run_name", "1.10"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),
        ("template: none", "template", None),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "auto"),
        ("do_eval: yes", "do_eval", True),
        ("output_dir: 7", "output_dir", "7"),
    ],
)
def test_yaml_scalars_are_taken_as_meant(tmp_path: Path, line: str, key: str, wanted: Any) -> None:
    base = "".join(f"{k}: {v}\n" for k, v in SFT.items() if k != key)
    assert getattr(load(_write(tmp_path, base + line + "\n")), key) == wanted


def test_null_means_the_default_except_where_it_means_off() -> None:
    config = load({**PPO, "clip_range_value": None, "lora_alpha": None, "lora_rank": 4})
    assert isinstance(config, PpoConfig)
    assert config.clip_range_value is None
    assert (config.lora_alpha, config.origin("lora_alpha")) == (8, "default")


def test_overrides_win_over_the_file_also_through_another_name(tmp_path: Path) -> None:
    path = ARTICLE / "sft.yaml"
    assert load(path, ["eval_strategy=epoch"]).eval_strategy == "epoch"
    assert load(path, ["compute_dtype=float32"]).compute_dtype == "float32"
    assert load(path, ["bf16=true"]).compute_dtype == "bfloat16"
    assert load(path, ["fp16=false"]).compute_dtype == "auto"
    assert load(path, ["warmup_ratio=0.5"]).warmup(10) == 5
    assert load(path, ["--learning_rate", "2e-5"]).learning_rate == 2e-5


def test_warmup_in_steps_and_in_shares() -> None:
    assert load({**SFT, "warmup_steps": 20}).warmup(1000) == 20
    assert load({**SFT, "warmup_steps": 20, "warmup_ratio": 0.5}).warmup(1000) == 20
    assert load({**SFT, "warmup_ratio": 0.03}).warmup(10) == 1
    assert load(SFT).warmup(10) == 0


def test_chat_sampling_defaults_are_those_users_know() -> None:
    sampling = load({"model_name_or_path": "m"}).chat_sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (0.95, 0.7, 50, 1024)
    assert load({"model_name_or_path": "m", "top_k": -1}).chat_sampling.top_k == 0
    assert load({"model_name_or_path": "m", "max_length": 64}).answer_limit == 64


def test_a_config_is_frozen() -> None:
    config = load(SFT)
    with pytest.raises(ValidationError):
        config.learning_rate = 1.0  # type: ignore[misc]


def test_keys_of_other_stages_are_told_in_one_line() -> None:
    config = load({**SFT, "ppo_epochs": 2, "reward_model": "r", "kl_coef": 0.1, "ppo_target": 6})
    assert config.notes == ("not read by stage sft: ppo_epochs, reward_model, kl_coef, ppo_target",)
    assert "ppo_epochs" in _error({**SFT, "ppo_epochs": "two"}).what


def test_dropout_in_stages_that_score_without_it_is_told() -> None:
    assert any("lora_dropout" in note for note in load({**PPO, "lora_dropout": 0.1}).notes)
    assert load({**SFT, "lora_dropout": 0.1}).notes == ()


# --------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_key_names_the_nearest_and_its_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "model_name_or_path: m\nlearning_rat: 1.0e-4\n")
    error = _error(path)
    assert error.what == "unknown key 'learning_rat'; did you mean 'learning_rate'?"
    assert error.where == f"{path}:2: learning_rat"
    assert "unknown key 'zzzz'" in _error(path, "learning_rat=", "zzzz=1").what


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("learning_rate", 0, "greater than 0"),
        ("learning_rate", -1e-4, "greater than 0"),
        ("learning_rate", "fast", "must be a number"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("learning_rate", True, "not numbers"),
        ("learning_rate", [1], "must be a number"),
        ("lora_rank", 0, "greater than or equal to 1"),
        ("lora_rank", 2.5, "whole number"),
        ("lora_rank", "many", "must be a number"),
        ("val_size", -0.1, "greater than or equal to 0"),
        ("lora_dropout", 1, "less than 1"),
        ("do_eval", "perhaps", "true or false"),
        ("do_eval", 3, "true or false"),
        ("eval_strategy", "stpes", "did you mean 'steps'?"),
        ("compute_dtype", "bfloat61", "did you mean 'bfloat16'?"),
        ("lr_scheduler_type", "cosin", "did you mean 'cosine'?"),
        ("mix_strategy", "interleave", "must be one of concat, interleave_under"),
        ("dataset", {"a": 1}, "must be a list, or text with commas"),
        ("dataset", 3, "must be a list, or text with commas"),
        ("template", True, "must be text"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.5, "less than or equal to 1"),
        ("seed", -1, "greater than or equal to 0"),
        ("dataloader_num_workers", "x", "whole number"),
        ("bf16", "maybe", "true or false"),
    ],
)
def test_wrong_values_are_shown_with_the_reason(key: str, value: Any, says: str) -> None:
    error = _error({**SFT, key: value})
    shown = {True: "true"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
    assert error.what == f"{key}: {shown} cannot be used"
    assert error.where == f"argument: {key}"
    assert says in error.why


@pytest.mark.parametrize(
    ("key", "value"),
    [("gamma", 1.1), ("gae_lambda", -0.1), ("clip_range", 0), ("clip_range_low", 1), ("kl_coef", -1), ("kl_target", 0),
     ("ppo_epochs", 0), ("group_size", 0), ("vf_coef", -0.1), ("critic", "none"), ("kl_estimator", "k4"),
     ("reward_clip", 0), ("missing_eos_mode", "keep"), ("critic_warmup_steps", -1)],
)  # fmt: skip
def test_ranges_of_ppo(key: str, value: Any) -> None:
    assert _error({**PPO, key: value}).where == f"argument: {key}"


DPO: dict[str, Any] = {**SFT, "stage": "dpo"}


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"pref_loss": "dpo"}, "pref_loss"),
        ({"pref_beta": 0}, "pref_beta"),
        ({"dpo_label_smoothing": 0.5}, "dpo_label_smoothing"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        # a setting that the loss does not read
        ({"pref_loss": "ipo", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing"),
        ({"pref_loss": "orpo", "pref_bco_weight": 0.5}, "pref_bco_weight"),
        ({"pref_loss": "simpo", "ld_alpha": 0.5}, "ld_alpha"),
        ({"pref_loss": "simpo", "pref_length_normalized": True}, "pref_length_normalized"),
        ({"pref_loss": "ipo_avg", "ld_alpha": 0.5}, "ld_alpha"),
        ({"stage": "orpo", "pref_loss": "sigmoid"}, "pref_loss"),
        ({"stage": "simpo", "pref_loss": "orpo"}, "pref_loss"),
        ({"stage": "kto", "kto_chosen_weight": 0, "kto_rejected_weight": 0}, "kto_chosen_weight"),
    ],
)
def test_mistakes_of_preference_stages(more: dict[str, Any], key: str) -> None:
    assert _error({**DPO, **more}).where == f"argument: {key}"


def test_preference_keys_as_their_users_write_them() -> None:
    """Values at which a key does nothing pass under every loss."""
    config = load({**DPO, "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1, "dpo_label_smoothing": 0.0,
                   "pref_bco_weight": 0, "ld_alpha": None, "pref_ftx": 0.1})  # fmt: skip
    assert (config.pref_loss, config.pref_beta, config.simpo_gamma) == ("simpo", 2.0, 1.0)  # type: ignore[attr-defined]
    assert config.notes == ()
    assert load({**DPO, "stage": "orpo", "pref_loss": "orpo"}).stage == "orpo"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"pref_loss": "ipo"}, "ipo_avg is the form per token"),
        ({"pref_loss": "exo"}, "dpo_label_smoothing: 0.001"),
        ({"simpo_gamma": 0.5}, "simpo_gamma: not read by pref_loss sigmoid"),
        ({"lora_dropout": 0.1}, "lora_dropout: not applied in stage dpo"),
    ],
)
def test_differences_of_preference_stages_are_told(more: dict[str, Any], word: str) -> None:
    assert any(word in note for note in load({**DPO, **more}).notes)


def test_all_mistakes_of_a_file_come_together_in_its_order(tmp_path: Path) -> None:
    text = "stage: sft\ndo_train: true\nlora_rank: 0\nquantization_bit: 5\nlearnin_rate: 1\nfinetuning_type: oft\n"
    error = _error(_write(tmp_path, text))
    assert error.what.startswith(f"4 mistakes in {tmp_path / 'run.yaml'}")
    places = [error.what.index(f"run.yaml:{line}: ") for line in (3, 4, 5, 6)]
    assert places == sorted(places)


def test_stages_that_do_not_exist() -> None:
    error = _error({**SFT, "stage": "nca"})
    assert error.what == "there is no stage 'nca'"
    assert "pt, sft, rm" in error.why
    error = _error({**SFT, "stage": "reinforce++"})
    assert "stage: reinforce_pp" in error.remedy
    assert "did you mean 'sft'" in _error({**SFT, "stage": "sftt"}).what


def test_what_is_missing_is_named() -> None:
    error = _error({"stage": "ppo", "do_train": True})
    for key in ("model_name_or_path", "dataset", "output_dir", "reward_model"):
        assert f"{key} is missing" in error.what
    assert _error({}).what == "model_name_or_path is missing"
    assert "eval_dataset is missing" in _error({"model_name_or_path": "m", "do_predict": True}).what


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"val_size": 0.1, "eval_dataset": "e"}, "val_size"),
        ({"val_size": 1.5}, "val_size"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"early_stopping_steps": 2}, "early_stopping_steps"),
        ({"load_best_model_at_end": True, "val_size": 9, "eval_strategy": "steps", "save_strategy": "no"},
         "load_best_model_at_end"),
        ({"dataset": "a,b", "interleave_probs": "0.5,0.5"}, "interleave_probs"),
        ({"dataset": "a,b", "interleave_probs": "1", "mix_strategy": "interleave_under"}, "interleave_probs"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"bf16": True, "compute_dtype": "float32"}, "bf16"),
        ({"gradient_checkpointing": True, "disable_gradient_checkpointing": True}, "disable_gradient_checkpointing"),
        ({"eval_strategy": "no", "evaluation_strategy": "epoch", "val_size": 9}, "evaluation_strategy"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together(extra: dict[str, Any], key: str) -> None:
    error = _error({**SFT, **extra})
    assert error.where == f"argument: {key}"
    assert error.remedy


def test_greedy_rollouts_are_refused() -> None:
    assert "temperature" in _error({**PPO, "temperature": 0}).what


def test_a_secret_is_not_shown_in_an_error() -> None:
    error = _error({**SFT, "hf_hub_token": ["abc"]})
    assert "abc" not in str(error)


# ------------------------------------------------------------------------------------------------------------ properties


@pytest.mark.property
@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted([*PpoConfig.model_fields, "bf16", "ppo_target", "deepspeed"])),
                       st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text()))))  # fmt: skip
def test_any_values_give_a_config_or_an_error_that_teaches(values: dict[str, Any]) -> None:
    try:
        config = load({**PPO, **values})
    except ConfigError:
        return
    assert dump_resolved(load(dump_resolved(config))) == dump_resolved(config)
    assert explain(config)


def test_loading_a_config_imports_no_torch() -> None:
    code = (
        "import sys; from trimtab.config import load; load({'model_name_or_path': 'm'}); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_keys_of_an_adapter_that_is_not_made_are_told(tmp_path: Path) -> None:
    def notes(**keys: Any) -> str:
        return " | ".join(load({**SFT, "output_dir": str(tmp_path), **keys}).notes)

    assert "lora_rank, use_rslora: not read, since the adapter" in notes(
        adapter_name_or_path="a", lora_rank=4, use_rslora=True
    )
    assert "not read" not in notes(adapter_name_or_path="a", lora_rank=4, create_new_adapter=True)
    assert "not read" not in notes(lora_rank=4, use_dora=True)
    told = notes(finetuning_type="full", use_dora=True, additional_target="norm")
    assert "use_dora, additional_target: not read with finetuning_type: full" in told
    assert "freeze_trainable_layers: not read with finetuning_type: lora" in notes(freeze_trainable_layers=1)
    assert "the adapter is new in any case" in notes(create_new_adapter=True)
