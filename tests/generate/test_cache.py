"""Layouts read exactly the keys of the rule, and how many elements that is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.generate.cache import (
    CacheLayout,
    cache_layout,
    joint_layout,
    kv_elements_read,
    kv_elements_stored,
    target_mask,
)
from megatron_vilg.ops.rules import AttentionRule, Pattern, layer_patterns
from megatron_vilg.sequence import Direction, StreamSpec

T2I, I2T = Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT
CPU = torch.device("cpu")


def tokens_read(layout: CacheLayout) -> list[set[int]]:
    """Play the writes and say which target tokens each step really reads."""
    holds: dict[int, int] = {}
    result = []
    for token, slot in enumerate(layout.slot):
        holds[slot] = token
        read = layout.reads[token]
        slots = range(read.start, read.stop) if isinstance(read, slice) else read.tolist()
        hidden = [] if layout.bias is None else [s for s in slots if layout.bias[token, s] < 0]
        result.append({holds[s] for s in slots if s not in hidden})
    return result


@settings(max_examples=80, deadline=None)
@given(
    pattern=st.sampled_from(["row", "column", "conv", "full"]),
    side=st.integers(2, 7),
    slots=st.integers(1, 5),
    kernel=st.sampled_from([1, 3, 5, 11]),
    wrap=st.booleans(),
    direction=st.sampled_from([T2I, I2T]),
    kind=st.sampled_from(["pattern", "dense"]),
)
def test_reads_are_the_rule(
    pattern: Pattern, side: int, slots: int, kernel: int, wrap: bool, direction: Direction, kind: str
) -> None:
    spec = StreamSpec(num_text_slots=slots, image_side=side)
    rule = AttentionRule(pattern, spec, conv_kernel=kernel, conv_wrap=wrap)
    layout = cache_layout(rule, direction, kind, CPU)  # type: ignore[arg-type]
    expected = [set(row.nonzero().flatten().tolist()) for row in target_mask(rule, direction)]
    assert tokens_read(layout) == expected
    if kind == "pattern":
        assert [layout.num_read(t) for t in range(len(expected))] == [len(keys) for keys in expected]
    assert max(layout.slot) < layout.num_slots


@pytest.mark.parametrize("kind", ["pattern", "dense"])
@pytest.mark.parametrize("pattern", ["row", "column", "conv", "full"])
def test_joint_layout_reads_the_front_and_the_same_tokens(pattern: Pattern, kind: str) -> None:
    rule = AttentionRule(pattern, StreamSpec(num_text_slots=3, image_side=6), conv_kernel=3)
    layout = cache_layout(rule, T2I, kind, CPU)  # type: ignore[arg-type]
    joint = joint_layout(layout, 5, CPU)
    assert joint.num_slots == layout.num_slots + 5 and joint.slot == tuple(s + 5 for s in layout.slot)
    every, behind = torch.arange(joint.num_slots), torch.arange(layout.num_slots)
    for token, (read, own) in enumerate(zip(joint.reads, layout.reads, strict=True)):
        assert every[read].tolist() == [*range(5), *(behind[own] + 5).tolist()]
        if layout.bias is not None and joint.bias is not None:
            assert joint.bias[token, :5].eq(0).all() and torch.equal(joint.bias[token, 5:], layout.bias[token])


@pytest.mark.parametrize(
    ("pattern", "side", "direction", "name", "slots"),
    [
        ("row", 32, T2I, "window", 33),
        ("column", 32, T2I, "columns", 1024),
        ("conv", 32, T2I, "gather", 166),
        ("conv", 8, T2I, "window", 46),
        ("full", 8, T2I, "window", 64),
        ("row", 8, I2T, "window", 10),
    ],
)
def test_layout_of_each_pattern(pattern: Pattern, side: int, direction: Direction, name: str, slots: int) -> None:
    layout = cache_layout(
        AttentionRule(pattern, StreamSpec(num_text_slots=10, image_side=side)), direction, "pattern", CPU
    )
    assert (layout.name, layout.num_slots) == (name, slots)


def paper_10b(num_text_slots: int) -> ModelConfig:
    return ModelConfig(num_layers=48, width=4096, num_heads=64, num_text_slots=num_text_slots, image_side=32)


def brute_force_count(config: ModelConfig, kind: str) -> int:
    """Keys and values that the image steps read, counted one query after the other with the predicate."""
    spec, total = config.spec, 0
    first = spec.source_length(T2I) + 1
    for pattern in layer_patterns(config.num_layers, config.pattern):
        rule = AttentionRule(pattern if kind == "pattern" else "full", spec, config.conv_kernel)
        for query in range(first, first + spec.num_image_tokens - 1):
            keys = torch.arange(spec.num_used)
            total += int(rule.allowed(T2I, query, keys, spec.num_text_slots).sum())
    return total * 2 * config.width


@pytest.mark.parametrize("kind", ["pattern", "dense"])
def test_count_equals_brute_force(kind: str) -> None:
    config = ModelConfig(num_layers=4, width=8, num_heads=2, num_text_slots=3, image_side=5, conv_kernel=3)
    assert kv_elements_read(config, kind=kind) == brute_force_count(config, kind)  # type: ignore[arg-type]


def test_reads_and_memory_at_paper_size() -> None:
    """64 text keys in all (61 slots and three special tokens), as in the memory plan."""
    config = paper_10b(61)
    dense = kv_elements_read(config, kind="dense")
    assert kv_elements_read(config) / dense == pytest.approx(0.161, abs=0.0005)
    assert kv_elements_read(config, num_targets=60) / 60 / dense <= 0.055
    assert kv_elements_read(config, num_targets=1) == kv_elements_read(config)
    stored = kv_elements_stored(config, kind="dense")
    assert kv_elements_stored(config) / stored <= 0.33
    assert kv_elements_stored(config, num_targets=60) / 60 / stored <= 0.27
    # All 64 slots used, and the special tokens on top.
    wide = paper_10b(64)
    assert kv_elements_read(wide) / kv_elements_read(wide, kind="dense") == pytest.approx(0.1656, abs=0.0005)
