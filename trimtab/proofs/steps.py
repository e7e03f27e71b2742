"""Expected steps as a run takes them: the algorithm built from the keys of a file, its loss reduced as the loops reduce it.

`gradients.py` asks what a formula is on average; here the preset, the baseline, the normalisation and the reduction that a config chooses
are part of what is measured. Two kinds of expectation:

    expected_step   over all groups of k answers that could be drawn, each an optimizer step of its own
    whole_batch     one batch in which every answer occurs as often as its probability says: moments that are taken over the batch
                    (whitening) are then those of the policy, and a token mean divides by a constant

Shapes: y answers, s prefixes, a tokens, b rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from trimtab.algos import ALGORITHMS
from trimtab.config import load
from trimtab.ops.reduction import reduction_weights
from trimtab.proofs.claims import EXACT, Claim, at_least, at_most, worst
from trimtab.proofs.problem import END, Problem, far, prefixes, random_problem, true_gradient
from trimtab.types import RolloutBatch, Scores

COUNTS = (3, 1, 4, 1, 5, 2, 6)
"""How often each answer of `random_problem` (two letters, depth 2) occurs in a batch that is the whole distribution."""


@cache
def algorithm(stage: str, **keys: object) -> Any:
    """The algorithm that a file with these keys runs."""
    needed = {"model_name_or_path": "table", "dataset": "questions", "output_dir": "nowhere", "do_train": True}
    config: Any = load({**needed, "stage": stage, "reward_funcs": "rewards.py:right", **keys})
    return ALGORITHMS.load(stage).from_config(config)


# -------------------------------------------------------------------------------------------------------- expectations


def expected_step(problem: Problem, algo: Any, logits: Tensor, *, now: Tensor | None = None) -> Tensor:
    """The mean over all draws of a group of the gradient `[s a]` that an optimizer step on that group descends.

    Args:
        logits: the policy that draws.
        now: the policy that steps, where it has moved since.
    """
    k = algo.group_size
    draws = torch.tensor(list(product(range(len(problem.answers)), repeat=k)))
    rows = draws.flatten()
    batch = algo.credit(rollouts(problem, logits, rows, torch.arange(len(draws)).repeat_interleave(k)))
    # every group has k rows with a token each, so its mean is that over all rows times the number of groups; not so a token mean,
    # whose denominator depends on the other answers of the batch
    assert algo.reduction != "token", "a mean over tokens: whole_batch"
    weights = len(draws) * reduction_weights(batch.mask, algo.reduction, max_length=problem.depth, dtype=torch.float64)
    chance = problem.logps(logits).detach().exp()[draws].prod(dim=-1).repeat_interleave(k)
    weights = weights * (chance.unsqueeze(-1) if weights.ndim == 2 else chance)
    return _gradient(problem, algo, logits if now is None else now, rows, batch, weights)


def whole_batch(
    problem: Problem,
    algo: Any,
    logits: Tensor,
    counts: Tensor,
    values: Tensor | None = None,
    *,
    now: Tensor | None = None,
) -> tuple[Tensor, RolloutBatch]:
    """The gradient `[s a]` that a step on one batch descends in which answer y occurs `counts[y]` times, and that batch, credited.

    Args:
        logits: a policy with the probabilities counts / their sum.
        values: what a critic says after each prefix `[s]`.
        now: the policy that steps, where it has moved since.
    """
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    batch = algo.credit(rollouts(problem, logits, rows, torch.arange(len(rows)), values))
    weights = reduction_weights(batch.mask, algo.reduction, max_length=problem.depth, dtype=torch.float64)
    return _gradient(problem, algo, logits if now is None else now, rows, batch, weights), batch


def rollouts(
    problem: Problem, logits: Tensor, rows: Tensor, group: Tensor, values: Tensor | None = None
) -> RolloutBatch:
    """The rollout batch in which the answers `rows` were drawn from the policy `logits`; its padding is nan, which nothing may read."""
    seen = values if values is not None else torch.zeros(len(problem.logits_ref), dtype=torch.float64)
    return RolloutBatch(
        mask=problem.mask[rows],
        logp_old=problem.padded(problem.token_logps(logits).detach())[rows],
        logp_ref=problem.padded(problem.token_logps(problem.logits_ref))[rows],
        values=problem.padded(seen[places(problem)])[rows],
        score=problem.rewards[rows],
        greedy=problem.rewards[problem.logps(logits).argmax()].expand(len(rows)),
        group=group,
        finished=torch.tensor([answer.endswith(END) for answer in problem.answers])[rows],
        kl_coef=problem.beta,
    )


def places(problem: Problem) -> Tensor:
    """`[y t]`: the number of the prefix that each token follows; 0 on padding."""
    number = {prefix: i for i, prefix in enumerate(prefixes(problem.letters, problem.depth))}
    rows = [[number[answer[:i]] for i in range(len(answer))] for answer in problem.answers]
    return torch.tensor([[*row, *[0] * (problem.depth - len(row))] for row in rows])


def _gradient(
    problem: Problem, algo: Any, logits: Tensor, rows: Tensor, batch: RolloutBatch, weights: Tensor
) -> Tensor:
    logits = logits.detach().clone().requires_grad_()
    logp = problem.padded(problem.token_logps(logits))[rows]
    entropy = problem.padded(entropies(logits)[places(problem)])[rows]
    loss = algo.policy_loss(Scores(logp=logp, entropy=entropy), batch).loss
    total = (loss * weights).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    # a loss that is nan stops a run before its gradient is looked at; nothing is near nan
    return gradient if bool(total.isfinite()) else torch.full_like(gradient, torch.nan)


def entropies(logits: Tensor) -> Tensor:
    """`[s]`: the entropy of the token after each prefix."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def visits(problem: Problem, logits: Tensor) -> Tensor:
    """`[s]`: how likely an answer is to go on from each prefix."""
    chance = problem.logps(logits).exp()[:, None] * problem.mask
    return torch.zeros(len(logits), dtype=torch.float64).index_add(0, places(problem).flatten(), chance.flatten())


