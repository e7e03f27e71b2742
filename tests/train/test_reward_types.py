"""Reward models of every kind, references that the file names, and the critic that comes of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from trimtab import ChatModel
from trimtab.config import load
from trimtab.errors import ConfigError, ModelError, RewardError
from trimtab.models.tiny import make_tiny
from trimtab.pipeline import run_exp
from trimtab.rewards.model import score_rows_as
from trimtab.rundir import RunFolder
from trimtab.train.assemble import CRITIC, POLICY, REFERENCE, REWARD, assemble
from trimtab.train.online import OnlineTrainer
from trimtab.types import TokenRow

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]


class Scores(BaseHTTPRequestHandler):
    """Longer answers are better; after `limit` requests the server is broken."""

    limit = 10_000
    seen: ClassVar[list[list[str]]] = []

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        Scores.seen.append(texts)
        works = len(Scores.seen) <= Scores.limit
        self.send_response(200 if works else 400)
        self.end_headers()
        if works:
            self.wfile.write(json.dumps({"scores": [len(text) / 100 for text in texts]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Scores.seen, Scores.limit = [], 10_000
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scores)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_server_rewards_whole_dialogues_that_end_in_their_end_marker(run: Run, url: str, tmp_path: Path) -> None:
    folder = run("ppo", tmp_path / "run", reward_model=url, reward_model_type="api", max_steps=1)
    (texts,) = Scores.seen
    assert len(texts) == 6
    assert all(text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>") for text in texts)
    (row,) = folder.metrics("train")
    assert row["reward/mean"] == pytest.approx(sum(len(t) for t in texts) / 600)
    assert row["reward/parts/api"] == row["reward/mean"]


def test_a_server_that_fails_leaves_a_checkpoint_and_the_run_goes_on_where_it_stopped(
    run: Run, url: str, tmp_path: Path
) -> None:
    more = {"reward_model": url, "reward_model_type": "api", "max_steps": 4, "save_steps": 100}
    whole = run("ppo", tmp_path / "whole", **more)
    Scores.seen, Scores.limit = [], 2
    with pytest.raises(RewardError, match="refuses"):
        run("ppo", tmp_path / "part", **more)
    part = RunFolder(tmp_path / "part")
    assert part.latest_checkpoint() == part.checkpoint_path(2)
    Scores.limit = 10_000
    again = run("ppo", tmp_path / "part", resume=True, **more)
    times = ("seconds", "seconds/sample", "seconds/reward", "seconds/score", "seconds/update")
    rows = [[{k: v for k, v in row.items() if k not in times} for row in f.metrics()] for f in (whole, again)]
    assert rows[0] == rows[1]


def test_without_a_reward_model_to_start_from_the_critic_is_warmed_up(
    run: Run, keys: Keys, url: str, sft_folder: Path, tmp_path: Path
) -> None:
    given = keys("ppo", tmp_path / "x", reward_model=url, reward_model_type="api", adapter_name_or_path=str(sft_folder))
    session = assemble(load(given))
    assert REWARD not in session.roles.specs
    head = session.roles.specs[CRITIC].head
    assert head is not None and not head.summary.weight.any() and not head.summary.bias.any()
    # the critic's trunk is the policy's as it starts, and its own from then on
    row = torch.tensor([[20, 31, 42]])
    states = []
    for role in (POLICY, CRITIC):
        with torch.no_grad(), session.roles.enter(role):
            states.append(session.roles.model.model(row).last_hidden_state)
    assert torch.equal(*states)
    assert not set(map(id, session.roles.trainable(POLICY).values())) & set(
        map(id, session.roles.trainable(CRITIC).values())
    )
    trainer = OnlineTrainer(session, RunFolder(tmp_path / "x"))
    (tmp_path / "x").mkdir()
    assert trainer.warmup == 5
    before = [p.detach().clone() for p in trainer.parameters[POLICY].values()]
    trainer.step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters[POLICY].values(), strict=True))
    assert head.summary.weight.any()


# ---------------------------------------------------------------------------------------------- a model of its own base


@pytest.fixture(scope="module")
def other_rm(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full reward model on another base (Qwen3's shape) with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    base = make_tiny("qwen3", folder / "base", seed=3)
    given = keys("rm", folder / "rm", finetuning_type="full", model_name_or_path=str(base), learning_rate=3e-3)
    return run_exp(given).path


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reward_model_of_another_base_scores_as_it_does_alone(
    kind: str, keys: Keys, other_rm: Path, tmp_path: Path
) -> None:
    given = keys("ppo", tmp_path / "x", reward_model=str(other_rm), reward_model_type="full", finetuning_type=kind)
    session = assemble(load(given))
    assert (
        session.roles.of(REWARD).config.model_type == "qwen3" and session.roles.of(POLICY).config.model_type == "qwen2"
    )
    assert session.record is not None and session.record.readout == "stop"
    alone = ChatModel({"model_name_or_path": str(other_rm), "stage": "rm", "compute_dtype": "float32", "use_cpu": True})
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    ids = tuple(session.tokenizer.encode(text, add_special_tokens=False))
    row = TokenRow(token_ids=ids, scored=(len(ids) - 1,))
    found = score_rows_as(session.roles, REWARD, [row], budget=100)
    assert found == pytest.approx(alone.get_scores([text]), abs=1e-6)
    assert session.fresh_critic
    assert session.roles.of(CRITIC) is session.roles.of(REFERENCE)


def test_ppo_runs_against_a_full_reward_model(run: Run, other_rm: Path, tmp_path: Path) -> None:
    folder = run("ppo", tmp_path / "run", reward_model=str(other_rm), reward_model_type="full", critic_warmup_steps=1)
    rows = folder.metrics("train")
    assert rows[0]["kl/k1_sequence"] == pytest.approx(0, abs=1e-4)
    assert (folder.path / "critic" / "value_head.safetensors").is_file()


def test_adapters_on_a_reward_model_of_its_own(keys: Keys, run: Run, rm_folder: Path, tmp_path: Path) -> None:
    """A reward adapter on its base, named as a full reward model with an adapter, is the same reward model."""
    base = keys("ppo", "x")["model_name_or_path"]
    more = {"reward_model_type": "full", "reward_model": base, "reward_model_adapters": str(rm_folder)}
    by_parts = assemble(load(keys("ppo", tmp_path / "x", **more)))
    by_adapter = assemble(load(keys("ppo", tmp_path / "x", reward_model=str(rm_folder))))
    rows = [TokenRow(token_ids=(20, 31, 42, 53), scored=(3,))]
    scores = [score_rows_as(s.roles, REWARD, rows, budget=100) for s in (by_parts, by_adapter)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert by_parts.fresh_critic and not by_adapter.fresh_critic


def test_another_tokenizer_is_refused(keys: Keys, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    given = keys("ppo", tmp_path / "x", ref_model=str(_renumbered(tiny_folder("qwen2"), tmp_path)), reward_model="r")
    with pytest.raises(ModelError, match="ref_model has another tokenizer"):
        assemble(load(given))


def _renumbered(source: Path, folder: Path) -> Path:
    """The model with two tokens of its vocabulary exchanged."""
    import shutil

    target = folder / "renumbered"
    shutil.copytree(source, target)
    file = target / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    vocab = stored["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(stored), encoding="utf-8")
    return target


def test_a_whole_model_named_as_an_adapter_says_what_to_write(keys: Keys, other_rm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a whole model") as caught:
        assemble(load(keys("ppo", tmp_path / "x", reward_model=str(other_rm))))
    assert caught.value.remedy == "reward_model_type: full"


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"reward_model": "http://h/"}, "reward_model_type"),
        ({"reward_model": "some/folder", "reward_model_type": "api"}, "reward_model_type"),
        ({"reward_model": "r", "reward_model_adapters": "a"}, "reward_model_adapters"),
    ],
)
def test_kinds_that_do_not_go_together(given: dict[str, str], where: str, keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(keys("ppo", tmp_path / "x", **given))
    assert caught.value.what.startswith(where)


# ----------------------------------------------------------------------------------------------------------- references


def logp(session: Any, role: str) -> torch.Tensor:
    from trimtab.models.forward import score_tokens

    with torch.no_grad(), session.roles.enter(role):
        scores = score_tokens(session.roles.model, [TokenRow(token_ids=(20, 31, 42, 53), scored=(1, 2, 3))])
    assert scores.logp is not None
    return scores.logp


def test_the_reference_may_be_the_bare_base_or_an_adapter_on_it(
    keys: Keys, sft_folder: Path, rm_folder: Path, tmp_path: Path
) -> None:
    base = keys("ppo", "x")["model_name_or_path"]
    common = {"reward_model": str(rm_folder)}
    bare = assemble(load(keys("ppo", tmp_path / "x", **common)))
    adapted = assemble(load(keys("ppo", tmp_path / "x", **common, adapter_name_or_path=str(sft_folder))))
    named = assemble(load(keys("ppo", tmp_path / "x", **common, adapter_name_or_path=str(sft_folder), ref_model=base)))
    by_adapter = assemble(load(keys("ppo", tmp_path / "x", **common, ref_model_adapters=str(sft_folder))))
    assert torch.allclose(logp(named, REFERENCE), logp(bare, REFERENCE))
    assert torch.allclose(logp(named, POLICY), logp(adapted, REFERENCE))
    assert not torch.allclose(logp(named, POLICY), logp(named, REFERENCE))
    assert torch.allclose(logp(by_adapter, REFERENCE), logp(adapted, REFERENCE))
    assert torch.allclose(logp(by_adapter, POLICY), logp(bare, REFERENCE))
    assert by_adapter.roles.of(REFERENCE) is by_adapter.roles.model  # no second copy
    assert named.roles.of(REFERENCE) is not named.roles.model


def test_ppo_measures_its_distance_from_the_reference_that_the_file_names(
    run: Run, other_rm: Path, rm_folder: Path, tmp_path: Path
) -> None:
    folder = run(
        "ppo", tmp_path / "run", reward_model=str(rm_folder), ref_model=str(other_rm.parent / "base"), max_steps=1
    )
    (row,) = folder.metrics("train")
    assert abs(row["kl/k1_sequence"]) > 1e-3
