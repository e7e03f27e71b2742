"""Full and freeze: the same numbers as plain PyTorch, two copies of the weights, and what is saved loads anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from trimtab import ChatModel
from trimtab.config import load
from trimtab.data.loader import batches
from trimtab.errors import ConfigError
from trimtab.models.heads import load_head
from trimtab.rundir import RunFolder
from trimtab.train.assemble import CRITIC, POLICY, REFERENCE, REWARD, assemble
from trimtab.train.offline import OfflineTrainer
from trimtab.train.online import OnlineTrainer

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]


def plain_sft(
    folder: str, session: Any, steps: int, rate: float, trained: Callable[[str], bool]
) -> tuple[Any, list[float]]:
    """The same steps written out with transformers and torch: cross-entropy over scored tokens, AdamW, a clipped gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)
    rows = session.data.train
    losses = []
    for number in range(steps):
        epoch, index = divmod(number, 3)
        chosen = [rows[i] for i in batches(len(rows), 3, 42, epoch, True)[index]]
        count = sum(len(row.scored) for row in chosen)
        total = torch.zeros(())
        for row in chosen:
            logits = model(torch.tensor([row.token_ids])).logits[0]
            at = torch.tensor(row.scored)
            total = total + F.cross_entropy(logits[at - 1], torch.tensor(row.token_ids)[at], reduction="sum") / count
        total.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return model, losses


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_sft_is_the_plain_computation_and_saves_an_ordinary_model(
    kind: str, keys: Keys, run: Run, tmp_path: Path
) -> None:
    more = {"finetuning_type": kind, "max_steps": 4, "lr_scheduler_type": "constant"}
    more |= {"freeze_trainable_layers": 1, "freeze_trainable_modules": "mlp", "freeze_extra_modules": "embed_tokens"}
    given = keys("sft", tmp_path / "run", **more)
    session = assemble(load(given))

    def trained(name: str) -> bool:
        return kind == "full" or "layers.1.mlp" in name or "embed_tokens" in name

    expected, losses = plain_sft(given["model_name_or_path"], session, 4, 1e-3, trained)
    folder = run("sft", tmp_path / "run", **more)
    found = [row["loss"] for row in folder.metrics() if row["kind"] == "train"]
    assert found == pytest.approx(losses, rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(given["model_name_or_path"], dtype=torch.float32)
    before = dict(start.named_parameters())
    for (name, a), b in zip(expected.named_parameters(), saved.parameters(), strict=True):
        # Steps of 1e-3: within a twentieth of one. Adam moves an element whose gradient is rounding noise as far as any other, so that
        # one in a thousand may be further off, on a CPU that rounds in another order.
        off = (b - a).abs()
        assert float((off > 5e-5).float().mean()) <= 1e-3, name
        assert float(off.max()) < 5e-4, name
        assert torch.equal(b, before[name]) != trained(name)
    assert not (folder.path / "adapter_config.json").exists()
    assert (folder.path / "tokenizer.json").is_file()


def test_the_trained_model_answers_as_it_did_in_training(keys: Keys, run: Run, tmp_path: Path) -> None:
    folder = run("sft", tmp_path / "run", finetuning_type="full", learning_rate=1e-2)
    model = {"model_name_or_path": str(folder.path), "template": "chatml", "compute_dtype": "float32", "use_cpu": True}
    asked = {"messages": [{"role": "user", "content": "a"}], "do_sample": False, "max_new_tokens": 8}
    by_folder = ChatModel(model).chat(**asked)
    by_file = ChatModel(load(keys("sft", tmp_path / "run", finetuning_type="full", learning_rate=1e-2))).chat(**asked)
    before = ChatModel({**model, "model_name_or_path": keys("sft", "x")["model_name_or_path"]}).chat(**asked)
    assert by_folder == by_file != before


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    kind: str, dtype: str, run: Run, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "finetuning_type": kind,
        "freeze_trainable_layers": 1,
        "compute_dtype": dtype,
        "max_steps": 4,
        "save_steps": 2,
    }
    whole = run("sft", tmp_path / "whole", **more)
    step = OfflineTrainer.step

    def until(self: Any, number: int) -> Any:
        if number == 3:
            raise Killed
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(OfflineTrainer, "step", until)
        with pytest.raises(Killed):
            run("sft", tmp_path / "part", **more)
    again = run("sft", tmp_path / "part", resume=True, **more)
    assert again.opened == "resumed"
    a = AutoModelForCausalLM.from_pretrained(whole.path)
    b = AutoModelForCausalLM.from_pretrained(again.path)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert [r["loss"] for r in whole.metrics("train")] == [r["loss"] for r in again.metrics("train")]
    start = AutoModelForCausalLM.from_pretrained(keys("sft", "x")["model_name_or_path"], dtype=a.dtype)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), start.parameters(), strict=True))
    saved = load_file(again.path / "checkpoint-4" / "state" / "weights.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}  # masters, whatever is computed in


# --------------------------------------------------------------------------------------------------------- reward model


@pytest.fixture(scope="module")
def full_rm(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full_rm") / "run"
    return run("rm", folder, finetuning_type="full", learning_rate=3e-3, max_steps=4).path


def test_a_full_reward_model_is_a_model_folder_with_its_head(full_rm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(full_rm, dtype=torch.float32)
    head, record = load_head(full_rm, 64)
    assert record.readout == "stop" and record.purpose == "reward"
    served = ChatModel(
        {
            "model_name_or_path": str(full_rm),
            "stage": "rm",
            "template": "chatml",
            "compute_dtype": "float32",
            "use_cpu": True,
        }
    )
    dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    (score,) = served.get_scores([dialogue])
    tokenizer = served.served.tokenizer
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    hidden = model.model(ids).last_hidden_state[0, -1]
    assert score == pytest.approx(float(head.summary(hidden).detach()), abs=1e-5)


def test_a_full_reward_model_is_trained_further_with_its_head(full_rm: Path, keys: Keys, tmp_path: Path) -> None:
    given = keys("rm", tmp_path / "x", finetuning_type="full", model_name_or_path=str(full_rm))
    head = assemble(load(given)).roles.specs[REWARD].head
    saved, _ = load_head(full_rm, 64)
    assert head is not None and torch.equal(head.summary.weight, saved.summary.weight)
    assert head.summary.weight.requires_grad


# ------------------------------------------------------------------------------------------------------------------ ppo


def storages(session: Any) -> int:
    """How many elements all models of a session hold, shared ones once."""
    tensors = {p.data_ptr(): p.numel() for model in session.roles.models() for p in model.parameters()}
    return sum(tensors.values())


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_ppo_holds_two_copies_and_moves_one(kind: str, keys: Keys, tmp_path: Path, rm_on_base: Path) -> None:
    more = {"finetuning_type": kind, "freeze_trainable_layers": 1, "reward_model": str(rm_on_base)}
    session = assemble(load(keys("ppo", tmp_path / "run", **more)))
    roles = session.roles
    assert roles.masters is not None
    trained = sum(p.numel() for p in roles.masters.parameters.values())
    base = sum(p.numel() for p in roles.model.parameters())
    assert storages(session) == base + trained  # what is not trained is shared
    assert roles.of(POLICY) is roles.model
    assert roles.of(REFERENCE) is roles.of(CRITIC) is roles.of(REWARD) is not roles.model
    start = {name: p.detach().clone() for name, p in roles.of(REFERENCE).named_parameters()}
    trainer = OnlineTrainer(session, RunFolder(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    figures = [trainer.step(0), trainer.step(1)]
    # the policy was the reference, was sampled from as it is now, and is sampled from as it has become
    assert figures[0]["kl/k1_sequence"] == pytest.approx(0, abs=1e-4)
    assert figures[0]["first_minibatch/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert figures[1]["kl/k1_sequence"] != pytest.approx(0, abs=1e-4)
    assert all(f["sampler_diff/max"] < 1e-4 for f in figures)
    assert all(torch.equal(start[name], p) for name, p in roles.of(REFERENCE).named_parameters())
    moved = {n for n, p in roles.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(roles.masters.parameters)


@pytest.fixture(scope="module")
def rm_on_base(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward adapter on the raw base."""
    return run("rm", tmp_path_factory.mktemp("rm_on_base") / "run", learning_rate=1e-2).path


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_ppo_in_full_ends_in_a_model_folder_and_a_critic(
    critic: str, run: Run, rm_on_base: Path, tmp_path: Path
) -> None:
    folder = run(
        "ppo", tmp_path / "run", finetuning_type="full", reward_model=str(rm_on_base), critic=critic,
        gradient_checkpointing=True,
    ).path  # fmt: skip
    AutoModelForCausalLM.from_pretrained(folder)
    assert (folder / "critic" / "adapter_model.safetensors").is_file() == (critic == "adapter")
    assert (folder / "value_head.safetensors").is_file() == (critic == "head")


def test_adapters_are_not_stacked_under_trained_weights(keys: Keys, sft_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter_name_or_path") as caught:
        load(keys("sft", tmp_path / "x", finetuning_type="full", adapter_name_or_path=str(sft_folder)))
    assert "merge it first" in caught.value.remedy


# ------------------------------------------------------------------------------------------------- other ways to train


@pytest.mark.parametrize("optim", ["sgd", "adagrad", "rmsprop"])
def test_other_optimizers_train_and_are_resumed(optim: str, run: Run, tmp_path: Path) -> None:
    more = {"optim": optim, "max_steps": 3, "save_steps": 1, "lr_scheduler_type": "cosine_with_min_lr"}
    more |= {"lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    whole = run("sft", tmp_path / "whole", **more)
    again = run("sft", tmp_path / "again", **more, resume_from_checkpoint=str(whole.checkpoint_path(2)))
    last = whole.metrics("train")[-1]
    assert last["loss"] == again.metrics("train")[-1]["loss"]
    assert last["lr"] == pytest.approx(1e-3 * (0.5 + 0.5 * 0.25))  # cos(2/3 pi) = -1/2


def test_a_full_policy_s_preferences_start_from_its_own_reference(run: Run, tmp_path: Path) -> None:
    folder = run("dpo", tmp_path / "run", finetuning_type="full")
    first, second = (row["loss"] for row in folder.metrics("train")[:2])
    assert first == pytest.approx(0.693147, abs=1e-5) and second != first  # log 2: the policy is its reference


def test_label_smoothing_is_that_of_transformers(keys: Keys, run: Run, tmp_path: Path) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    given = keys("sft", tmp_path / "x", label_smoothing_factor=0.1, finetuning_type="full", max_steps=1)
    session = assemble(load(given))
    chosen = [session.data.train[i] for i in batches(9, 3, 42, 0, True)[0]]
    width = max(len(row.token_ids) for row in chosen)
    ids = torch.tensor([[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in chosen])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(chosen):
        labels[i, list(row.scored)] = ids[i, list(row.scored)]
    model = AutoModelForCausalLM.from_pretrained(given["model_name_or_path"], dtype=torch.float32)
    loss = LabelSmoother(epsilon=0.1)({"logits": model(ids).logits}, labels, shift_labels=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    (row,) = run("sft", tmp_path / "run", label_smoothing_factor=0.1, finetuning_type="full", max_steps=1).metrics(
        "train"
    )
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert row["grad_norm/policy"] == pytest.approx(float(norm), rel=1e-4)
    plain = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert row["nll"] == pytest.approx(float(plain.detach()), rel=1e-5)


def test_neftune_is_noise_of_the_stated_size_in_training_alone(keys: Keys, tmp_path: Path) -> None:
    session = assemble(load(keys("sft", tmp_path / "x", neftune_noise_alpha=5)))
    embed = session.roles.model.get_input_embeddings()
    ids = torch.randint(0, 300, (1, 50), generator=torch.Generator().manual_seed(0))
    noise = (embed(ids) - embed.weight[ids]).detach()
    size = 5 / (50 * 64) ** 0.5
    assert float(noise.abs().max()) <= size + 1e-6
    assert float(noise.std()) == pytest.approx(size / 3**0.5, rel=0.05)
    with torch.no_grad():
        assert torch.equal(embed(ids), embed.weight[ids])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr_scheduler_kwargs": {"power": 2}}, "linear has no 'power'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}}, "'two'"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"loraplus_lr_ratio": 4, "finetuning_type": "full"}, "loraplus_lr_ratio"),
    ],
)
def test_settings_that_do_not_fit_are_told(given: dict[str, Any], says: str, keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(keys("sft", tmp_path / "x", **given))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"additional_target": "lm_head,embed_tokens", "lora_target": "q_proj"},
        {"finetuning_type": "full"},
    ],
    ids=["dora", "whole modules", "full"],
)
def test_what_samples_is_what_scores_after_an_update_too(
    more: dict[str, Any], run: Run, rm_on_base: Path, tmp_path: Path
) -> None:
    """Whatever is trained, the engine must read it as it is now."""
    folder = run("ppo", tmp_path / "run", reward_model=str(rm_on_base), learning_rate=1e-2, **more)
    rows = folder.metrics("train")
    assert abs(rows[1]["kl/k1_sequence"]) > 1e-3  # the first step moved the policy
    assert all(row["sampler_diff/max"] < 1e-4 for row in rows)
