"""The fast forms equal the dense reference, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vilg.ops.attention import attention, choose_implementation
from megatron_vilg.ops.rules import AttentionRule
from megatron_vilg.sequence import Direction, StreamSpec

PATTERNS = ["full", "row", "column", "conv"]


def run(rule: AttentionRule, text_len: torch.Tensor, implementation: str, direction: Direction | None):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    shape = (len(text_len), rule.spec.length, 2, 8)
    q, k, v, out_grad = (torch.randn(shape, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, rule, text_len, implementation, direction)  # type: ignore[arg-type]
    out.backward(out_grad)
    return out.detach(), [x.grad for x in inputs]


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    side=st.integers(2, 6),
    slots=st.integers(1, 6),
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=4),
    kernel=st.sampled_from([3, 5, 11]),
    direction=st.sampled_from([None, Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT]),
    other=st.sampled_from(["sdpa", "fold"]),
)
def test_twins_agree(
    pattern: str, side: int, slots: int, lengths: list[int], kernel: int, direction: Direction | None, other: str
) -> None:
    rule = AttentionRule(pattern, StreamSpec(num_text_slots=slots, image_side=side), conv_kernel=kernel)  # type: ignore[arg-type]
    rows = lengths[: len(lengths) // 2 * 2]
    text_len = torch.tensor([min(n, slots) for n in rows])
    expected, expected_grads = run(rule, text_len, "dense", direction)
    actual, grads = run(rule, text_len, other, direction)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_window_rows_fall_back_to_a_mask() -> None:
    rule = AttentionRule("row", StreamSpec(num_text_slots=2, image_side=4), image_to_text_row="window")
    text_len = torch.tensor([2, 1])
    torch.testing.assert_close(run(rule, text_len, "fold", None)[0], run(rule, text_len, "dense", None)[0])


@pytest.mark.parametrize(
    ("requested", "side", "chosen"),
    [("auto", 8, "dense"), ("auto", 32, "fold"), ("dense", 32, "dense"), ("fold", 8, "fold")],
)
def test_choice_is_explained(requested: str, side: int, chosen: str) -> None:
    implementation, reason = choose_implementation(requested, side)
    assert implementation == chosen and reason
