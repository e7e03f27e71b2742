"""SFT, pre-training and reward models: losses by plain PyTorch, one result however a batch is cut, dropout where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab.config import load
from trimtab.errors import AdapterError, TrimtabError
from trimtab.models import lora
from trimtab.models.heads import load_head
from trimtab.rewards import Answer, finished_row
from trimtab.rewards.model import ModelReward, score_rows_as
from trimtab.rundir import RunFolder
from trimtab.train.assemble import REWARD, assemble
from trimtab.train.offline import OfflineTrainer
from trimtab.types import Completion, Prompt

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]


def trainer(keys: dict[str, Any]) -> OfflineTrainer:
    return OfflineTrainer(assemble(load(keys)))


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_the_first_loss_is_the_mean_nll_by_plain_pytorch(
    stage: str, keys: Keys, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    one = trainer(keys(stage, tmp_path, per_device_train_batch_size=9, micro_batch_tokens=70))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in one.rows[:9] if stage == "sft" else [one.rows[i] for i in first_batch(one)]:
            log_p = model(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
            total -= sum(float(log_p[index - 1, row.token_ids[index]]) for index in row.scored)
            count += len(row.scored)
    if stage == "sft":
        assert len(one.rows) == 9
        # the end marker is learnt, and the newline after it
        assert all(row.token_ids[-2] == 2 and row.scored[-1] == len(row.token_ids) - 1 for row in one.rows)
    assert one.step(0)["loss"] == pytest.approx(total / count, rel=1e-5)


def first_batch(one: OfflineTrainer) -> list[int]:
    from trimtab.data.order import batches

    config = one.session.config
    return batches(len(one.rows), config.batch_size, config.order_seed, 0)[0]


def test_the_first_rm_loss_by_plain_pytorch(keys: Keys, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    one = trainer(keys("rm", tmp_path, per_device_train_batch_size=9, center_rewards_coef=0.3))
    head = one.session.roles.specs[REWARD].head
    assert head is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"))
    losses = []
    with torch.no_grad():
        for pair in one.rows:
            chosen, rejected = (
                head(model(torch.tensor([row.token_ids]), output_hidden_states=True).hidden_states[-1][0, -1])
                for row in (pair.chosen, pair.rejected)
            )
            assert pair.chosen.token_ids[-1] == pair.rejected.token_ids[-1] == 2  # read at the end marker
            losses.append(-torch.log(torch.sigmoid(chosen - rejected)) + 0.3 * (chosen + rejected) ** 2)
    assert one.step(0)["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_results_do_not_depend_on_how_a_batch_is_cut(stage: str, keys: Keys, tmp_path: Path) -> None:
    """per_device 1, 2, 4, 8 x accumulation at one global batch, and any token budget: two steps of each."""
    ways: list[dict[str, Any]] = [
        {"per_device_train_batch_size": n, "gradient_accumulation_steps": 8 // n} for n in (1, 2, 4, 8)
    ]
    ways += [{"per_device_train_batch_size": 8, "micro_batch_tokens": budget} for budget in (1, 90, 200)]
    expected: tuple[list[dict[str, float]], dict[str, torch.Tensor]] | None = None
    for way in ways:
        one = trainer(keys(stage, tmp_path, **way))
        rows = [one.step(0), one.step(1)]
        weights = {name: p.detach().clone() for name, p in one.parameters.items()}
        if expected is None:
            expected = rows, weights
        for row, other in zip(rows, expected[0], strict=True):
            # the level of a reward model's scores has no gradient but that of rounding, which Adam blows up to steps of 1e-3
            for level in ("reward_chosen", "reward_rejected"):
                assert row.get(level, 0.0) == pytest.approx(other.get(level, 0.0), abs=2e-3)
            kept = {name: value for name, value in row.items() if not name.startswith("reward_")}
            assert kept == pytest.approx({name: other[name] for name in kept}, rel=1e-5, abs=1e-6)
        for name, tensor in weights.items():
            # Adam divides by the gradient's own size, so rounding of a tiny one is a visible part of a step of 1e-3
            atol = 2e-3 if name.startswith("head/") and name.endswith("bias") else 2e-5
            torch.testing.assert_close(tensor, expected[1][name], atol=atol, rtol=1e-4)


def test_dropout_acts_in_sft_and_nowhere_else(keys: Keys, tmp_path: Path, sft_folder: Path) -> None:
    start = {"adapter_name_or_path": str(sft_folder)}
    for stage, acts in (("sft", True), ("rm", False)):
        losses = {p: trainer(keys(stage, tmp_path, lora_dropout=p, **start)).step(0)["loss"] for p in (0.0, 0.5)}
        assert (losses[0.0] != losses[0.5]) == acts, stage
    one = trainer(keys("sft", tmp_path, lora_dropout=0.5, eval_dataset="qa_eval", eval_strategy="steps", **start))
    assert one.evaluate(0) == one.evaluate(0)  # and never in evaluation


def test_the_base_and_the_stack_below_are_bit_unchanged(keys: Keys, tmp_path: Path, sft_folder: Path) -> None:
    one = trainer(
        keys("sft", tmp_path, adapter_name_or_path=str(sft_folder), create_new_adapter=True, weight_decay=0.1)
    )
    model = one.session.roles.model
    named = dict(model.named_parameters())
    for adapter in ("adapter0", "trained"):
        named |= {f"{adapter}/{name}": p for name, p in lora.parameters(model, adapter).items()}
    before = {name: p.detach().clone() for name, p in named.items()}
    for number in range(2):
        one.step(number)
    changed = {name for name, p in named.items() if not torch.equal(p, before[name])}
    assert changed == {name for name in named if name.startswith("trained/")}
    assert len(changed) == 28


def test_a_saved_stack_is_the_trained_model(
    run: Run, keys: Keys, sft_folder: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """SFT on SFT: the folder holds one adapter, which plain peft puts on the raw base."""
    import peft

    more = {"adapter_name_or_path": str(sft_folder), "create_new_adapter": True, "learning_rate": 1e-2}
    folder = run("sft", tmp_path / "two", eval_dataset="qa_eval", do_eval=True, **more).path
    rows = trainer(keys("sft", tmp_path / "x", dataset="qa_eval")).rows
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2")), folder)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            log_p = model(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
            total -= sum(float(log_p[index - 1, row.token_ids[index]]) for index in row.scored)
            count += len(row.scored)
    assert RunFolder(folder).results("eval")["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_adapter_of_another_base_is_refused_by_content_not_by_path(
    keys: Keys, sft_folder: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    elsewhere = tmp_path / "the same base under another path"
    shutil.copytree(tiny_folder("qwen2"), elsewhere)
    assemble(load(keys("sft", tmp_path, adapter_name_or_path=str(sft_folder), model_name_or_path=str(elsewhere))))
    other = str(tiny_folder("qwen2", 1))  # the same shapes, other weights
    with pytest.raises(AdapterError, match="another base model"):
        assemble(load(keys("sft", tmp_path, adapter_name_or_path=str(sft_folder), model_name_or_path=other)))


def test_an_adapter_without_a_record_is_taken_by_shape_with_a_line(
    keys: Keys, sft_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    foreign = tmp_path / "foreign"
    shutil.copytree(sft_folder, foreign)
    (foreign / "base_model.json").unlink()
    assemble(load(keys("sft", tmp_path, adapter_name_or_path=str(foreign))))
    assert "no record of its base" in " ".join(capsys.readouterr().out.split())


def test_a_reward_model_is_centred_and_scores_alike_everywhere(
    run: Run, keys: Keys, rm_folder: Path, sft_folder: Path, tmp_path: Path
) -> None:
    """After training the chosen answers score 0 on average; evaluation, PPO and score_rows_as agree on equal tokens."""
    session = assemble(load(keys("ppo", tmp_path, adapter_name_or_path=str(sft_folder), reward_model=str(rm_folder))))
    one = trainer(keys("rm", tmp_path))
    pairs = one.rows
    rows = [pair.chosen for pair in pairs]
    scores = score_rows_as(session.roles, REWARD, rows, budget=session.budget, layout=session.layout)
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-5)
    # as PPO sees the same tokens
    answers = []
    for row in rows:
        start = row.scored[0]
        prompt = Prompt(index=0, token_ids=row.token_ids[:start], example=pairs[0].example)
        completion = Completion(
            prompt_index=0, sample_index=0, token_ids=row.token_ids[start:], logprobs=(), finish="stop"
        )
        answers.append(
            Answer(
                prompt=prompt,
                completion=completion,
                row=finished_row(prompt, completion, session.template.stop_ids, session.tail),
                text="",
            )
        )
    assert [a.row for a in answers] == rows
    assert ModelReward(session.roles, budget=40, layout="padded").score(answers) == pytest.approx(scores, abs=1e-4)
    # and as an evaluation of the reward model itself does, on an assembly of its own
    other = assemble(load(keys("rm", tmp_path, adapter_name_or_path=str(rm_folder))))
    head, record = load_head(rm_folder, 64)
    other.roles.define(REWARD, "adapter0", head=head)
    again = score_rows_as(other.roles, REWARD, rows, budget=70)
    assert again == pytest.approx(scores, abs=1e-4)
    assert record.readout == "stop"
    assert record.template == "chatml"


def test_the_figures_of_a_reward_model_by_hand(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(keys("rm", tmp_path))
    scores = [2.0, 1.0, 0.0, 1.0, 1.0, 1.0]  # leads 1, -1 and a tie, which is an error
    monkeypatch.setattr("trimtab.train.offline.score_rows_as", lambda *args, **keys: scores)
    figures = one.evaluate_judged(one.rows[:3], [])
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["margin"] == 0.0
    # log(1 + exp(-1)) = 0.3132617, log(1 + e) = 1.3132617, log 2 = 0.6931472
    assert figures["nll"] == figures["loss"] == pytest.approx((0.3132617 + 1.3132617 + 0.6931472) / 3, rel=1e-6)
    assert (figures["reward_chosen"], figures["reward_rejected"]) == (1.0, 1.0)


def test_reading_at_the_last_token_is_another_place(keys: Keys, tmp_path: Path) -> None:
    stop, last = (trainer(keys("rm", tmp_path, reward_readout=where)) for where in ("stop", "last"))
    newline = stop.session.tokenizer.encode("\n", add_special_tokens=False)
    flat = [[row for answers in one.answers(one.rows) for row in answers] for one in (stop, last)]
    for a, b in zip(*flat, strict=True):
        assert b.token_ids == (*a.token_ids, *newline)
        assert b.scored[-1] == len(b.token_ids) - 1
    assert stop.step(0)["loss"] != last.step(0)["loss"]


def test_a_run_without_a_step_is_an_error(run: Run, data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text('{"qa": {"file_name": "qa.json"}}', encoding="utf-8")
    (folder / "qa.json").write_text('[{"instruction": "a", "output": ""}]', encoding="utf-8")
    with pytest.raises(TrimtabError, match="1 read - 1 dropped = 0"):
        run("sft", tmp_path / "out", dataset_dir=str(folder))


def test_no_adapters_no_model_of_another_kind(keys: Keys, sft_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no value head"):
        assemble(load(keys("ppo", tmp_path, reward_model=str(sft_folder))))


def test_continuing_an_adapter_starts_where_it_ended(keys: Keys, sft_folder: Path, tmp_path: Path) -> None:
    one = trainer(keys("sft", tmp_path, adapter_name_or_path=str(sft_folder)))
    assert one.session.roles.specs["policy"].adapters == ("trained",)
    start = lora.parameters(one.session.roles.model, "adapter0")
    trained = lora.parameters(one.session.roles.model, "trained")
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    assert not any(p.requires_grad for p in start.values())
    new = trainer(keys("sft", tmp_path, adapter_name_or_path=str(sft_folder), create_new_adapter=True))
    assert new.session.roles.specs["policy"].adapters == ("adapter0", "trained")
    assert new.evaluate(0) == {}


def test_neat_packing_has_the_loss_of_the_same_rows_unpacked(run: Callable[..., RunFolder], tmp_path: Path) -> None:
    """Two packs of some rows each in one batch, and the same rows loose in one batch: every figure of the step is the same."""
    same = {"disable_shuffling": True, "max_steps": 3, "cutoff_len": 200}
    loose = run("sft", tmp_path / "loose", per_device_train_batch_size=9, **same)
    neat = run("sft", tmp_path / "neat", per_device_train_batch_size=9, neat_packing=True, **same)
    for a, b in zip(figures(loose), figures(neat), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm/policy"] == pytest.approx(b["grad_norm/policy"], rel=1e-4)
    joined = run("sft", tmp_path / "joined", per_device_train_batch_size=9, packing=True, **same)
    assert figures(joined)[0]["tokens"] == figures(loose)[0]["tokens"]
    assert figures(joined)[0]["loss"] != pytest.approx(figures(loose)[0]["loss"], rel=1e-4)  # rows see each other


def test_a_batch_counts_packs(run: Callable[..., RunFolder], tmp_path: Path) -> None:
    folder = run(
        "sft", tmp_path / "run", per_device_train_batch_size=1, neat_packing=True, max_steps=-1, num_train_epochs=1
    )
    rows = figures(folder)
    assert 1 < len(rows) < 9
    seen = [0, *(row["tokens"] for row in rows)]  # counted from the start
    assert all(0 < b - a <= 64 for a, b in pairwise(seen))


def figures(folder: RunFolder) -> list[dict[str, Any]]:
    return [row for row in folder.metrics() if "loss" in row]
