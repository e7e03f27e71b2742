"""Answers to prompts, from the weights that are being trained. One seam behind rollouts, evaluation, chat and the API.

`Generator` says what an engine does; `Engine` does it: it schedules rows, and a decoder (`decoders`, `blocks`) computes. Each prompt is
read once for all its completions, rows leave when they stop and others take their slots, and what is drawn is kept as token ids
(never re-encoded) with the log-probability that each had when it was drawn.

Shapes: b live rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.engine import graphs
from trimtab.engine.blocks import BlockDecoder, Weights, why_not
from trimtab.engine.decoders import Decoder, ForwardDecoder
from trimtab.engine.sampling import next_tokens, uniforms
from trimtab.errors import ModelError
from trimtab.models.forward import sees_everything
from trimtab.models.load import head_weight
from trimtab.models.roles import Roles
from trimtab.types import Completion, Finish, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One drawn token of a stream, and how the completion ended if it was the last."""

    prompt_index: int
    sample_index: int
    token_id: int
    finish: Finish | None


class Generator(Protocol):
    """What rollouts, evals and servers ask of an engine."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, k: int = 1) -> list[Completion]:
        """k completions of every prompt, in order: all of the first prompt, then all of the second ..."""
        ...

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Token]:
        """The tokens of one completion as they are drawn."""
        ...

    def update(self, version: int) -> None:
        """The policy's weights have changed; completions from here on carry this version."""
        ...


STEP = 8

AHEAD = 8
"""Steps that a GPU goes on before the host looks at what was drawn. A row that stopped in between is computed for nothing until then."""


@dataclass(slots=True)
class _Row:
    prompt: Prompt
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(slots=True)
class Kept:
    """What the block decoder prepares of the weights. Engines that share it prepare them once; it is freed with the last of them."""

    weights: Weights | None = None


