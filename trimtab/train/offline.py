"""Training on a data set: pt, sft and rm. A step is one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any

import torch

from trimtab.algos import ALGORITHMS, Offline
from trimtab.data.loader import batches, row_answers
from trimtab.evals import EVALS
from trimtab.models.forward import score_tokens
from trimtab.models.layout import plan
from trimtab.ops.ranking import plackett_luce
from trimtab.ops.reduction import reduction_weights
from trimtab.ops.stats import calibration_bins, calibration_error, correlation
from trimtab.rewards import with_tail
from trimtab.rewards.model import score_rows_as
from trimtab.train.assemble import POLICY, REWARD, Session
from trimtab.train.loop import Figures
from trimtab.train.optim import make_optimizer
from trimtab.train.progress import say
from trimtab.train.step import Forward, backward_rows, backward_tokens, clip_and_step
from trimtab.types import Example, Pair, PairBatch, RankBatch, Ranking, Sampling, ScoreBatch, TokenBatch, TokenRow, take

Judged = Pair | Ranking | TokenRow
"""A row of a reward model's data: two answers, several, or one with a score (in its example)."""


class OfflineTrainer:
    """SFT, pre-training and reward models, told apart by what their algorithm reads."""

    def __init__(self, session: Session, *, trains: bool = True) -> None:
        """
        Args:
            trains: False for a model that is only evaluated: nothing of it is trainable, and its head stays as it is.
        """
        config = session.config
        self.session = session
        self.algorithm: Offline = ALGORITHMS.load(config.stage).from_config(config)
        self.role = REWARD if self.algorithm.reads == "reward" else POLICY
        self.rows = session.data.train
        self.packs = session.data.packs or [[i] for i in range(len(self.rows))]
        # a stream has no epochs: the run is one
        self.steps_per_epoch = (
            config.max_steps if session.data.stream else math.ceil(len(self.packs) / config.batch_size)
        )
        ranks = self.algorithm.reads == "reward" and config.rm_loss != "pointwise"
        self.best_metric = ("accuracy", True) if ranks else ("loss", False)
        self.learning_rates = {self.role: config.learning_rate}
        self.current: list[dict[str, Any]] = []
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if not trains:
            return
        self.parameters = session.roles.trainable(self.role)
        if self.algorithm.reads == "reward":
            # a random head starts with one large score for everything; losses of leads cannot see it, centring would fight it, and
            # a regression would spend its first steps on it
            first = [row for answers in self.answers(self.rows[:32]) for row in answers]
            self._subtract_mean(first, self._targets(session.data.train_examples[:32]))
        if ranks and not config.center_rewards_coef:
            # losses of leads do not see the level: the bias has rounding noise for a gradient, of which Adam would make whole steps
            self.parameters = {n: p for n, p in self.parameters.items() if not n.endswith("summary.bias")}
        self.optimizers = {self.role: make_optimizer(self.parameters, config, config.learning_rate)}

    def step(self, number: int) -> Figures:
        config = self.session.config
        chosen, examples = self._next(number)
        self.current = [described(example) for example in examples]
        names = [row["row"] for row in self.current]
        how = Forward(
            budget=self.session.budget,
            room=self.session.room,
            layout=self.session.layout,
            dropout=config.lora_dropout if self.algorithm.reads == "logprobs" else 0.0,
            mean_logp=bool(config.label_smoothing_factor),
        )
        if self.algorithm.reads == "reward":
            sums, tokens = self._judged(chosen, examples, how, names)
        else:
            sums, tokens = self._tokens(chosen, how, names)
        norm = clip_and_step(self.optimizers[self.role], self.parameters, config.max_grad_norm, self.role)
        return {"loss": sums.loss, f"grad_norm/{self.role}": norm, "tokens": tokens, **sums.figures()}

    def _next(self, number: int) -> tuple[list[Any], list[Example]]:
        """The rows of a step and the example of each."""
        config, data = self.session.config, self.session.data
        if data.stream is not None:
            found = data.stream.take(config.batch_size)
            while data.stream.complaints:
                say(data.stream.complaints.pop(0))
            return found
        epoch, index = divmod(number, self.steps_per_epoch)
        drawn = batches(len(self.packs), config.batch_size, config.order_seed, epoch, not config.disable_shuffling)
        order = [row for pack in drawn[index] for row in self.packs[pack]]
        return [self.rows[i] for i in order], [data.train_examples[i] for i in order]

    def _tokens(self, rows: list[TokenRow], how: Forward, names: list[str]) -> tuple[Any, int]:
        mask = scored_mask(rows, self.session.device)
        batch = TokenBatch(mask=mask)
        sums = backward_tokens(
            self.session.roles,
            self.role,
            rows,
            reduction_weights(mask, self.algorithm.reduction),
            lambda scores, which: self.algorithm.loss(scores.policy, take(batch, which)),
            how,
            names=names,
        )
        return sums, sum(len(row.token_ids) for row in rows)

    def _judged(self, judged: list[Judged], examples: list[Example], how: Forward, names: list[str]) -> tuple[Any, int]:
        groups = self.answers(judged)
        batch: Any = self.judged_batch(judged, examples)
        rows = [row for answers in groups for row in answers]
        sums = backward_rows(
            self.session.roles,
            self.role,
            rows,
            reduction_weights(
                torch.ones(len(judged), dtype=torch.bool, device=self.session.device), self.algorithm.reduction
            ),
            lambda scores, which: self.algorithm.loss(scores, take(batch, which)),
            how,
            sizes=[len(answers) for answers in groups],
            names=names,
        )
        return sums, sum(len(row.token_ids) for row in rows)

    def answers(self, judged: Sequence[Judged]) -> list[list[TokenRow]]:
        """The answers of each row, the better ones first, each ending where the reward is read."""
        return [[with_tail(answer, self.session.tail) for answer in row_answers(row)] for row in judged]

    def judged_batch(self, judged: Sequence[Judged], examples: Sequence[Example]) -> PairBatch | RankBatch | ScoreBatch:
        """What the data says of these answers: the lead, the ranking, or the score."""
        device = self.session.device
        targets = self._targets(examples)
        if targets is not None:
            return ScoreBatch(score=torch.tensor(targets, device=device))
        margin = torch.tensor([row.margin if isinstance(row, Pair) else 0.0 for row in judged], device=device)
        if all(isinstance(row, Pair) for row in judged):
            return PairBatch(margin=margin)
        sizes = torch.tensor([len(row_answers(row)) for row in judged], device=device)
        return RankBatch(mask=torch.arange(int(sizes.max()), device=device)[None] < sizes[:, None], margin=margin)

    def _targets(self, examples: Sequence[Example]) -> list[float] | None:
        """The scores that a regression learns; None for every other loss."""
        if self.session.config.rm_loss != "pointwise":
            return None
        return [float(example.score or 0.0) for example in examples]

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, step: int) -> Figures:
        data, limit = self.session.data, self.session.config.eval_max_samples
        rows = data.eval[:limit]
        if not rows:
            return {}
        if self.algorithm.reads == "reward":
            return self.evaluate_judged(rows, data.eval_examples[:limit])

        def work(tokens: int) -> tuple[float, int]:
            total, count = 0.0, 0
            for chunk in plan(rows, tokens, layout=self.session.layout):
                with torch.no_grad(), self.session.roles.enter(self.role):
                    scores = score_tokens(
                        self.session.roles.model, [rows[i] for i in chunk], layout=self.session.layout
                    )
                assert scores.logp is not None
                total -= float(scores.logp[scores.mask].sum())
                count += int(scores.mask.sum())
            return total, count

        total, count = self.session.room.attempt(work)
        loss = total / max(count, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))} | run_tasks(self.session, limit)

    def evaluate_judged(self, judged: list[Judged], examples: list[Example]) -> Figures:
        """Of rankings (a pair is one): accuracy (ties are errors), margin and negative log-likelihood over all pairs, calibration,
        correlation of score with length. Of single answers: errors, and correlations with the row's score and with length.
        """
        session = self.session
        groups = self.answers(judged)
        sizes = [len(answers) for answers in groups]
        rows = [row for answers in groups for row in answers]
        scores = score_rows_as(session.roles, self.role, rows, budget=session.room, layout=session.layout, unit=sizes)
        by_length = {"length_correlation": correlation([float(len(row.scored)) for row in rows], scores)}
        targets = self._targets(examples)
        if targets is not None:
            errors = [score - target for score, target in zip(scores, targets, strict=True)]
            return {
                "loss": sum(error**2 for error in errors) / len(errors),
                "abs_error": sum(map(abs, errors)) / len(errors),
                "reward": sum(scores) / len(scores),
                "score_correlation": correlation(targets, scores),
                **by_length,
            }
        starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        ranked = [scores[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        leads = [better - worse for group in ranked for better, worse in combinations(group, 2)]
        bins = calibration_bins(
            [1 / (1 + math.exp(-min(abs(d), 700.0))) for d in leads], [d > 0 for d in leads], low=0.5
        )
        nll = sum(math.log1p(math.exp(-d)) if d > -700 else -d for d in leads) / len(leads)
        loss = nll
        if session.config.rm_loss == "listwise":
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(group) for group in ranked], batch_first=True)
            real = torch.arange(padded.shape[1])[None] < torch.tensor(sizes)[:, None]
            loss = float(plackett_luce(padded, real).mean())
        return {
            "loss": loss,
            "accuracy": sum(d > 0 for d in leads) / len(leads),
            "margin": sum(leads) / len(leads),
            "nll": nll,
            "reward_chosen": sum(group[0] for group in ranked) / len(ranked),
            "reward_rejected": sum(group[-1] for group in ranked) / len(ranked),
            "calibration_error": calibration_error(bins),
            **by_length,
        }

    # ------------------------------------------------------------------------------------------------------------- end

    def state(self) -> dict[str, Any]:
        """Besides the weights only the place in a stream carries over from step to step."""
        stream = self.session.data.stream
        return {} if stream is None else {"stream": stream.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.session.data.stream is not None:
            self.session.data.stream.seek(state["stream"])

    def finish(self) -> bool:
        """A reward model's scores are centred: the mean score of reference answers goes into the head's bias. Not after a regression,
        whose level is that of the data.
        """
        if self.algorithm.reads != "reward" or self.session.config.rm_loss == "pointwise":
            return False
        self._subtract_mean([answers[0] for answers in self.answers(self.rows[:256])])
        return True

    def _subtract_mean(self, rows: list[TokenRow], targets: Sequence[float] | None = None) -> None:
        """Take the mean score of these rows, less that of `targets`, off the head's bias; differences of scores do not change."""
        head = self.session.roles.specs[self.role].head
        assert head is not None
        scores = score_rows_as(
            self.session.roles, self.role, rows, budget=self.session.room, layout=self.session.layout
        )
        with torch.no_grad():
            level = sum(targets) / len(targets) if targets else 0.0
            head.summary.bias.sub_(sum(scores) / len(scores) - level)


def described(example: Example) -> dict[str, Any]:
    """An example as a reader of `failed_step.json` needs it: where it stands, and its texts."""
    texts = {
        name: message.content
        for name in ("response", "chosen", "rejected")
        if (message := getattr(example, name, None)) is not None
    }
    return {"row": str(example.origin), "prompt": [m.content for m in example.prompt], **texts}


def scored_mask(rows: list[TokenRow], device: torch.device) -> torch.Tensor:
    """`[b t]`: which entries of the batch's arrays are scored tokens."""
    lengths = torch.tensor([len(row.scored) for row in rows], device=device)
    return torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]


def run_tasks(session: Session, limit: int | None) -> Figures:
    """The file's `eval_tasks` on greedy answers to the held-out prompts, as means."""
    names = session.config.eval_tasks
    prompts = session.data.eval_prompts[:limit]
    if not names or not prompts:
        return {}
    sampling = Sampling(temperature=0.0, max_new_tokens=session.config.answer_limit, seed=session.config.seed)
    texts = [session.text(c) for c in session.generator().generate(prompts, sampling)]
    return score_tasks(names, texts, prompts)


def score_tasks(names: Any, texts: list[str], prompts: list[Any]) -> Figures:
    """Mean score of each task over answers in the order of their prompts; rows that it cannot judge are counted apart."""
    found: Figures = {}
    for name in (EVALS.row(name).name for name in names):
        scores = EVALS.load(name)(texts, [prompt.example for prompt in prompts])
        judged = [score for score in scores if score is not None]
        if judged or not scores:
            found[name] = sum(judged) / max(1, len(judged))
        if len(judged) < len(scores):
            found[f"{name}_unverified"] = len(scores) - len(judged)
    return found
