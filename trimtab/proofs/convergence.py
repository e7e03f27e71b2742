"""Items 5 and 6: runs of the real loop, engine and algorithms on questions that can be enumerated, and how far from the best they end.

Two questions, each with a reference and rewards of its own, and answers of up to three letters; the reward is a Python function, the model
one of `models/enumerable.py`. A run is an ordinary run (`run_exp`), in float32. Afterwards every answer is scored by the trained policy and
by the reference, and the gap of the policy is

    beta log Z - J(pi), averaged over the questions        (problem.py: 0 at pi* and nowhere else)

The gap of the reference itself is what there is to be won. A setting that is said to converge elsewhere must stay away from 0, and end
where it is said to.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from trimtab.algos.rloo import Rloo
from trimtab.algos.surrogate import Surrogate
from trimtab.ops.kl import Estimator, Placement
from trimtab.proofs.claims import Claim, at_least, at_most, worst
from trimtab.proofs.optima import walk
from trimtab.proofs.problem import END, Problem, answers, best, objective
from trimtab.types import RolloutBatch

Kind = Literal["table", "transformer"]
Tell = Callable[[str], None]

LETTERS, DIGITS, DEPTH, BETA = "ab", "12", 3, 0.5
ANSWERS = answers(LETTERS, DEPTH)
LABELLED = [i for i, answer in enumerate(ANSWERS) if answer.endswith(END) and answer != END]
"""The answers in DPO's pairs: a data row has an end, and some text before it."""

GROUP = 128
"""Answers to each question in a step."""

COPIES = 50
"""How often each pair is labelled for DPO."""


