"""The nouns that pass between floors: messages, examples, prompts, completions, rollouts, batches.

Plain frozen values. Tensors appear in annotations only, so that importing this file does not import torch.

Shapes: b completions (or rows, or pairs) in a batch; t the most scored tokens of any row; n tokens in one row.
Every per-token array is `[b, t]` over the *scored tokens* of each row, in order, padded on the right; `mask` says which are real.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Role = Literal["system", "user", "assistant", "observation", "function"]
Finish = Literal["stop", "other_stop", "length"]


# ---------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a dialogue."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a data row was read: a file as the user named it, and its number there, from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One data row of any format, before tokens.

    Attributes:
        origin: the file and row it was read from.
        prompt: every message before the answer (a system message first, if any); the last is the user's or an observation.
        response: the answer to imitate, or the gold answer of a prompt; None when the row has none.
        chosen, rejected: the two answers of a preference row.
        ranked: the answers of a ranking from best to worst; then `chosen` and `rejected` are its first and last.
        margin: what the chosen answer should lead the rejected one by.
        label: the `kto_tag` of the row: was this answer wanted?
        score: what the answer is worth, by the row.
        text: plain text, for stage pt; then `prompt` is empty.
        tools: the row's tools, as it writes them.
        columns: the row's columns as read, for rewards and evals.
    """

    origin: Origin
    prompt: tuple[Message, ...] = ()
    response: Message | None = None
    chosen: Message | None = None
    rejected: Message | None = None
    ranked: tuple[Message, ...] = ()
    margin: float = 0.0
    label: bool | None = None
    score: float | None = None
    text: str | None = None
    tools: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A row of token ids and the index in it of each scored token, ascending.

    The log-probability of scored token i is read at the hidden state *before* it, `token_ids[scored[i] - 1]`, so no scored
    index is 0. A reward is read at the last scored token itself.
    """

    token_ids: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt ready for the engine; `index` is its number in the data set (it keys the draw), `cut` if it lost its head."""

    index: int
    token_ids: tuple[int, ...]
    example: Example
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two answers of a preference row, each with the prompt before it; both end at the end marker."""

    chosen: TokenRow
    rejected: TokenRow
    example: Example
    margin: float = 0.0

    @property
    def answers(self) -> tuple[TokenRow, ...]:
        """Both, the better one first."""
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Two or more answers to one prompt from best to worst, each with the prompt before it and ending at the end marker."""

    answers: tuple[TokenRow, ...]
    example: Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine wrote after a prompt, up to and including the token that ended it.

    Attributes:
        token_ids: the tokens as drawn, never re-encoded.
        logprobs: log-probability of each at draw time, under the rollout temperature, no filter applied.
        finish: "stop" when the last token is the template's end of turn; "other_stop" for any other stop; "length".
        policy_version: how many updates the sampling weights had seen.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    policy_version: int = 0

    @property
    def finished(self) -> bool:
        return self.finish == "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A completion with its text and its reward, in all and by part."""

    prompt: Prompt
    completion: Completion
    text: str
    reward: float
    reward_parts: Mapping[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a causal LM says of the scored tokens, at the rollout temperature.

    Attributes:
        mean_logp: the mean of log p over the whole vocabulary, where it was asked for (label smoothing).
    """

    logp: Float[Tensor, "b t"]
    entropy: Float[Tensor, "b t"]
    mean_logp: Float[Tensor, "b t"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """An SFT or pre-training batch: which of the scored tokens are real."""

    mask: Bool[Tensor, "b t"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """A reward-model batch of b pairs; `margin` is what the chosen answer should lead by."""

    margin: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """A reward-model batch of b rankings of up to k answers.

    Attributes:
        mask: real answers; they stand from best to worst.
        margin: what any answer should lead the ones below it by.
    """

    mask: Bool[Tensor, "b k"]
    margin: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """A reward-model batch of b single answers and what each is worth."""

    score: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """Pairs of answers as rows: chosen, rejected, chosen, rejected ...; r = 2 x pairs.

    Attributes:
        mask: real scored tokens.
        logp_ref: the reference's log-probabilities; None where the loss has no reference.
        z_chosen, z_rejected: max(0, mean log-ratio) of the chosen and of the rejected answers over the optimizer step.
        h_mean, h_count: mean log-ratio of all answers of the steps so far, this one included, and how many they are.
    """

    mask: Bool[Tensor, "r t"]
    logp_ref: Float[Tensor, "r t"] | None = None
    z_chosen: float = 0.0
    z_rejected: float = 0.0
    h_mean: float = 0.0
    h_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBatch:
    """Single answers, each wanted or not.

    Attributes:
        mask, logp_ref: as in `PreferenceBatch`, one row per answer.
        desirable: the answer's label.
        z0: max(0, mean log-ratio) of mismatched answers over the optimizer step.
    """

    mask: Bool[Tensor, "b t"]
    desirable: Bool[Tensor, " b"]
    logp_ref: Float[Tensor, "b t"] | None = None
    z0: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """A whole rollout batch as arrays; an algorithm's `credit` fills in `advantages` (and `returns`, with a critic).

    Attributes:
        mask: real scored tokens.
        logp_old: the policy that sampled, by the trainer's own forward; with `fresh` as the sampler had it, until the update's first
            and only pass over a row gives it.
        logp_ref: the reference; None when the algorithm needs none.
        values: the critic at the state *before* each token; None without a critic.
        score: the reward of each completion, shaped (penalty, clip, normalisation).
        group: completions of one prompt share a number.
        finished: the completion ended by itself.
        fresh: one optimizer step follows, so the policy that is trained is still the one that sampled.
        greedy: the score of the greedy answer to each completion's prompt; None unless the algorithm asks for it.
        kl_coef: beta, now.
        score_std: running standard deviation of the raw scores, the unit of `clip_range_value`.
        stats: figures that `credit` wants logged.
    """

    mask: Bool[Tensor, "b t"]
    logp_old: Float[Tensor, "b t"]
    score: Float[Tensor, " b"]
    group: Int[Tensor, " b"]
    finished: Bool[Tensor, " b"]
    kl_coef: float
    fresh: bool = False
    logp_ref: Float[Tensor, "b t"] | None = None
    values: Float[Tensor, "b t"] | None = None
    advantages: Float[Tensor, "b t"] | None = None
    returns: Float[Tensor, "b t"] | None = None
    greedy: Float[Tensor, " b"] | None = None
    score_std: float = 1.0
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """An unreduced loss and what is worth logging about it.

    Attributes:
        loss: one number per scored token `[b, t]`, or per row or pair `[b]`.
        means: arrays of the same kind, logged as means (over real tokens, or over rows).
        maxima: the same, logged as maxima.
        among: for a mean that concerns some entries only, which.
    """

    loss: Float[Tensor, "b t"] | Float[Tensor, " b"]
    means: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
    among: Mapping[str, Tensor] = field(default_factory=dict)


BatchT = TypeVar("BatchT", TokenBatch, PairBatch, RankBatch, ScoreBatch, PreferenceBatch, LabelledBatch, RolloutBatch)


def take(batch: BatchT, rows: list[int]) -> BatchT:
    """The same batch with only these rows: every tensor indexed along its first axis, all else kept."""
    kept = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: value[rows] for name, value in kept.items() if hasattr(value, "ndim")})
