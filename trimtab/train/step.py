"""One optimizer step: forward, loss, backward, role by role and micro-batch by micro-batch. The only backward pass in trimtab.

The weights of every token (one over the denominator) are fixed on the whole optimizer batch before it is cut, so the loss is a plain
sum over micro-batches and neither it nor its gradient depends on the cut. A role is entered, computed and backpropagated before
the next is entered (see `models/roles.py` for why that matters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from trimtab.errors import NumericsError
from trimtab.models.budget import Budget
from trimtab.models.forward import TokenScores, score_rows, score_tokens
from trimtab.models.layout import Layout, plan
from trimtab.models.roles import Roles
from trimtab.types import LossTerms, TokenRow


@dataclass(slots=True)
class Sums:
    """Running sums of what is logged over the micro-batches of a step: weighted means, maxima, and the loss itself."""

    loss: float = 0.0
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, terms: LossTerms, mask: Tensor, loss: Tensor) -> None:
        """Take in one micro-batch; `mask` has the shape of the loss."""
        self.loss += float(loss.detach())
        for name, array in terms.means.items():
            real = mask if array.ndim == mask.ndim else mask.any(-1)
            if name in terms.among:
                real = real & terms.among[name]
            total, count = self.means.get(name, (0.0, 0.0))
            self.means[name] = (total + float(array.detach()[real].sum()), count + float(real.sum()))
        for name, array in terms.maxima.items():
            real = mask if array.ndim == mask.ndim else mask.any(-1)
            if bool(real.any()):
                self.maxima[name] = max(self.maxima.get(name, -float("inf")), float(array.detach()[real].max()))

    def figures(self) -> dict[str, float]:
        """Means and maxima as plain numbers; a mean that concerns none of the entries is left out."""
        return {name: total / count for name, (total, count) in self.means.items() if count} | self.maxima


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """How the rows of a step are computed: token budget, layout for rows of one prompt, temperature, dropout; for
    label smoothing also the mean of log p over the vocabulary. `room`: the budget that shrinks when memory runs out."""

    budget: int
    room: Budget | None = None
    layout: Layout = "padded"
    temperature: float = 1.0
    dropout: float = 0.0
    mean_logp: bool = False


@dataclass(slots=True)
class Held:
    """Scores of a whole optimizer batch, row by row, with the graph behind them: good for one backward pass before anything has moved."""

    scores: TokenScores | None

    def take(self) -> TokenScores | None:
        """The scores, once; then they are gone, and no memory with them stays behind a pass that broke off."""
        scores, self.scores = self.scores, None
        return scores


def hold_tokens(
    roles: Roles, role: str, rows: Sequence[TokenRow], how: Forward, *, value_head: bool = False
) -> TokenScores | None:
    """The forward pass that `backward_tokens` would begin with, its graph kept; None if it takes several micro-batches.

    What follows until then must leave the role's weights alone and must not enter another role.
    """

    def work(budget: int) -> TokenScores | None:
        if len(plan(rows, budget, layout=how.layout)) > 1:
            return None
        with roles.enter(role) as spec:
            head = spec.head if value_head else None
            return score_tokens(roles.model, rows, layout=how.layout, temperature=how.temperature, head=head)

    return (how.room or Budget(how.budget)).attempt(work)


def backward_tokens(
    roles: Roles,
    role: str,
    rows: Sequence[TokenRow],
    weights: Tensor,
    loss: Callable[[TokenScores, list[int]], LossTerms],
    how: Forward,
    *,
    lm_head: bool = True,
    value_head: bool = False,
    trunk_learns: bool = True,
    coefficient: float = 1.0,
    unit: int = 1,
    width: int | None = None,
    names: Sequence[str] = (),
    held: Held | None = None,
) -> Sums:
    """Add the gradient of `coefficient * sum(weights * loss)` to the role's parameters.

    Args:
        rows: the whole optimizer batch; weights `[b t]` over it, or `[b / unit]` for a loss on whole answers.
        loss: unreduced loss of some rows (their scores padded to t, their numbers); one without a gradient is only measured.
        trunk_learns: False: only the head's parameters get a gradient, and the layers' backward pass does not run.
        unit: rows that one entry of a loss on whole answers is made of (2 for pairs): consecutive, never separated.
        width: t, where it is not the most scored tokens of these rows.
        names: what to call each row (each entry) when its loss is not finite.
        held: the forward pass over these rows, if it has been made (`hold_tokens`).

    Raises:
        NumericsError: a loss that is not finite; no optimizer step has been taken.
    """

    def work(budget: int) -> Sums:
        sums = Sums()
        made = held.take() if held is not None else None
        cut = [list(range(len(rows)))] if made is not None else plan(rows, budget, layout=how.layout, unit=unit)
        for chunk in cut:
            with roles.enter(role, dropout=how.dropout) as spec:
                scores = made or score_tokens(
                    roles.model,
                    [rows[i] for i in chunk],
                    layout=how.layout,
                    temperature=how.temperature,
                    lm_head=lm_head,
                    head=spec.head if value_head else None,
                    width=width or max(len(row.scored) for row in rows),
                    mean_logp=how.mean_logp,
                    trunk_learns=trunk_learns,
                )
                terms = loss(scores, chunk)
                entries, mask = chunk, scores.mask
                if weights.ndim == 1:
                    entries, mask = [i // unit for i in chunk[::unit]], mask.any(-1).view(-1, unit).all(-1)
                total = _total(terms.loss, weights[entries], mask, entries, names)
                if trunk_learns or total.requires_grad:
                    torch.autograd.backward(coefficient * total)
            sums.add(terms, mask, total)
        return sums

    return _within(roles, role, how, work)


def backward_rows(
    roles: Roles,
    role: str,
    rows: Sequence[TokenRow],
    weights: Tensor,
    loss: Callable[[Tensor, list[int]], LossTerms],
    how: Forward,
    *,
    sizes: Sequence[int],
    names: Sequence[str] = (),
) -> Sums:
    """The same for losses on whole rows (reward models), several of which make one entry of `weights` `[b]`.

    Args:
        sizes: how many consecutive rows make each entry.
        loss: of scores `[b k]`, k the largest size of the step, padded on the right with 0.
    """

    def work(budget: int) -> Sums:
        sums = Sums()
        owners = [entry for entry, size in enumerate(sizes) for _ in range(size)]
        width = max(sizes)
        for chunk in plan(rows, budget, layout=how.layout, unit=sizes):
            entries = list(dict.fromkeys(owners[i] for i in chunk))
            with roles.enter(role, dropout=how.dropout) as spec:
                if spec.head is None:
                    raise RuntimeError(f"role {role!r} has no head")
                scores = score_rows(roles.model, [rows[i] for i in chunk], spec.head, layout=how.layout)
                ends = accumulate(sizes[entry] for entry in entries)
                parts = [scores[end - sizes[entry] : end] for entry, end in zip(entries, ends, strict=True)]
                own = [nn.functional.pad(part, (0, width - len(part))) for part in parts]
                terms = loss(torch.stack(own), entries)
                mask = torch.ones(len(entries), dtype=torch.bool, device=scores.device)
                total = _total(terms.loss, weights[entries], mask, entries, names)
                torch.autograd.backward(total)
            sums.add(terms, mask, total)
        return sums

    return _within(roles, role, how, work)


def _within(roles: Roles, role: str, how: Forward, work: Callable[[int], Sums]) -> Sums:
    """All micro-batches of a pass; after out-of-memory all of them again, smaller, from the gradients that stood before.

    A backward pass that breaks off has added to some gradients and not to others: none of it may stay.
    """
    parameters = list(roles.trainable(role).values())
    before = [None if p.grad is None else p.grad.clone() for p in parameters]

    def undo() -> None:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = None if grad is None else grad.clone()

    return (how.room or Budget(how.budget)).attempt(work, undo)


def _total(loss: Tensor, weights: Tensor, mask: Tensor, rows: list[int], names: Sequence[str]) -> Tensor:
    total = (loss * weights.to(loss.device)).sum()
    if not bool(torch.isfinite(total)):
        bad = ~torch.isfinite(loss) & (mask if loss.ndim == mask.ndim else mask.any(-1))
        at = bad.any(-1) if bad.ndim > 1 else bad
        guilty = [names[rows[i]] if names else f"row {rows[i]}" for i in at.nonzero().flatten().tolist()]
        raise NumericsError(
            "the loss is not finite; stopped before the optimizer step",
            where=", ".join(guilty[:8]) or "in the sum over the batch",
            why="a NaN or infinity in the model's output; the weights before this step are unharmed",
            remedy="look at these rows, lower learning_rate, or set compute_dtype: float32; continue from the last checkpoint",
            rows=guilty if names else (),
        )
    return total


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], max_norm: float | None, what: str
) -> float:
    """Clip the gradient of one role to `max_norm` (0 or None: no clipping), step, clear; returns the norm before clipping.

    Raises:
        NumericsError: a gradient that is not finite; the step is not taken.
    """
    limit = max_norm if max_norm else float("inf")
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), limit))
    if norm != norm or norm == float("inf"):
        raise NumericsError(
            f"the gradient of the {what} is not finite (norm {norm}); stopped before the optimizer step",
            why="some product in the backward pass overflowed",
            remedy="lower learning_rate or set compute_dtype: float32; continue from the last checkpoint",
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
