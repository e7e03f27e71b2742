"""PPO runs: what must hold before anything has moved, what the reference is, and what the parts of a step are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.config import load
from trimtab.errors import NumericsError, RewardError
from trimtab.models import lora
from trimtab.rewards.model import ModelReward
from trimtab.rundir import RunFolder
from trimtab.train import online, rollout
from trimtab.train.assemble import CRITIC, POLICY, REFERENCE, REWARD, assemble
from trimtab.train.online import OnlineTrainer

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]


@pytest.fixture
def trainer(keys: Keys, sft_folder: Path, rm_folder: Path, tmp_path: Path) -> Callable[..., OnlineTrainer]:
    """`trainer(**more)`: a PPO trainer that continues the SFT adapter (`adapter_name_or_path=None`: the raw base)."""

    def make(**more: Any) -> OnlineTrainer:
        wanted = {"adapter_name_or_path": str(sft_folder), "reward_model": str(rm_folder), **more}
        return OnlineTrainer(assemble(load(keys("ppo", tmp_path, **wanted))), RunFolder(tmp_path))

    return make


def from_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score rollouts row by row, padded, while updates run in shared trees of many rows."""
    plain = rollout.score_role

    def scored(session: Any, *args: Any, **keys: Any) -> Any:
        before = session.budget, session.layout
        session.budget, session.layout = 1, "padded"
        try:
            return plain(session, *args, **keys)
        finally:
            session.budget, session.layout = before

    monkeypatch.setattr(rollout, "score_role", scored)


