"""Which token comes next: the fixed draw, and the filters on it. Pure functions.

Every draw uses one uniform number that is a function of (seed, epoch, prompt, sample, token) and of nothing else: no engine keeps
random state, so resuming, batch companions and slots cannot change a text beyond rounding, and a faster engine draws the same texts.

Shapes: b rows drawing at once, v vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops import native
from trimtab.types import Sampling

Words = npt.NDArray[np.uint64]


def _mix(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection on 64-bit words that scatters every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def uniforms(
    seed: int, epoch: int, prompt: npt.NDArray[np.int64], sample: npt.NDArray[np.int64], tokens: int
) -> npt.NDArray[np.float32]:
    """The draws of b completions: `[b, tokens]` float32 in [0, 1), multiples of 2^-23.

    A counter-based generator: the key words are absorbed one after the other, each through the mixer, and the token index is
    the counter. 23 bits, so that u times a float32 total is always below the total.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.full(prompt.shape, golden, dtype=np.uint64)
        for word in (
            np.uint64(seed & 0xFFFFFFFFFFFFFFFF),
            np.uint64(epoch),
            prompt.astype(np.uint64),
            sample.astype(np.uint64),
        ):
            state = _mix(state * golden + word + golden)
        counters = np.arange(1, tokens + 1, dtype=np.uint64)
        bits = _mix(state[:, None] + counters[None, :] * golden)
    return ((bits >> np.uint64(41)).astype(np.float64) * 2.0**-23).astype(np.float32)


def draw(probs: Float[Tensor, "b v"], u: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Inverse CDF in vocabulary order: the first token whose cumulative probability exceeds u times the row's own total.

    The float32 cumulative sum is scaled to its own total rather than to 1, so its rounding favours no token at the end.
    """
    cumulative = probs.float().cumsum(-1)
    target = u[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return token.clamp_(max=probs.shape[-1] - 1)


def filtered(logits: Float[Tensor, "b v"], sampling: Sampling) -> Float[Tensor, "b v"]:
    """Logits with everything outside top-k, top-p and min-p at minus infinity. For chat and prediction, never for rollouts.

    top-k first; then top-p on what is left: the smallest set of most likely tokens whose probability reaches p (arXiv:1904.09751);
    then min-p: what is at least that share of the most likely token's probability (arXiv:2407.01082).
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0.0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), -torch.inf)
    return logits


def penalise_repeats(logits: Float[Tensor, "b v"], seen: Tensor, penalty: float) -> Float[Tensor, "b v"]:
    """Divide positive and multiply negative logits of tokens seen before by `penalty` (arXiv:1909.05858, section 4.1).

    Args:
        seen: `[b v]` bool, tokens of the prompt and of the answer so far.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_tokens(
    logits: Float[Tensor, "b v"], u: Float[Tensor, " b"], sampling: Sampling, seen: Tensor | None = None
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """Draw one token per row; also its log-probability under the plain policy at this temperature, no filter applied.

    Temperature 0 takes the most likely token (log-probabilities then are those at temperature 1).
    """
    if native.takes(logits) and logits.is_contiguous() and _is_plain(sampling, seen):
        token, logp = (
            logits.new_empty(len(logits), dtype=torch.int64),
            logits.new_empty(len(logits), dtype=torch.float32),
        )
        u = u.float().contiguous()
        native.kernels().trimtab_draw(
            logits.data_ptr(), sampling.temperature, u.data_ptr(), token.data_ptr(), logp.data_ptr(), *logits.shape,
            native.is_narrow(logits), torch.get_num_threads(),
        )  # fmt: skip
        return token, logp
    logits = logits.float()
    if sampling.temperature > 0 and sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    logp = logits.log_softmax(-1)
    allowed = logits
    if seen is not None and sampling.repetition_penalty != 1.0:
        allowed = penalise_repeats(allowed, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = allowed.argmax(-1)
    else:
        changed = allowed is not logits
        if sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0:
            allowed, changed = filtered(allowed, sampling), True
        token = draw(allowed.softmax(-1) if changed else logp.exp(), u)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


def _is_plain(sampling: Sampling, seen: Tensor | None) -> bool:
    """Is the token drawn from the policy itself, as in every rollout?"""
    penalised = seen is not None and sampling.repetition_penalty != 1.0
    filters = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
    return sampling.temperature > 0 and not penalised and not filters
