"""Intervals, rounding and seeded choices that all evaluations share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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


def _generator(seed: int) -> np.random.Generator:
    """numpy refuses negative seeds, which every verb takes: they count from the end of 64 bits, as for torch."""
    return np.random.default_rng(seed % 2**64)


_SETTINGS = ("config", "drawing_settings")


def rounded_figures(figures: Mapping[str, Any], digits: int) -> dict[str, Any]:
    """The figures of a report with ``digits`` decimals: more are noise, and would hide a real difference.

    Settings beside them (``config``, ``drawing_settings``) stay exact, so that a run can be repeated with them.
    """
    return {name: part if name in _SETTINGS else _rounded(part, digits) for name, part in figures.items()}


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {str(key): _rounded(part, digits) for key, part in value.items()}
    return [_rounded(part, digits) for part in value] if isinstance(value, (list, tuple)) else value


def derangement(count: int, seed: int) -> np.ndarray:
    """int64 [count]: a random order in which nothing keeps its place, the same for the same seed.

    Raises:
        ValueError: fewer than two items cannot trade places.
    """
    if count < 2:
        raise ValueError(f"count={count}: fewer than two items cannot trade places")
    # One random cycle through all items: no item can map to itself.
    order = _generator(seed).permutation(count)
    result = np.empty(count, dtype=np.int64)
    result[order] = np.roll(order, 1)
    return result


def sample_indices(population: Sequence[int], count: int, seed: int) -> list[int]:
    """At most ``count`` members of ``population``, drawn without replacement, in their old order."""
    if count >= len(population):
        return list(population)
    chosen = _generator(seed).choice(len(population), size=count, replace=False)
    return [population[i] for i in sorted(chosen.tolist())]


_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the normal's 1.96 is within 0.17."""


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent repetitions, and half the width of its 95 % interval (Student's t); None for one value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    freedom = len(values) - 1
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom)
    quantile = _T975[freedom - 1] if freedom <= len(_T975) else 1.96
    return mean, quantile * deviation / math.sqrt(len(values))
