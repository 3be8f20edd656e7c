"""C5, C6: what decoding reads and keeps, counted from the cache layouts of the 10B model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.measure import Bench, Goal, Row
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.generate.cache import kv_elements_read, kv_elements_stored

NUM_SHARED = 64
BYTES = 2


def cache_reads(bench: Bench) -> Iterator[Row]:
    """Keys and values read for one picture of 1024 codes, bf16."""
    yield from _rows("C5", "KV bytes read per picture", kv_elements_read, (6.0, 18.0))


def cache_capacity(bench: Bench) -> Iterator[Row]:
    """Keys and values kept for one picture, bf16."""
    yield from _rows("C6", "KV bytes kept per picture", kv_elements_stored, (3.0, 3.7))


def _rows(id: str, metric: str, count: Callable[..., int], goals: tuple[float, float]) -> Iterator[Row]:
    model = PRESETS["paper-10b"]().model
    dense = BYTES * count(model, kind="dense") / 1e6
    for samples, goal in zip((1, NUM_SHARED), goals, strict=True):
        value = BYTES * count(model, num_targets=samples) / samples / 1e6
        name = f"{metric}, 10B, {samples} of one prompt"
        least = Goal("ratio", ">=", goal)
        yield Row(id, name, value, "MB", "dense cache", dense, least, less_is_better=True, counted=True)
