"""From prompts to a rollout batch: sample, reward, score. No gradients here, at most a graph that the first update goes back through."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.models.forward import score_tokens
from trimtab.models.layout import plan
from trimtab.ops.stats import RunningMoments
from trimtab.rewards import Answer, finished_row
from trimtab.rewards.mixture import Mixture
from trimtab.rewards.shaping import overlong_cost, shape_scores
from trimtab.train.assemble import CRITIC, POLICY, REFERENCE, Session
from trimtab.train.step import Forward, Held, hold_tokens
from trimtab.types import Completion, Prompt, Rollout, RolloutBatch, Sampling, TokenRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A rollout batch with everything that was seen on the way to it.

    Attributes:
        rows: prompt and completion as drawn, one per completion.
        moments: running moments of the raw scores, this batch included.
        seconds: of sampling, rewarding and scoring.
        held: the policy's pass over all rows with its graph, where the first update begins with that pass.
    """

    rollouts: list[Rollout]
    rows: list[TokenRow]
    batch: RolloutBatch
    moments: RunningMoments
    seconds: dict[str, float]
    held: Held | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Prompts to answer, and the pass over the data that they belong to: it keys the draw."""

    prompts: list[Prompt]
    epoch: int


More = Callable[[int], Draw]
"""The next so many prompts of the data (fewer where a pass over it ends)."""


def collect(
    session: Session,
    reward: Mixture,
    draw: Draw,
    *,
    k: int,
    sampling: Sampling,
    needs: Any,
    kl_coef: float,
    moments: RunningMoments,
    version: int,
    baselines: dict[int, float] | None = None,
    more: More | None = None,
    one_step: bool = False,
    one_minibatch: bool = False,
) -> Collected:
    """Answer every prompt k times and score the answers for all roles that the algorithm needs.

    Args:
        baselines: with `reward_baseline: answer`, what is known so far of the prompts' own answers, by the prompt's number; added to.
        more: with dynamic sampling, where further prompts come from: a group whose scores are all equal teaches nothing, and is replaced
            until the batch is full or `dynamic_sampling_rounds` are over.
        one_step: one optimizer step follows. Its own pass then gives the old log-probabilities, and none is made for them here, unless
            `credit` needs them and the sampler's are not good enough for that (it computed in less than float32).
        one_minibatch: the first update is over all of these rows, and its weights are the ones that are asked now: the pass for the old
            log-probabilities is its forward pass, and is kept with its graph if it is a single micro-batch.
    """
    config = session.config
    seconds = {"seconds/sample": 0.0, "seconds/reward": 0.0}
    wanted = len(draw.prompts)
    kept: list[_Scored] = []
    left_out, rounds = 0, 0
    while True:
        found, moments = _answer(session, reward, draw, k, sampling, needs, moments, version, baselines, seconds)
        rounds += 1
        if more is None:
            kept = found
            break
        useful = [group for start in range(0, len(found), k) if _varies(group := found[start : start + k])]
        left_out += len(found) // k - len(useful)
        kept.extend(scored for group in useful for scored in group)
        missing = wanted - len(kept) // k
        if missing == 0 or rounds >= config.dynamic_sampling_rounds:
            # a batch must not be empty: a step without one useful group trains on groups whose advantages are 0
            kept = kept or found
            break
        draw = more(missing)
    rollouts, prompts = [scored.rollout for scored in kept], len(kept) // k

    clock = time.monotonic()
    rows = [completion_row(r.prompt, r.completion) for r in rollouts]
    head_on_policy = needs.critic and config.critic == "head"
    fresh = one_step and not head_on_policy and not (needs.old and session.dtype.itemsize < 4)
    ref = score_role(session, REFERENCE, rows, temperature=sampling.temperature)["logp"] if needs.reference else None
    values = None
    if needs.critic and not head_on_policy:
        values = score_role(session, CRITIC, rows, temperature=1.0, lm_head=False, value_head=True)["values"]
    # the policy last: no other role is entered between a pass that is held and its backward pass
    old: dict[str, Tensor] = {}
    held = None
    if one_minibatch and not fresh:
        how = Forward(budget=session.budget, room=session.room, layout=session.layout, temperature=sampling.temperature)
        held = hold_tokens(session.roles, POLICY, rows, how, value_head=head_on_policy)
    if held is not None:
        old = {name: x.detach() for name in ("logp", "values") if (x := getattr(held, name)) is not None}
    elif not fresh:
        old = score_role(session, POLICY, rows, temperature=sampling.temperature, value_head=head_on_policy)
    values = old.get("values", values)

    device, dtype = session.device, torch.promote_types(session.dtype, torch.float32)
    completions = [r.completion for r in rollouts]
    lengths = torch.tensor([len(c.token_ids) for c in completions], device=device)
    mask = torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]
    drawn = torch.zeros(mask.shape, dtype=dtype, device=device)
    drawn[mask] = torch.tensor([lp for c in completions for lp in c.logprobs], dtype=dtype, device=device)
    logp_old = old.get("logp", drawn)
    stats = {} if fresh else sampler_figures(drawn - logp_old, mask)
    if more is not None:
        stats |= {"dynamic/left_out": float(left_out), "dynamic/rounds": float(rounds)}
    batch = RolloutBatch(
        mask=mask,
        logp_old=logp_old,
        fresh=fresh,
        logp_ref=ref,
        values=values,
        score=torch.tensor([scored.score for scored in kept], dtype=dtype, device=device),
        greedy=torch.tensor([scored.greedy for scored in kept], dtype=dtype, device=device) if needs.greedy else None,
        group=torch.arange(prompts, device=device).repeat_interleave(k),
        finished=torch.tensor([c.finished for c in completions], device=device),
        kl_coef=kl_coef,
        score_std=moments.std or 1.0,
        stats=stats,
    )
    seconds["seconds/score"] = time.monotonic() - clock
    return Collected(
        rollouts=rollouts,
        rows=rows,
        batch=batch,
        moments=moments,
        seconds=seconds,
        held=None if held is None else Held(held),
    )


def sampler_figures(difference: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the sampler's log-probabilities `[b t]` lie from the trainer's: in float32 by rounding."""
    real = difference[mask]
    return {
        "sampler_diff/mean": float(real.abs().mean()),
        "sampler_diff/max": float(real.abs().max()),
        "sampler_diff/signed": float(real.mean()),
    }


