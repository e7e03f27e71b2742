"""Training on what the policy writes. A step is one rollout batch with all its updates.

prompts -> completions -> rewards -> old, reference and value arrays     (rollout.py)
        -> credit over the whole batch                                     (the algorithm)
        -> epochs x minibatches: weights fixed, then per role: forward, loss, backward, clip, step   (step.py)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from trimtab.algos import ALGORITHMS, Online
from trimtab.data.loader import batches
from trimtab.errors import DataError
from trimtab.models.forward import TokenScores
from trimtab.ops.masked import masked_mean
from trimtab.ops.reduction import reduction_weights
from trimtab.ops.stats import RunningMoments
from trimtab.rundir import RunFolder
from trimtab.train.assemble import CRITIC, POLICY, REFERENCE, Session
from trimtab.train.loop import Figures
from trimtab.train.offline import described, score_tasks
from trimtab.train.optim import make_optimizer
from trimtab.train.rollout import (
    Collected,
    Draw,
    collect,
    completion_row,
    reward_completions,
    sampler_figures,
    score_role,
)
from trimtab.train.step import Forward, Held, Sums, backward_tokens, clip_and_step
from trimtab.train.weights import refresh_reference
from trimtab.types import Completion, LossTerms, Prompt, RolloutBatch, Sampling, take

SHOWN = 4
"""Samples of each logged step that go into samples.jsonl; evaluations write all of theirs."""


class OnlineTrainer:
    """Rollouts and updates of any online algorithm."""

    def __init__(self, session: Session, folder: RunFolder) -> None:
        config = session.config
        self.session, self.folder = session, folder
        self.algorithm: Online = ALGORITHMS.load(config.stage).from_config(config)
        self.reward = session.reward()
        self.prompts: list[Prompt] = session.data.train
        self.steps_per_epoch = math.ceil(len(self.prompts) / config.rollout_size)
        self.best_metric = ("reward_sampled", True)
        self.current: list[dict[str, Any]] = []
        self.kl_coef = self.algorithm.kl_coef
        self.moments = RunningMoments()
        self.version = 0
        self.baselines: dict[int, float] | None = {} if config.reward_baseline == "answer" else None
        if self.baselines is not None:
            check_answers(self.prompts, config.origin("reward_baseline"))
        self.cursor = 0  # prompts that dynamic sampling has taken
        policy = session.roles.trainable(POLICY)
        critic = self.algorithm.needs.critic
        self.head_on_policy = critic and config.critic == "head"
        # the head of `critic: head` is the critic: its own clip, its own rate
        self.parameters = {POLICY: {n: p for n, p in policy.items() if not n.startswith("head/")}}
        if self.head_on_policy:
            self.parameters[CRITIC] = {n: p for n, p in policy.items() if n.startswith("head/")}
        elif critic:
            self.parameters[CRITIC] = session.roles.trainable(CRITIC)
        self.learning_rates = {POLICY: config.learning_rate}
        if CRITIC in self.parameters:
            self.learning_rates[CRITIC] = config.critic_learning_rate or config.learning_rate
        self.optimizers = {
            role: make_optimizer(p, config, self.learning_rates[role]) for role, p in self.parameters.items()
        }
        self.warmup = config.critic_warmup_steps if critic else 0
        if self.warmup is None:
            self.warmup = 5 if session.fresh_critic else 0

    # ------------------------------------------------------------------------------------------------------------ step

    def step(self, number: int) -> Figures:
        config = self.session.config
        epoch, index = divmod(number, self.steps_per_epoch)
        dynamic = getattr(self.algorithm, "dynamic", False)
        if dynamic:
            draw = self._next(config.rollout_size)
        else:
            order = self._batches(epoch, config.rollout_size)[index]
            draw = Draw(prompts=[self.prompts[i] for i in order], epoch=epoch)
        self.current = [described(prompt.example) for prompt in draw.prompts]
        sampling = self.sampling(seed=config.seed, epoch=epoch)
        collected = collect(
            self.session,
            self.reward,
            draw,
            k=self.algorithm.group_size,
            sampling=sampling,
            needs=self.algorithm.needs,
            kl_coef=self.kl_coef,
            moments=self.moments,
            version=self.version,
            baselines=self.baselines,
            more=self._next if dynamic else None,
            one_step=self.algorithm.epochs == 1 and config.rollout_size <= config.batch_size,
            # in warm-up no gradient reaches the layers, and of pairs some rows are left out
            one_minibatch=config.rollout_size <= config.batch_size
            and number >= self.warmup
            and self.algorithm.unit != "pair",
        )
        self.moments = collected.moments
        self.current = [
            {**described(r.prompt.example), "completion": r.text, "reward": r.reward} for r in collected.rollouts
        ]
        batch = self.algorithm.credit(collected.batch)
        started = time.monotonic()
        figures = self._update(collected, batch, number, sampling.temperature)
        figures |= _rollout_figures(collected, batch) | collected.seconds
        figures["seconds/update"] = time.monotonic() - started
        self._show(number + 1, collected)
        self.kl_coef = self.algorithm.next_kl_coef(self.kl_coef, batch.stats.get("kl", 0.0), len(collected.rows))
        if config.ref_update_every and (number + 1) % config.ref_update_every == 0:
            refresh_reference(self.session.roles)
        return figures

    def _batches(self, epoch: int, size: int) -> list[list[int]]:
        config = self.session.config
        return batches(len(self.prompts), size, config.order_seed, epoch, not config.disable_shuffling)

    def _next(self, count: int) -> Draw:
        """The next prompts in the order of the data, fewer where a pass over them ends (dynamic sampling takes no fixed number a step)."""
        epoch, place = divmod(self.cursor, len(self.prompts))
        order = [i for batch in self._batches(epoch, self.session.config.rollout_size) for i in batch]
        found = [self.prompts[i] for i in order[place : place + count]]
        self.cursor += len(found)
        return Draw(prompts=found, epoch=epoch)

    def sampling(self, *, seed: int, epoch: int) -> Sampling:
        """How rollouts are drawn: the temperature acts, no filter does, so what samples is what scores."""
        sampling: Sampling = self.session.config.rollout_sampling
        return replace(sampling, seed=seed, epoch=epoch)

    def _update(self, collected: Collected, batch: RolloutBatch, number: int, temperature: float) -> Figures:
        """All epochs and minibatches over one rollout batch."""
        session, config, k = self.session, self.session.config, self.algorithm.group_size
        if self.algorithm.unit == "pair":
            compared = self.algorithm.pairs(batch)
            if not compared:  # every prompt's scores are equal
                return {"loss": 0.0}
            batch, k = take(batch, compared), 2
            collected = replace(
                collected,
                rows=[collected.rows[i] for i in compared],
                rollouts=[collected.rollouts[i] for i in compared],
            )
        how = Forward(budget=session.budget, room=session.room, layout=session.layout, temperature=temperature)
        only_critic = number < self.warmup
        policy_sums, value_sums, norms = [], [], []
        first: Figures = {}
        count = len(collected.rows) // k
        for epoch in range(self.algorithm.epochs):
            # whole groups move together; the order is a function of (seed, step, epoch)
            order = np.random.default_rng([config.order_seed, number, epoch]).permutation(count)
            held = collected.held if epoch == 0 else None
            if held is not None:  # one minibatch, in the order in which it was scored
                order = np.arange(count)
            for start in range(0, count, config.batch_size):
                which = [int(g) * k + j for g in order[start : start + config.batch_size] for j in range(k)]
                rows = [collected.rows[i] for i in which]
                part = take(batch, which)
                part_names = [f"{collected.rollouts[i].prompt.example.origin}" for i in which]
                mask = part.mask
                if self.algorithm.unit == "pair":
                    mask, part_names = mask.view(-1, 2, mask.shape[-1]).any(dim=1), part_names[::2]
                weights = reduction_weights(mask, self.algorithm.reduction, max_length=config.answer_limit)
                minibatch = _Minibatch(self, rows, part, weights, part_names, how)
                sums = minibatch.policy(only_critic, held)
                if not only_critic:
                    norms.append((POLICY, self._clip_and_step(POLICY)))
                    self.version += 1
                else:
                    self.optimizers[POLICY].zero_grad(set_to_none=True)
                policy_sums.append(sums)
                if CRITIC in self.optimizers:
                    if not self.head_on_policy:
                        value_sums.append(minibatch.critic())
                    norms.append((CRITIC, self._clip_and_step(CRITIC)))
                if not first:
                    first = _first_minibatch(sums, part, weights) | minibatch.sampler_figures()
        figures = _mean_figures(policy_sums, value_sums)
        for role in self.optimizers:
            own = [norm for owner, norm in norms if owner == role]
            if own:
                figures[f"grad_norm/{role}"] = sum(own) / len(own)
        return figures | first

    def _clip_and_step(self, role: str) -> float:
        return clip_and_step(self.optimizers[role], self.parameters[role], self.session.config.max_grad_norm, role)

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, step: int) -> Figures:
        """Greedy and sampled answers to held-out prompts: reward, KL to the reference, length, finished rate, tasks.

        Sampled answers are drawn as rollouts are, so that their KL means something; where the file writes top_k, top_p or
        repetition_penalty, the answers that are rewarded are drawn with them, and the KL is taken on answers drawn without.
        With `eval_group_size` each prompt has several sampled answers, and the first of them is shown.
        """
        config = self.session.config
        prompts = self.session.data.eval_prompts[: config.eval_max_samples]
        if not prompts:
            return {}
        shown: list[dict[str, Any]] = [
            {"step": step, "kind": "eval", "prompt": p.example.prompt[-1].content} for p in prompts
        ]
        plain = self.sampling(seed=config.seed + 1, epoch=0)
        filtered = with_filters(plain, config)
        figures: Figures = {}
        k = config.eval_group_size
        owners = [prompt for prompt in prompts for _ in range(k)]
        for name, sampling, each in (("greedy", replace(plain, temperature=0.0), 1), ("sampled", filtered, k)):
            completions = self.session.generator().generate(prompts, sampling, k=each)
            rollouts = reward_completions(self.session, self.reward, owners if each > 1 else prompts, completions)
            figures[f"reward_{name}"] = sum(r.reward for r in rollouts) / len(rollouts)
            for row, rollout in zip(shown, rollouts[::each], strict=True):
                row[name], row[f"reward_{name}"] = rollout.text, rollout.reward
            if name == "greedy" and all(p.example.response is not None for p in prompts):
                figures |= score_tasks(config.eval_tasks, [r.text for r in rollouts], prompts)
        figures["length"] = sum(len(c.token_ids) for c in completions) / len(completions)
        figures["finished_rate"] = sum(c.finished for c in completions) / len(completions)
        if filtered != plain:
            completions = self.session.generator().generate(prompts, plain, k=k)
        figures |= self._distance(owners, completions, plain.temperature)
        for row, prompt in zip(shown, prompts, strict=True):
            row["gold"] = prompt.example.response.content if prompt.example.response else None
            self.folder.append_sample(row)
        return figures

    def _distance(self, prompts: list[Prompt], completions: list[Completion], temperature: float) -> Figures:
        """KL to the reference per answer (k1) and entropy per token, on answers drawn from the policy itself."""
        rows = [completion_row(p, c) for p, c in zip(prompts, completions, strict=True)]
        policy = score_role(self.session, POLICY, rows, temperature=temperature)
        figures = {"entropy": float(policy["entropy"].sum()) / sum(len(row.scored) for row in rows)}
        if REFERENCE in self.session.roles.specs:
            reference = score_role(self.session, REFERENCE, rows, temperature=temperature)
            figures["kl"] = float((policy["logp"] - reference["logp"]).sum()) / len(rows)
        return figures

    def _show(self, step: int, collected: Collected) -> None:
        for rollout in collected.rollouts[:SHOWN]:
            self.folder.append_sample(
                {
                    "step": step,
                    "kind": "train",
                    "prompt": rollout.prompt.example.prompt[-1].content,
                    "text": rollout.text,
                    "reward": rollout.reward,
                    "parts": dict(rollout.reward_parts),
                    "finish": rollout.completion.finish,
                    "origin": str(rollout.prompt.example.origin),
                }
            )

    # ----------------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_coef,
            "moments": asdict(self.moments),
            "version": self.version,
            "cursor": self.cursor,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kl_coef, self.version = state["kl_coef"], state["version"]
        self.cursor = state.get("cursor", 0)  # checkpoints from before it have taken none
        self.moments = RunningMoments(**state["moments"])

    def finish(self) -> bool:
        return False


class _Minibatch:
    """The forward and backward passes of one optimizer step, role by role."""

    def __init__(
        self,
        trainer: OnlineTrainer,
        rows: list[Any],
        batch: RolloutBatch,
        weights: torch.Tensor,
        names: list[str],
        how: Forward,
    ) -> None:
        self.trainer, self.rows, self.batch, self.weights, self.names, self.how = (
            trainer,
            rows,
            batch,
            weights,
            names,
            how,
        )
        self.logp = torch.zeros_like(batch.logp_old)  # of a fresh batch, as the pass gives it

    def policy(self, only_critic: bool, held: Held | None = None) -> Sums:
        """The policy's pass, or what follows one that is `held`; with `critic: head` the value loss rides on it (in warm-up alone)."""
        algorithm, on_policy = self.trainer.algorithm, self.trainer.head_on_policy

        def loss(scores: TokenScores, which: list[int]) -> LossTerms:
            part = take(self.batch, which)
            if part.fresh:
                self.logp[which] = scores.policy.logp.detach()
                part = replace(part, logp_old=self.logp[which])
            terms = algorithm.policy_loss(scores.policy, part)
            if only_critic:  # measured, not learnt: no gradient reaches the layers
                terms = LossTerms(loss=torch.zeros_like(terms.loss), means=terms.means, maxima=terms.maxima)
            if not on_policy:
                return terms
            assert scores.values is not None
            value = algorithm.value_loss(scores.values, part)
            return LossTerms(
                loss=terms.loss + value.loss,
                means={**terms.means, **value.means},
                maxima={**terms.maxima, **value.maxima},
            )

        return backward_tokens(
            self.trainer.session.roles,
            POLICY,
            self.rows,
            self.weights,
            loss,
            self.how,
            value_head=on_policy,
            trunk_learns=not only_critic,
            unit=2 if algorithm.unit == "pair" else 1,
            width=self.batch.mask.shape[1],
            names=self.names,
            held=held,
        )

    def sampler_figures(self) -> Figures:
        """The sampler's log-probabilities beside this pass's own, where nothing measured them before."""
        if not self.batch.fresh or not bool(self.batch.mask.any()):
            return {}
        return sampler_figures(self.batch.logp_old - self.logp, self.batch.mask)

    def critic(self) -> Sums:
        """The critic's pass, when it is an adapter of its own."""
        algorithm = self.trainer.algorithm

        def loss(scores: TokenScores, which: list[int]) -> LossTerms:
            assert scores.values is not None
            return algorithm.value_loss(scores.values, take(self.batch, which))

        return backward_tokens(
            self.trainer.session.roles,
            CRITIC,
            self.rows,
            self.weights,
            loss,
            self.how,
            lm_head=False,
            value_head=True,
            width=self.batch.mask.shape[1],
            names=self.names,
        )