def unexplained(step: Tensor, truth: Tensor) -> float:
    """|step - c truth| / |step| with the c that makes it least: 0 for a multiple, 1 for a right angle."""
    step, truth = step.flatten(), truth.flatten()
    return float((step - (step @ truth) / (truth @ truth) * truth).norm() / step.norm())


# --------------------------------------------------------------------------------------------------------- 1: gradients


def steps() -> list[Claim]:
    """More of item 1."""
    problem, logits = random_problem(1, depth=2), random_problem(2, depth=2).logits_ref
    free = replace(problem, beta=0.0)
    truth, reward_only = true_gradient(problem, logits), true_gradient(free, logits)
    rloo = [far(expected_step(problem, algorithm("rloo", group_size=k), logits), truth) for k in (2, 3)]
    bare = expected_step(problem, algorithm("rloo", group_size=2, baseline="none"), logits)
    dr_grpo = expected_step(free, algorithm("grpo", preset="dr_grpo", group_size=3), logits)
    by_length = expected_step(free, algorithm("grpo", group_size=3, advantage_norm="none", kl_coef=0.0), logits)
    return [
        at_most(1, "RLOO from a file's keys, reduced as in the loop, k = 2 and 3: that of J", worst(rloo), EXACT),
        at_most(1, "... and with baseline: none", far(bare, truth), EXACT),
        at_most(
            1,
            "preset: dr_grpo, its sum over tokens / limit, k = 3: (k - 1)/k of that of E r",
            far(problem.depth * dr_grpo, 2 / 3 * reward_only),
            EXACT,
        ),
        at_least(
            1,
            "GRPO's mean over an answer's own tokens: share that no multiple of that of E r explains",
            unexplained(by_length, reward_only),
            0.01,
        ),
        _shifted(problem, logits),
        *_several_prompts(),
        *_whitened(problem, logits),
        *_critic(problem),
        _stale(free, logits),
        _presets(free, logits),
    ]


def _shifted(problem: Problem, logits: Tensor) -> Claim:
    """A baseline has no mean effect, so nothing above would miss it; without one, 10 more for every answer would move advantages."""
    richer = replace(problem, rewards=problem.rewards + 10)
    moved = []
    for stage, keys in (
        ("rloo", {"group_size": 2}),
        ("grpo", {"group_size": 2}),
        ("grpo", {"group_size": 2, "preset": "dr_grpo"}),
        ("reinforce_pp", {}),
        ("reinforce_pp", {"group_size": 2}),
        ("remax", {}),
        ("raft", {"group_size": 2}),
        ("ppo", {"gae_lambda": 1.0}),
    ):
        algo = algorithm(stage, **keys)
        draws = torch.tensor(list(product(range(len(problem.answers)), repeat=algo.group_size)))
        group = torch.arange(len(draws)).repeat_interleave(algo.group_size)
        plain, rich = (algo.credit(rollouts(p, logits, draws.flatten(), group)).advantages for p in (problem, richer))
        moved.append(far(plain, rich))
    return at_most(
        1,
        "10 more for every answer changes no advantage of ppo, rloo, grpo, reinforce_pp, remax and raft",
        worst(moved),
        1e-10,
    )