@pytest.mark.parametrize("critic", ["adapter", "head"])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("start", ["sft", "sft and a new adapter", "base"])
def test_before_anything_has_moved(
    start: str, critic: str, group_size: int, trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First minibatch of each update: ratio 1, nothing clipped, no KL, |policy loss| = |mean advantage|; step 0: KL 0."""
    from_another_layout(monkeypatch)
    more: dict[str, Any] = {"create_new_adapter": True} if start != "sft" else {}
    if start == "base":
        more = {"adapter_name_or_path": None}
    one = trainer(critic=critic, group_size=group_size, critic_warmup_steps=0, **more)
    assert one.session.layout == "shared"
    for number in range(2):
        figures = one.step(number)
        assert figures["first_minibatch/ratio_max"] == pytest.approx(1.0, abs=1e-5)
        assert figures["first_minibatch/clip_fraction"] == 0.0
        assert figures["first_minibatch/approx_kl"] == pytest.approx(0.0, abs=1e-9)
        loss, advantage = figures["first_minibatch/policy_loss"], figures["first_minibatch/advantage"]
        assert abs(loss) == pytest.approx(abs(advantage), abs=1e-6)
        assert loss == pytest.approx(-advantage, abs=1e-6)
        assert figures["sampler_diff/max"] < 1e-4  # what sampled is what scores
        if number == 0:
            assert figures["kl/k1_sequence"] == pytest.approx(0.0, abs=1e-5)
            assert figures["kl/k3_sequence"] == pytest.approx(0.0, abs=1e-9)
        else:
            assert figures["kl/k3_sequence"] > 1e-5
        assert figures["ratio/max"] > 1.0001  # later minibatches have moved


def test_a_whole_batch_as_one_minibatch(trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whitened advantages of the whole batch have mean 0, and so has the loss (rounding of float32: a few 1e-8)."""
    from_another_layout(monkeypatch)
    one = trainer(ppo_buffer_size=1, per_device_train_batch_size=9, max_new_tokens=12)
    figures = one.step(0)
    assert figures["first_minibatch/advantage"] == pytest.approx(0.0, abs=1e-7)
    assert figures["first_minibatch/policy_loss"] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("critic", ["adapter", "head"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_update_begins_with_the_pass_that_scored(
    critic: str, checkpointing: bool, trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One minibatch a rollout batch: no pass for the old log-probabilities, and the figures and weights of a run that makes it."""
    scored: list[str] = []
    score, collect = rollout.score_role, online.collect

    def watched(session: Any, role: str, *rest: Any, **named: Any) -> Any:
        scored.append(role)
        return score(session, role, *rest, **named)

    monkeypatch.setattr(rollout, "score_role", watched)
    found = []
    for held in (True, False):
        monkeypatch.setattr(
            online, "collect", lambda *rest, held=held, **named: collect(*rest, **{**named, "one_minibatch": held})
        )
        one = trainer(
            critic=critic, ppo_buffer_size=1, ppo_epochs=2, critic_warmup_steps=0, learning_rate=1e-2, adam_epsilon=1e-4,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        one.step(0)  # the reference has been left behind
        scored.clear()
        figures = one.step(1)
        assert ("policy" in scored) != held and "reference" in scored
        assert figures["first_minibatch/ratio_max"] == pytest.approx(1.0, abs=1e-5)
        weights = {f"{role}/{n}": p.detach().clone() for role, own in one.parameters.items() for n, p in own.items()}
        found.append(({n: x for n, x in figures.items() if not n.startswith("seconds/")}, weights))
    (figures, weights), (wanted, plain) = found
    assert figures == pytest.approx(wanted, rel=1e-3, abs=2e-4)
    for name, weight in weights.items():
        assert torch.allclose(weight, plain[name], atol=2e-5), name


def test_a_critic_in_warm_up_holds_no_pass(
    trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    collect = online.collect
    monkeypatch.setattr(
        online, "collect", lambda *a, **named: (found := collect(*a, **named), held.append(found.held))[0]
    )
    one = trainer(critic="head", ppo_buffer_size=1, critic_warmup_steps=1)
    one.step(0)
    one.step(1)
    assert held[0] is None and held[1] is not None
    assert held[1].scores is None  # its one backward pass is over


def test_the_reference_is_the_policy_at_the_start_of_the_stage(
    trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer()
    roles = one.session.roles
    start = {name: p.detach().clone() for name, p in lora.parameters(roles.model, "adapter0").items()}
    assert roles.specs[REFERENCE].adapters == ("adapter0",)
    seen: list[torch.Tensor] = []
    collect = online.collect

    def watched(*args: Any, **keys: Any) -> Any:
        collected = collect(*args, **keys)
        rows = collected.rows
        with torch.no_grad():  # the bare base, which the reference must not be
            roles.define("bare")
            bare = rollout.score_role(one.session, "bare", rows, temperature=1.0)["logp"]
        seen.extend([collected.batch.logp_ref, bare])
        return collected

    monkeypatch.setattr(online, "collect", watched)
    one.step(0)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    one.step(1)
    assert all(torch.equal(p, start[name]) for name, p in lora.parameters(roles.model, "adapter0").items())
    trained = lora.parameters(roles.model, "trained")
    assert any(not torch.equal(p, start[name]) for name, p in trained.items())


def test_only_the_policy_and_the_critic_move(trainer: Callable[..., OnlineTrainer]) -> None:
    one = trainer(lora_dropout=0.5)
    roles = one.session.roles
    names = ("adapter0", "trained", REWARD, CRITIC)
    before = {n: {k: p.detach().clone() for k, p in lora.parameters(roles.model, n).items()} for n in names}
    head = roles.specs[REWARD].head
    critic = roles.specs[CRITIC].head
    assert head is not None
    assert critic is not None
    # the critic starts as the reward model, head and centring included
    assert all(torch.equal(before[REWARD][k], before[CRITIC][k]) for k in before[REWARD])
    assert torch.equal(head.summary.bias, critic.summary.bias)
    assert torch.equal(head.summary.weight, critic.summary.weight)
    base = {name: p.detach().clone() for name, p in roles.model.named_parameters()}
    bias = head.summary.bias.clone()
    one.step(0)
    moved = {
        n for n in names if any(not torch.equal(p, before[n][k]) for k, p in lora.parameters(roles.model, n).items())
    }
    assert moved == {"trained", CRITIC}
    assert all(torch.equal(p, base[name]) for name, p in roles.model.named_parameters())
    assert torch.equal(head.summary.bias, bias)
    assert not torch.equal(critic.summary.bias, bias)


def test_results_do_not_depend_on_micro_batches(trainer: Callable[..., OnlineTrainer]) -> None:
    ways: list[dict[str, Any]] = [{"micro_batch_tokens": n} for n in (1, 60, 100_000)]
    ways += [{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}, {"gradient_checkpointing": True}]
    rows = []
    for way in ways:
        one = trainer(group_size=2, ppo_epochs=1, ppo_buffer_size=1, **way)
        rows.append({k: v for k, v in one.step(0).items() if not k.startswith(("seconds", "sampler_diff"))})
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-4, abs=1e-5)


def test_a_group_of_one_prompt_shares_its_number_and_its_order(trainer: Callable[..., OnlineTrainer]) -> None:
    one = trainer(group_size=2)
    figures = one.step(0)
    assert figures["completions"] == 12  # 3 x 2 prompts, 2 answers each
    assert 0.0 <= figures["zero_variance_groups"] <= 1.0


def test_a_critic_in_warm_up_moves_alone(trainer: Callable[..., OnlineTrainer]) -> None:
    for critic in ("adapter", "head"):
        one = trainer(critic=critic, critic_warmup_steps=1)
        before = {name: p.detach().clone() for name, p in one.parameters[POLICY].items()}
        values = {name: p.detach().clone() for name, p in one.parameters[CRITIC].items()}
        one.step(0)
        assert all(torch.equal(p, before[name]) for name, p in one.parameters[POLICY].items())
        assert any(not torch.equal(p, values[name]) for name, p in one.parameters[CRITIC].items())
        assert one.version == 0
        one.step(1)
        assert any(not torch.equal(p, before[name]) for name, p in one.parameters[POLICY].items())
    assert trainer(critic="head").warmup == 5
    assert trainer(critic="adapter").warmup == 0


def test_unfinished_answers_pay_the_penalty(
    trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(max_new_tokens=1, missing_eos_penalty=0.5)  # cut after a token: hardly an answer finishes
    batches: list[Any] = []
    collect = online.collect

    def watched(*args: Any, **keys: Any) -> Any:
        batches.append(collect(*args, **keys))
        return batches[-1]

    monkeypatch.setattr(online, "collect", watched)
    figures = one.step(0)
    collected = batches[0]
    assert figures["finished_rate"] < 1
    for rollout_, score, done in zip(collected.rollouts, collected.batch.score, collected.batch.finished, strict=True):
        assert float(score) == pytest.approx(rollout_.reward - (0.0 if done else 0.5), abs=1e-6)
    assert figures["score/mean"] == pytest.approx(
        figures["reward/mean"] - 0.5 * (1 - figures["finished_rate"]), abs=1e-6
    )


def test_adaptive_kl_by_hand(trainer: Callable[..., OnlineTrainer]) -> None:
    one = trainer(kl_target=6.0, kl_horizon=100)
    assert one.kl_coef == 0.2
    figures = one.step(0)
    assert figures["kl/coef"] == 0.2
    # KL 0 is more than 20 % below the target: 0.2 (1 - 0.2 x 6 / 100)
    assert one.kl_coef == pytest.approx(0.2 * (1 - 0.2 * 6 / 100))
    assert one.step(1)["kl/coef"] == pytest.approx(one.kl_coef / (1 - 0.2 * 3 / 100))


def test_a_temperature_divides_every_log_probability(
    trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_another_layout(monkeypatch)
    one = trainer(temperature=0.5, top_k=3, top_p=0.1, repetition_penalty=2.0)  # filters: not in rollouts
    figures = one.step(0)
    assert figures["sampler_diff/max"] < 1e-4
    assert figures["first_minibatch/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert figures["kl/k1_sequence"] == pytest.approx(0.0, abs=1e-5)


def test_a_reward_that_is_not_finite_names_its_row_before_any_update(
    trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer()
    before = {name: p.detach().clone() for name, p in one.parameters[POLICY].items()}
    monkeypatch.setattr(ModelReward, "score", lambda self, answers: [0.0, float("nan")] + [0.0] * (len(answers) - 2))
    with pytest.raises(RewardError, match="'model' of an answer is nan") as caught:
        one.step(0)
    assert "qa.json:" in caught.value.where
    assert all(torch.equal(p, before[name]) for name, p in one.parameters[POLICY].items())


def test_a_loss_that_is_not_finite_names_its_row(
    trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(ppo_buffer_size=1)
    collect = online.collect
    spoilt: list[str] = []

    def poisoned(*args: Any, **keys: Any) -> Any:
        collected = collect(*args, **keys)
        collected.batch.logp_old[1, 0] = float("-inf")  # ratio 0 / 0
        spoilt.append(str(collected.rollouts[1].prompt.example.origin))
        return collected

    monkeypatch.setattr(online, "collect", poisoned)
    before = {name: p.detach().clone() for name, p in one.parameters[POLICY].items()}
    with pytest.raises(NumericsError) as caught:
        one.step(0)
    assert spoilt[0] in caught.value.where
    assert all(torch.equal(p, before[name]) for name, p in one.parameters[POLICY].items())


def test_texts_are_keyed_by_prompt_and_epoch_not_by_place(trainer: Callable[..., OnlineTrainer]) -> None:
    one = trainer()
    prompts = one.prompts
    sampling = one.sampling(seed=1, epoch=0)
    generator = one.session.generator()
    texts = [c.token_ids for c in generator.generate(prompts, sampling)]
    assert [c.token_ids for c in generator.generate(prompts[::-1], sampling)] == texts[::-1]
    assert [c.token_ids for c in generator.generate(prompts, replace(sampling, epoch=1))] != texts


def test_an_evaluation_can_draw_several_answers_to_a_prompt(
    run: Run, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are scored by their place: of three prompts x 3 sampled answers the mean is 4, and 0, 3, 6 are the first of each prompt."""
    monkeypatch.setattr(ModelReward, "score", lambda self, answers: [float(i) for i in range(len(answers))])
    folder = run(
        "ppo", tmp_path / "r", reward_model=str(rm_folder), max_steps=1, eval_dataset="qa_eval", do_eval=True, eval_group_size=3,
        missing_eos_penalty=0.0,
    )  # fmt: skip
    (row,) = folder.metrics("eval")
    assert (row["eval/reward_greedy"], row["eval/reward_sampled"]) == (1.0, 4.0)
    shown = [row for row in folder.samples() if row["kind"] == "eval"]
    assert [row["reward_sampled"] for row in shown] == [0.0, 3.0, 6.0]
    assert [row["reward_greedy"] for row in shown] == [0.0, 1.0, 2.0]
