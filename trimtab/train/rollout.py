"""From prompts to a rollout batch: sample, reward, score. No gradients here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.models.forward import plan, score_tokens
from trimtab.ops.stats import RunningMoments
from trimtab.rewards import Answer, finished_row
from trimtab.rewards.mixture import Mixture
from trimtab.rewards.shaping import shape_scores
from trimtab.train.assemble import CRITIC, POLICY, REFERENCE, Session
from trimtab.types import Completion, Prompt, Rollout, RolloutBatch, Sampling, TokenRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A rollout batch with everything that was seen on the way to it.

    Attributes:
        rows: prompt and completion as drawn, one per completion.
        moments: running moments of the raw scores, this batch included.
        seconds: of sampling, rewarding and scoring.
    """

    rollouts: list[Rollout]
    rows: list[TokenRow]
    batch: RolloutBatch
    moments: RunningMoments
    seconds: dict[str, float]


def completion_row(prompt: Prompt, completion: Completion) -> TokenRow:
    """The row of a completion as it was drawn: every token of it is scored."""
    start = len(prompt.token_ids)
    return TokenRow(
        token_ids=(*prompt.token_ids, *completion.token_ids),
        scored=tuple(range(start, start + len(completion.token_ids))),
    )


def reward_completions(
    session: Session, reward: Mixture, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[Rollout]:
    """Rollouts of completions, in order; `prompts` holds the prompt of each."""
    stops = session.template.stop_ids
    answers = [
        Answer(prompt=p, completion=c, row=finished_row(p, c, stops, session.tail), text=session.text(c))
        for p, c in zip(prompts, completions, strict=True)
    ]
    judged = reward.judge(answers)
    return [
        Rollout(
            prompt=answer.prompt,
            completion=answer.completion,
            text=answer.text,
            reward=score,
            reward_parts={name: part[i] for name, part in judged.parts.items()},
        )
        for i, (answer, score) in enumerate(zip(answers, judged.scores, strict=True))
    ]


def score_role(
    session: Session,
    role: str,
    rows: Sequence[TokenRow],
    *,
    temperature: float,
    lm_head: bool = True,
    value_head: bool = False,
) -> dict[str, Tensor]:
    """Arrays `[b t]` of one role over all rows: logp and entropy, values, as asked for."""
    width = max(len(row.scored) for row in rows)

    def work(budget: int) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for chunk in plan(rows, budget, layout=session.layout):
            with torch.no_grad(), session.roles.enter(role) as spec:
                scores = score_tokens(
                    session.roles.model,
                    [rows[i] for i in chunk],
                    layout=session.layout,
                    temperature=temperature,
                    lm_head=lm_head,
                    head=spec.head if value_head else None,
                    width=width,
                )
            for name in ("logp", "entropy", "values"):
                found = getattr(scores, name)
                if found is not None:
                    parts.setdefault(name, found.new_zeros(len(rows), width))[chunk] = found
        return parts

    with session.memory.phase("score"):
        return session.room.attempt(work)


def collect(
    session: Session,
    reward: Mixture,
    prompts: Sequence[Prompt],
    *,
    k: int,
    sampling: Sampling,
    needs: Any,
    kl_coef: float,
    moments: RunningMoments,
    version: int,
) -> Collected:
    """Answer every prompt k times and score the answers for all roles that the algorithm needs."""
    config = session.config
    clock = time.monotonic()
    generator = session.generator()
    generator.update(version)
    with session.memory.phase("rollout"):
        completions = generator.generate(prompts, sampling, k=k)
    sampled = time.monotonic()
    rollouts = reward_completions(session, reward, [p for p in prompts for _ in range(k)], completions)
    rewarded = time.monotonic()

    raw = [r.reward for r in rollouts]
    finished = [c.finished for c in completions]
    moments = moments.merge(raw)
    shaped = shape_scores(
        raw,
        finished,
        mean=moments.mean,
        std=moments.std,
        normalise=config.score_norm,
        clip=config.reward_clip,
        missing_eos_penalty=config.missing_eos_penalty,
        missing_eos_mode=config.missing_eos_mode,
    )
    rows = [completion_row(r.prompt, r.completion) for r in rollouts]
    head_on_policy = needs.critic and config.critic == "head"
    old = score_role(session, POLICY, rows, temperature=sampling.temperature, value_head=head_on_policy)
    ref = score_role(session, REFERENCE, rows, temperature=sampling.temperature)["logp"] if needs.reference else None
    values = old.get("values")
    if needs.critic and not head_on_policy:
        values = score_role(session, CRITIC, rows, temperature=1.0, lm_head=False, value_head=True)["values"]

    device = session.device
    lengths = torch.tensor([len(c.token_ids) for c in completions], device=device)
    mask = torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]
    drawn = torch.zeros_like(old["logp"])
    drawn[mask] = torch.tensor([lp for c in completions for lp in c.logprobs], dtype=drawn.dtype, device=device)
    difference = (drawn - old["logp"])[mask]
    batch = RolloutBatch(
        mask=mask,
        logp_old=old["logp"],
        logp_ref=ref,
        values=values,
        score=torch.tensor(shaped, dtype=old["logp"].dtype, device=device),
        group=torch.arange(len(prompts), device=device).repeat_interleave(k),
        finished=torch.tensor(finished, device=device),
        kl_coef=kl_coef,
        score_std=moments.std or 1.0,
        stats={
            "sampler_diff/mean": float(difference.abs().mean()),
            "sampler_diff/max": float(difference.abs().max()),
            "sampler_diff/signed": float(difference.mean()),
        },
    )
    seconds = {
        "seconds/sample": sampled - clock,
        "seconds/reward": rewarded - sampled,
        "seconds/score": time.monotonic() - rewarded,
    }
    return Collected(rollouts=rollouts, rows=rows, batch=batch, moments=moments, seconds=seconds)
