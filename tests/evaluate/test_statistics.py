from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vilg.evaluate.statistics import derangement, rounded_figures, sample_indices, wilson_interval


def test_wilson_interval_of_known_cases() -> None:
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    low, high = wilson_interval(1.0, 51)
    assert low == pytest.approx(0.930, abs=1e-3)
    assert high == pytest.approx(1.0)


def test_an_interval_needs_answers() -> None:
    with pytest.raises(ValueError, match="count=0"):
        wilson_interval(0.0, 0)


@settings(deadline=None)  # a busy machine pauses any example
@given(st.integers(2, 60), st.integers(0, 10_000))
def test_nobody_keeps_a_place(count: int, seed: int) -> None:
    order = derangement(count, seed)
    assert sorted(order.tolist()) == list(range(count))
    assert not np.any(order == np.arange(count))
    assert np.array_equal(order, derangement(count, seed))


def test_one_item_cannot_trade_places() -> None:
    with pytest.raises(ValueError, match="fewer than two"):
        derangement(1, 0)


def test_sample_is_seeded_ordered_and_without_repeats() -> None:
    population = list(range(100, 200))
    sample = sample_indices(population, 10, seed=3)
    assert sample == sorted(set(sample))
    assert sample == sample_indices(population, 10, seed=3)
    assert sample != sample_indices(population, 10, seed=4)
    assert sample_indices(population, 500, seed=3) == population


@pytest.mark.parametrize("seed", [-1, -(2**70)])
def test_negative_seeds_are_those_from_the_end_of_64_bits(seed: int) -> None:
    population = list(range(100))
    assert sample_indices(population, 10, seed) == sample_indices(population, 10, seed % 2**64)
    assert derangement(7, seed).tolist() == derangement(7, seed % 2**64).tolist()
    assert sample_indices(population, 10, -1) != sample_indices(population, 10, 1)


def test_what_a_seed_chooses_does_not_change() -> None:
    assert sample_indices(range(100), 5, seed=3) == [8, 17, 18, 23, 77]
    assert derangement(6, seed=3).tolist() == [3, 4, 0, 1, 5, 2]


def test_figures_are_rounded_and_settings_are_not() -> None:
    figures = {"ce": {"right": 1.23456789, "parts": (0.00001, 3)}, "config": {"optim": {"eps": 1e-8}}, "seed": 3}
    figures |= {"drawing_settings": {"temperature": 0.123456789}}
    assert rounded_figures(figures, 4) == {
        "ce": {"right": 1.2346, "parts": [0.0, 3]},
        "config": {"optim": {"eps": 1e-8}},
        "drawing_settings": {"temperature": 0.123456789},
        "seed": 3,
    }
