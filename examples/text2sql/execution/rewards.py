"""A control: a reward that knows nothing of the answer. What a policy gains by it is not learnt from right and wrong.

reward_funcs: examples/text2sql/execution/rewards.py:coin
"""

from __future__ import annotations

import random

_DRAWS = random.Random(0)


def coin(completion: str) -> float:
    """0 or 1, drawn anew for every answer."""
    return float(_DRAWS.random() < 0.5)