# ------------------------------------------------------------------------------------------------------------- figures


def what_moves_the_optimum(config: Any) -> list[str]:
    """What the start line adds to the algorithm's own words: settings beside it that move what the run converges to."""
    said = []
    if config.ref_update_every:
        said.append(
            f"the reference becomes the policy every {config.ref_update_every} steps, so what is said above holds for each stretch alone: "
            "the run as a whole drifts to the argmax of the reward"
        )
    if config.entropy_coef:
        said.append(f"an entropy bonus of {config.entropy_coef:g} a token flattens the optimum")
    if getattr(config, "mask_truncated", False):
        said.append("answers cut by the limit are not trained on: what counts is the reward of those that end")
    if config.missing_eos_penalty:
        verb = "scores minus" if config.missing_eos_mode == "replace" else "costs"
        said.append(f"an answer without its end {verb} {config.missing_eos_penalty:g}")
    if config.overlong_buffer:
        said.append(
            f"the last {config.overlong_buffer} tokens before the limit of {config.answer_limit} cost up to {config.overlong_penalty:g}"
        )
    if config.reward_length_penalty:
        said.append(f"each token beyond {config.reward_length_free} costs {config.reward_length_penalty:g}")
    if config.score_norm:
        said.append("scores are in units of their running deviation, and beta with them")
    if config.reward_clip is not None:
        said.append(f"scores are clipped to plus or minus {config.reward_clip:g}")
    return said


