"""Training on a data set: pt, sft and rm. A step is one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trimtab.algos import ALGORITHMS, Offline
from trimtab.data.loader import batches
from trimtab.evals import EVALS
from trimtab.models.forward import plan, score_tokens
from trimtab.ops.reduction import reduction_weights
from trimtab.ops.stats import calibration_bins, calibration_error, correlation
from trimtab.rewards import with_tail
from trimtab.rewards.model import score_rows_as
from trimtab.train.assemble import POLICY, REWARD, Session
from trimtab.train.loop import Figures
from trimtab.train.optim import make_optimizer
from trimtab.train.progress import say
from trimtab.train.step import Forward, backward_rows, backward_tokens, clip_and_step
from trimtab.types import Example, Pair, PairBatch, Sampling, TokenBatch, TokenRow, take


class OfflineTrainer:
    """SFT, pre-training and reward models, told apart by what their algorithm reads."""

    def __init__(self, session: Session) -> None:
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
        self.parameters = session.roles.trainable(self.role)
        if self.algorithm.reads == "reward":
            # a random head starts with one large score for everything; the pairwise loss cannot see it, centring would fight it
            self._subtract_mean(self.pair_rows(self.rows[:32]))
        self.optimizers = {self.role: make_optimizer(self.parameters, config, config.learning_rate)}
        self.learning_rates = {self.role: config.learning_rate}
        self.current: list[dict[str, Any]] = []
        self.best_metric = ("accuracy", True) if self.algorithm.reads == "reward" else ("loss", False)

    def step(self, number: int) -> Figures:
        config = self.session.config
        chosen, examples = self._next(number)
        self.current = [described(example) for example in examples]
        names = [row["row"] for row in self.current]
        how = Forward(
            budget=self.session.budget,
            layout=self.session.layout,
            dropout=config.lora_dropout if self.algorithm.reads == "logprobs" else 0.0,
            mean_logp=bool(config.label_smoothing_factor),
        )
        if self.algorithm.reads == "reward":
            sums, tokens = self._pairs(chosen, how, names)
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

    def _pairs(self, pairs: list[Pair], how: Forward, names: list[str]) -> tuple[Any, int]:
        rows = self.pair_rows(pairs)
        batch = PairBatch(margin=torch.tensor([pair.margin for pair in pairs], device=self.session.device))
        sums = backward_rows(
            self.session.roles,
            self.role,
            rows,
            reduction_weights(
                torch.ones(len(pairs), dtype=torch.bool, device=self.session.device), self.algorithm.reduction
            ),
            lambda scores, which: self.algorithm.loss(scores, take(batch, which)),
            how,
            unit=2,
            names=names,
        )
        return sums, sum(len(row.token_ids) for row in rows)

    def pair_rows(self, pairs: list[Pair]) -> list[TokenRow]:
        """Chosen, rejected, chosen ... each ending where the reward is read."""
        return [with_tail(row, self.session.tail) for pair in pairs for row in (pair.chosen, pair.rejected)]

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, step: int) -> Figures:
        data, limit = self.session.data, self.session.config.eval_max_samples
        rows = data.eval[:limit]
        if not rows:
            return {}
        if self.algorithm.reads == "reward":
            return self.evaluate_pairs(rows)
        total, count = 0.0, 0
        for chunk in plan(rows, self.session.budget, layout=self.session.layout):
            with torch.no_grad(), self.session.roles.enter(self.role):
                scores = score_tokens(self.session.roles.model, [rows[i] for i in chunk], layout=self.session.layout)
            assert scores.logp is not None
            total -= float(scores.logp[scores.mask].sum())
            count += int(scores.mask.sum())
        loss = total / max(count, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))} | run_tasks(self.session, limit)

    def evaluate_pairs(self, pairs: list[Pair]) -> Figures:
        """Accuracy (ties are errors), margin, negative log-likelihood, calibration, correlation of score with length."""
        rows = self.pair_rows(pairs)
        session = self.session
        scores = score_rows_as(session.roles, self.role, rows, budget=session.budget, layout=session.layout, unit=2)
        leads = [w - lose for w, lose in zip(scores[::2], scores[1::2], strict=True)]
        bins = calibration_bins(
            [1 / (1 + math.exp(-min(abs(d), 700.0))) for d in leads], [d > 0 for d in leads], low=0.5
        )
        nll = sum(math.log1p(math.exp(-d)) if d > -700 else -d for d in leads) / len(leads)
        return {
            "loss": nll,
            "accuracy": sum(d > 0 for d in leads) / len(leads),
            "margin": sum(leads) / len(leads),
            "nll": nll,
            "reward_chosen": sum(scores[::2]) / len(leads),
            "reward_rejected": sum(scores[1::2]) / len(leads),
            "calibration_error": calibration_error(bins),
            "length_correlation": correlation([float(len(row.scored)) for row in rows], scores),
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
        """A reward model's scores are centred: the mean score of reference answers goes into the head's bias."""
        if self.algorithm.reads != "reward":
            return False
        self._subtract_mean(self.pair_rows(self.rows[:256])[::2])
        return True

    def _subtract_mean(self, rows: list[TokenRow]) -> None:
        """Take the mean score of these rows off the head's bias; differences of scores, and so the loss, do not change."""
        head = self.session.roles.specs[self.role].head
        assert head is not None
        scores = score_rows_as(
            self.session.roles, self.role, rows, budget=self.session.budget, layout=self.session.layout
        )
        with torch.no_grad():
            head.summary.bias.sub_(sum(scores) / len(scores))


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
    """Mean score of each task over answers in the order of their prompts."""
    found: Figures = {}
    for name in names:
        scores = EVALS.load(name)(texts, [prompt.example for prompt in prompts])
        found[name] = sum(scores) / max(1, len(scores))
    return found
