"""Packed layers compute what the plain ones compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.generate import decode
from megatron_vilg.generate.decode import Decoder, inference, prefill
from megatron_vilg.generate.text_to_image import Prompts, draw_ids
from megatron_vilg.generate.weights import (
    Int8Linear,
    JointAttention,
    can_pack,
    packed_block,
    packed_linear,
    use_bf16,
    use_int8,
)
from megatron_vilg.sequence import Direction
from tests.tiny import tiny_batch, tiny_config, tiny_model

needs_packing = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this build of torch has no oneDNN")


@needs_packing
@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_packed_layer_equals_plain_layer(rows: int, bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(rows, 1, 24)
    torch.testing.assert_close(packed_linear(layer, 4)(x), layer(x), atol=1e-5, rtol=1e-5)


@needs_packing
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"sandwich_norm": True}], ids=str)
@torch.no_grad()
def test_packed_decoding_equals_plain_decoding(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(**changes))
    for parameter in model.parameters():  # biases start at zero, which would hide a mistake
        parameter.add_(0.1 * torch.randn(parameter.shape))
    batch = tiny_batch(model.config, 3)
    text, lengths, codes = batch.text_ids[:, 0], batch.text_len[:, 0], batch.image_ids[:, 0]
    outputs = []
    for steps in (10**9, 1):
        monkeypatch.setattr(decode, "PACK_FROM_STEPS", steps)
        with inference(model):
            decoder = Decoder(model, prefill(model, Direction.TEXT_TO_IMAGE, text, lengths), 1)
            assert all(isinstance(block.attention, JointAttention) == (steps == 1) for block in decoder.blocks)
            outputs.append(torch.stack([decoder.step(codes[:, t]) for t in range(codes.shape[1] - 1)]))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)


@needs_packing
@torch.no_grad()
def test_packed_layer_follows_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        if not can_pack(torch.zeros(1)):
            pytest.skip("this processor has no bfloat16 for oneDNN")
        layer, x = nn.Linear(24, 40), torch.randn(4, 24)
        packed, plain = packed_linear(layer, 4)(x), layer(x)
    assert packed.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(packed, plain, atol=2e-2, rtol=2e-2)


@needs_packing
@pytest.mark.parametrize("autocast", [True, False])
def test_drawing_packs_in_either_precision(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PACK_FROM_STEPS", 1)
    model = tiny_model()
    batch = tiny_batch(model.config, 3)
    text, lengths = batch.text_ids[:, 0], batch.text_len[:, 0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ids = draw_ids(model, Prompts(text, lengths), SampleConfig(), num_images=2, seed=0)
    assert ids.shape == (3, 2, model.spec.num_image_tokens)
    assert ids.min() >= 0 and ids.max() < model.config.image_vocab_size


@needs_packing
def test_packing_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    names = list(model.state_dict())
    block = model.blocks["0"]
    packed_block(block, 4)  # type: ignore[arg-type]
    assert list(model.state_dict()) == names
    assert not isinstance(block.attention, JointAttention)
    assert isinstance(block.mlp.up, nn.Linear)  # type: ignore[union-attr]


def test_only_types_and_devices_that_onednn_packs() -> None:
    assert not can_pack(torch.zeros(1, dtype=torch.float64))
    assert not can_pack(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_int8_layer_is_within_a_percent(bias: bool) -> None:
    layer, x = nn.Linear(256, 64, bias=bias), torch.randn(3, 5, 256)
    layer.weight[7] = 0.0  # a row without any scale
    small = Int8Linear(layer)
    assert small.weight.dtype == torch.int8 and small.weight.nbytes == layer.weight.nbytes // 4
    exact, out = layer(x), small(x)
    assert out.dtype == torch.bfloat16 and out.shape == exact.shape
    assert (out.float() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("convert", [use_bf16, use_int8])
@torch.no_grad()
def test_drawing_with_small_weights(convert: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PACK_FROM_STEPS", 1)
    config = tiny_config(width=32, num_heads=2)
    exact, model = tiny_model(config, std=0.1), tiny_model(config, std=0.1)
    convert(model)  # type: ignore[operator]
    layer = model.blocks["0"].mlp.up
    assert isinstance(layer, Int8Linear) == (convert is use_int8) and layer.bias.dtype == torch.bfloat16
    batch = tiny_batch(config, 3)
    text, lengths, codes = batch.text_ids[:, 0], batch.text_len[:, 0], batch.image_ids[:, 0]
    logits = [m.logits(text, codes, lengths, Direction.TEXT_TO_IMAGE).float() for m in (exact, model)]
    assert (logits[1] - logits[0]).norm() < 0.1 * logits[0].norm()
    settings = SampleConfig(temperature=0.8, guidance=2.0)
    drawn = draw_ids(model, Prompts(text, lengths), settings, num_images=2, seed=0)
    assert torch.equal(drawn, draw_ids(model, Prompts(text, lengths), settings, num_images=2, seed=0))