def rewards() -> Tensor:
    """`[q y]`: what each answer to each question earns; fixed numbers between 0 and 1."""
    return torch.rand(len(DIGITS), len(ANSWERS), generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def graded(prompt: str, completion: str) -> float:
    """The reward as a run is given it: the answer's text says all, for only answers that reach the limit have `DEPTH` letters."""
    question = next(i for i, digit in enumerate(DIGITS) if digit in prompt)
    answer = completion if len(completion) == DEPTH else completion + END
    return float(rewards()[question, ANSWERS.index(answer)])


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        logp, logp_ref: log-probabilities `[q y]` of every answer under what was trained and under the reference, both float64.
        logged: mean reward and KL per answer of its last rollout batch, as its metrics have them; None of a run without rollouts.
    """

    logp: Tensor
    logp_ref: Tensor
    logged: tuple[float, float] | None = None

    def gap(self, gains: Tensor | None = None, beta: float = BETA) -> float:
        """beta log Z - J, averaged over the questions."""
        gains = rewards() if gains is None else gains
        each = [
            best(ref, r, beta) - float(objective(p, ref, r, beta))
            for p, ref, r in zip(self.logp, self.logp_ref, gains, strict=True)
        ]
        return sum(each) / len(each)

    @property
    def to_be_won(self) -> float:
        """The gap of the reference."""
        return Outcome(logp=self.logp_ref, logp_ref=self.logp_ref).gap()

    @property
    def reward(self) -> float:
        """Mean reward of the policy, averaged over the questions."""
        return _mean_reward(self.logp)

    @property
    def best_reward(self) -> float:
        """Mean reward of pi*."""
        return _mean_reward(torch.log_softmax(self.logp_ref + rewards() / BETA, dim=-1))

    def noise(self, answers: int) -> float:
        """How far the logged reward and KL are from the exact ones, in standard errors of so many answers to each question.

        The last batch was drawn before the last update, whose learning rate is all but 0.
        """
        assert self.logged is not None, "a run without rollouts logs neither"
        found = []
        for logged, each in zip(self.logged, (rewards(), self.logp - self.logp_ref), strict=True):
            p = self.logp.exp()
            mean = (p * each).sum(dim=-1)
            spread = (p * (each - mean[:, None]) ** 2).sum(dim=-1)
            error = float((spread.sum() / answers).sqrt()) / len(DIGITS)
            found.append(abs(logged - float(mean.mean())) / error)
        return worst(found)

    @property
    def kl(self) -> float:
        """KL(pi, ref), averaged over the questions."""
        return float((self.logp.exp() * (self.logp - self.logp_ref)).sum(dim=-1).mean())


MODEL_KEYS: dict[Kind, dict[str, Any]] = {
    "table": {"finetuning_type": "full", "learning_rate": 0.05},
    "transformer": {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "learning_rate": 5e-3},
}
ONLINE_KEYS: dict[str, Any] = {
    "reward_funcs": [graded],
    "per_device_train_batch_size": len(DIGITS),
    "max_new_tokens": DEPTH,
    "kl_coef": BETA,
    "missing_eos_penalty": 0.0,
}
STAGE_KEYS: dict[str, dict[str, Any]] = {
    "ppo": {
        "gae_lambda": 1.0,
        "ppo_epochs": 2,
        "group_size": GROUP,
        "critic_warmup_steps": 5,
        "critic_learning_rate": 1e-2,
    },
    "rloo": {"group_size": GROUP},
    "grpo": {
        "group_size": GROUP,
        "kl_coef": BETA,
        "kl_estimator": "k3",
        "kl_placement": "loss",
        "advantage_norm": "none",
        "loss_reduction": "constant",
    },
    "dpo": {"dataset": "pairs", "per_device_train_batch_size": 256, "pref_beta": BETA},
}


def train(folder: Path, kind: Kind, stage: str, *, seed: int, steps: int, **more: Any) -> Outcome:
    """One run, and what it came to."""
    from trimtab import run_exp
    from trimtab.models.tiny import make_few_tokens, make_prefix_table

    folder.mkdir(parents=True)
    model = folder / "model"
    if kind == "table":
        make_prefix_table(model, letters=LETTERS, digits=DIGITS, depth=DEPTH, seed=seed)
    else:
        make_few_tokens(model, letters=LETTERS, seed=seed)
    _write_data(folder)
    model_keys: dict[str, Any] = {
        "model_name_or_path": str(model),
        "do_train": True,
        "template": "chatml",
        "dataset_dir": str(folder),
        "dataset": "questions",
        "compute_dtype": "float32",
        "use_cpu": True,
        **MODEL_KEYS[kind],
    }
    keys = {
        **model_keys,
        "stage": stage,
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "seed": seed,
        "lr_scheduler_type": "linear",
        "logging_steps": steps,
        "save_strategy": "no",
        **(ONLINE_KEYS if stage != "dpo" else {}),
        **STAGE_KEYS[stage],
        **more,
    }
    run = run_exp(keys)
    trained = {"model_name_or_path" if kind == "table" else "adapter_name_or_path": str(run.path)}
    last = run.metrics("train")[-1]
    read = {**model_keys, "stage": "rloo", "reward_funcs": [graded], "output_dir": str(folder / "read")}
    return Outcome(
        logp=_scored({**read, **trained}),
        logp_ref=_scored(read),
        logged=(last["reward/mean"], last["kl/k1_sequence"]) if stage != "dpo" else None,
    )


def _write_data(folder: Path) -> None:
    """Write `questions`, and for DPO `pairs` and `shuffled`.

    `pairs` has all pairs of `LABELLED` answers in the proportions in which sigmoid(r_w - r_l) labels them; `shuffled` has either label as
    often as the other.
    """
    pairs: list[dict[str, str]] = []
    shuffled: list[dict[str, str]] = []
    for digit, gains in zip(DIGITS, rewards(), strict=True):
        for i, j in combinations(LABELLED, 2):
            right = round(COPIES * float(torch.sigmoid(gains[i] - gains[j])))
            for share, rows in ((right, pairs), (COPIES // 2, shuffled)):
                for copy in range(COPIES):
                    w, l = (i, j) if copy < share else (j, i)  # noqa: E741
                    rows.append(
                        {"instruction": digit, "chosen": ANSWERS[w].rstrip(END), "rejected": ANSWERS[l].rstrip(END)}
                    )
    sets: dict[str, list[dict[str, str]]] = {
        "questions": [{"instruction": digit, "output": LETTERS[0]} for digit in DIGITS],
        "pairs": pairs,
        "shuffled": shuffled,
    }
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json", "ranking": name != "questions"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def _scored(keys: Mapping[str, Any]) -> Tensor:
    """`[q y]`: the log-probability of each answer to each question under the policy that these keys describe."""
    from trimtab.config import load
    from trimtab.models.forward import score_tokens
    from trimtab.train.assemble import POLICY, assemble
    from trimtab.types import TokenRow

    session = assemble(load(keys))
    ends = session.template.stop_ids[0]
    found = []
    for prompt in session.data.train:
        rows = []
        for answer in ANSWERS:
            ids = [ends if c == END else session.tokenizer.convert_tokens_to_ids(c) for c in answer]
            start = len(prompt.token_ids)
            rows.append(TokenRow(token_ids=(*prompt.token_ids, *ids), scored=tuple(range(start, start + len(ids)))))
        with torch.no_grad(), session.roles.enter(POLICY):
            scores = score_tokens(session.roles.model, rows, layout="padded")
        assert scores.logp is not None
        found.append((scores.logp.double() * scores.mask).sum(dim=-1))
    return torch.stack(found)


# ---------------------------------------------------------------------------------------------------------- 5: convergence

SEEDS = (0, 1, 2)
BOUNDS: dict[tuple[Kind, str], float] = {
    ("table", "ppo"): 1e-3,
    ("table", "rloo"): 2e-3,
    ("transformer", "ppo"): 0.02,
    ("transformer", "rloo"): 0.02,
}
STEPS: dict[Kind, int] = {"table": 80, "transformer": 100}
IN_LOSS = {"kl_placement": "loss", "advantage_norm": "none"}


def convergence(say: Tell) -> list[Claim]:
    """Item 5: PPO and RLOO reach pi*, and settings that are said to converge elsewhere do."""
    claims, logged = [], []
    for (kind, stage), bound in BOUNDS.items():
        found = [_run(say, kind, stage, seed=seed) for seed in SEEDS]
        logged += [outcome.noise(GROUP) for outcome in found]
        won = min(outcome.to_be_won for outcome in found)
        name = f"{stage.upper()}, {kind}, the worst of {len(SEEDS)} seeds (at least {won:.2f} to be won)"
        claims.append(at_most(5, f"beta log Z - J of {name}", worst(outcome.gap() for outcome in found), bound))
    text = f"reward and KL that those {len(logged)} runs log in the end: standard errors from the exact ones"
    claims.append(at_most(5, text, worst(logged), 5))
    normalised = _run(say, "table", "rloo", advantage_norm="group")
    claims.append(
        at_most(
            5, "RLOO with k1 in the reward, advantages divided by the deviation: the same pi*", normalised.gap(), 2e-3
        )
    )

    k3 = _run(say, "table", "grpo")
    claims.append(at_least(5, "k3 in the loss ends elsewhere: beta log Z - J", k3.gap(), 3e-3))
    claims.append(
        at_most(5, "... where its own expected gradient is 0: KL to that", _far_from_rest(k3, "loss", "k3"), 1e-3)
    )
    shaped = _run(say, "table", "rloo", kl_estimator="k3")
    claims.append(at_least(5, "k3 in the reward ends elsewhere: beta log Z - J", shaped.gap(), 0.02))
    k1 = _run(say, "table", "grpo", kl_estimator="k1")
    claims.append(
        at_least(5, "k1 in the loss holds nothing: mean reward over that of pi*", k1.reward - k1.best_reward, 0.1)
    )
    claims.append(at_least(5, "... at any price: beta log Z - J", k1.gap(), 0.1))
    return claims


def _run(say: Tell, kind: Kind, stage: str, *, seed: int = 0, what: str = "", **more: Any) -> Outcome:
    # what a run says of itself, its warnings of settings that are wrong on purpose among it, is not what this is about
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        found = train(Path(scratch) / "proof", kind, stage, seed=seed, steps=STEPS[kind], **more)
    settings = what or ", ".join(f"{key} {value}" for key, value in more.items())
    say(f"{kind}, {stage}{', ' + settings if settings else ''}, seed {seed}: beta log Z - J = {found.gap():.2e}")
    return found


def _mean_reward(logp: Tensor) -> float:
    return float((logp.exp() * rewards()).sum(dim=-1).mean())


def _far_from_rest(outcome: Outcome, placement: Placement, estimator: Estimator) -> float:
    """KL of what was trained to the policy where the expected gradient of its setting is 0, averaged over the questions."""
    rloo = Rloo(group_size=2, how=Surrogate(level="token", kl_placement=placement, kl_estimator=estimator))
    total = 0.0
    for logp, logp_ref, gains in zip(outcome.logp, outcome.logp_ref, rewards(), strict=True):
        blank = Problem(letters=LETTERS, depth=DEPTH, logits_ref=torch.zeros(1), rewards=gains, beta=BETA)
        problem = replace(blank, logits_ref=blank.table_of(logp_ref))
        rest = problem.logps(walk(problem, rloo)[-1])
        total += float((logp.exp() * (logp - rest)).sum())
    return total / len(DIGITS)


# -------------------------------------------------------------------------------------------------------------- 6: controls


def controls(say: Tell) -> list[Claim]:
    """Item 6: runs that must learn nothing, or the wrong thing."""
    noise = torch.Generator().manual_seed(12)

    def at_random(prompt: str, completion: str) -> float:
        return float(torch.rand((), generator=noise))

    random = _run(say, "table", "rloo", what="a random reward", reward_funcs=[at_random])
    with patch.object(Rloo, "credit", _negated(Rloo.credit)):
        negated = _run(say, "table", "rloo", what="advantages negated")
    labels = _run(say, "table", "dpo")
    shuffled = _run(say, "table", "dpo", dataset="shuffled")
    return [
        at_most(6, "a random reward leaves RLOO at the reference: KL to it", random.kl, 5e-3),
        at_least(
            6,
            "with its advantages negated it does worse than nothing: gap over that of the reference",
            negated.gap() / negated.to_be_won,
            1.5,
        ),
        at_most(
            6,
            "DPO on labels of the reward: largest |beta (h_w - h_l) - (r_w - r_l)|",
            _preference_error(labels, 1.0),
            0.1,
        ),
        at_most(6, "... on shuffled labels: largest |beta (h_w - h_l)|", _preference_error(shuffled, 0.0), 0.1),
    ]


def _negated(credit: Any) -> Any:
    def turned(self: Rloo, batch: RolloutBatch, **keys: Any) -> RolloutBatch:
        credited: RolloutBatch = credit(self, batch, **keys)
        assert credited.advantages is not None
        return replace(credited, advantages=-credited.advantages)

    return turned


def _preference_error(outcome: Outcome, scale: float) -> float:
    """Over all pairs of the answers that are in the data: how far beta (h_w - h_l) is from scale (r_w - r_l)."""
    h = BETA * (outcome.logp - outcome.logp_ref)[:, LABELLED] - scale * rewards()[:, LABELLED]
    return float((h[:, :, None] - h[:, None, :]).abs().max())
