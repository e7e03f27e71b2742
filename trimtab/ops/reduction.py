"""From many losses to one number: the weights, and the one denominator.

Shapes: b rows of the *whole optimizer step*, t scored tokens.

    weights = reduction_weights(mask, "token")              once, over the whole step
    loss = sum over micro-batches of (terms.loss * weights[rows]).sum()

Because the denominator is taken before the step is split, the loss and its gradient do not depend on the micro-batch
size. (A mean per micro-batch, averaged over micro-batches, weighs a token by how short its companions are.)
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.masked import Reduce, alone

Reduction = Literal["token", "sequence", "constant", "row"]


def reduction_weights(
    mask: Bool[Tensor, "b t"] | Bool[Tensor, " b"],
    kind: Reduction,
    *,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    reduce: Reduce = alone,
) -> Float[Tensor, "b t"] | Float[Tensor, " b"]:
    """Weights w such that sum(loss * w) is the wanted mean; 0 on padding, all 0 where nothing is real.

        token      1 / (real tokens of the step)             every token alike; long rows weigh more      w [b t]
        sequence   1 / (tokens of the row x rows)            mean over rows of the mean over tokens        w [b t]
        constant   1 / (max_length x rows)                   Dr.GRPO (2503.20783): no length in the weight  w [b t]
        row        1 / rows                                  one loss per row or pair                      w [b]

    Args:
        mask: real tokens `[b t]`; for "row" also real rows `[b]`. A row without a real token is not counted as a row.
        kind: which mean.
        max_length: for "constant", the most tokens that a completion may have.
        reduce: adds the count over all workers (see `masked`).

    Raises:
        ValueError: "constant" without `max_length`.
    """
    tokens = mask if mask.ndim == 2 else mask.unsqueeze(-1)
    lengths = tokens.sum(dim=-1, keepdim=True)
    rows = (lengths > 0).sum()
    match kind:
        case "token":
            share, count = tokens, tokens.sum()
        case "sequence":
            share, count = tokens.to(dtype) / lengths.clamp(min=1), rows
        case "constant":
            if max_length is None:
                raise ValueError("the constant reduction needs max_length")
            share, count = tokens.to(dtype) / max_length, rows
        case "row":
            share, count = (lengths > 0).squeeze(-1), rows
    return share / reduce(count.to(dtype)).clamp(min=1)
