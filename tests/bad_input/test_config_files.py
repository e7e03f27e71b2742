"""Config files and command lines that cannot be read, or say what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.conftest import Place

pytestmark = pytest.mark.e2e

HEAD = "model_name_or_path: m\nstage: sft\ndo_train: true\ndataset: qa\noutput_dir: o\n"

# name -> content, words of the message
FILES: dict[str, tuple[bytes | str, tuple[str, ...]]] = {
    "empty": ("", ("is empty",)),
    "only comments": ("# nothing\n\n# here\n", ("is empty",)),
    "only blanks": ("   \n\n\t\n", ("run.yaml",)),
    "binary": (bytes(range(256)) * 4, ("run.yaml",)),
    "png": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", ("run.yaml",)),
    "nul": (b"stage: sft\x00\n", ("run.yaml",)),
    "control character": ("stage: s\x07ft\n", ("run.yaml",)),
    "latin-1": ("output_dir: caf\xe9\n".encode("latin-1"), ("UTF-8",)),
    "gbk": ("output_dir: 输出\n".encode("gbk"), ("UTF-8",)),
    "utf-16": ("stage: sft\n".encode("utf-16"), ("UTF-8",)),
    "list": ("- stage: sft\n- do_train: true\n", ("run.yaml:1",)),
    "scalar": ("sft\n", ("run.yaml:1",)),
    "number": ("42\n", ("run.yaml:1",)),
    "tab": ("stage: sft\n\tdo_train: true\n", ("run.yaml:2",)),
    "no colon": (HEAD + "learning_rate 1e-4\n", ("run.yaml:6",)),
    "no blank after colon": (HEAD + "learning_rate:1e-4\n", ("run.yaml:6",)),
    "open bracket": (HEAD + "lora_target: [q_proj, v_proj\n", ("run.yaml",)),
    "open quote": (HEAD + "run_name: 'abc\n", ("run.yaml",)),
    "bad indent": (HEAD + "  seed: 1\n", ("run.yaml:6",)),
    "twice": (HEAD + "stage: rm\n", ("stage is written twice", "run.yaml:6")),
    "twice, one null": (HEAD + "seed: 1\nseed:\n", ("seed is written twice",)),
    "two documents": (HEAD + "---\nstage: rm\n", ("run.yaml",)),
    "anchor": (HEAD + "seed: *nowhere\n", ("nowhere", "run.yaml:6")),
    "tag": (HEAD + "seed: !!python/object:os.system 1\n", ("run.yaml:6",)),
    "own tag": (HEAD + "seed: !secret 1\n", ("run.yaml:6",)),
    "bad date": (HEAD + "run_name: 2024-13-45\n", ("run.yaml",)),
    "merge of a scalar": (HEAD + "<<: 3\n", ("run.yaml:6",)),
    "key that is a list": (HEAD + "[1, 2]: 3\n", ("run.yaml:6",)),
    "key that is a number": (HEAD + "3: 4\n", ("unknown key '3'", "run.yaml:6")),
    "key that is null": (HEAD + "~: 4\n", ("run.yaml:6",)),
    "recursive": (HEAD + "lora_target: &a [*a]\n", ("run.yaml",)),
    "deep": (HEAD + "lora_target: " + "[" * 5000 + "]" * 5000 + "\n", ("run.yaml",)),
    "long line": (HEAD + "run_name: {" + "x" * 100000 + "\n", ("run.yaml",)),
    "chinese key": (HEAD + "学习率: 1e-4\n", ("学习率", "run.yaml:6")),
    "full-width colon": (HEAD + "learning_rate：1e-4\n", ("run.yaml:6",)),
    "capital key": (HEAD + "Learning_Rate: 1e-4\n", ("learning_rate", "run.yaml:6")),
    "dashed key": (HEAD + "learning-rate: 1e-4\n", ("learning_rate", "run.yaml:6")),
    "misspelt key": (HEAD + "lerning_rate: 1e-4\n", ("did you mean 'learning_rate'?", "run.yaml:6: lerning_rate")),
    "trailing blank in key": (HEAD + "'learning_rate ': 1e-4\n", ("learning_rate", "run.yaml:6")),
    "tags in a list": (HEAD + "lora_target:\n  - {q_proj: 1}\n", ("run.yaml:6: lora_target",)),
}
JSON_FILES: dict[str, tuple[bytes | str, tuple[str, ...]]] = {
    "empty": ("", ("run.json",)),
    "list": ("[]", ("JSON object",)),
    "null": ("null", ("JSON object",)),
    "string": ('"sft"', ("JSON object",)),
    "comma": ('{"stage": "sft",\n "seed": 1,\n}', ("run.json:3",)),
    "no comma": ('{"stage": "sft"\n "seed": 1}', ("run.json:2",)),
    "single quotes": ("{'stage': 'sft'}", ("run.json:1",)),
    "comment": ('{"stage": "sft" // x\n}', ("run.json:1",)),
    "cut": ('{"stage": "sf', ("run.json:1",)),
    "more after": ('{"stage": "sft"}\n{"stage": "rm"}', ("run.json:2",)),
    "twice": ('{"stage": "sft",\n"stage": "rm"}', ("twice", "run.json:2")),
    "nan": ('{"stage": "sft", "learning_rate": NaN}', ("learning_rate",)),
    "infinity": ('{"stage": "sft", "learning_rate": Infinity}', ("learning_rate",)),
    "yaml in json": ("stage: sft\n", ("run.json:1",)),
    "true in capitals": ('{"do_train": True}', ("run.json:1",)),
    "deep": ('{"lora_target": ' + "[" * 100000 + "]" * 100000 + "}", ("run.json",)),
    "huge number": ('{"seed": ' + "9" * 5000 + "}", ("run.json",)),
    "bad escape": ('{"output_dir": "C:\\new\\q"}', ("run.json:1",)),
    "binary": (bytes(range(256)), ("run.json",)),
}


@pytest.mark.parametrize("name", list(FILES))
def test_yaml(place: Place, name: str) -> None:
    content, told = FILES[name]
    place.refused("train", str(place.write("run.yaml", content)), told=told)


@pytest.mark.parametrize("name", list(JSON_FILES))
def test_json(place: Place, name: str) -> None:
    content, told = JSON_FILES[name]
    place.refused("train", str(place.write("run.json", content)), told=told)


def test_no_file(place: Place) -> None:
    place.refused("train", str(place.root / "none.yaml"), told="none.yaml")
    place.refused("train", str(place.root / "none.yaml" / "deeper.yaml"), told="deeper.yaml")
    place.refused("train", str(place.root), told="directory")
    (place.root / "file").write_text("x", encoding="utf-8")
    place.refused("train", str(place.root / "file" / "x.yaml"), told="x.yaml")
    place.refused("train", "a" * 300 + ".yaml", told="config file")
    place.refused("train", "a\0b.yaml", told="file")


def test_no_permission(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file = place.file()

    def denied(self: Path, *arguments: Any, **named: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        code_words = ("train", file)
        from trimtab.cli import main

        assert main(list(code_words)) == 2
    assert "Permission denied" in place.capsys.readouterr().err


# keys of the file -> words of the message
KEYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stage": ({"stage": "stf"}, ("did you mean 'sft'?", "run.yaml:", ": stage")),
    "stage list": ({"stage": ["sft", "rm"]}, ("stage",)),
    "stage number": ({"stage": 3}, ("stage",)),
    "no model": ({"model_name_or_path": None}, ("model_name_or_path is missing",)),
    "no dataset": ({"dataset": None}, ("dataset is missing",)),
    "no output_dir": ({"output_dir": None}, ("output_dir is missing",)),
    "model a list": ({"model_name_or_path": ["a"]}, ("model_name_or_path", "text")),
    "model empty": ({"model_name_or_path": ""}, ("model_name_or_path",)),
    "model blank": ({"model_name_or_path": "  "}, ("model_name_or_path",)),
    "model true": ({"model_name_or_path": True}, ("model_name_or_path",)),
    "rate word": ({"learning_rate": "fast"}, ("learning_rate: 'fast'", "number")),
    "rate zero": ({"learning_rate": 0}, ("learning_rate", "greater than 0")),
    "rate negative": ({"learning_rate": -1e-4}, ("learning_rate",)),
    "rate nan": ({"learning_rate": float("nan")}, ("learning_rate",)),
    "rate inf": ({"learning_rate": float("inf")}, ("learning_rate",)),
    "rate text inf": ({"learning_rate": "inf"}, ("learning_rate",)),
    "rate text nan": ({"learning_rate": "nan"}, ("learning_rate",)),
    "rate list": ({"learning_rate": [1e-4]}, ("learning_rate",)),
    "rate true": ({"learning_rate": True}, ("learning_rate",)),
    "rate comma": ({"learning_rate": "1,5"}, ("learning_rate",)),
    "rate huge": ({"learning_rate": "1e400"}, ("learning_rate",)),
    "batch zero": ({"per_device_train_batch_size": 0}, ("per_device_train_batch_size",)),
    "batch half": ({"per_device_train_batch_size": 1.5}, ("per_device_train_batch_size", "whole number")),
    "batch word": ({"per_device_train_batch_size": "auto"}, ("per_device_train_batch_size",)),
    "batch huge": ({"per_device_train_batch_size": 10**30}, ("per_device_train_batch_size",)),
    "accumulation": ({"gradient_accumulation_steps": -1}, ("gradient_accumulation_steps",)),
    "epochs zero": ({"num_train_epochs": 0}, ("num_train_epochs",)),
    "epochs inf": ({"num_train_epochs": float("inf")}, ("num_train_epochs",)),
    "epochs huge": ({"num_train_epochs": 1e300, "max_steps": -1}, ("num_train_epochs",)),
    "steps word": ({"max_steps": "all"}, ("max_steps",)),
    "steps huge": ({"max_steps": 10**30}, ("max_steps",)),
    "steps half": ({"max_steps": 2.5}, ("max_steps",)),
    "cutoff 0": ({"cutoff_len": 0}, ("cutoff_len",)),
    "cutoff negative": ({"cutoff_len": -5}, ("cutoff_len",)),
    "cutoff text": ({"cutoff_len": "2k"}, ("cutoff_len",)),
    "rank": ({"lora_rank": 0}, ("lora_rank",)),
    "rank huge": ({"lora_rank": 10**9}, ("lora_rank",)),
    "alpha": ({"lora_alpha": -8}, ("lora_alpha",)),
    "dropout 1": ({"lora_dropout": 1.0}, ("lora_dropout",)),
    "dropout 50": ({"lora_dropout": 50}, ("lora_dropout",)),
    "target empty": ({"lora_target": []}, ("lora_target",)),
    "target typo": ({"lora_target": "q_porj"}, ("q_porj", "q_proj")),
    "target dict": ({"lora_target": {"q": 1}}, ("lora_target",)),
    "scheduler": ({"lr_scheduler_type": "cosin"}, ("did you mean 'cosine'?",)),
    "optimizer": ({"optim": "lion"}, ("optim",)),
    "warmup ratio": ({"warmup_ratio": 1.5}, ("warmup_ratio",)),
    "warmup negative": ({"warmup_steps": -3}, ("warmup_steps",)),
    "beta": ({"adam_beta1": 1.0}, ("adam_beta1",)),
    "epsilon": ({"adam_epsilon": 0}, ("adam_epsilon",)),
    "decay": ({"weight_decay": -0.1}, ("weight_decay",)),
    "clip": ({"max_grad_norm": "none of it"}, ("max_grad_norm",)),
    "seed negative": ({"seed": -1}, ("seed",)),
    "seed huge": ({"seed": 10**40}, ("seed",)),
    "seed word": ({"seed": "random"}, ("seed",)),
    "bool word": ({"do_train": "maybe"}, ("do_train", "true or false")),
    "bool number": ({"overwrite_output_dir": 7}, ("overwrite_output_dir", "true or false")),
    "bool list": ({"plot_loss": [True]}, ("plot_loss",)),
    "val_size": ({"val_size": -1}, ("val_size",)),
    "val_size 1.5": ({"val_size": 1.5}, ("val_size",)),
    "val_size all": ({"val_size": 6}, ("val_size",)),
    "val_size too many": ({"val_size": 100}, ("val_size",)),
    "val and eval": ({"val_size": 0.5, "eval_dataset": "qa"}, ("val_size", "eval_dataset")),
    "eval without rows": ({"eval_strategy": "steps"}, ("eval_strategy",)),
    "eval word": ({"eval_strategy": "step"}, ("did you mean 'steps'?",)),
    "eval true": ({"eval_strategy": True}, ("eval_strategy",)),
    "eval_steps": ({"eval_steps": 0}, ("eval_steps",)),
    "save_steps": ({"save_steps": -1}, ("save_steps",)),
    "save limit": ({"save_total_limit": 0}, ("save_total_limit",)),
    "best without evaluations": ({"load_best_model_at_end": True}, ("load_best_model_at_end",)),
    "best without checkpoints": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "val_size": 2, "save_strategy": "no"},
        ("load_best_model_at_end",),
    ),
    "best of weights alone": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "val_size": 2, "save_only_model": True},
        ("save_only_model",),
    ),
    "no task": ({"eval_tasks": "exact_mach", "val_size": 2}, ("exact_match",)),
    "dtype": ({"compute_dtype": "fp8"}, ("compute_dtype",)),
    "both dtypes": ({"compute_dtype": None, "bf16": True, "fp16": True}, ("bf16 and fp16",)),
    "dtype and bf16": ({"bf16": True}, ("compute_dtype",)),
    "bf16 word": ({"bf16": "please"}, ("bf16",)),
    "template": ({"template": "qwenn"}, ("qwen",)),
    "template number": ({"template": 5}, ("template", "5")),
    "template list": ({"template": ["qwen"]}, ("template",)),
    "max_samples": ({"max_samples": 0}, ("max_samples",)),
    "mix": ({"mix_strategy": "shuffle"}, ("mix_strategy",)),
    "probs alone": ({"interleave_probs": [0.5, 0.5]}, ("interleave_probs",)),
    "probs count": ({"interleave_probs": [1, 2], "mix_strategy": "interleave_under"}, ("interleave_probs",)),
    "probs word": ({"interleave_probs": "half,half"}, ("interleave_probs",)),
    "unknown": ({"foo": 1}, ("unknown key 'foo'",)),
    "of trl": ({"use_vllm": True}, ("use_vllm",)),
    "refused": ({"use_galore": True}, ("use_galore",)),
    "quantised": ({"quantization_bit": 4}, ("quantization_bit",)),
    "finetuning_type": ({"finetuning_type": "oft"}, ("finetuning_type",)),
    "two names": ({"eval_strategy": "no", "evaluation_strategy": "steps"}, ("two names of one key",)),
    "resume": ({"resume_from_checkpoint": "nowhere"}, ("nowhere", "does not exist")),
    "resume number": ({"resume_from_checkpoint": 5}, ("resume_from_checkpoint",)),
    "output_dir list": ({"output_dir": ["a"]}, ("output_dir",)),
    "output_dir empty": ({"output_dir": ""}, ("output_dir",)),
    "output_dir nul": ({"output_dir": "a\0b"}, ("output_dir",)),
    "output_dir too long": ({"output_dir": "x" * 300}, ("output_dir",)),
    "dataset dict": ({"dataset": {"qa": 1}}, ("dataset",)),
    "dataset empty": ({"dataset": ""}, ("dataset",)),
    "dataset commas": ({"dataset": ",,"}, ("dataset",)),
    "dataset_dir number": ({"dataset_dir": 4}, ("dataset_dir",)),
    "dataset_dir list": ({"dataset_dir": ["data"]}, ("dataset_dir",)),
    "early stopping": ({"early_stopping_steps": 3}, ("early_stopping_steps",)),
    "logging": ({"logging_steps": 0}, ("logging_steps",)),
    "strategy": ({"save_strategy": "best"}, ("save_strategy",)),
    "micro batch": ({"micro_batch_tokens": 0}, ("micro_batch_tokens",)),
    "ppo without reward model": ({"stage": "ppo"}, ("reward_model is missing",)),
    "ppo temperature": ({"stage": "ppo", "reward_model": "r", "temperature": 0}, ("temperature",)),
    "ppo kl": ({"stage": "ppo", "reward_model": "r", "kl_estimator": "k4"}, ("kl_estimator",)),
    "ppo epochs": ({"stage": "ppo", "reward_model": "r", "ppo_epochs": 0}, ("ppo_epochs",)),
    "ppo gamma": ({"stage": "ppo", "reward_model": "r", "gamma": 2}, ("gamma",)),
    "ppo top_p": ({"stage": "ppo", "reward_model": "r", "top_p": 0}, ("top_p",)),
    "key of another stage": ({"ppo_epochs": "many"}, ("ppo_epochs",)),
    "top_k": ({"top_k": -5}, ("top_k",)),
    "max_new_tokens": ({"max_new_tokens": 0}, ("max_new_tokens",)),
    "four mistakes": (
        {"learning_rate": "fast", "lerning_rate": 1, "seed": -1, "stage": "x"},
        ("4 mistakes", "run.yaml"),
    ),
}


@pytest.mark.parametrize("name", list(KEYS))
def test_keys(place: Place, name: str) -> None:
    keys, told = KEYS[name]
    place.refused("train", place.file(**keys), told=told)


WORDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no sign": (["seed", "3"], ("seed", "command line")),
    "blanks": (["seed", "=", "3"], ("seed",)),
    "lone sign": (["=3"], ("=3",)),
    "misspelt": (["sead=3"], ("did you mean 'seed'?", "command line")),
    "wrong type": (["seed=x"], ("seed", "command line: seed")),
    "nothing for the model": (["model_name_or_path="], ("model_name_or_path",)),
    "unknown option": (["--sead", "3"], ("did you mean 'seed'?",)),
    "short option": (["-s", "3"], ("-s",)),
    "value with a dash": (["--learning_rate", "--seed=1"], ("learning_rate",)),
    "bad list": (["lora_target=[q_proj"], ("lora_target",)),
    "mapping": (["seed={a: 1}"], ("seed",)),
    "empty word": ([""], ("command line",)),
    "nan": (["learning_rate=.nan"], ("learning_rate",)),
    "another file": (["other.yaml"], ("other.yaml",)),
}


@pytest.mark.parametrize("name", list(WORDS))
def test_words(place: Place, name: str) -> None:
    words, told = WORDS[name]
    place.refused("train", place.file(), *words, told=told)