@dataclass(frozen=True, slots=True)
class _Scored:
    """A rollout with its shaped score, and that of the greedy answer to its prompt where the algorithm asks for it."""

    rollout: Rollout
    score: float
    greedy: float


def _varies(group: Sequence[_Scored]) -> bool:
    return len({scored.score for scored in group}) > 1


def _answer(
    session: Session,
    reward: Mixture,
    draw: Draw,
    k: int,
    sampling: Sampling,
    needs: Any,
    moments: RunningMoments,
    version: int,
    baselines: dict[int, float] | None,
    seconds: dict[str, float],
) -> tuple[list[_Scored], RunningMoments]:
    """Completions of some prompts with their scores, k consecutive ones per prompt, and the moments with them; adds to `seconds`."""
    started = time.monotonic()
    generator = session.generator()
    generator.update(version)
    sampling = replace(sampling, epoch=draw.epoch)
    with session.memory.phase("rollout"):
        completions = generator.generate(draw.prompts, sampling, k=k)
        likeliest = generator.generate(draw.prompts, replace(sampling, temperature=0.0)) if needs.greedy else []
    del generator  # and with it the weights that it packed
    sampled = time.monotonic()
    owners = [prompt for prompt in draw.prompts for _ in range(k)]
    rollouts = reward_completions(session, reward, owners, completions)
    own = answer_rewards(session, reward, draw.prompts, baselines) if baselines is not None else {}
    raw = [r.reward - own.get(r.prompt.index, 0.0) for r in rollouts]
    moments = moments.merge(raw)
    scores = _shaped(session, rollouts, raw, moments)
    greedy = [0.0] * len(draw.prompts)
    if needs.greedy:
        found = reward_completions(session, reward, draw.prompts, likeliest)
        greedy = _shaped(session, found, [r.reward - own.get(r.prompt.index, 0.0) for r in found], moments)
    seconds["seconds/sample"] += sampled - started
    seconds["seconds/reward"] += time.monotonic() - sampled
    return [
        _Scored(r, score, greedy[i // k]) for i, (r, score) in enumerate(zip(rollouts, scores, strict=True))
    ], moments


def answer_rewards(
    session: Session, reward: Mixture, prompts: Sequence[Prompt], known: dict[int, float]
) -> dict[int, float]:
    """What the data's own answer to each prompt is worth, by the prompt's number; asked for once, and kept in `known`.

    Taken off the scores of a prompt's completions (`reward_baseline: answer`) it is a constant for them all: the optimum stays where it
    was, and what differs between prompts no longer drowns what differs between answers (Shen et al. 2403.07708, with one answer).
    """
    new = [prompt for prompt in prompts if prompt.index not in known]
    answers = []
    for prompt in new:
        assert prompt.example.response is not None, "checked when the run was put together"
        ids = session.template.encode_answer(session.tokenizer, prompt.example.response.content, newline=False)
        answers.append(
            Completion(
                prompt_index=prompt.index,
                sample_index=0,
                token_ids=tuple(ids),
                logprobs=(0.0,) * len(ids),
                finish="stop",
            )
        )
    for rollout in reward_completions(session, reward, new, answers) if new else ():
        known[rollout.prompt.index] = rollout.reward
    return known


def _shaped(
    session: Session, rollouts: Sequence[Rollout], raw: Sequence[float], moments: RunningMoments
) -> list[float]:
    """Scores as they are credited: normalised, clipped, less what a missing end or a length near the limit costs."""
    config = session.config
    lengths = [len(r.completion.token_ids) for r in rollouts]
    costs = [overlong_cost(n, config.answer_limit, config.overlong_buffer, config.overlong_penalty) for n in lengths]
    return shape_scores(
        raw,
        [r.completion.finished for r in rollouts],
        mean=moments.mean,
        std=moments.std,
        normalise=config.score_norm,
        clip=config.reward_clip,
        missing_eos_penalty=config.missing_eos_penalty,
        missing_eos_mode=config.missing_eos_mode,
        overlong=costs,
    )
