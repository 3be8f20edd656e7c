"""Cached predictions equal those of the whole rows, for every pattern and in both directions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vilg.generate.decode import JOINT_LENGTH, JOINT_ROWS, Decoder, inference, prefill
from megatron_vilg.generate.static import StaticDecoder
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.sequence import Direction
from tests.tiny import tiny_batch, tiny_config, tiny_model

T2I, I2T = Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT


def rows(model: ViLG, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random text ids [B, L], codes [B, N] and text lengths [B] (0 to L)."""
    batch = tiny_batch(model.config, count, seed)
    return batch.text_ids[:, 0], batch.image_ids[:, 0], batch.text_len[:, 0]


def cached_logits(
    model: ViLG,
    direction: Direction,
    text: Tensor,
    codes: Tensor,
    lengths: Tensor,
    *,
    num_given: int = 0,
    cache: Any = "pattern",
    joint: bool | None = None,
) -> Tensor:
    """Teacher-forced predictions of target positions ``num_given ..`` through the cache: [B, positions, V]."""
    source, target = (text, codes) if direction == T2I else (codes, text)
    with inference(model):
        prefix = prefill(model, direction, source, lengths, target[:, :num_given])
        prefix = prefix.select(torch.arange(len(text)))
        decoder = Decoder(model, prefix, 1, cache, joint=joint)
        last = target.shape[1] - (direction == T2I)
        outputs = [prefix.logits, *(decoder.step(target[:, t]) for t in range(num_given, last))]
    return torch.stack(outputs, dim=1)


def full_logits(model: ViLG, direction: Direction, text: Tensor, codes: Tensor, lengths: Tensor) -> Tensor:
    """The same predictions from whole rows."""
    with inference(model):
        return model.logits(text, codes, lengths, direction)


@settings(max_examples=80, deadline=None)
@given(
    direction=st.sampled_from([T2I, I2T]),
    pattern=st.sampled_from(["paper", "full"]),
    image_side=st.integers(2, 6),
    num_text_slots=st.integers(1, 6),
    conv_kernel=st.sampled_from([1, 3, 5, 11]),
    conv_wrap=st.booleans(),
    image_to_text_row=st.sampled_from(["same_row", "window"]),
    qk_norm=st.booleans(),
    cache=st.sampled_from(["pattern", "dense"]),
    joint=st.booleans(),
    implementation=st.sampled_from(["dense", "fold"]),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_cached_equals_full_at_every_position(
    direction: Direction, cache: Any, joint: bool, implementation: Any, count: int, seed: int, **sizes: Any
) -> None:
    model = tiny_model(tiny_config(**sizes), implementation)
    text, codes, lengths = rows(model, count, seed)
    expected = full_logits(model, direction, text, codes, lengths)
    actual = cached_logits(model, direction, text, codes, lengths, cache=cache, joint=joint)
    used = torch.ones(actual.shape[:2], dtype=torch.bool)
    if direction == I2T:  # captions up to their end: what follows it is never drawn
        used = torch.arange(actual.shape[1]) <= lengths[:, None]
    assert expected[used].std() > 0.1
    torch.testing.assert_close(actual[used], expected[used], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("num_given", [1, 5, 15])
def test_given_beginning_equals_steps(num_given: int, joint: bool) -> None:
    model = tiny_model()
    text, codes, lengths = rows(model, 3)
    stepped = cached_logits(model, T2I, text, codes, lengths, joint=False)[:, num_given:]
    given_at_once = cached_logits(model, T2I, text, codes, lengths, num_given=num_given, joint=joint)
    torch.testing.assert_close(given_at_once, stepped, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["pattern", "dense"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("direction", [T2I, I2T])
def test_targets_of_one_source_share_it(direction: Direction, joint: bool, cache: Any) -> None:
    """Several targets per source, sources picked by number: as if each row had its own copy, which joint ones have."""
    model = tiny_model()
    text, codes, lengths = rows(model, 6)
    source = text[[0, 0, 0, 1, 1, 1]] if direction == T2I else codes[[0, 0, 0, 1, 1, 1]]
    source_len = lengths[[0, 0, 0, 1, 1, 1]]
    target = codes if direction == T2I else text
    with inference(model):
        alone = prefill(model, direction, source, source_len).select(torch.arange(6))
        shared = prefill(model, direction, source[[3, 0]], source_len[[3, 0]]).select(torch.tensor([1, 0]))
        one, many = Decoder(model, alone, 1, joint=False), Decoder(model, shared, 3, cache, joint=joint)
        for token in range(4):
            torch.testing.assert_close(many.step(target[:, token]), one.step(target[:, token]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_select_continues_other_targets(joint: bool) -> None:
    model = tiny_model()
    text, codes, lengths = rows(model, 4)
    index = torch.tensor([[1, 1], [0, 1]])
    flat = torch.tensor([1, 1, 2, 3])
    with inference(model):
        prefix = prefill(model, I2T, codes[:2], lengths[:2])
        moved, straight = (Decoder(model, prefix, 2, joint=joint) for _ in range(2))
        moved.step(text[:, 0])
        moved.select(index)
        straight.step(text[flat, 0])
        torch.testing.assert_close(moved.step(text[:, 1]), straight.step(text[:, 1]), atol=1e-5, rtol=1e-5)


def test_a_few_short_rows_on_a_cpu_have_copies_of_their_source() -> None:
    model, long = tiny_model(), tiny_model(tiny_config(image_side=math.isqrt(JOINT_LENGTH) + 1))
    with inference(model):
        text, codes, lengths = rows(model, 3)
        prefix = prefill(model, T2I, text, lengths)
        few, many = (Decoder(model, prefix, count) for count in (JOINT_ROWS // 3, JOINT_ROWS // 3 + 1))
        caption = Decoder(model, prefill(model, I2T, codes, lengths), 1)
        static = StaticDecoder(model, prefix, 1)
    with inference(long):
        text, _, lengths = rows(long, 1)
        longer = Decoder(long, prefill(long, T2I, text, lengths), 1)
    assert [d.joint for d in (few, many, caption, static, longer)] == [True, False, False, False, False]
    assert not few.shared_keys and len(many.shared_keys) == model.config.num_layers


@pytest.mark.parametrize("joint", [False, True])
def test_bf16_stays_close(joint: bool) -> None:
    model = tiny_model(std=0.1)
    text, codes, lengths = rows(model, 3)
    exact = cached_logits(model, T2I, text, codes, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cached_logits(model, T2I, text, codes, lengths, joint=joint)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)


def test_inference_puts_the_mode_back() -> None:
    model = tiny_model().train()
    with inference(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()
