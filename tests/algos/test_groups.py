"""RLOO, GRPO and its presets, REINFORCE++ and ReMax on plain tensors: credit and loss by hand, gradients too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from trimtab.algos.grpo import Grpo
from trimtab.algos.reinforce_pp import ReinforcePp
from trimtab.algos.remax import Remax
from trimtab.algos.rloo import Rloo
from trimtab.algos.surrogate import Surrogate
from trimtab.ops.reduction import reduction_weights
from trimtab.types import RolloutBatch, Scores

pytestmark = pytest.mark.unit

MASK = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
NAN = float("nan")


def tensor(rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def batch(**fields: Any) -> RolloutBatch:
    """Two prompts with two answers each; one answer has a single token, its padding is nan."""
    given: dict[str, Any] = {
        "mask": MASK,
        "logp_old": tensor([[-1.0, -2.0], [-1.0, NAN], [-0.5, -0.5], [-3.0, -1.0]]),
        "logp_ref": tensor([[-1.5, -2.0], [-2.0, NAN], [-0.5, -1.5], [-3.0, -0.5]]),
        "score": tensor([2.0, 1.0, 0.0, 4.0]),
        "group": torch.tensor([0, 0, 1, 1]),
        "finished": torch.tensor([True, True, False, True]),
        "kl_coef": 0.1,
        **fields,
    }
    return RolloutBatch(**given)


# log-ratios to the reference, summed: 0.5 + 0 = 0.5; 1; 0 + 1 = 1; 0 - 0.5 = -0.5. Rewards less 0.1 of them:
REWARDS = [1.95, 0.9, -0.1, 4.05]


def near(found: torch.Tensor | None, expected: Any) -> None:
    assert found is not None
    assert torch.allclose(found, tensor(expected), atol=1e-12, rtol=0), found


def gradient(algorithm: Any, credited: RolloutBatch, shift: float = 0.0) -> tuple[float, torch.Tensor]:
    """The reduced loss where every logp is `shift` above the old one, and its gradient."""
    logp = (torch.where(MASK, credited.logp_old, torch.zeros(())) + shift).requires_grad_()
    terms = algorithm.policy_loss(Scores(logp=logp, entropy=torch.ones_like(logp)), credited)
    weights = reduction_weights(credited.mask, algorithm.reduction, max_length=4, dtype=torch.float64)
    loss = (terms.loss * weights).sum()
    loss.backward()
    assert logp.grad is not None
    return float(loss.detach()), logp.grad


class TestRloo:
    def test_credit(self) -> None:
        credited = Rloo(group_size=2).credit(batch())
        near(credited.advantages, [[1.05, 1.05], [-1.05, 0], [-4.15, -4.15], [4.15, 4.15]])
        assert credited.stats["kl"] == pytest.approx((0.5 + 1 + 1 - 0.5) / 4)
        assert credited.stats["kl_per_token"] == pytest.approx(2 / 7)

    def test_an_answer_is_one_action(self) -> None:
        """At rho = 1: loss = -mean A = 0, gradient -A / 4 at every token of the answer, whatever its length."""
        algorithm = Rloo(group_size=2)
        loss, grad = gradient(algorithm, algorithm.credit(batch()))
        assert loss == pytest.approx(0, abs=1e-12)
        near(grad, [[-0.2625, -0.2625], [0.2625, 0], [1.0375, 1.0375], [-1.0375, -1.0375]])

    def test_a_reused_batch_has_the_ratio_of_the_answer(self) -> None:
        """Every logp 0.05 up: rho = e^0.1 for two tokens, e^0.05 for one. None is clipped at 0.2."""
        algorithm = Rloo(group_size=2)
        loss, grad = gradient(algorithm, algorithm.credit(batch()), shift=0.05)
        two, one = math.exp(0.1), math.exp(0.05)
        assert loss == pytest.approx((-1.05 * two + 1.05 * one + 4.15 * two - 4.15 * two) / 4)
        near(grad[0], [-1.05 * two / 4] * 2)
        # 0.1 up: e^0.2 = 1.221 is past 1.2: where A > 0 the gradient is gone, where A < 0 it is not
        loss, grad = gradient(algorithm, algorithm.credit(batch()), shift=0.1)
        assert grad[0].tolist() == grad[3].tolist() == [0, 0]
        near(grad[2], [4.15 * math.exp(0.2) / 4] * 2)

    def test_kl_in_the_loss(self) -> None:
        """Then the rewards are the scores; the loss gains beta times the sum over tokens of the estimate: here k1, gradient beta."""
        how = Surrogate(level="sequence", kl_placement="loss", kl_estimator="k1")
        algorithm = Rloo(group_size=2, how=how)
        credited = algorithm.credit(batch())
        near(credited.advantages, [[1, 1], [-1, 0], [-4, -4], [4, 4]])
        loss, grad = gradient(algorithm, credited)
        assert loss == pytest.approx(0.1 * (0.5 + 1 + 1 - 0.5) / 4)
        near(grad[1], [(1 + 0.1) / 4, 0])

    def test_truncated_answers_are_credited_and_not_trained_on(self) -> None:
        algorithm = Rloo(group_size=2, mask_truncated=True)
        credited = algorithm.credit(batch())
        assert credited.mask.tolist() == [[True, True], [True, False], [False, False], [True, True]]
        near(credited.advantages, [[1.05, 1.05], [-1.05, 0], [0, 0], [4.15, 4.15]])
        _, grad = gradient(algorithm, credited)
        assert grad[2].tolist() == [0, 0]
        near(grad[3], [-4.15 / 3] * 2)  # a mean over the three answers that are left

    def test_without_a_penalty_it_needs_no_reference(self) -> None:
        algorithm = Rloo(group_size=2, kl_coef=0.0)
        assert not algorithm.needs.reference
        near(algorithm.credit(batch(logp_ref=None, kl_coef=0.0)).advantages, [[1, 1], [-1, 0], [-4, -4], [4, 4]])


class TestGrpo:
    def test_credit(self) -> None:
        """Scores 2, 1: mean 1.5, deviation sqrt(1/2); 0, 4: mean 2, deviation sqrt(8). The KL is not in the reward."""
        a, b = 0.5 / (math.sqrt(0.5) + 1e-4), 2 / (math.sqrt(8) + 1e-4)
        near(Grpo(group_size=2).credit(batch()).advantages, [[a, a], [-a, 0], [-b, -b], [b, b]])

    def test_mean_over_answers_of_their_means(self) -> None:
        """At rho = 1, -A / (4 x tokens) each, and the gradient of beta k3: beta (1 - exp(-(logp - logp_ref)))."""
        algorithm = Grpo(group_size=2)
        credited = algorithm.credit(batch())
        a = float(credited.advantages[0, 0])  # type: ignore[index]
        _, grad = gradient(algorithm, credited)
        near(grad[0], [(-a + 0.1 * (1 - math.exp(-0.5))) / 8, -a / 8])
        near(grad[1], [(a + 0.1 * (1 - math.exp(-1.0))) / 4, 0])

    def test_dr_grpo(self) -> None:
        """Not divided, and every token weighs 1 / (4 answers x 4 tokens at most)."""
        algorithm = Grpo(group_size=2, kl_coef=0.0, normalisation="none", token_reduction="constant")
        credited = algorithm.credit(batch(kl_coef=0.0))
        near(credited.advantages, [[0.5, 0.5], [-0.5, 0], [-2, -2], [2, 2]])
        _, grad = gradient(algorithm, credited)
        near(grad, [[-0.5 / 16] * 2, [0.5 / 16, 0], [2 / 16] * 2, [-2 / 16] * 2])

    def test_dapo_clips_higher(self) -> None:
        """rho = e^0.2 = 1.221: within 1.28, past 1.2 and so cut off with a symmetric clip. Mean over all 7 tokens."""
        wide = Grpo(
            group_size=2, kl_coef=0.0, normalisation="none", token_reduction="token", how=Surrogate(clip_high=0.28)
        )
        credited = wide.credit(batch(kl_coef=0.0))
        _, grad = gradient(wide, credited, shift=0.2)
        near(grad[3], [-2 * math.exp(0.2) / 7] * 2)
        _, grad = gradient(replace(wide, how=Surrogate()), credited, shift=0.2)
        assert grad[3].tolist() == [0, 0]
        near(grad[2], [2 * math.exp(0.2) / 7] * 2)

    def test_gspo(self) -> None:
        """One ratio per answer, exp of the mean log-ratio: at rho = 1 the gradient is -A / (4 x tokens)."""
        how = Surrogate(level="sequence_mean", clip_low=3e-4, clip_high=4e-4)
        algorithm = Grpo(group_size=2, kl_coef=0.0, normalisation="none", how=how)
        assert algorithm.reduction == "row"
        credited = algorithm.credit(batch(kl_coef=0.0))
        _, grad = gradient(algorithm, credited)
        near(grad, [[-0.5 / 8] * 2, [0.5 / 4, 0], [2 / 8] * 2, [-2 / 8] * 2])
        _, grad = gradient(algorithm, credited, shift=3.5e-4)  # within the upper bound
        near(grad[3], [-2 * math.exp(3.5e-4) / 8] * 2)
        _, grad = gradient(algorithm, credited, shift=4.5e-4)
        assert grad[3].tolist() == [0, 0]

    def test_cispo(self) -> None:
        """-min(rho, 1.1) A logp, mean over 7 tokens: with rho = e^0.2 the gradient is 1.1 A / 7 and never 0."""
        how = Surrogate(objective="cispo", cispo_cap=1.1)
        algorithm = Grpo(group_size=2, kl_coef=0.0, normalisation="none", token_reduction="token", how=how)
        _, grad = gradient(algorithm, algorithm.credit(batch(kl_coef=0.0)), shift=0.2)
        near(grad, [[-1.1 * 0.5 / 7] * 2, [1.1 * 0.5 / 7, 0], [1.1 * 2 / 7] * 2, [-1.1 * 2 / 7] * 2])

    def test_equal_scores_give_no_gradient_and_no_nan(self) -> None:
        algorithm = Grpo(group_size=2, kl_coef=0.0)
        loss, grad = gradient(algorithm, algorithm.credit(batch(score=tensor([1.0, 1.0, 3.0, 3.0]), kl_coef=0.0)))
        assert loss == 0 and not grad.any()

    def test_entropy_bonus(self) -> None:
        """Entropy 1 at every token, coefficient 0.5: the loss falls by 0.5."""
        plain = Grpo(group_size=2, kl_coef=0.0)
        credited = plain.credit(batch(kl_coef=0.0))
        with_bonus = replace(plain, how=replace(plain.how, entropy_coef=0.5))
        assert gradient(with_bonus, credited)[0] == pytest.approx(gradient(plain, credited)[0] - 0.5)

    def test_dual_clip_of_tokens(self) -> None:
        how = Surrogate(dual_clip=1.5)
        algorithm = Grpo(group_size=2, kl_coef=0.0, normalisation="none", token_reduction="token", how=how)
        credited = algorithm.credit(batch(kl_coef=0.0))
        _, grad = gradient(algorithm, credited, shift=math.log(2.0))  # rho = 2: -A rho = 4 where A = -2, bounded at 3
        assert grad[2].tolist() == [0, 0]


class TestReinforcePp:
    def test_credit(self) -> None:
        """Rewards to go: 2 - 0.05 and 2; 0.9; -0.1 twice; 4.05 twice. All seven to mean 0 and variance 1."""
        credited = ReinforcePp().credit(batch(group=torch.arange(4)))
        returns = [1.95, 2.0, 0.9, -0.1, -0.1, 4.05, 4.05]
        mean = sum(returns) / 7
        std = math.sqrt(sum((x - mean) ** 2 for x in returns) / 7)
        scaled = [(x - mean) / std for x in returns]
        assert credited.advantages is not None
        assert credited.advantages[MASK].tolist() == pytest.approx(scaled, rel=1e-6)
        assert credited.advantages[1, 1] == 0
        assert credited.stats["return_mean"] == pytest.approx(mean)

    def test_discount(self) -> None:
        """gamma = 0.5, no penalty: the first of two tokens has half of the score; three finished scores 2, 1, 4 and a 0."""
        credited = ReinforcePp(gamma=0.5).credit(batch(kl_coef=0.0, group=torch.arange(4)))
        returns = [1.0, 2.0, 1.0, 0.0, 0.0, 2.0, 4.0]
        mean = sum(returns) / 7
        assert credited.stats["return_mean"] == pytest.approx(mean)
        advantages = credited.advantages
        assert advantages is not None
        assert float(advantages[3, 1] - advantages[3, 0]) > 0 > float(advantages[0, 0] - advantages[0, 1])

    def test_with_a_group_its_mean_goes_first(self) -> None:
        """Scores 2, 1, 0, 4 become 0.5, -0.5, -2, 2."""
        credited = ReinforcePp(group_size=2).credit(batch(kl_coef=0.0))
        returns = [0.5, 0.5, -0.5, -2, -2, 2, 2]
        mean = sum(returns) / 7
        std = math.sqrt(sum((x - mean) ** 2 for x in returns) / 7)
        assert credited.advantages is not None
        assert credited.advantages[MASK].tolist() == pytest.approx([(x - mean) / std for x in returns], rel=1e-6)

    def test_gradient(self) -> None:
        algorithm = ReinforcePp()
        credited = algorithm.credit(batch(group=torch.arange(4)))
        assert credited.advantages is not None
        _, grad = gradient(algorithm, credited)
        near(grad, (-credited.advantages / 7).tolist())


class TestRemax:
    def test_credit_and_gradient(self) -> None:
        """Rewards 1.95, 0.9, -0.1, 4.05 less the greedy scores 1, 1, 2, 2."""
        algorithm = Remax(group_size=2)
        assert algorithm.needs.greedy
        credited = algorithm.credit(batch(greedy=tensor([1.0, 1.0, 2.0, 2.0])))
        near(credited.advantages, [[0.95, 0.95], [-0.1, 0], [-2.1, -2.1], [2.05, 2.05]])
        loss, grad = gradient(algorithm, credited)
        assert loss == pytest.approx(-(0.95 - 0.1 - 2.1 + 2.05) / 4)
        near(grad, [[-0.95 / 4] * 2, [0.1 / 4, 0], [2.1 / 4] * 2, [-2.05 / 4] * 2])

    def test_it_never_clips(self) -> None:
        algorithm = Remax(group_size=2)
        credited = algorithm.credit(batch(greedy=tensor([1.0, 1.0, 2.0, 2.0])))
        for shift in (-3.0, 3.0):
            _, grad = gradient(algorithm, credited, shift=shift)
            near(grad[0], [-0.95 * math.exp(2 * shift) / 4] * 2)


class TestPlacesAndBounds:
    """Settings away from an algorithm's own: where the KL is, which bound is which, what is left out."""

    def test_grpo_with_the_kl_in_the_reward(self) -> None:
        """Rewards 1.95, 0.9 and -0.1, 4.05 less their means 1.425 and 1.975."""
        how = Surrogate(kl_placement="reward", kl_estimator="k1")
        credited = Grpo(group_size=2, normalisation="none", how=how).credit(batch())
        near(credited.advantages, [[0.525, 0.525], [-0.525, 0], [-2.075, -2.075], [2.075, 2.075]])

    def test_reinforce_pp_with_the_kl_in_the_loss(self) -> None:
        """Scores 2, 1, 0, 4 at each of their tokens, less their mean 13/7, over their deviation; k2 adds beta l to the gradient."""
        algorithm = ReinforcePp(how=Surrogate(kl_placement="loss", kl_estimator="k2"))
        credited = algorithm.credit(batch(group=torch.arange(4)))
        std = math.sqrt((2 * 2**2 + 1 + 2 * 4**2) / 7 - (13 / 7) ** 2)
        a = [(score - 13 / 7) / std for score in (2, 1, 0, 4)]
        assert credited.advantages is not None
        assert torch.allclose(credited.advantages, tensor([[a[0]] * 2, [a[1], 0], [a[2]] * 2, [a[3]] * 2]), atol=1e-6)
        _, grad = gradient(algorithm, credited)
        pull = [[0.05, 0.0], [0.1, 0.0], [0.0, 0.1], [0.0, -0.05]]  # beta times the log-ratio
        expected = [[(pull[i][t] - a[i]) / 7 if MASK[i][t] else 0.0 for t in range(2)] for i in range(4)]
        assert torch.allclose(grad, tensor(expected), atol=1e-6)

    def test_terms_beside_a_mean_ratio_are_means(self) -> None:
        """k2 of the answers, averaged over their tokens: 0.0625, 0.5, 0.25, 0.0625; an entropy of 1 a token counts once an answer."""
        how = Surrogate(level="sequence_mean", kl_placement="loss", kl_estimator="k2", entropy_coef=0.02)
        algorithm = Grpo(group_size=2, normalisation="none", how=how)
        loss, grad = gradient(algorithm, algorithm.credit(batch()))
        assert loss == pytest.approx(0.1 * 0.21875 - 0.02)
        # advantages 0.5, -0.5, -2, 2, halved where an answer has two tokens; beta l with them; four answers
        near(
            grad,
            [[(0.05 - 0.5) / 8, -0.5 / 8], [(0.1 + 0.5) / 4, 0], [2 / 8, (0.1 + 2) / 8], [-2 / 8, (-0.05 - 2) / 8]],
        )

    @pytest.mark.parametrize("make", [Grpo, Rloo])
    def test_the_upper_bound_is_for_what_gains(self, make: Any) -> None:
        """Bounds 0.1 below and 0.4 above: 1.35 is within for a gain; 0.82 is beyond for a loss, whose gradient ends."""
        algorithm = make(group_size=2, kl_coef=0.0, normalisation="none", how=Surrogate(clip_low=0.1, clip_high=0.4))
        credited = algorithm.credit(batch(kl_coef=0.0))
        _, up = gradient(algorithm, credited, shift=0.3)
        assert (up[0] < 0).all() and (up[3] < 0).all()
        _, down = gradient(algorithm, credited, shift=-0.2)
        assert (down[2] == 0).all() and down[1, 0] == 0
        assert (down[0] < 0).all()

    def test_grpo_leaves_truncated_answers_out(self) -> None:
        """The third answer did not end: it is in its group's mean, and in no loss."""
        algorithm = Grpo(group_size=2, normalisation="none", kl_coef=0.0, mask_truncated=True)
        credited = algorithm.credit(batch(kl_coef=0.0))
        assert credited.mask.tolist() == [[True, True], [True, False], [False, False], [True, True]]
        _, grad = gradient(algorithm, credited)
        near(grad[2], [0.0, 0.0])
        near(grad[3], [-2 / 2 / 3] * 2)


def test_describe_says_what_moves_the_optimum() -> None:
    assert "1 / length" in Rloo(how=Surrogate(level="token"), token_reduction="sequence").describe()
    assert "1 / length" not in Rloo(how=Surrogate(level="token")).describe()
    assert "difficulty" in Grpo().describe() and "forward-KL" in Grpo().describe()
    assert "argmax" in Grpo(kl_coef=0.0).describe()
    assert "difficulty" not in Rloo().describe() and "pi_ref exp(reward / beta)" in Rloo().describe()
    assert "difficulty" in Rloo(normalisation="group").describe()