def check_answers(prompts: list[Prompt], where: str) -> None:
    """Every prompt's row must have an answer.

    Raises:
        DataError: one has none.
    """
    for prompt in prompts:
        if prompt.example.response is None:
            raise DataError(
                "reward_baseline: answer, and a row without an answer",
                where=f"{prompt.example.origin} ({where})",
                why="the baseline is what the row's own answer is worth",
                remedy="give every row an answer, or delete reward_baseline",
            )


def with_filters(sampling: Sampling, config: Any) -> Sampling:
    """With the top_k, top_p, min_p and repetition_penalty that the file writes; off where it writes none."""
    return replace(
        sampling,
        top_k=max(0, config.top_k or 0),
        top_p=config.top_p or 1.0,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
    )


_KL_NAMES = {
    "kl": "kl/k1_sequence",
    "kl_k3": "kl/k3_sequence",
    "kl_per_token": "kl/k1_token",
    "kl_k3_per_token": "kl/k3_token",
}
_NAMES = {"ratio_mean": "ratio/mean", "ratio_max": "ratio/max"}


def _mean_figures(policy: list[Sums], value: list[Sums]) -> Figures:
    """Means over the minibatches of a step (maxima: the largest), under their names in metrics.jsonl."""
    figures: Figures = {}
    for sums in (policy, value):
        for name in {n for s in sums for n in s.figures()}:
            found = [s.figures()[name] for s in sums if name in s.figures()]
            figures[_NAMES.get(name, name)] = max(found) if name.endswith("_max") else sum(found) / len(found)
    figures["loss"] = sum(s.loss for s in policy) / len(policy) + (
        sum(s.loss for s in value) / len(value) if value else 0.0
    )
    return figures


