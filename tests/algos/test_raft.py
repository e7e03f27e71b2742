"""RAFT by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trimtab.algos.raft import Raft, best_of_groups
from trimtab.algos.surrogate import Surrogate
from trimtab.config import load
from trimtab.errors import ConfigError
from trimtab.ops.reduction import reduction_weights
from trimtab.types import RolloutBatch, Scores

pytestmark = pytest.mark.unit

BATCH = RolloutBatch(
    mask=torch.tensor([[True, True], [True, False], [True, True], [True, False]]),
    logp_old=torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-0.5, -0.5], [-2.0, 0.0]], dtype=torch.float64),
    logp_ref=torch.tensor([[-1.0, -1.0], [-3.0, 0.0], [-0.5, -0.5], [-2.0, 0.0]], dtype=torch.float64),
    score=torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64),
    group=torch.tensor([0, 0, 1, 1]),
    finished=torch.ones(4, dtype=torch.bool),
    kl_coef=0.0,
)


def gradient(algorithm: Raft, batch: RolloutBatch) -> list[list[float]]:
    logp = batch.logp_old.clone().requires_grad_()
    terms = algorithm.policy_loss(Scores(logp=logp, entropy=torch.full_like(logp, 0.5)), batch)
    loss = (terms.loss * reduction_weights(batch.mask, algorithm.reduction, dtype=torch.float64)).sum()
    found: list[list[float]] = torch.autograd.grad(loss, logp)[0].tolist()
    return found


def test_the_best_is_imitated_and_a_tie_teaches_nothing() -> None:
    """Row 1 has the higher score of the first prompt; the second prompt is tied. One token is left: its gradient is -1."""
    algorithm = Raft(group_size=2, kl_coef=0.0)
    credited = algorithm.credit(BATCH)
    assert credited.mask.tolist() == [[False, False], [True, False], [False, False], [False, False]]
    assert credited.stats["kept"] == 0.25
    assert gradient(algorithm, credited) == [[0, 0], [-1, 0], [0, 0], [0, 0]]


def test_the_kl_in_the_reward_moves_the_ranking() -> None:
    """Row 0 has left the reference by -1 nat, row 1 by +2: with beta 0.5 their rewards are 1 + 0.5 and 2 - 1. Two tokens, -1/2 each."""
    algorithm = Raft(group_size=2)
    credited = algorithm.credit(replace(BATCH, kl_coef=0.5))
    assert credited.mask.any(dim=-1).tolist() == [True, False, False, False]
    assert gradient(algorithm, credited)[0] == [-0.5, -0.5]


def test_the_kl_in_the_loss_does_not_but_pulls() -> None:
    """Row 1 stays the best; k2 = l^2 / 2 with l = 2 adds beta l = 1 to the gradient -1 of its token."""
    algorithm = Raft(group_size=2, kl_coef=0.5, how=Surrogate(kl_placement="loss", kl_estimator="k2"))
    credited = algorithm.credit(replace(BATCH, kl_coef=0.5))
    assert gradient(algorithm, credited)[1] == [0.0, 0.0]


def test_the_first_of_equals() -> None:
    reward, group = torch.tensor([2.0, 0.0, 2.0, 1.0]), torch.tensor([5, 5, 5, 5])
    assert best_of_groups(reward, group).tolist() == [True, False, False, False]


def test_one_answer_has_no_best() -> None:
    needed = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True, "reward_model": "r"}
    assert load({**needed, "stage": "raft"}).group_size == 4
    with pytest.raises(ConfigError, match="group_size"):
        load({**needed, "stage": "raft", "group_size": 1})
