"""NEFTune (arXiv:2310.05914): noise on the input embeddings while training.

    e' = e + alpha / sqrt(L d) u,    u uniform on (-1, 1)        L tokens in a sequence, d hidden size

L is the width of the micro-batch, padding counted, as in transformers. Only passes that want gradients get noise, so evaluation and
answers have none; the draw is a function of the step's seed.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn


def add_noise(model: nn.Module, alpha: float) -> None:
    """Put the noise on `model` for good."""

    def noisy(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        size = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-size, size)

    cast(Any, model).get_input_embeddings().register_forward_hook(noisy)
