"""Errors that stand alone: what no test of their own area meets on its way."""

from __future__ import annotations

import errno
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trimtab.config import load
from trimtab.errors import (
    AdapterError,
    ConfigError,
    DataError,
    MachineError,
    ModelError,
    NumericsError,
    RunError,
    TemplateError,
    typed,
)

pytestmark = pytest.mark.unit


def test_what_the_machine_refuses() -> None:
    with pytest.raises(MachineError, match="the disk is full"), typed():
        raise OSError(errno.ENOSPC, "No space left on device", "x")
    with pytest.raises(MachineError, match="the system refuses: Permission denied"), typed():
        raise PermissionError(errno.EACCES, "Permission denied", "x")
    with pytest.raises(MachineError, match="out of memory"), typed():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
    with pytest.raises(RuntimeError, match="of ours"), typed():
        raise RuntimeError("a fault of ours")


def test_a_stage_that_a_caller_misspells(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model_name_or_path: m\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="there is no stage 'stf'"):
        load(file, [], stage="stf")


def test_no_config_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab import run_exp

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ConfigError, match="no config given"):
        run_exp()


def test_the_example_is_in_neither_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab import pipeline

    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "trimtab" / "pipeline.py"))
    with pytest.raises(ConfigError, match="example data is not installed"):
        pipeline.examples_folder()


def test_modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without network, without the package, and with a package that cannot reach its server."""
    from trimtab.models import folder

    source = load_source("someone/something")
    with pytest.raises(ModelError, match="ModelScope"):  # HF_HUB_OFFLINE is set in tests
        folder._from_modelscope(source, "here")
    monkeypatch.setattr(folder, "offline", lambda: False)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError) as caught:
        folder._from_modelscope(source, "here")
    assert "not installed" in caught.value.why
    fake = types.ModuleType("modelscope.hub.snapshot_download")

    def unreachable(*args: object, **keys: object) -> str:
        raise OSError("no route to host")

    fake.snapshot_download = unreachable  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", fake)
    with pytest.raises(ModelError) as caught:
        folder._from_modelscope(source, "here")
    assert "revision master" in caught.value.what and caught.value.why == "no route to host"


def load_source(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(model_name_or_path=name, model_revision="main", cache_dir=None, ms_hub_token=None)


def test_logits_that_are_no_plain_map(tiny_folder: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    from trimtab.models.load import check_plain_head

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    check_plain_head(model)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * 0.5
    with pytest.raises(ModelError, match="not a plain linear map"):
        check_plain_head(model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="not a plain linear map"):
        check_plain_head(model)
    model.config.final_logit_softcapping = None
    model.set_output_embeddings(None)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="not a plain linear map"):
        check_plain_head(model)


def test_saving_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    from trimtab.models import lora
    from trimtab.models.tiny import tiny_model

    with pytest.raises(AdapterError, match="no adapter called ghost is loaded"):
        lora.save_adapter(tiny_model("llama"), ["ghost"], tmp_path, base="b")


def test_the_state_of_another_model(tmp_path: Path) -> None:
    from trimtab.train.state import load_state, save_state

    weights = {"a": torch.nn.Parameter(torch.zeros(2))}
    save_state(tmp_path, weights, {}, {})
    assert load_state(tmp_path, weights, {}) is not None
    with pytest.raises(RunError, match="another model or another adapter"):
        load_state(tmp_path, {"a": torch.nn.Parameter(torch.zeros(3))}, {})


def test_a_name_that_is_no_checkpoint() -> None:
    from trimtab.rundir import checkpoint_step

    assert checkpoint_step("r/checkpoint-12") == 12
    with pytest.raises(RunError, match="not a checkpoint folder"):
        checkpoint_step("r/best")


def test_a_folder_that_cannot_be_locked_or_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.rundir import RunFolder

    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="cannot write in"):
        RunFolder(tmp_path / "file").lock()
    folder = RunFolder(tmp_path)

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match="cannot rename"):
        folder._move_aside("finished", print)


def test_rows_that_parquet_does_not_take(tmp_path: Path) -> None:
    from trimtab.data.write import write_rows

    with pytest.raises(DataError, match="do not fit into parquet"):
        write_rows(tmp_path / "x.parquet", [{"a": 1}, {"a": {"b": 2}}])


def test_a_template_that_rewrites_answers(tiny_folder: Callable[..., Path]) -> None:
    from trimtab.data import templates
    from trimtab.data.tokenizer import load_tokenizer
    from trimtab.types import Message

    tokenizer = load_tokenizer(
        tiny_folder("qwen2"), types.SimpleNamespace(use_fast_tokenizer=True, trust_remote_code=False)
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}<|im_end|>{% endfor %}"
    template = templates.get(None, tokenizer)
    with pytest.raises(TemplateError, match="changes answers in a way that cannot be followed"):
        template.render(
            [Message(role="user", content="a"), Message(role="assistant", content="b")], add_generation_prompt=False
        )


def test_the_wide_window_of_an_answer() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from tests.engine.test_blocks import SIZES
    from tests.engine.test_generator import PROMPTS
    from trimtab.engine.generator import Engine
    from trimtab.models.roles import Roles
    from trimtab.types import Sampling

    roles = Roles(model=MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval())
    roles.define("policy")
    engine = Engine(roles=roles, role="policy", stop_ids=(9999,))
    assert engine.generate(PROMPTS[:1], Sampling(max_new_tokens=5))
    with pytest.raises(ModelError, match="attention window of 8"):
        engine.generate(PROMPTS[:1], Sampling(max_new_tokens=6))


def test_float16_on_a_card_that_has_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.train import device

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="float16 training is not offered"):
        device.pick_dtype("float16", torch.device("cuda"))


def test_a_superuser_is_told_why() -> None:
    from trimtab.sql.postgres import superuser_refused

    assert "GRANT SELECT" in superuser_refused().remedy


def test_no_rows_to_plan_with(tmp_path: Path) -> None:
    from trimtab.plan.sample import look

    config = types.SimpleNamespace(
        dataset=(), dataset_dir=str(tmp_path), eval_dataset=(), val_size=0.0, max_samples=None, stage="sft"
    )
    with pytest.raises(DataError, match="no training rows"):
        look(config, str.encode)


def test_a_step_that_is_not_finite_leaves_its_rows(
    tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of nan in the second step: the run stops before it, names the rows, writes them, and keeps what was saved."""
    from trimtab import run_exp
    from trimtab.algos import sft

    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    plain, calls = sft.nll, []

    def spoilt(logp: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(logp) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(sft, "nll", spoilt)
    with pytest.raises(NumericsError, match="step 2") as caught:
        run_exp(
            {
                "model_name_or_path": str(tiny_folder("qwen2")), "stage": "sft", "do_train": True, "template": "chatml",
                "dataset": "qa", "dataset_dir": {"qa": {"file_name": str(tmp_path / "rows.json")}}, "output_dir": str(tmp_path / "run"),
                "max_steps": 3, "logging_steps": 1, "lora_rank": 2, "compute_dtype": "float32", "use_cpu": True,
                "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 1,
            }
        )  # fmt: skip
    written = json.loads((tmp_path / "run" / "failed_step.json").read_text("utf-8"))
    assert written["step"] == 2 and len(written["rows"]) == 2
    assert all("question" in json.dumps(row) for row in written["rows"])
    assert "failed_step.json" in caught.value.remedy
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