def _several_prompts() -> list[Claim]:
    """Prompts of unlike difficulty in one step, each with parameters of its own."""
    together: dict[str, tuple[list[Tensor], list[Tensor]]] = {"group": ([], []), "none": ([], [])}
    for p in (0.05, 0.2, 0.5, 0.8, 0.95):
        quiz = Problem(
            letters="a",
            depth=1,
            logits_ref=torch.zeros(1, 2, dtype=torch.float64),
            rewards=torch.tensor([0.0, 1.0], dtype=torch.float64),
            beta=0.0,
        )
        logits = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
        for norm, (found, truth) in together.items():
            found.append(expected_step(quiz, algorithm("grpo", kl_coef=0.0, advantage_norm=norm), logits))
            truth.append(true_gradient(quiz, logits))
    share = {norm: unexplained(torch.cat(found), torch.cat(truth)) for norm, (found, truth) in together.items()}
    return [
        at_least(
            1, "GRPO on five prompts at once: share that no multiple of that of E r explains", share["group"], 0.05
        ),
        at_most(1, "... with advantage_norm: none", share["none"], EXACT),
    ]


def _whitened(problem: Problem, logits: Tensor) -> list[Claim]:
    """Whitening takes a constant off advantages and divides by another: along the gradient of J, if the batch is the whole policy.

    An exact critic knows the mean of what is to come; with it the errors of one step have no bias, whatever lambda.
    """
    counts, policy = _whole_policy(problem)
    truth = true_gradient(problem, policy)
    exact, wrong = state_values(problem, policy), torch.linspace(-1, 1, len(policy), dtype=torch.float64)
    reinforce, _ = whole_batch(problem, algorithm("reinforce_pp"), policy, counts)
    ppo, _ = whole_batch(problem, algorithm("ppo", gae_lambda=1.0), policy, counts, wrong)
    plain = algorithm("ppo", gae_lambda=0.5, whiten_advantages=False)
    # a token mean: the mean over answers divided by their mean length
    length = int((counts[:, None] * problem.mask).sum()) / int(counts.sum())
    short, _ = whole_batch(problem, plain, policy, counts, exact)
    return [
        at_most(
            1,
            "REINFORCE++, the batch the whole policy: share that no multiple of that of J explains",
            unexplained(reinforce, truth),
            1e-10,
        ),
        at_most(1, "PPO, whitened, lambda = 1, a wrong critic: the same", unexplained(ppo, truth), 1e-10),
        at_most(
            1, "PPO with the exact critic, lambda = 0.5, not whitened: that of J", far(length * short, truth), EXACT
        ),
    ]


def _whole_policy(problem: Problem) -> tuple[Tensor, Tensor]:
    """COUNTS, and the policy whose batch they are."""
    counts = torch.tensor(COUNTS)
    return counts, problem.table_of((counts.double() / counts.sum()).log())


def _critic(problem: Problem) -> list[Claim]:
    """PPO's critic, a free number for each prefix: with lambda = 1 it is drawn to what is still to come there, as often as it is asked."""
    counts, policy = _whole_policy(problem)
    exact, wrong = state_values(problem, policy), torch.linspace(-1, 1, len(policy), dtype=torch.float64)
    seen = visits(problem, policy)

    def pull(lam: float, values: Tensor) -> Tensor:
        algo = algorithm("ppo", gae_lambda=lam, vf_coef=0.25)
        _, batch = whole_batch(problem, algo, policy, counts, values)
        free = values.clone().requires_grad_()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        loss = algo.value_loss(problem.padded(free[places(problem)])[rows], batch).loss
        weights = reduction_weights(batch.mask, algo.reduction, dtype=torch.float64)
        return torch.autograd.grad((loss * weights).sum(), free)[0]

    towards = 0.25 * seen * (wrong - exact) / seen.sum()
    return [
        at_most(
            1,
            "PPO's critic, lambda = 1: drawn to the exact values, vf_coef x visits x error",
            far(pull(1.0, wrong), towards),
            EXACT,
        ),
        at_most(1, "... and at rest there whatever lambda is", float(pull(0.5, exact).abs().max()), EXACT),
    ]


