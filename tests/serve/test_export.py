"""Exported folders: equal to base and adapter, ordinary to other tools, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import ChatModel
from trimtab.config import load
from trimtab.data import templates
from trimtab.data.tokenizer import load_tokenizer
from trimtab.errors import ConfigError, RunError
from trimtab.models import lora
from trimtab.models.heads import load_head
from trimtab.serve.export import as_jinja, export, merge
from trimtab.types import Message

pytestmark = pytest.mark.unit

IDS = torch.tensor([[1, 40, 41, 42, 2, 60, 61, 62]])


def hf_logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


@pytest.fixture
def exported(args: dict[str, Any], tmp_path: Path) -> Path:
    return export(load({**args, "export_dir": str(tmp_path / "merged")}))


def test_it_is_base_and_adapter_in_one_for_plain_transformers(exported: Path, base: Path, policy: Path) -> None:
    merged, beside = hf_logits(exported), hf_logits(base, policy)
    assert (merged - beside).abs().max() < 1e-5
    assert (merged - hf_logits(base)).abs().max() > 0.1


def test_it_answers_as_before(exported: Path, args: dict[str, Any]) -> None:
    asked = [{"role": "user", "content": "哪些镇名?"}]
    before = ChatModel(args).chat(asked, do_sample=False)
    del args["adapter_name_or_path"]
    after = ChatModel({**args, "model_name_or_path": str(exported)}).chat(asked, do_sample=False)
    assert after == before


def test_tokenizer_template_and_generation_config_go_with_it(exported: Path, base: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    stops = GenerationConfig.from_pretrained(exported).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ([stops] if isinstance(stops, int) else stops)
    assert not [path.name for path in exported.iterdir() if "adapter" in path.name or "value_head" in path.name]


def test_stops_of_another_template_are_added(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import GenerationConfig

    llama = tiny_folder("llama")  # its own end of turn is <|eot_id|>
    args = {"model_name_or_path": str(llama), "template": "chatml", "export_dir": str(tmp_path / "merged")}
    folder = export(load(args))
    tokenizer = load_tokenizer(folder)
    wanted = [tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|im_end|>")]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == wanted


def test_a_reward_model_keeps_its_head(reward_args: dict[str, Any], reward: Path, tmp_path: Path) -> None:
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    before = ChatModel(reward_args).get_scores([dialogue])
    folder = export(load({**reward_args, "export_dir": str(tmp_path / "merged")}))
    head, record = load_head(folder, 64)
    old, old_record = load_head(reward, 64)
    assert torch.equal(head.summary.weight, old.summary.weight)
    assert record == old_record
    del reward_args["adapter_name_or_path"]
    after = ChatModel({**reward_args, "model_name_or_path": str(folder)}).get_scores([dialogue])
    assert after == pytest.approx(before, abs=1e-4)


def test_the_type_is_the_models_own_unless_asked_for(
    args: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del args["compute_dtype"]
    for name, more, written in (("own", {}, "float32"), ("asked", {"compute_dtype": "bfloat16"}, "bfloat16")):
        folder = export(load({**args, **more, "export_dir": str(tmp_path / name)}))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["dtype"] == written
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "asked" / "model.safetensors").values()} == {torch.bfloat16}
    again = export(
        load({**args, "model_name_or_path": str(tmp_path / "asked"), "adapter_name_or_path": None,
              "export_dir": str(tmp_path / "again")})
    )  # fmt: skip
    assert json.loads((again / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def one_layer(change: float) -> torch.nn.Module:
    """A model of one layer of ones, 4 x 4, with an adapter that adds `change` everywhere."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=True))
    switch = lora.Switch()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    lora.inject(model, ("0",), switch)
    layer: Any = model[0]
    layer.adapters["a"] = lora.Adapter(torch.ones(1, 4), torch.full((4, 1), change / 2), 2.0, trainable=False)
    return model


def test_how_much_of_a_change_survives_rounding() -> None:
    # between 1 and 2 bfloat16 has steps of 2^-7: 2^-9 is lost, 3 * 2^-9 becomes 2^-7, 2^-7 stays
    for change, kept in ((2.0**-9, 0.0), (3 * 2.0**-9, 4 / 3), (2.0**-7, 1.0)):
        model = one_layer(change)
        assert merge(model, ("a",), torch.bfloat16) == pytest.approx(kept)
        weight: Any = model.get_parameter("0.weight")
        assert float(weight[0, 0]) == 1 + change * kept
        assert model.get_parameter("0.bias").dtype == torch.bfloat16
        assert sorted(model.state_dict()) == ["0.bias", "0.weight"]
    model = one_layer(0.5)
    assert merge(model, (), torch.float32) == 1.0


def test_small_shards(args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    from transformers import PreTrainedModel

    asked: list[str] = []
    save = PreTrainedModel.save_pretrained

    def spy(self: Any, folder: Any, *, max_shard_size: str, **more: Any) -> None:
        asked.append(max_shard_size)
        save(self, folder, max_shard_size="100KB", **more)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spy)
    folder = export(load({**args, "export_dir": str(tmp_path / "merged"), "export_size": 2}))
    assert asked == ["2GB"]
    assert (folder / "model.safetensors.index.json").is_file()
    assert hf_logits(folder).shape == (1, 8, 300)


def test_it_is_whole_or_not_there(args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="export_dir"):
        export(load(args))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="not empty"):
        export(load({**args, "export_dir": str(full)}))
    assert [path.name for path in full.iterdir()] == ["mine.txt"]

    empty = tmp_path / "empty"
    empty.mkdir()
    settings = load({**args, "export_dir": str(empty)})

    def broken(*words: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", broken)
        with pytest.raises(RunError, match="could not be written") as caught:
            export(settings)
    assert "No space left" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert not any(empty.iterdir())
    export(settings)
    assert (empty / "config.json").is_file()


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2", "qwen"), ("qwen2", "chatml"), ("llama", "llama3"), ("llama", "default")]
)
def test_a_tokenizer_without_a_chat_template_gets_the_files(
    tiny_folder: Callable[..., Path], family: str, name: str
) -> None:
    tokenizer: Any = load_tokenizer(tiny_folder(family))
    template: Any = templates.get(name, tokenizer)
    tokenizer.chat_template = as_jinja(template)
    dialogue = [
        Message(role="system", content="s 'q' \"d\"\n"),
        Message(role="user", content="问 {{ x }}"),
        Message(role="assistant", content="a"),
        Message(role="user", content="\n v"),
    ]
    for messages in (dialogue, dialogue[1:], dialogue[:3]):
        listed = [{"role": m.role, "content": m.content} for m in messages]
        for asked in (True, False):
            theirs = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=asked)
            assert theirs == template.text(messages, add_generation_prompt=asked)


def test_which_chat_template_is_kept_is_said(
    args: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(load({**args, "export_dir": str(tmp_path / "same")}))
    assert "chat template" not in capsys.readouterr().out
    export(load({**args, "template": "qwen", "export_dir": str(tmp_path / "other")}))  # another system message
    assert "own chat template is kept" in capsys.readouterr().out
