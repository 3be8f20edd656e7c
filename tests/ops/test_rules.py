"""The predicate against a truth table written by hand and against counts computed from the paper's description."""

from __future__ import annotations

import pytest
import torch

from megatron_vilg.ops.rules import AttentionRule, dense_mask, full_length_mask, layer_patterns
from megatron_vilg.sequence import Direction, StreamSpec

T2I, I2T = Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT
CPU = torch.device("cpu")
SMALL = StreamSpec(num_text_slots=3, image_side=4)
PAPER = StreamSpec(num_text_slots=64, image_side=32)


def image_keys(rule: AttentionRule, direction: Direction, query: int) -> set[int]:
    """Raster indices that the image token ``query`` may see."""
    first = rule.spec.image_slice(direction).start
    count = rule.spec.num_image_tokens
    return {k for k in range(count) if rule.allowed(direction, first + query, first + k, rule.spec.num_text_slots)}


@pytest.mark.parametrize(
    ("pattern", "query", "keys"),
    [
        ("row", 9, {5, 6, 7, 8, 9}),
        ("column", 9, {1, 5, 9}),
        ("conv", 9, {4, 5, 6, 8, 9}),
        ("conv", 8, {3, 4, 5, 7, 8}),
        ("full", 9, set(range(10))),
    ],
)
def test_text_to_image_truth_table(pattern: str, query: int, keys: set[int]) -> None:
    rule = AttentionRule(pattern, SMALL, conv_kernel=3)  # type: ignore[arg-type]
    assert image_keys(rule, T2I, query) == keys


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("row", {8, 9, 10, 11}),
        ("column", {1, 5, 9, 13}),
        ("conv", {4, 5, 6, 8, 9, 10, 12, 13, 14}),
        ("full", set(range(16))),
    ],
)
def test_image_to_text_truth_table(pattern: str, keys: set[int]) -> None:
    rule = AttentionRule(pattern, SMALL, conv_kernel=3)  # type: ignore[arg-type]
    assert image_keys(rule, I2T, 9) == keys


def test_window_reading_and_unwrapped_window() -> None:
    window = AttentionRule("row", SMALL, image_to_text_row="window")
    assert image_keys(window, I2T, 9) == set(range(5, 14))
    no_wrap = AttentionRule("conv", SMALL, conv_kernel=3, conv_wrap=False)
    assert image_keys(no_wrap, T2I, 8) == {4, 5, 8}


@pytest.mark.parametrize(
    ("direction", "pattern", "mean"),
    [
        (T2I, "row", 32.48),
        (T2I, "column", 16.5),
        (T2I, "conv", 55.83),
        (T2I, "full", 512.5),
        (I2T, "row", 32.0),
        (I2T, "column", 32.0),
        (I2T, "conv", 110.66),
    ],
)
def test_mean_key_counts_at_paper_size(direction: Direction, pattern: str, mean: float) -> None:
    rule = AttentionRule(pattern, PAPER)  # type: ignore[arg-type]
    image = PAPER.image_slice(direction)
    mask = full_length_mask(rule, direction, CPU)[image, image]
    assert mask.sum().item() / PAPER.num_image_tokens == pytest.approx(mean, abs=0.005)


def test_layer_kinds() -> None:
    kinds = layer_patterns(48, "paper")
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 48, 4))
    assert kinds[-1] == "conv" and kinds.count("row") == 35
    kinds = layer_patterns(24, "paper")
    assert (kinds.count("row"), kinds.count("column"), kinds.count("conv")) == (17, 6, 1)
    assert layer_patterns(3, "full") == ("full",) * 3


@pytest.mark.parametrize("direction", [T2I, I2T])
@pytest.mark.parametrize("pattern", ["full", "row", "column", "conv"])
def test_source_and_target_blocks(direction: Direction, pattern: str) -> None:
    """Sources never see targets; targets never see later targets; text keys are all visible to targets."""
    spec, text_len = SMALL, 2
    rule = AttentionRule(pattern, spec, conv_kernel=3)  # type: ignore[arg-type]
    mask = dense_mask(rule, direction, torch.tensor([text_len]))[0]
    source, used = spec.source_length(direction), spec.num_used
    assert not mask[:source, source:].any()
    assert not mask[source:used, source:used].triu(1).any()
    text = spec.text_slice(direction)
    unused = range(text.start + text_len, text.stop)
    for key in [*unused, *range(used, spec.length)]:
        assert mask[:, key].nonzero().flatten().tolist() == [key]
    if direction == T2I:
        assert mask[source:used, : text.start + text_len].all()
    else:
        assert mask[source:used, :source].all()
    assert mask.any(dim=1).all()


def test_ints_and_tensors_agree() -> None:
    for direction in (T2I, I2T):
        for pattern in ("full", "row", "column", "conv"):
            rule = AttentionRule(pattern, SMALL, conv_kernel=3)  # type: ignore[arg-type]
            mask = dense_mask(rule, direction, torch.tensor([2]))[0]
            for q in range(SMALL.length):
                for k in range(SMALL.length):
                    assert bool(rule.allowed(direction, q, k, 2)) == bool(mask[q, k])