def _stale(free: Problem, old: Tensor) -> Claim:
    """Answers of an older policy, no clip in the way: ratios make the step that of the policy as it is now.

    A ratio of the whole answer does that exactly; ratios of tokens where an answer is one token.
    """
    now = random_problem(3, depth=2).logits_ref
    wide: dict[str, object] = {"clip_range_low": 1 - 1e-9, "clip_range_high": 1e9}
    truth = true_gradient(free, now)
    found = [
        far(expected_step(free, algorithm("rloo", group_size=2, **wide), old, now=now), truth),
        far(expected_step(free, algorithm("remax"), old, now=now), truth),
    ]
    one = random_problem(4, letters="abcd", depth=1, beta=0.0)
    old, now = (
        random_problem(5, letters="abcd", depth=1).logits_ref,
        random_problem(6, letters="abcd", depth=1).logits_ref,
    )
    truth = true_gradient(one, now)
    undivided: dict[str, object] = {
        "group_size": 2,
        "kl_coef": 0.0,
        "advantage_norm": "none",
        "loss_reduction": "constant",
    }
    for keys in (wide, {"preset": "cispo", "cispo_cap": 1e6}):
        found.append(far(2 * expected_step(one, algorithm("grpo", **undivided, **keys), old, now=now), truth))
    counts = torch.tensor((2, 1, 4, 3, 1))
    drawn = one.table_of((counts.double() / counts.sum()).log())
    ppo = algorithm("ppo", whiten_advantages=False, **wide)
    found.append(far(whole_batch(one, ppo, drawn, counts, torch.ones(1, dtype=torch.float64), now=now)[0], truth))
    return at_most(
        1, "stale answers, unclipped: RLOO, ReMax, GRPO, CISPO and PPO step as the policy is now", worst(found), 1e-10
    )


def _presets(free: Problem, logits: Tensor) -> Claim:
    """On fresh answers every ratio is 1, and variants that differ in ratio and clip alone take the same step."""
    constant: dict[str, object] = {"group_size": 2, "loss_reduction": "constant"}
    pairs = (
        ({"preset": "gspo", "group_size": 2}, {"group_size": 2, "kl_coef": 0.0}),
        ({"preset": "cispo", **constant}, {"kl_coef": 0.0, **constant}),
    )
    found = [
        far(
            expected_step(free, algorithm("grpo", **one), logits),
            expected_step(free, algorithm("grpo", **other), logits),
        )
        for one, other in pairs
    ]
    return at_most(1, "GSPO and CISPO on fresh answers: GRPO's own step", worst(found), EXACT)


def state_values(problem: Problem, logits: Tensor) -> Tensor:
    """`[s]`: the mean of what is still to come after each prefix, reward less beta KL."""
    logp = problem.token_logps(logits)
    paid = problem.beta * (logp - problem.token_logps(problem.logits_ref))
    to_come = problem.rewards[:, None] - paid.flip(-1).cumsum(dim=-1).flip(-1)  # [y t], from token t on
    chance = logp.sum(dim=-1).exp()[:, None] * problem.mask
    total = torch.zeros(len(logits), dtype=torch.float64)
    return total.index_add(0, places(problem).flatten(), (chance * to_come).flatten()) / visits(problem, logits)


# ---------------------------------------------------------------------------------------------------------------- 2: KL


def kl_steps() -> list[Claim]:
    """More of item 2."""
    one, logits = (
        random_problem(4, letters="abcd", depth=1, beta=0.5),
        random_problem(5, letters="abcd", depth=1).logits_ref,
    )
    flat = replace(one, rewards=torch.zeros_like(one.rewards))
    two = random_problem(6, letters="ab", depth=2, beta=0.5)
    reverse = true_gradient(flat, logits)  # no reward: -J is beta KL(pi, ref)

    def pull(estimator: str) -> Tensor:
        return expected_step(flat, algorithm("rloo", group_size=2, kl_estimator=estimator), logits)

    at_best = expected_step(one, algorithm("rloo", group_size=2, kl_estimator="k2"), one.table_of(one.optimum))
    divided = algorithm("grpo", group_size=3, kl_coef=0.5, kl_placement="reward", kl_estimator="k1")
    divided_at_best = expected_step(two, divided, two.table_of(two.optimum))
    return [
        at_most(2, "k1 in the reward pulls as KL(pi, ref) does", far(pull("k1"), reverse), EXACT),
        at_least(2, "... k2 in the reward does not", far(pull("k2"), reverse), 1e-2),
        at_least(2, "... nor does k3", far(pull("k3"), reverse), 1e-2),
        at_least(2, "k2 in the reward does not rest at pi*", float(at_best.abs().max()), 1e-2),
        at_most(
            2,
            "k1 in the reward, divided by the group's deviation, rests at pi*",
            float(divided_at_best.abs().max()),
            1e-10,
        ),
        _beta_sigma(),
        *_logged(two),
        *_in_loss(two),
    ]


