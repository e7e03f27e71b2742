"""Online DPO: which answers are compared, its loss by hand in float64, ties, and a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trimtab.algos.online_dpo import OnlineDpo
from trimtab.config import load
from trimtab.errors import ConfigError
from trimtab.types import RolloutBatch, Scores

pytestmark = pytest.mark.unit


def batch(score: list[float], group: list[int], logp_ref: Any = None, mask: Any = None) -> RolloutBatch:
    rows = len(score)
    ref = torch.zeros(rows, 2, dtype=torch.float64) if logp_ref is None else torch.tensor(logp_ref, dtype=torch.float64)
    return RolloutBatch(
        mask=torch.ones(rows, 2, dtype=torch.bool) if mask is None else torch.tensor(mask),
        logp_old=ref,
        logp_ref=ref,
        score=torch.tensor(score, dtype=torch.float64),
        group=torch.tensor(group),
        finished=torch.ones(rows, dtype=torch.bool),
        kl_coef=0.0,
    )


def test_the_best_and_the_worst_of_each_prompt() -> None:
    found = batch([1.0, 3.0, 2.0, 3.0, -1.0, 5.0, 5.0, 5.0], [0, 0, 0, 0, 1, 1, 2, 2])
    assert OnlineDpo().pairs(found) == [1, 0, 5, 4]  # of equals the first; the third prompt is tied
    stats = OnlineDpo().credit(found).stats
    assert stats["pairs/used"] == 2.0
    assert stats["pairs/tied"] == pytest.approx(1 / 3)
    assert stats["pairs/lead"] == pytest.approx((2 + 6) / 2)
    assert OnlineDpo().pairs(batch([1.0, 1.0], [0, 0])) == []
    assert OnlineDpo().credit(batch([1.0, 1.0], [0, 0])).stats["pairs/tied"] == 1.0


def test_the_loss_by_hand() -> None:
    """beta 1/2, h_w = ln 9, h_l = 0: beta h = ln 3, loss ln 4/3, and each token of w has slope -beta (1 - 3/4) = -1/8, of l +1/8.

    The second token of l is padding and holds NaN.
    """
    ln3, nan = math.log(3), float("nan")
    logp = torch.tensor([[ln3 - 2, ln3 - 2], [-1.0, nan]], dtype=torch.float64, requires_grad=True)
    found = batch([1.0, 0.0], [0, 0], [[-2.0, -2.0], [-1.0, nan]], [[True, True], [True, False]])
    terms = OnlineDpo(beta=0.5).policy_loss(Scores(logp=logp, entropy=logp.detach()), found)
    torch.testing.assert_close(terms.loss, torch.tensor([math.log(4 / 3)], dtype=torch.float64))
    assert terms.means["margin"].item() == pytest.approx(ln3)
    assert terms.means["accuracy"].item() == 1.0
    terms.loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-1 / 8, -1 / 8], [1 / 8, 0.0]], dtype=torch.float64))
    smooth = OnlineDpo(beta=0.5, smoothing=0.25).policy_loss(Scores(logp=logp, entropy=logp.detach()), found)
    assert smooth.loss.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def config(**keys: Any) -> Any:
    needed = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True, "reward_model": "r"}
    return load({**needed, "stage": "online_dpo", **keys})


def test_its_keys() -> None:
    found = config(pref_beta=0.3, dpo_label_smoothing=0.1, group_size=6, ppo_epochs=2)
    assert OnlineDpo.from_config(found) == OnlineDpo(beta=0.3, smoothing=0.1, group_size=6, epochs=2)
    assert (config().group_size, config().ppo_epochs, config().kl_coef) == (4, 1, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("kl_coef", 0.1), ("kl_target", 6), ("kl_placement", "loss"), ("kl_estimator", "k3")),
        *(("kl_horizon", 5), ("entropy_coef", 0.1), ("group_size", 1), ("temperature", 0)),
    ],
)
def test_what_would_not_act_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: "):
        config(**{key: value})