@dataclass(slots=True)
class Engine:
    """Answers of one role, rows in slots: a row that has stopped leaves its slot to the next prompt.

    Attributes:
        stop_ids: the template's stop tokens; the first is its end of turn, a completion that ends with it is finished.
        decode: text of token ids, needed only for stop strings.
        slots: most rows decoded at once.
        packing: may a decoder keep a copy of the weights in the order that its products like best?
        kept: what the decoder prepares of the weights.
        say: where a line goes about fewer slots.
        ahead: steps between two looks at what was drawn; None: 1, on a GPU `AHEAD`. The texts do not depend on it.
    """

    roles: Roles
    role: str
    stop_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str] | None = None
    slots: int = 64
    packing: bool = True
    version: int = 0
    kept: Kept = field(default_factory=Kept)
    say: Callable[[str], None] = print
    ahead: int | None = None

    def update(self, version: int) -> None:
        self.version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        k: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        rows = [[_Row(prompt=prompt, sample=i) for i in range(k)] for prompt in prompts]
        ended: set[int] = set()

        def count(row: _Row) -> None:
            """A row that is drawn again has been counted."""
            if row.finish is not None and id(row) not in ended:
                ended.add(id(row))
                if progress is not None:
                    progress(1)

        while not self._finish(rows, sampling, count):
            self.slots = max(k, min(self.slots, k * len(rows)) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.say(f"out of memory: going on with {self.slots} answers at a time (the texts are the same)")
        return [self._completion(row) for own in rows for row in own]

    def _finish(self, rows: Sequence[list[_Row]], sampling: Sampling, count: Callable[[_Row], None]) -> bool:
        """Decode what has not ended; False when memory has run out and fewer rows at a time could help: a draw can be repeated."""
        waiting = [own for own in rows if any(row.finish is None for row in own)]
        for row in (row for own in waiting for row in own):
            row.tokens, row.logprobs, row.finish = [], [], None
        try:
            for row in self._decode(waiting, sampling, self._ahead()):
                count(row)
        except torch.OutOfMemoryError:
            if min(self.slots, sum(map(len, rows))) <= len(rows[0]):
                raise
            return False
        return True

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Token]:
        for row in self._decode([[_Row(prompt=prompt, sample=0)]], sampling, ahead=1):
            yield Token(prompt_index=prompt.index, sample_index=0, token_id=row.tokens[-1], finish=row.finish)

    def _completion(self, row: _Row) -> Completion:
        return Completion(
            prompt_index=row.prompt.index,
            sample_index=row.sample,
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            finish=row.finish or "length",
            policy_version=self.version,
        )

    def _decode(self, groups: Sequence[list[_Row]], sampling: Sampling, ahead: int) -> Iterator[_Row]:
        """Decode the rows of each prompt to their ends; yields a row after each of its tokens."""
        if not groups:
            return
        # longest prompts first, so that a pass over new prompts pads little. The draw does not depend on companions: order is free
        waiting = sorted(groups, key=lambda own: len(own[0].prompt.token_ids))
        k, limit = len(groups[0]), sampling.max_new_tokens
        slots = max(k, min(self.slots, k * len(groups)))
        with self._as_role():
            decoder = self._decoder(slots, len(waiting[-1][0].prompt.token_ids) + limit)
        live = _Live(slots, limit, self.device, self._vocabulary() if sampling.repetition_penalty != 1.0 else 0)
        while waiting or live.rows:
            free = (slots - len(live.rows)) // k
            # prompts are cheaper to read together: wait until an eighth of the slots is free
            if waiting and (not live.rows or free >= max(1, min(len(waiting), slots // k // 8))):
                new = [waiting.pop() for _ in range(min(free, len(waiting)))]
                states, lengths = self._admit(new, decoder, len(live.rows))
                first = len(live.rows)
                live.add([row for own in new for row in own], lengths, sampling)
                drawn = [self._draw(states, decoder, live, first, sampling)]
            else:
                first, drawn = 0, []
                for _ in range(min(ahead, live.left(limit))):
                    with self._as_role():
                        states = decoder.step(*live.rounded(), live.longest)[: len(live.rows)]
                    live.grow()
                    drawn.append(self._draw(states, decoder, live, first, sampling))
            yield from self._told(live.rows[first:], drawn, sampling)
            live.leave(decoder)
        self._heed(decoder)

    def _draw(
        self, states: Tensor, decoder: Decoder, live: _Live, first: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """The next token of the rows from `first` on, and its log-probability. Nothing waits for the device here."""
        with self._as_role():
            logits = decoder.logits(states)
        tokens, logps = next_tokens(logits, live.draws(first), sampling, live.seen_from(first))
        live.put(first, tokens)
        return tokens, logps

    def _told(self, rows: Sequence[_Row], drawn: Sequence[tuple[Tensor, Tensor]], sampling: Sampling) -> Iterator[_Row]:
        """Write down what was drawn, step by step, for the rows that had not stopped by then; yields a row after each token."""
        tokens, logps = (torch.stack(own).tolist() for own in zip(*drawn, strict=True))
        for step_tokens, step_logps in zip(tokens, logps, strict=True):
            for row, token, logp in zip(rows, step_tokens, step_logps, strict=True):
                if row.finish is None:
                    row.tokens.append(token)
                    row.logprobs.append(logp)
                    row.finish = self._ending(row, token, sampling)
                    yield row

    def _heed(self, decoder: Decoder) -> None:
        """Once steps could not be replayed, none are recorded any more."""
        replays = decoder.replays if isinstance(decoder, BlockDecoder) else None
        if replays is not None and replays.why:
            graphs.refuse(replays.why)
            self.say(f"decoding without CUDA graphs, which is slower: {replays.why}")

    def _ahead(self) -> int:
        return self.ahead or (AHEAD if self.device.type == "cuda" else 1)

    def _admit(self, groups: list[list[_Row]], decoder: Decoder, first: int) -> tuple[Tensor, list[int]]:
        """Read new prompts into the slots from `first` on; the hidden state and length of each new row."""
        k = len(groups[0])
        prompts = [own[0].prompt.token_ids for own in groups]
        slots = [list(range(first + i * k, first + (i + 1) * k)) for i in range(len(groups))]
        with self._as_role():
            states = decoder.prefill(prompts, slots)
        return states.repeat_interleave(k, dim=0), [len(ids) for ids in prompts for _ in range(k)]

    def _decoder(self, slots: int, capacity: int) -> Decoder:
        model = self.roles.of(self.role)
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        if window is not None and not sees_everything(model) and capacity > window:
            raise ModelError(
                f"prompt and answer may reach {capacity} tokens, more than this model's attention window of {window}",
                where="max_new_tokens, cutoff_len",
                why="the engine's cache and mask hold whole answers and know no window",
                remedy=f"keep cutoff_len + max_new_tokens within {window}",
            )
        if why_not(model, self.roles.switch.active):
            return ForwardDecoder(model, slots, capacity)
        active, kept = self.roles.switch.active, self.kept
        if kept.weights is None or not kept.weights.current(active):
            kept.weights = None  # freed before the new copy is made
            kept.weights = Weights(model, active, packing=self.packing)
        return BlockDecoder(kept.weights, slots, capacity, graphs.recorder(self.device))

    @property
    def device(self) -> torch.device:
        return next(self.roles.of(self.role).parameters()).device

    def _vocabulary(self) -> int:
        return len(head_weight(self.roles.of(self.role)))

    @contextmanager
    def _as_role(self) -> Iterator[None]:
        """Inference as the generator's role, entered per forward: between tokens a stream's reader may do as it likes."""
        with torch.no_grad(), self.roles.enter(self.role):
            yield

    def _ending(self, row: _Row, token: int, sampling: Sampling) -> Finish | None:
        if token in self.stop_ids:
            return "stop" if token == self.stop_ids[0] else "other_stop"
        if sampling.stop and self.decode is not None:
            text = self.decode(row.tokens)
            if any(s in text for s in sampling.stop):
                return "other_stop"
        return "length" if len(row.tokens) >= sampling.max_new_tokens else None


class _Live:
    """The rows that are being decoded, row i in slot i, and what the next step needs of them.

    Args:
        vocabulary: keep the tokens that each row has seen, of this many; 0: do not.
    """

    def __init__(self, slots: int, limit: int, device: torch.device, vocabulary: int) -> None:
        self.rows: list[_Row] = []
        self.device = device
        self._uniforms = torch.zeros(slots, limit, device=device)
        self._tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self._written = torch.zeros(slots, dtype=torch.long, device=device)
        self._seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device) if vocabulary else None
        self.longest = 0

    def rounded(self) -> tuple[Tensor, Tensor]:
        """The last token of each row and how many the cache holds, with free slots up to a multiple of `STEP` rows.

        What a free slot held is computed on and not read; libraries make a kernel for every number of rows that they meet.
        """
        b = len(self.rows)
        if b > STEP:
            b = min(-(-b // STEP) * STEP, len(self._tokens))
        return self._tokens[:b], self._lengths[:b]

    def add(self, rows: list[_Row], lengths: list[int], sampling: Sampling) -> None:
        """Rows in the next free slots, their prompts read."""
        first, last = len(self.rows), len(self.rows) + len(rows)
        prompts, samples = np.array([row.prompt.index for row in rows]), np.array([row.sample for row in rows])
        drawn = uniforms(sampling.seed, sampling.epoch, prompts, samples, sampling.max_new_tokens)
        self._uniforms[first:last] = torch.from_numpy(drawn).to(self.device)
        self._lengths[first:last] = torch.tensor(lengths, device=self.device)
        self._written[first:last] = 0
        if self._seen is not None:
            self._seen[first:last] = False
            for i, row in enumerate(rows, first):
                self._seen[i, list(row.prompt.token_ids)] = True
        self.rows += rows
        self.longest = max(self.longest, *lengths)

    def grow(self) -> None:
        """The cache holds one token more of each row."""
        self._lengths[: len(self.rows)] += 1
        self.longest += 1

    def left(self, limit: int) -> int:
        """Steps until the first row has reached the limit of tokens."""
        return limit - max(len(row.tokens) for row in self.rows)

    def draws(self, first: int) -> Tensor:
        """The uniform number of the next token of the rows from `first` on."""
        part = slice(first, len(self.rows))
        return self._uniforms[part].gather(1, self._written[part, None]).squeeze(1)

    def seen_from(self, first: int) -> Tensor | None:
        return None if self._seen is None else self._seen[first : len(self.rows)]

    def put(self, first: int, tokens: Tensor) -> None:
        """Tokens that the rows from `first` on have been given."""
        part = slice(first, len(self.rows))
        self._tokens[part] = tokens
        self._written[part] += 1
        if self._seen is not None:
            self._seen[torch.arange(first, len(self.rows), device=self.device), tokens] = True

    def leave(self, decoder: Decoder) -> None:
        """Rows that have stopped leave; the last ones move into their slots."""
        kept = [i for i, row in enumerate(self.rows) if row.finish is None]
        if len(kept) == len(self.rows):
            return
        holes = sorted(set(range(len(kept))) - set(kept))
        movers = kept[len(kept) - len(holes) :]
        if holes:
            targets = torch.tensor(holes, device=self.device)
            sources = torch.tensor(movers, device=self.device)
            decoder.move(sources, targets, self.longest)
            for own in (self._uniforms, self._tokens, self._lengths, self._written, self._seen):
                if own is not None:
                    own[targets] = own[sources]
        rows = self.rows[: len(kept)]
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = self.rows[mover]
        self.rows = rows
        self.longest = max((len(r.prompt.token_ids) + len(r.tokens) - 1 for r in rows), default=0)
