"""Training on judged answers: dpo, kto, orpo and simpo. A step is one optimizer step.

rows of the step -> the reference's log-probabilities        (reference.py: once for the run, from disk if they are there)
                 -> what the losses are measured against      (the algorithm's `observe`: a pass of its own, without gradient)
                 -> forward, loss, backward, clip, step       (step.py; both answers of a pair in one micro-batch)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.algos import ALGORITHMS, Preference
from trimtab.data.loader import batches
from trimtab.errors import DataError
from trimtab.models.layout import prefix
from trimtab.ops.reduction import reduction_weights
from trimtab.train.assemble import POLICY, Session
from trimtab.train.loop import Figures, total_steps
from trimtab.train.offline import run_tasks, scored_mask
from trimtab.train.optim import make_optimizer
from trimtab.train.reference import reference_logp
from trimtab.train.rollout import score_role
from trimtab.train.step import Forward, Sums, backward_tokens, clip_and_step
from trimtab.types import LabelledBatch, Pair, PreferenceBatch, Scores, TokenRow, take

PREFERENCE_STAGES = ("dpo", "kto", "orpo", "simpo")


@dataclass(slots=True)
class Answers:
    """The rows of a data set, two for each of its examples, and the reference's log-probabilities of them.

    The two are the chosen and the rejected answer of a pair; or, of a labelled answer, itself and a mismatched one: the same
    prompt with the answer of another row.

    Attributes:
        labels: of labelled answers, in the order of examples.
        reference: for each example whose reference was computed, that of its two rows.
    """

    rows: list[tuple[TokenRow, TokenRow]]
    labels: list[bool]
    reference: dict[int, list[Tensor]]


class PreferenceTrainer:
    """Preference optimisation, told apart by what the algorithm compares."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session = session
        self.algorithm: Preference = ALGORITHMS.load(config.stage).from_config(config)
        data = session.data
        limit = config.eval_max_samples
        self.train = self._answers(data.train, data.train_examples)
        self.held_out = self._answers(data.eval[:limit], data.eval_examples[:limit], more=data.train)
        self.steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
        self.parameters = session.roles.trainable(POLICY)
        self.optimizers = {POLICY: make_optimizer(self.parameters, config, config.learning_rate)}
        self.learning_rates = {POLICY: config.learning_rate}
        self.best_metric = ("loss", False)
        self.seen = (
            0.0,
            0,
        )  # mean log-ratio of all answers so far, and their number: where BCO's classifier is undecided

    def _answers(self, rows: Sequence[Any], examples: Sequence[Any], more: Sequence[Any] = ()) -> Answers:
        if self.algorithm.unit == "pair":
            pairs: Sequence[Pair] = rows
            return Answers(rows=[(pair.chosen, pair.rejected) for pair in pairs], labels=[], reference={})
        # a few held-out rows may all have one prompt: the training rows follow them
        others = mismatched([*rows, *more], self.session.config.cutoff_len)[: len(rows)]
        return Answers(
            rows=list(zip(rows, others, strict=True)), labels=[bool(e.label) for e in examples], reference={}
        )

    # ------------------------------------------------------------------------------------------------------------ step

    def step(self, number: int) -> Figures:
        config = self.session.config
        which = self._order(number)
        batch, observed_rows = self._prepare(self.train, which, needed=self._visited)
        rows = self._rows(self.train, which)
        unit = 2 if self.algorithm.unit == "pair" else 1
        real = torch.ones(len(which), dtype=torch.bool, device=self.session.device)
        sums = backward_tokens(
            self.session.roles,
            POLICY,
            rows,
            reduction_weights(real, self.algorithm.reduction),
            lambda scores, some: self.algorithm.loss(scores.policy, take(batch, some)),
            Forward(budget=self.session.budget, room=self.session.room, layout=self.session.layout),
            unit=unit,
            names=[str(self.session.data.train_examples[i].origin) for i in which],
        )
        norm = clip_and_step(self.optimizers[POLICY], self.parameters, config.max_grad_norm, POLICY)
        if isinstance(batch, PreferenceBatch):
            self.seen = (batch.h_mean, batch.h_count)
        tokens = sum(len(row.token_ids) for row in (*rows, *observed_rows))
        return {"loss": sums.loss, f"grad_norm/{POLICY}": norm, "tokens": tokens, **_figures(sums)}

    def _order(self, number: int) -> list[int]:
        """The examples of a step."""
        config = self.session.config
        epoch, index = divmod(number, self.steps_per_epoch)
        count, shuffle = len(self.train.rows), not config.disable_shuffling
        return batches(count, config.batch_size, config.order_seed, epoch, shuffle)[index]

    def _visited(self) -> list[int]:
        """Every example that some step of the run uses."""
        total = total_steps(self.session.config, self.steps_per_epoch)
        return sorted({i for number in range(min(total, self.steps_per_epoch)) for i in self._order(number)} | (
            set(range(len(self.train.rows))) if total > self.steps_per_epoch else set()
        ))  # fmt: skip

    def _rows(self, answers: Answers, which: Sequence[int]) -> list[TokenRow]:
        """The rows that losses are taken on: both of a pair, the first of a labelled answer's two."""
        if self.algorithm.unit == "pair":
            return [row for i in which for row in answers.rows[i]]
        return [answers.rows[i][0] for i in which]

    def _prepare(self, answers: Answers, which: Sequence[int], *, needed: Any) -> tuple[Any, list[TokenRow]]:
        """The batch of these examples with all that is settled before its first gradient, and the rows looked at for it."""
        rows = self._rows(answers, which)
        mask = scored_mask(rows, self.session.device)
        if self.algorithm.needs.reference and not answers.reference:
            self._score_reference(answers, needed())
        labels = torch.tensor([answers.labels[i] for i in which], device=mask.device) if answers.labels else None
        pair = labels is None
        logp_ref = None
        if self.algorithm.needs.reference:
            own = [r for i in which for r in (answers.reference[i] if pair else answers.reference[i][:1])]
            logp_ref = padded(own, mask)
        batch: Any
        if labels is None:
            mean, count = self.seen
            batch = PreferenceBatch(mask=mask, logp_ref=logp_ref, h_mean=mean, h_count=count)
        else:
            batch = LabelledBatch(mask=mask, logp_ref=logp_ref, desirable=labels)
        if self.algorithm.observes == "nothing":
            return batch, []
        looked_at, observed = rows, batch
        if self.algorithm.observes == "mismatched":
            looked_at = [answers.rows[i][1] for i in which]
            other = scored_mask(looked_at, mask.device)
            observed = replace(batch, mask=other, logp_ref=padded([answers.reference[i][1] for i in which], other))
        logp = score_role(self.session, POLICY, looked_at, temperature=1.0)["logp"]
        observing: Any = self.algorithm
        return observing.observe(logp, observed, batch), looked_at

    def _score_reference(self, answers: Answers, needed: Sequence[int]) -> None:
        """The reference's log-probabilities of the examples that will be used; both rows of each."""
        flat = reference_logp(self.session, [row for i in needed for row in answers.rows[i]])
        answers.reference = {i: flat[2 * n : 2 * n + 2] for n, i in enumerate(needed)}

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, step: int) -> Figures:
        """The loss and figures of the held-out answers, taken as one batch."""
        count = len(self.held_out.rows)
        if not count:
            return {}
        which = list(range(count))
        batch, _ = self._prepare(self.held_out, which, needed=lambda: which)
        if isinstance(batch, PreferenceBatch):
            batch = replace(batch, h_mean=self.seen[0])  # BCO is measured against the training answers
        arrays = score_role(self.session, POLICY, self._rows(self.held_out, which), temperature=1.0)
        with torch.no_grad():
            terms = self.algorithm.loss(Scores(logp=arrays["logp"], entropy=arrays["entropy"]), batch)
        sums = Sums()
        sums.add(terms, torch.ones(count, dtype=torch.bool, device=terms.loss.device), terms.loss.mean())
        return {"loss": sums.loss, **_figures(sums)} | run_tasks(self.session, self.session.config.eval_max_samples)

    # ------------------------------------------------------------------------------------------------------------- end

    def state(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def restore(self, state: Mapping[str, Any]) -> None:
        mean, count = state["seen"]
        self.seen = (float(mean), int(count))

    def finish(self) -> bool:
        return False


def mismatched(rows: Sequence[TokenRow], limit: int) -> list[TokenRow]:
    """Each row's prompt with the answer of the next row that has another prompt; a prompt too long for it loses its head.

    The same for every epoch, so the reference is computed once for these rows too.

    Raises:
        DataError: all rows have the same prompt.
    """
    prompts = [prefix(row) for row in rows]
    other = next(
        (i for i, prompt in enumerate(prompts) if prompt != prompts[0]), None
    )  # the next one after the last row
    if other is None:
        raise DataError(
            f"all {len(rows)} rows have the same prompt",
            why="KTO measures an answer against answers that were written for other prompts",
            remedy="use rows with at least two prompts, or pairs with stage: dpo",
        )
    found: list[TokenRow] = []
    for i in range(len(rows) - 1, -1, -1):
        after = (i + 1) % len(rows)
        if prompts[after] != prompts[i]:
            other = after
        answer = [rows[other].token_ids[place] for place in rows[other].scored]
        prompt = prompts[i][-max(1, limit - len(answer)) :]
        found.append(
            TokenRow(token_ids=(*prompt, *answer), scored=tuple(range(len(prompt), len(prompt) + len(answer))))
        )
    return found[::-1]


def padded(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Rows of different length as one array of the mask's shape and device, 0 on the right."""
    full = torch.zeros(mask.shape, dtype=rows[0].dtype, device=mask.device)
    full[mask] = torch.cat(list(rows)).to(mask.device)
    return full


def _figures(sums: Sums) -> Figures:
    """Means of the step; the margin of labelled answers is that between the two kinds."""
    figures = sums.figures()
    kinds = ("rewards/chosen", "rewards/rejected")
    if "margin" not in figures and all(kind in figures for kind in kinds):
        figures["margin"] = figures[kinds[0]] - figures[kinds[1]]
    return figures