def _first_minibatch(sums: Sums, part: RolloutBatch, weights: torch.Tensor) -> Figures:
    """Before anything has moved the ratio is 1, nothing is clipped, and the policy loss is minus the mean advantage."""
    found = sums.figures()
    if part.advantages is None or "ratio_max" not in found:  # pairs have none; what is imitated has no ratio
        return {}
    advantage = masked_mean(part.advantages, part.mask)
    if weights.ndim == 1:  # one loss per answer: the mean over answers
        advantage = (part.advantages.sum(dim=-1) / part.mask.sum(dim=-1).clamp(min=1)).mean()
    return {
        "first_minibatch/ratio_max": found["ratio_max"],
        "first_minibatch/clip_fraction": found["clip_fraction"],
        "first_minibatch/approx_kl": found["approx_kl"],
        "first_minibatch/policy_loss": found["policy_loss"],
        "first_minibatch/advantage": float(advantage),
    }


def _rollout_figures(collected: Collected, batch: RolloutBatch) -> Figures:
    rewards = [r.reward for r in collected.rollouts]
    lengths = [len(r.completion.token_ids) for r in collected.rollouts]
    stats = batch.stats
    figures: Figures = {
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "score/mean": float(batch.score.mean()),
        "kl/coef": batch.kl_coef,
        "length/mean": float(np.mean(lengths)),
        "length/p95": float(np.percentile(lengths, 95)),
        "finished_rate": float(batch.finished.float().mean()),
        "tokens": float(sum(len(row.token_ids) for row in collected.rows)),
        "completions": float(len(rewards)),
    }
    for name, shown in _KL_NAMES.items():
        if name in stats:
            figures[shown] = stats[name]
    for part in collected.rollouts[0].reward_parts:
        figures[f"reward/parts/{part}"] = float(np.mean([r.reward_parts[part] for r in collected.rollouts]))
    figures |= {name: value for name, value in stats.items() if "/" in name or name == "explained_variance"}
    for name in ("value_mean", "return_mean", "advantage_mean", "advantage_std"):
        if name in stats:
            figures[name.replace("_", "/", 1)] = stats[name]
    size = int((batch.group == batch.group[0]).sum())
    if size > 1:
        spread = batch.score.view(-1, size).std(dim=1)
        figures["zero_variance_groups"] = float((spread == 0).float().mean())
    return figures
