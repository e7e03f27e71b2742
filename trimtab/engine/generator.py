"""Answers to prompts, from the weights that are being trained. One seam behind rollouts, evaluation, chat and the API.

`Generator` says what an engine does; `ForwardGenerator` does it with the model's own forward pass and a preallocated cache: any
causal language model of transformers. Each prompt is computed once for all its completions, rows leave when they stop, and what
is drawn is kept as token ids (never re-encoded) with the log-probability that each had when it was drawn.

Shapes: b live rows, p columns of the longest prompt (padded on the left, so that all rows write the same column), v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.engine.cache import SlotCache
from trimtab.engine.sampling import next_tokens, uniforms
from trimtab.errors import ModelError
from trimtab.models.forward import sees_everything
from trimtab.models.load import decoder, head_bias, head_weight
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


@dataclass(slots=True)
class _Row:
    prompt: Prompt
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(slots=True)
class ForwardGenerator:
    """Decoding through `model.forward`, as one role.

    Attributes:
        stop_ids: the template's stop tokens; the first is its end of turn, a completion that ends with it is finished.
        decode: text of token ids, needed only for stop strings.
        slots: most rows decoded at once.
    """

    roles: Roles
    role: str
    stop_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str] | None = None
    slots: int = 64
    version: int = 0

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
        rows = [_Row(prompt=prompt, sample=i) for prompt in prompts for i in range(k)]
        per_wave = max(1, self.slots // k)
        # longest prompts together: a wave is padded to its longest. The draw does not depend on companions, so order is free
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
        for start in range(0, len(order), per_wave):
            wave = [rows[i * k + j] for i in order[start : start + per_wave] for j in range(k)]
            for stopped in self._decode_wave(wave, sampling, k):
                if progress is not None and stopped.finish is not None:
                    progress(1)
        return [self._completion(row) for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Token]:
        for row in self._decode_wave([_Row(prompt=prompt, sample=0)], sampling, 1):
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

    def _decode_wave(self, rows: list[_Row], sampling: Sampling, k: int) -> Iterator[_Row]:
        """Decode rows (k consecutive ones per prompt) to their ends; yields a row after each of its tokens."""
        model = self.roles.of(self.role)
        device = next(model.parameters()).device
        limit = sampling.max_new_tokens
        draws = torch.from_numpy(
            uniforms(
                sampling.seed,
                sampling.epoch,
                np.array([row.prompt.index for row in rows]),
                np.array([row.sample for row in rows]),
                limit,
            )
        ).to(device)
        lengths = [len(row.prompt.token_ids) for row in rows[::k]]
        longest = max(lengths)
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        if window is not None and not sees_everything(model) and longest + limit > window:
            raise ModelError(
                f"prompt and answer may reach {longest + limit} tokens, more than this model's attention window of {window}",
                where="max_new_tokens, cutoff_len",
                why="the engine's cache and mask hold whole answers and know no window",
                remedy=f"keep cutoff_len + max_new_tokens within {window}",
            )
        cache = SlotCache(model.config.get_text_config().num_hidden_layers, longest + limit)
        with self._as_role():
            state = self._prefill([row.prompt for row in rows[::k]], cache, longest)
        repeat = torch.arange(len(lengths), device=device).repeat_interleave(k)
        if k > 1:
            cache.keep(repeat)
            state = state[repeat]
        pad = torch.tensor([longest - n for n in lengths], device=device)[repeat]
        live = list(range(len(rows)))
        seen = self._seen(rows, device) if sampling.repetition_penalty != 1.0 else None
        columns = torch.arange(longest + limit, device=device)
        for step in range(limit):
            token, logp = next_tokens(self._logits(state), draws[live, step], sampling, seen)
            going = []
            for slot, (i, t, lp) in enumerate(zip(live, token.tolist(), logp.tolist(), strict=True)):
                row = rows[i]
                row.tokens.append(t)
                row.logprobs.append(lp)
                row.finish = self._ending(row, t, sampling)
                if row.finish is None:
                    going.append(slot)
                yield row
            if not going or step == limit - 1:
                return
            if seen is not None:
                seen[torch.arange(len(live), device=device), token] = True
            if len(going) < len(live):
                kept = torch.tensor(going, device=device)
                token, pad = token[kept], pad[kept]
                seen = seen[kept] if seen is not None else None
                live = [live[slot] for slot in going]
                cache.keep(kept)
            width = longest + step + 1
            mask = (columns[None, :width] >= pad[:, None])[:, None, None] if longest > min(lengths) else None
            with self._as_role():
                state = decoder(model)(
                    input_ids=token[:, None],
                    attention_mask=mask,
                    position_ids=(longest + step - pad)[:, None],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]

    @contextmanager
    def _as_role(self) -> Iterator[None]:
        """Inference as the generator's role, entered per forward: between tokens a stream's reader may do as it likes."""
        with torch.no_grad(), self.roles.enter(self.role):
            yield

    def _prefill(self, prompts: list[Prompt], cache: SlotCache, longest: int) -> Tensor:
        """Fill the cache with left-padded prompts; returns the hidden state of each prompt's last token `[b, d]`."""
        model = self.roles.of(self.role)
        device = next(model.parameters()).device
        ids = torch.tensor([[0] * (longest - len(p.token_ids)) + list(p.token_ids) for p in prompts], device=device)
        pad = torch.tensor([longest - len(p.token_ids) for p in prompts], device=device)
        columns = torch.arange(longest, device=device)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        # a padded column sees itself, or its softmax would be 0 / 0
        mask = (causal & (columns[None, None, :] >= pad[:, None, None])) | torch.eye(
            longest, dtype=torch.bool, device=device
        )
        out = decoder(model)(
            input_ids=ids,
            attention_mask=mask[:, None] if bool(pad.any()) else None,
            position_ids=(columns[None] - pad[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return out  # type: ignore[no-any-return]

    def _logits(self, state: Tensor) -> Tensor:
        model = self.roles.of(self.role)
        with self._as_role():  # the role may have an output head of its own
            return torch.nn.functional.linear(state, head_weight(model), head_bias(model))

    def _seen(self, rows: list[_Row], device: torch.device) -> Tensor:
        seen = torch.zeros(len(rows), head_weight(self.roles.of(self.role)).shape[0], dtype=torch.bool, device=device)
        for i, row in enumerate(rows):
            seen[i, list(row.prompt.token_ids)] = True
        return seen

    def _ending(self, row: _Row, token: int, sampling: Sampling) -> Finish | None:
        if token in self.stop_ids:
            return "stop" if token == self.stop_ids[0] else "other_stop"
        if sampling.stop and self.decode is not None:
            text = self.decode(row.tokens)
            if any(s in text for s in sampling.stop):
                return "other_stop"
        return "length" if len(row.tokens) >= sampling.max_new_tokens else None