def _beta_sigma() -> Claim:
    """k2 in the loss beside whitened advantages rests where pi = ref exp(r / (beta sigma)) / Z, sigma the deviation of r under pi.

    The reference is made so that the batch of `counts` is that policy.
    """
    counts = torch.tensor((5, 1, 2))
    problem = random_problem(7, letters="ab", depth=1, beta=0.5)
    pi = counts.double() / counts.sum()
    sigma = ((pi * problem.rewards**2).sum() - (pi * problem.rewards).sum() ** 2).sqrt()
    reference = torch.log_softmax(pi.log() - problem.rewards / (problem.beta * sigma), dim=0)
    problem = replace(problem, logits_ref=problem.table_of(reference))
    algo = algorithm("ppo", kl_placement="loss", kl_estimator="k2", kl_coef=0.5)
    step, _ = whole_batch(problem, algo, problem.table_of(pi.log()), counts)
    text = "k2 in the loss, advantages whitened, rests at ref exp(r / (beta sigma))"
    return at_most(2, text, float(step.abs().max()), 1e-6)


def _logged(problem: Problem) -> list[Claim]:
    """The KL that a run logs, on a batch that is the whole policy."""
    counts, policy = _whole_policy(problem)
    logp = problem.logps(policy)
    truth = float((logp.exp() * (logp - problem.logp_ref)).sum())
    stats = [
        whole_batch(problem, algorithm(stage), policy, counts)[1].stats
        for stage in ("ppo", "rloo", "grpo", "reinforce_pp", "remax")
    ]
    # k3 of each token is a KL of that token on average, and these add up to the answer's
    off = worst(abs(found[name] - truth) for found in stats for name in ("kl", "kl_k3"))
    return [at_most(2, "the KL that ppo, rloo, grpo, reinforce_pp and remax log, k1 and k3: KL(pi, ref)", off, EXACT)]


def _in_loss(problem: Problem) -> list[Claim]:
    """KL and entropy in the loss of answers of several tokens: those of the token at hand, at the prefixes that the policy comes to.

    The loss is a mean over answers of a sum over tokens where the answer is one action, a mean over tokens elsewhere; both are put on the
    scale of the first.
    """
    flat = replace(problem, rewards=torch.zeros_like(problem.rewards))
    counts, policy = _whole_policy(flat)
    seen = visits(flat, policy)
    length = float(seen.sum())
    scales = {"rloo": 1.0, "remax": 1.0, "grpo": float(flat.depth), "ppo": length, "reinforce_pp": length}

    def step(stage: str, **keys: object) -> Tensor:
        extra = {"loss_reduction": "constant"} if stage == "grpo" else {}
        return (
            scales[stage] * whole_batch(flat, algorithm(stage, kl_placement="loss", **extra, **keys), policy, counts)[0]
        )

    free = policy.clone().requires_grad_()
    logp, logp_ref = torch.log_softmax(free, dim=-1), torch.log_softmax(flat.logits_ref, dim=-1)
    terms = {
        "k2": (seen * (logp.exp() * (logp - logp_ref)).sum(dim=-1)).sum(),
        "k3": (seen * (logp_ref.exp() * (logp_ref - logp)).sum(dim=-1)).sum(),
        "entropy": (seen * entropies(free)).sum(),
    }
    truth = {name: torch.autograd.grad(term, free, retain_graph=True)[0] for name, term in terms.items()}
    off = {
        name: worst(far(step(stage, kl_estimator=name), flat.beta * truth[name]) for stage in scales)
        for name in ("k2", "k3")
    }
    bonus = [
        far(step(stage, kl_estimator="k1", entropy_coef=0.3) - step(stage, kl_estimator="k1"), -0.3 * truth["entropy"])
        for stage in scales
    ]
    who = "rloo, remax, grpo, ppo and reinforce_pp"
    return [
        at_most(2, f"k2 in the loss of {who}: KL(pi, ref) of the token at hand", off["k2"], EXACT),
        at_most(2, "... k3: KL(ref, pi) of the token at hand", off["k3"], EXACT),
        at_most(2, "... and entropy_coef adds the entropy of the token at hand", worst(bonus), EXACT),
    ]
