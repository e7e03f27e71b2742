"""From rows of token ids to numbers at their scored tokens. The only file that knows how rows lie in memory.

Two layouts, equal in loss and gradient up to rounding:

    padded   one row per sequence, padded on the right. Causal attention never looks right, so no mask is needed.
    shared   rows that begin with the same tokens become one sequence [prompt | c1 | ... | ck]: each answer sees the prompt and
             itself (a tree mask) and its positions restart after the prompt, so the prompt is computed once.

The second is used where rows share a prompt and the model is plain causal softmax attention; a numerical check on first use decides,
not a list of model names. No logits exist outside `ops/logprobs`, and the language-model head runs at scored positions only.

Shapes: b rows, t scored tokens of the longest row, q sequences, n tokens in the longest sequence, s scored tokens in all, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.models.heads import ValueHead
from trimtab.models.load import decoder, head_bias, head_weight
from trimtab.ops.logprobs import logprobs_and_entropy
from trimtab.types import Scores, TokenRow

Layout = Literal["auto", "padded", "shared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What a forward pass says at each scored token; `values` with a head, `logp` and `entropy` when the LM head was asked for."""

    mask: Bool[Tensor, "b t"]
    logp: Float[Tensor, "b t"] | None = None
    entropy: Float[Tensor, "b t"] | None = None
    values: Float[Tensor, "b t"] | None = None

    @property
    def policy(self) -> Scores:
        """What a policy loss reads; the LM head must have been asked for."""
        if self.logp is None or self.entropy is None:
            raise ValueError("these scores were computed without the LM head")
        return Scores(logp=self.logp, entropy=self.entropy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows laid out for one forward pass.

    Attributes:
        ids, positions: `[q n]`; `mask` `[q 1 n n]` (True = may look), None where plain causal attention is right.
        places: for each row, its sequence and, for each of its token indices, the column where it lies.
    """

    ids: Int[Tensor, "q n"]
    positions: Int[Tensor, "q n"]
    mask: Bool[Tensor, "q 1 n n"] | None
    places: list[tuple[int, list[int]]]


# ------------------------------------------------------------------------------------------------------------ planning


def prefix(row: TokenRow) -> tuple[int, ...]:
    """What comes before the first scored token: the part that rows of one prompt have in common."""
    return row.token_ids[: row.scored[0]]


def trees(rows: Sequence[TokenRow], layout: Layout) -> list[list[int]]:
    """Row numbers grouped into sequences: rows with an equal prefix together in the shared layout, else each alone."""
    if layout == "padded":
        return [[i] for i in range(len(rows))]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(prefix(row), []).append(i)
    return list(groups.values())


def _parts(rows: Sequence[TokenRow], tree: list[int], budget: int) -> list[list[int]]:
    """A tree in parts of at most `budget` tokens (one answer at least): a data set with a single prompt is still cut."""
    shared = rows[tree[0]].scored[0]
    parts: list[list[int]] = []
    room = 0
    for i in tree:
        own = len(rows[i].token_ids) - shared
        if own > room:
            parts.append([])
            room = budget - shared
        parts[-1].append(i)
        room -= own
    return parts


def plan(rows: Sequence[TokenRow], budget: int, *, layout: Layout = "padded", unit: int = 1) -> list[list[int]]:
    """Cut rows into micro-batches of at most `budget` tokens, padding counted; a sequence longer than that goes alone.

    Sequences are sorted by length, and a micro-batch is closed when its padding would cost more than another pass does (taken as
    a sixteenth of the budget, at least 64 tokens). Losses do not depend on the cut: weights are fixed before it.

    Args:
        unit: rows that belong together are consecutive, this many at a time (2 for pairs), and are never separated.

    Returns:
        Row numbers of each micro-batch; every row once.
    """
    blocks = [list(range(i, min(i + unit, len(rows)))) for i in range(0, len(rows), unit)]
    if layout == "shared" and unit == 1:
        blocks = [part for tree in trees(rows, layout) for part in _parts(rows, tree, budget)]

    def key(i: int) -> object:
        return prefix(rows[i]) if layout == "shared" else i

    def extended(sequences: dict[object, int], block: list[int]) -> dict[object, int]:
        """Lengths of the sequences that `pack` makes of these, with the block's rows among them."""
        longer = dict(sequences)
        for i in block:
            shared = rows[i].scored[0] if layout == "shared" else 0
            longer[key(i)] = longer.get(key(i), shared) + len(rows[i].token_ids) - shared
        return longer

    sized = sorted(((max(extended({}, block).values()), block) for block in blocks), key=lambda item: -item[0])
    cut: list[list[int]] = []
    sequences: dict[object, int] = {}
    for _, block in sized:
        longer = extended(sequences, block)
        area = max(longer.values()) * len(longer)
        if cut and area <= budget and area - sum(longer.values()) <= max(64, budget // 16):
            cut[-1].extend(block)
            sequences = longer
        else:
            cut.append(list(block))
            sequences = extended({}, block)
    return cut


def pack(rows: Sequence[TokenRow], layout: Layout, device: torch.device) -> Packed:
    """Lay rows out for one forward pass."""
    sequences: list[list[int]] = []
    positions: list[list[int]] = []
    branches: list[list[tuple[int, int]]] = []
    shares: list[int] = []
    places: list[tuple[int, list[int]]] = [(0, [])] * len(rows)
    for tree in trees(rows, layout):
        shared = rows[tree[0]].scored[0] if len(tree) > 1 else 0
        ids = list(rows[tree[0]].token_ids[:shared])
        where = list(range(shared))
        spans = []
        for i in tree:
            start = len(ids)
            own = rows[i].token_ids[shared:]
            ids.extend(own)
            where.extend(range(shared, shared + len(own)))
            spans.append((start, len(ids)))
            places[i] = (len(sequences), [*range(shared), *range(start, len(ids))])
        sequences.append(ids)
        positions.append(where)
        branches.append(spans)
        shares.append(shared)
    n = max(map(len, sequences))
    id_rows = torch.tensor([ids + [0] * (n - len(ids)) for ids in sequences], device=device)
    # positions go on through the padding: transformers takes a restart for a second packed sequence and builds a mask for it
    position_rows = torch.tensor([p + list(range(len(p), n)) for p in positions], device=device)
    mask = None
    if any(shares):
        # a tree's mask: causal, and an answer sees no other answer. Padding sees itself, or softmax would divide 0 by 0
        mask = torch.ones(n, n, dtype=torch.bool, device=device).tril().repeat(len(sequences), 1, 1)
        for q, (spans, shared) in enumerate(zip(branches, shares, strict=True)):
            for start, end in spans[1:] if shared else ():
                mask[q, start:end, shared:start] = False
        mask = mask[:, None]
    return Packed(ids=id_rows, positions=position_rows, mask=mask, places=places)


# ------------------------------------------------------------------------------------------------------------- forward


def _hidden(model: torch.nn.Module, packed: Packed) -> Float[Tensor, "q n d"]:
    out = decoder(model)(
        input_ids=packed.ids, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return out  # type: ignore[no-any-return]


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
) -> TokenScores:
    """Log-probability, entropy and value of every scored token, each from the hidden state *before* that token.

    Args:
        model: a causal LM switched to a role.
        temperature: divides the logits, as it did when the tokens were drawn.
        lm_head: compute `logp` and `entropy`.
        head: compute `values` with this head.
        width: make the arrays this wide, t of a larger batch that these rows are part of.
    """
    device = next(model.parameters()).device
    packed = pack(rows, layout, device)
    states, owner, slot = _gather(_hidden(model, packed), packed, rows, shift=1)
    b, t = len(rows), width or max(len(row.scored) for row in rows)

    def spread(flat: Tensor) -> Tensor:
        return flat.new_zeros(b, t).index_put((owner, slot), flat)

    mask = torch.zeros(b, t, dtype=torch.bool, device=device).index_put(
        (owner, slot), torch.tensor(True, device=device)
    )
    logp = entropy = None
    if lm_head:
        targets = torch.tensor([row.token_ids[i] for row in rows for i in row.scored], device=device)
        flat_logp, flat_entropy = logprobs_and_entropy(
            states, head_weight(model), targets, temperature=temperature, bias=head_bias(model)
        )
        logp, entropy = spread(flat_logp), spread(flat_entropy)
    values = spread(head(states)) if head is not None else None
    return TokenScores(mask=mask, logp=logp, entropy=entropy, values=values)


def score_rows(
    model: torch.nn.Module, rows: Sequence[TokenRow], head: ValueHead, *, layout: Layout = "padded"
) -> Float[Tensor, " b"]:
    """The reward of each row: the head at the row's last scored token (its end marker). The language-model head never runs."""
    device = next(model.parameters()).device
    last = [TokenRow(token_ids=row.token_ids, scored=row.scored[-1:]) for row in rows]
    packed = pack(rows, layout, device)
    states, _, _ = _gather(_hidden(model, packed), packed, last, shift=0)
    return head(states)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- choosing a layout


def sees_everything(model: torch.nn.Module) -> bool:
    """Does every layer attend to all earlier tokens (no sliding windows, no recurrence)?"""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    kinds = set(getattr(config, "layer_types", None) or ())
    return not kinds - {"full_attention"} and not (not kinds and getattr(config, "sliding_window", None))


def choose_layout(model: torch.nn.Module, wanted: Layout) -> tuple[Literal["padded", "shared"], str]:
    """The layout to use for rows that share a prompt, and why in a few words.

    `auto` tries the tree mask on a dozen tokens: a model whose attention is not plain causal softmax (sliding windows by column,
    recurrence, positions it makes itself) gives other hidden states under it, and then the rows are padded.
    """
    if wanted == "padded":
        return "padded", "as the file says"
    if not sees_everything(model):
        return "padded", "some layers see a sliding window, which no test on a dozen tokens would show"
    rows = [TokenRow(token_ids=ids, scored=(5,)) for ids in ((5, 6, 7, 8, 9, 3, 4), (5, 6, 7, 8, 9, 4, 3, 6))]
    device = next(model.parameters()).device
    with torch.no_grad():
        plain = pack(rows, "padded", device)
        tree = pack(rows, "shared", device)
        try:
            a, b = _hidden(model, plain).float(), _hidden(model, tree).float()
        except (RuntimeError, ValueError, TypeError) as error:
            return "padded", f"the model takes no attention mask of ours ({error})"
    scale = a.abs().mean().item()
    worst = 0.0
    for i, row in enumerate(rows):
        (q1, w1), (q2, w2) = plain.places[i], tree.places[i]
        columns = range(len(row.token_ids))
        worst = max(worst, max((a[q1, w1[c]] - b[q2, w2[c]]).abs().max().item() for c in columns))
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.2
    if worst > tolerance * max(scale, 1e-6):
        return "padded", "this model's attention is not plain causal softmax"
    return "shared", "answers to one prompt are computed with the prompt once"
