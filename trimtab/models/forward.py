"""From rows of token ids to numbers at their scored tokens. The only file, with `layout` beside it, that knows how rows lie in memory.

Three layouts, equal in loss and gradient up to rounding:

    padded   one row per sequence, padded on the right. Causal attention never looks right, so no mask is needed.
    packed   all rows of a micro-batch one after the other in one sequence, each with positions from 0 and blind to the others:
             no padding.
    shared   packed, and what rows have in common at their beginnings is there once: of a group the prompt before its answers, of
             unlike prompts the system message or the schema that they begin with. Each row sees its own tokens and no others, its
             positions go on from what it shares.

The last two need a model of plain causal softmax attention (`models/attention.py` computes it); a numerical check decides, not a list of
model names. No logits exist outside `ops/logprobs`, and the language-model head runs at scored positions only.

Shapes: b rows, t scored tokens of the longest row, q sequences, n tokens in the longest sequence, s scored tokens in all, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.errors import ConfigError
from trimtab.models import attention
from trimtab.models.attention import Segment, Trees
from trimtab.models.heads import ValueHead
from trimtab.models.layout import Layout, in_common, order
from trimtab.models.load import decoder, head_bias, head_weight
from trimtab.ops.logprobs import logprobs_and_entropy, vocabulary_mean
from trimtab.types import Scores, TokenRow

STEP = 64
"""Where oneDNN multiplies (16-bit types, and the engine's packed weights) tokens and scored states are filled up to a multiple of this: it
makes a kernel, 0.7 MB of it, for every number of rows that it meets (docs/log.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What a forward pass says at each scored token; `values` with a head, `logp` and `entropy` when the LM head was asked for."""

    mask: Bool[Tensor, "b t"]
    logp: Float[Tensor, "b t"] | None = None
    entropy: Float[Tensor, "b t"] | None = None
    values: Float[Tensor, "b t"] | None = None
    mean_logp: Float[Tensor, "b t"] | None = None

    @property
    def policy(self) -> Scores:
        """What a policy loss reads; the LM head must have been asked for."""
        if self.logp is None or self.entropy is None:
            raise ValueError("these scores were computed without the LM head")
        return Scores(logp=self.logp, entropy=self.entropy, mean_logp=self.mean_logp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows laid out for one forward pass.

    Attributes:
        ids, positions: `[q n]`; q is 1 where rows are packed.
        trees: which token sees which in a packed sequence; None where plain causal attention is right.
        places: for each row, its sequence and, for each of its token indices, the column where it lies.
    """

    ids: Int[Tensor, "q n"]
    positions: Int[Tensor, "q n"]
    trees: Trees | None
    places: list[tuple[int, list[int]]]


# ------------------------------------------------------------------------------------------------------------- layout


def pack(rows: Sequence[TokenRow], layout: Layout, device: torch.device, heads: int = 1, multiple: int = 1) -> Packed:
    """Lay rows out for one forward pass.

    Args:
        heads: attention heads of the model, for the size of what is computed together.
        multiple: fill a packed sequence up to a multiple of this many tokens, with a row that nobody reads.
    """
    if layout == "padded":
        n = max(len(row.token_ids) for row in rows)
        # positions go on through the padding: transformers takes a restart for a second packed sequence and builds a mask for it
        return Packed(
            ids=torch.tensor([[*row.token_ids, *[0] * (n - len(row.token_ids))] for row in rows], device=device),
            positions=torch.arange(n, device=device).expand(len(rows), n),
            trees=None,
            places=[(i, list(range(len(row.token_ids)))) for i, row in enumerate(rows)],
        )
    ids: list[int] = []
    positions: list[int] = []
    columns: list[list[int]] = [[] for _ in rows]
    begun: dict[int, int] = {}  # column where a row's own tokens begin -> the column that they go on from
    before: int | None = None
    for i in sorted(range(len(rows)), key=lambda i: order(rows[i])) if layout == "shared" else range(len(rows)):
        shared = in_common(rows[before], rows[i]) if layout == "shared" and before is not None else 0
        path = columns[before][:shared] if before is not None else []
        own = range(shared, len(rows[i].token_ids))
        if own:
            begun[len(ids)] = path[-1] if path else -1
        columns[i] = [*path, *range(len(ids), len(ids) + len(own))]
        ids.extend(rows[i].token_ids[shared:])
        positions.extend(own)
        before = i
    if filler := -len(ids) % multiple:
        begun[len(ids)] = -1
        ids.extend([0] * filler)
        positions.extend(range(filler))
    return Packed(
        ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        trees=Trees(_segments(begun, len(ids)), len(ids), heads, device),
        places=[(0, own) for own in columns],
    )


def _segments(begun: dict[int, int], n: int) -> tuple[Segment, ...]:
    """Cut the columns where something begins and after each column that something goes on from."""
    starts = sorted({*begun, *(column + 1 for column in begun.values() if column >= 0)})
    numbers = {end - 1: number for number, end in enumerate([*starts[1:], n])}  # last column -> segment
    return tuple(
        Segment(start, end, numbers.get(begun.get(start, start - 1), -1))
        for start, end in zip(starts, [*starts[1:], n], strict=True)
    )


# ------------------------------------------------------------------------------------------------------------- forward


def _hidden(model: torch.nn.Module, packed: Packed) -> Float[Tensor, "q n d"]:
    keys: dict[str, Any] = {}
    if packed.trees is not None:
        attention.install(cast(PreTrainedModel, model))
        if not attention.installed(model):
            raise RuntimeError(
                "packed rows for a model with an attention of its own, which would mix them up; pad them"
            )
        # transformers hands a mask of four axes on as it is; ours is never read, the trees say who sees whom
        keys = {"attention_mask": packed.ids.new_ones(1, 1, 1, 1, dtype=torch.bool), "trees": packed.trees}
    out = decoder(model)(input_ids=packed.ids, position_ids=packed.positions, use_cache=False, **keys).last_hidden_state
    return out  # type: ignore[no-any-return]


def _multiple(model: torch.nn.Module) -> int:
    return STEP if head_weight(model).element_size() == 2 else 1


def _heads(model: torch.nn.Module) -> int:
    return int(model.config.get_text_config().num_attention_heads)  # type: ignore[operator, union-attr]


def _gather(hidden: Tensor, packed: Packed, rows: Sequence[TokenRow], shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states at (scored index - shift) of every row, flat `[s d]`, with the row and the slot t that each belongs to."""
    sequence, column, owner, slot = [], [], [], []
    for i, row in enumerate(rows):
        q, where = packed.places[i]
        for t, index in enumerate(row.scored):
            sequence.append(q)
            column.append(where[index - shift])
            owner.append(i)
            slot.append(t)
    device = hidden.device
    states = hidden[torch.tensor(sequence, device=device), torch.tensor(column, device=device)]
    return states, torch.tensor(owner, device=device), torch.tensor(slot, device=device)


def score_tokens(
    model: torch.nn.Module,
    rows: Sequence[TokenRow],
    *,
    layout: Layout = "padded",
    temperature: float = 1.0,
    lm_head: bool = True,
    head: ValueHead | None = None,
    width: int | None = None,
    mean_logp: bool = False,
    trunk_learns: bool = True,
) -> TokenScores:
    """Log-probability, entropy and value of every scored token, each from the hidden state *before* that token.

    Args:
        model: a causal LM switched to a role.
        temperature: divides the logits, as it did when the tokens were drawn.
        lm_head: compute `logp` and `entropy`.
        head: compute `values` with this head.
        width: make the arrays this wide, t of a larger batch that these rows are part of.
        mean_logp: compute the mean of log p over the vocabulary too.
        trunk_learns: False: gradients end at the head, and nothing of the layers is kept for a backward pass.
    """
    device = next(model.parameters()).device
    # nothing is read at the last scored token or after it, and no earlier token sees them
    read = [TokenRow(token_ids=row.token_ids[: row.scored[-1]], scored=row.scored) for row in rows]
    packed = pack(read, layout, device, _heads(model), _multiple(model))
    with torch.set_grad_enabled(trunk_learns and torch.is_grad_enabled()):
        states, owner, slot = _gather(_hidden(model, packed), packed, rows, shift=1)
    b, t = len(rows), width or max(len(row.scored) for row in rows)

    def spread(flat: Tensor) -> Tensor:
        return flat.new_zeros(b, t).index_put((owner, slot), flat)

    mask = torch.zeros(b, t, dtype=torch.bool, device=device).index_put(
        (owner, slot), torch.tensor(True, device=device)
    )
    logp = entropy = average = None
    if lm_head:
        targets = torch.tensor([row.token_ids[i] for row in rows for i in row.scored], device=device)
        filler = -len(states) % _multiple(model)
        flat_logp, flat_entropy = logprobs_and_entropy(
            F.pad(states, (0, 0, 0, filler)),
            head_weight(model),
            F.pad(targets, (0, filler)),
            temperature=temperature,
            bias=head_bias(model),
        )
        flat_logp, flat_entropy = flat_logp[: len(states)], flat_entropy[: len(states)]
        logp, entropy = spread(flat_logp), spread(flat_entropy)
        if mean_logp:
            average = spread(
                vocabulary_mean(
                    states, head_weight(model), targets, flat_logp, temperature=temperature, bias=head_bias(model)
                )
            )
    values = spread(head(states)) if head is not None else None
    return TokenScores(mask=mask, logp=logp, entropy=entropy, values=values, mean_logp=average)


def score_rows(
    model: torch.nn.Module, rows: Sequence[TokenRow], head: ValueHead, *, layout: Layout = "padded"
) -> Float[Tensor, " b"]:
    """The reward of each row: the head at the row's last scored token (its end marker). The language-model head never runs."""
    device = next(model.parameters()).device
    last = [TokenRow(token_ids=row.token_ids, scored=row.scored[-1:]) for row in rows]
    packed = pack(rows, layout, device, _heads(model), _multiple(model))
    states, _, _ = _gather(_hidden(model, packed), packed, last, shift=0)
    return head(states)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- choosing a layout


def sees_everything(model: torch.nn.Module) -> bool:
    """Does every layer attend to all earlier tokens (no sliding windows, no recurrence)?"""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    kinds = set(getattr(config, "layer_types", None) or ())
    return not kinds - {"full_attention"} and not (not kinds and getattr(config, "sliding_window", None))


def choose_layout(models: Sequence[PreTrainedModel], wanted: Layout | Literal["auto"] = "auto") -> tuple[Layout, str]:
    """The layout for all models of a run, and why in a few words; they are prepared for it here (`attention.install`).

    `auto` packs with shared prompts wherever the model allows it, which never computes more tokens than the others do. What it allows
    is tried on a dozen tokens: a model whose attention is not plain causal softmax (sliding windows, recurrence, positions that it
    makes itself) gives other hidden states, and its rows are padded.

    Raises:
        ConfigError: `packed` or `shared` was asked for and would change this model's results.
    """
    if wanted == "padded":
        return "padded", "as the file says"
    why = next((reason for reason in map(_why_not, models) if reason), "")
    if why and wanted != "auto":
        raise ConfigError(
            f"layout: {wanted} would change the results of this model",
            where="layout",
            why=why,
            remedy="use layout: auto or layout: padded",
        )
    if why:
        return "padded", why
    if wanted == "packed":
        return "packed", "rows one after the other without padding, as the file says"
    return "shared", "rows one after the other without padding, what they begin with in common computed once"


def _why_not(model: PreTrainedModel) -> str:
    """Why rows of this model cannot be packed; empty when they can, and the model's layers then take trees."""
    if not sees_everything(model):
        return "some layers see a sliding window, which no test on a dozen tokens would show"
    attention.install(model)
    if not attention.installed(model):
        return f"its attention is {model.config.get_text_config()._attn_implementation!r}, which takes no trees"
    rows = [TokenRow(token_ids=ids, scored=(5,)) for ids in ((5, 6, 7, 8, 9, 3, 4), (5, 6, 7, 8, 9, 4, 3, 6))]
    rows.append(TokenRow(token_ids=(8, 5, 4), scored=(1,)))
    device = next(model.parameters()).device
    with torch.no_grad():
        plain, packed = pack(rows, "padded", device), pack(rows, "shared", device)
        try:
            a, b = _hidden(model, plain).float(), _hidden(model, packed).float()
        except (RuntimeError, ValueError, TypeError) as error:
            attention.uninstall(model)
            return f"the model takes no packed rows ({str(error).splitlines()[0]})"
    errors = []
    for i, row in enumerate(rows):
        (q1, w1), (q2, w2) = plain.places[i], packed.places[i]
        own = a[q1, w1[: len(row.token_ids)]]
        errors.append((own - b[q2, w2[: len(row.token_ids)]]).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-6))
    # bfloat16 noise is 3 % on average and more at single tokens; rows that saw each other are 30 % off and more
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    if not float(torch.cat(errors).mean()) <= tolerance:
        attention.uninstall(model)
        return "this model's attention is not plain causal softmax"
    return ""
