"""Figures that describe a run: explained variance here; running moments, calibration and correlation, which need no tensors, next door.

Shapes: b rows, t scored tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.calibration import CalibrationBin as CalibrationBin
from trimtab.ops.calibration import calibration_bins as calibration_bins
from trimtab.ops.calibration import calibration_error as calibration_error
from trimtab.ops.masked import Reduce, alone, masked_var
from trimtab.ops.moments import RunningMoments as RunningMoments
from trimtab.ops.moments import correlation as correlation


def explained_variance(
    values: Float[Tensor, "b t"],
    returns: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    reduce: Reduce = alone,
) -> Float[Tensor, ""]:
    """1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 no better than a constant, below 0 worse.

    Where the returns do not vary there is nothing to explain, and the answer is 0.
    """
    total = masked_var(returns, mask, reduce=reduce)
    unexplained = masked_var(returns - values, mask, reduce=reduce)
    return torch.where(total > 0, 1 - unexplained / total, 0.0)
