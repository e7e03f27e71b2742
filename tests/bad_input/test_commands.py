"""Verbs that are asked for what they do not do, and folders that stand in the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.bad_input.conftest import PAIRS, ROWS, Place
from tests.bad_input.test_models import adapter  # noqa: F401  (a fixture)
from trimtab.cli import main

pytestmark = pytest.mark.e2e


def test_eval_of_predictions_and_of_a_config(place: Place) -> None:
    file = str(place.write("predictions.jsonl", '{"predict": "a", "label": "a"}\n'))
    place.refused("eval", file, "seed=1", told="takes no keys: seed=1")
    place.refused("eval", place.file(), "--task", "bleu", told="are for files of predictions")
    place.refused("eval", place.file(stage="dpo", do_train=None, output_dir=None), told="does not measure stage dpo")


def test_predictions_in_another_encoding(place: Place) -> None:
    lines = '{"predict": "a", "label": "a"}\n{"predict": "镇", "label": "a"}\n'
    told = place.refused("eval", str(place.write("e.jsonl", lines.encode("gbk"))), told="is not UTF-8 text")
    assert "at line 2" in told and "e.jsonl:2" in told and "such as GBK" in told
    odd = str(place.write("odd.jsonl", '{"predict": "a\u2028b", "label": "a\u2028b"}\n'))  # one line, to JSON
    assert main(["eval", odd, "--task", "exact_match"]) == 0


def test_figures_of_predictions_overwrite_nothing(place: Place) -> None:
    file = str(place.write("predictions.jsonl", '{"predict": "a", "label": "a"}\n'))
    (place.root / "folder.json").mkdir()
    told = place.refused("eval", file, "--output", f"{place.root}/./predictions.jsonl", told="exists already")
    assert "it is a source of this command" in told
    told = place.refused("eval", file, "--output", str(place.root / "folder.json"), told="exists already")
    assert "it is a folder" in told
    told = place.refused("eval", file, "--output", str(place.write("notes.json", "{}")), told="exists already")
    assert "nothing is overwritten" in told
    place.refused("eval", file, "--output", str(place.root / "figures.csv"), told="unknown kind of file '.csv'")
    told = place.refused(
        "eval", file, "--output", str(place.root / "notes.json" / "x.json"), told="could not be written"
    )
    assert ".tmp" not in told
    new = place.root / "new" / "figures.json"
    assert main(["eval", file, "--task", "exact_match", "--output", str(new)]) == 0
    assert json.loads(new.read_text(encoding="utf-8"))["exact_match"]["mean"] == 1.0


def test_a_report_of_what_is_no_reward_model(place: Place) -> None:
    scores = str(place.write("scores.jsonl", '{"chosen": 1.0, "rejected": 0.0}\n'))
    place.refused("rm", "report", scores, "seed=1", told="takes no keys: seed=1")
    place.refused("rm", "report", place.file(do_train=None, output_dir=None), told="this file is of stage sft")
    place.write("empty/note.txt", "")
    place.refused("rm", "report", str(place.root / "empty"), told="holds neither scores nor a run of stage rm")
    latin = place.write("latin.jsonl", b"\xe9\n")
    place.refused("rm", "report", str(latin), told="latin.jsonl is not UTF-8 text: byte 0xe9 at line 1")
    place.refused("rm", "report", str(place.root / "none.jsonl"), told="cannot read the scores")


def test_converting_and_splitting_nothing(place: Place) -> None:
    data = ["--dataset-dir", str(place.root / "data")]
    place.refused("data", "split", "qa", "--val", "0", "--test", "0", *data, told="nothing to hold out")
    place.data("a text\n", name="text.txt", columns={"prompt": "text"})
    out = str(place.root / "rows.openai.json")
    place.refused("data", "convert", "qa", "--to", "openai", "--output", out, *data, told="can be written as openai")
    (place.root / "none").mkdir()
    place.write("data/dataset_info.json", {"qa": {"file_name": str(place.root / "none")}})
    place.refused("data", "clean", "qa", *data, told="no data files in")


def test_a_set_of_a_hub_is_no_file(place: Place) -> None:
    place.write("data/dataset_info.json", {"qa": {"hf_hub_url": "someone/something"}})
    told = "data set 'qa' is not a file"
    place.refused("data", "split", "qa", "--dataset-dir", str(place.root / "data"), told=told)


def test_targets_that_cannot_be_written(place: Place) -> None:
    """A file where a folder has to be."""
    place.write("way", "")
    target = str(place.root / "way" / "x.json")
    data = ["--dataset-dir", str(place.root / "data")]
    place.refused("data", "convert", "qa", "--to", "openai", "--output", target, *data, told="could not be written")
    predicting = {"do_train": None, "do_predict": True, "max_steps": None, "output_dir": str(place.root / "way" / "p")}
    place.refused("predict", place.file(**predicting), told="cannot make the folder")
    place.refused("train", place.file(tokenized_path=str(place.root / "way" / "t")), told="rows could not be saved")


def test_output_dir_is_missing_or_the_models_own(place: Place) -> None:
    place.refused("train", place.file(output_dir=None), told="output_dir")
    place.refused("train", place.file(output_dir=None), "--dry-run", told="output_dir")
    folder = place.root / "model"
    shutil.copytree(place.keys["model_name_or_path"], folder)
    keys = {"finetuning_type": "full", "model_name_or_path": str(folder), "output_dir": str(folder)}
    place.refused("train", place.file(**keys), told="it is the folder of the model")


def test_a_refreshed_reference_beside_what_is_not_low_rank(place: Place, adapter: Path) -> None:  # noqa: F811
    place.data(ROWS)
    told = "ref_update_every: with use_dora or additional_target"
    keys = {"stage": "grpo", "reward_funcs": "f.py:f", "ref_update_every": 2, "use_dora": True, "kl_coef": 0.1}
    place.refused("train", place.file(**keys), told=told)


def test_a_dry_run_reads_tokenizer_and_reward_model(place: Place, adapter: Path) -> None:  # noqa: F811
    keys = {"stage": "ppo", "reward_model": str(adapter)}
    place.refused("train", place.file(**keys), "--dry-run", told="no value head in")
    folder = place.root / "model"
    shutil.copytree(place.keys["model_name_or_path"], folder)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    place.refused("plan", place.file(model_name_or_path=str(folder)), told="tokenizer.json of this model is broken")


def test_a_reward_model_writes_no_answers(place: Place, adapter: Path) -> None:  # noqa: F811
    folder = place.root / "rm"
    shutil.copytree(adapter, folder)
    (folder / "value_head.json").write_text(json.dumps({"readout": "stop", "purpose": "reward"}), encoding="utf-8")
    told = "is a reward model"
    place.refused("train", place.file(adapter_name_or_path=str(folder)), told=told)
    place.refused("train", place.file(adapter_name_or_path=str(folder)), "--dry-run", told=told)
    place.data(PAIRS, ranking=True)
    keys = {"stage": "dpo", "ref_model_adapters": str(folder)}
    place.refused("train", place.file(**keys), told=("ref_model_adapters", told))
    (folder / "value_head.json").write_text(json.dumps({"purpose": "critic"}), encoding="utf-8")  # what PPO leaves
    assert main(["train", place.file(adapter_name_or_path=str(folder), stage="dpo")]) == 0


def test_a_head_that_is_not_finite(place: Place, adapter: Path) -> None:  # noqa: F811
    import torch
    from safetensors.torch import save_file

    folder = place.root / "rm"
    shutil.copytree(adapter, folder)
    weight = torch.full((1, 64), float("nan"))
    width = json.loads((Path(place.keys["model_name_or_path"]) / "config.json").read_text("utf-8"))["hidden_size"]
    save_file(
        {"v_head.summary.weight": weight[:, :width].contiguous(), "v_head.summary.bias": torch.zeros(1)},
        folder / "value_head.safetensors",
    )
    keys = {"stage": "ppo", "reward_model": str(folder), "max_new_tokens": 4}
    place.refused("train", place.file(**keys), told="the value head holds NaN or infinity")


def test_a_dora_adapter_below_another(place: Place, adapter: Path) -> None:  # noqa: F811
    from trimtab.pipeline import run_exp

    keys = {**place.keys, "use_dora": True, "output_dir": str(place.root / "dora")}
    dora = run_exp(keys).path
    told = "is a DoRA adapter, which cannot be stacked"
    place.refused("train", place.file(adapter_name_or_path=f"{adapter},{dora}"), told=told)


def test_a_row_without_the_answer_that_is_the_baseline(place: Place) -> None:
    place.data([*ROWS, {"instruction": "no answer"}])
    place.write("f.py", "def f(prompt, completion):\n    return 0.0\n")
    keys = {
        "stage": "rloo",
        "reward_funcs": f"{place.root / 'f.py'}:f",
        "reward_baseline": "answer",
        "max_new_tokens": 4,
    }
    place.refused("train", place.file(**keys), told="a row without an answer")


def test_a_run_without_steps(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill no step: the last line of defence, behind the checks of the data."""
    from trimtab.train import loop

    monkeypatch.setattr(loop, "total_steps", lambda config, per_epoch: 0)
    place.refused("train", place.file(), told="a run of zero steps")


def test_packed_weights_without_their_library(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with CUDA: elsewhere the key is refused before."""
    from trimtab.errors import ModelError
    from trimtab.models import load

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    import torch

    with pytest.raises(ModelError, match="needs bitsandbytes"):
        load._packed(load.Packing(bits=4, kind="nf4", double=True), torch.float32, "cpu")
