"""Intervals and seeded choices that all evaluations share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of ``count`` independent yes/no answers (Wilson's score interval).

    Unlike the textbook interval it stays inside [0, 1] and has a width when all answers agree.

    Raises:
        ValueError: no answers.
    """
    if count < 1:
        raise ValueError(f"count={count}: an interval needs at least one answer")
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def derangement(count: int, seed: int) -> np.ndarray:
    """int64 [count]: a random order in which nothing keeps its place, the same for the same seed.

    Raises:
        ValueError: fewer than two items cannot trade places.
    """
    if count < 2:
        raise ValueError(f"count={count}: fewer than two items cannot trade places")
    # One random cycle through all items: no item can map to itself.
    order = np.random.default_rng(seed).permutation(count)
    result = np.empty(count, dtype=np.int64)
    result[order] = np.roll(order, 1)
    return result


def sample_indices(population: Sequence[int], count: int, seed: int) -> list[int]:
    """At most ``count`` members of ``population``, drawn without replacement, in their old order."""
    if count >= len(population):
        return list(population)
    chosen = np.random.default_rng(seed).choice(len(population), size=count, replace=False)
    return [population[i] for i in sorted(chosen.tolist())]
