"""Rewards: the row that is read, the one score of it, and what is made of the score."""

from __future__ import annotations

import pytest
import torch

from trimtab.models import lora
from trimtab.models.heads import ValueHead
from trimtab.models.roles import Roles
from trimtab.models.tiny import FAMILIES, Family, tiny_model
from trimtab.rewards import Answer, finished_row, with_tail
from trimtab.rewards.model import ModelReward, score_rows_as
from trimtab.rewards.shaping import shape_scores
from trimtab.types import Completion, Example, Finish, Origin, Prompt, TokenRow

pytestmark = pytest.mark.unit

STOP, OTHER = 2, 1
PROMPT = Prompt(index=0, token_ids=(30, 31, 32), example=Example(origin=Origin(file="f", row=1)))


def completion(*ids: int, finish: Finish) -> Completion:
    return Completion(prompt_index=0, sample_index=0, token_ids=ids, logprobs=(-1.0,) * len(ids), finish=finish)


@pytest.mark.parametrize(
    ("ids", "finish"),
    [((40, 41, STOP), "stop"), ((40, 41), "length"), ((40, 41, OTHER), "other_stop"), ((40, 41), "other_stop")],
    ids=["finished", "cut", "other stop token", "stop string"],
)
def test_every_ending_is_read_as_if_finished(ids: tuple[int, ...], finish: Finish) -> None:
    row = finished_row(PROMPT, completion(*ids, finish=finish), (STOP, OTHER))
    assert row == TokenRow(token_ids=(30, 31, 32, 40, 41, STOP), scored=(3, 4, 5))


def test_what_another_tool_reads_after_the_end_marker() -> None:
    row = finished_row(PROMPT, completion(40, STOP, finish="stop"), (STOP,), (198,))
    assert row == TokenRow(token_ids=(30, 31, 32, 40, STOP, 198), scored=(3, 4, 5))
    assert with_tail(row, ()) is row


def shape(raw: list[float], done: list[bool], **keys: object) -> list[float]:
    wanted: dict[str, object] = {
        "mean": 0.0,
        "std": 1.0,
        "normalise": False,
        "clip": None,
        "missing_eos_penalty": 1.0,
        "missing_eos_mode": "subtract",
        **keys,
    }
    return shape_scores(raw, done, **wanted)  # type: ignore[arg-type]


def test_shaping_by_hand() -> None:
    raw, done = [4.0, -6.0, 4.0], [True, True, False]
    assert shape(raw, done) == [4.0, -6.0, 3.0]
    assert shape(raw, done, missing_eos_penalty=2.5) == [4.0, -6.0, 1.5]
    assert shape(raw, done, missing_eos_mode="replace") == [4.0, -6.0, -1.0]
    assert shape(raw, done, clip=5.0) == [4.0, -5.0, 3.0]
    assert shape(raw, done, clip=3.0) == [3.0, -3.0, 2.0]  # the penalty comes after the clip: never clipped away
    assert shape(raw, done, normalise=True, mean=2.0, std=4.0) == [0.5, -2.0, -0.5]
    assert shape(raw, done, normalise=True, mean=2.0, std=4.0, clip=1.0) == [0.5, -1.0, -0.5]
    # what a length near the limit costs comes last: beside the penalty, never clipped away
    assert shape(raw, done, clip=3.0, overlong=[0.0, 0.5, 0.25]) == [3.0, -3.5, 1.75]
    assert shape([2.0, 2.0], [True, False], normalise=True, mean=2.0, std=0.0) == [0.0, -1.0]  # nothing has varied yet


def judge(family: Family = "qwen2") -> Roles:
    model = tiny_model(family).requires_grad_(False)
    roles = Roles(model=model)
    lora.new_adapter(
        model, "reward", paths=lora.inject(model, ["all"], roles.switch), rank=3, alpha=6, rslora=False, seed=0
    )
    for parameter in lora.parameters(model, "reward").values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    roles.define("reward", "reward", head=ValueHead(64, seed=2))
    return roles


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_padding_batch_or_layout(family: Family) -> None:
    roles = judge(family)
    rows = []
    for n in range(9):
        prompt = tuple(range(20, 23 + n % 3 * 4))
        answer = (*range(50, 51 + n), STOP)
        scored = tuple(range(len(prompt), len(prompt) + len(answer)))
        rows.append(TokenRow(token_ids=(*prompt, *answer), scored=scored))
    alone = [score_rows_as(roles, "reward", [row], budget=1)[0] for row in rows]
    assert len({round(score, 4) for score in alone}) == 9
    for layout in ("padded", "packed", "shared"):
        for budget in (1, 40, 10_000):
            assert score_rows_as(roles, "reward", rows, budget=budget, layout=layout) == pytest.approx(alone, abs=1e-4)
            back = score_rows_as(roles, "reward", rows[::-1], budget=budget, layout=layout)
            assert back == pytest.approx(alone[::-1], abs=1e-4)
    pairs = score_rows_as(roles, "reward", rows[:8], budget=60, layout="shared", unit=2)
    assert pairs == pytest.approx(alone[:8], abs=1e-4)


def test_an_unfinished_completion_scores_exactly_the_penalty_below_the_same_text_finished() -> None:
    reward = ModelReward(judge(), budget=1000, layout="shared")
    ways = [completion(40, 41, 42, STOP, finish="stop"), completion(40, 41, 42, finish="length")]
    ways.append(completion(40, 41, 42, OTHER, finish="other_stop"))
    answers = [Answer(prompt=PROMPT, completion=c, row=finished_row(PROMPT, c, (STOP, OTHER)), text="") for c in ways]
    raw = reward.score(answers)
    assert raw[0] == raw[1] == raw[2]
    shaped = shape(raw, [c.finished for c in ways], missing_eos_penalty=0.75)
    assert [shaped[0] - s for s in shaped[1:]] == pytest.approx([0.75, 0.75], abs=1e-12)


def test_a_role_without_a_head_gives_no_rewards() -> None:
    roles = judge()
    roles.define("policy", "reward")
    with pytest.raises(RuntimeError, match="no head"):
        score_rows_as(roles, "policy", [TokenRow(token_ids=(1, 2), scored=(1,))], budget=10)
