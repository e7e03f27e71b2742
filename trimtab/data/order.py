"""Orders of rows: mixing of data sets, the seeded split, and the shuffle of each epoch. Pure functions of their
arguments.

Shuffles sort raw counter-based random numbers, so that an order depends on (seed, epoch) alone: a resumed run needs
no state, and no later version of a library's `permutation` can change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SPLIT = 2**32  # "epochs" beyond any real one, for draws that are not an epoch's order
MIX = SPLIT + 1
SAMPLE = SPLIT + 2


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The order of n rows in an epoch."""
    if not shuffle:
        return list(range(n))
    raw = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(n)
    return [int(index) for index in np.argsort(raw, kind="stable")]


def batches(n: int, batch_size: int, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """An epoch's rows in batches; the last one holds what is left and is kept."""
    order = epoch_order(n, seed, epoch, shuffle)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


def split_off(n: int, val_size: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows for training, and rows held out: `val_size` of them if 1 or more, that share of n, rounded up, if less."""
    held = int(val_size) if val_size >= 1 else math.ceil(n * val_size)
    order = epoch_order(n, seed, SPLIT)
    return sorted(order[held:]), sorted(order[:held])


def sample(n: int, count: int, seed: int) -> list[int]:
    """`count` of n rows: without repeats while they last, whole rounds before that."""
    return [*list(range(n)) * (count // n), *sorted(epoch_order(n, seed, SAMPLE)[: count % n])] if n else []


def interleave(
    lengths: Sequence[int], strategy: str, probs: Sequence[float] | None, seed: int
) -> list[tuple[int, int]]:
    """Rows of several sets in turn, as (set, row).

    Args:
        strategy: interleave_under ends when the first set has run out; interleave_over when the last has, the others
            starting again; interleave_once uses every row once.
        probs: how likely each set is at each place; None takes them one after the other.
    """
    count = len(lengths)
    if not all(lengths):
        raise ValueError(f"a set without rows cannot be interleaved: {list(lengths)}")
    raw = np.random.Philox(key=[seed % 2**64, MIX])
    weights = np.ones(count) if probs is None else np.asarray(probs, dtype=np.float64)
    bounds = np.cumsum(weights / weights.sum())
    taken = [0] * count
    mixed: list[tuple[int, int]] = []
    turn = 0
    while True:
        done = [taken[which] >= lengths[which] for which in range(count)]
        # In turn, a round is finished before the end is looked at, so that all sets give alike.
        round_over = probs is not None or turn % count == 0
        if strategy == "interleave_under" and any(done) and round_over:
            return mixed
        if all(done) and (strategy == "interleave_once" or round_over):
            return mixed
        if probs is None:
            which = turn % count
        else:
            uniform = (int(raw.random_raw()) >> 11) / 2.0**53
            which = min(int(np.searchsorted(bounds, uniform, side="right")), count - 1)
        turn += 1
        if strategy == "interleave_once" and done[which]:
            continue
        mixed.append((which, taken[which] % lengths[which]))
        taken[which] += 1
