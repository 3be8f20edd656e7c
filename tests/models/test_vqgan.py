from __future__ import annotations

import pytest
import torch

from megatron_vilg.config.presets import demo, paper_10b
from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.models.vqgan import VQGAN, AttentionBlock, ResidualBlock

SMALL = ImageTokenizerConfig(
    image_size=24,
    patch=3,
    channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    bottom_attention=True,
    norm_groups=4,
    codebook_size=32,
    codebook_dim=8,
)


@pytest.fixture
def small() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(SMALL).eval()


def pictures(count: int = 2, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_demo_shapes_and_size() -> None:
    torch.manual_seed(0)
    model = VQGAN(demo().image_tokenizer)
    assert isinstance(model, ImageTokenizer)
    ids = model.encode(pictures(2, 48))
    assert ids.shape == (2, 64) and ids.dtype == torch.int64
    vectors = model.lookup(ids)
    assert vectors.shape == (2, 64, 16) and vectors.dtype == torch.float32
    assert model.decode(vectors).shape == (2, 3, 48, 48)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.326e6, rel=0.001)


def test_paper_shape_is_the_published_f8_model() -> None:
    config = paper_10b().image_tokenizer
    with torch.device("meta"):
        model = VQGAN(config)
        vectors = model.features(torch.empty(1, 3, 256, 256))
        assert vectors.shape == (1, 1024, 16)
        assert model.decode(vectors).shape == (1, 3, 256, 256)
    assert model.codebook.shape == (8192, 16)
    blocks = [m.conv1.out_channels for m in model.encoder if isinstance(m, ResidualBlock)]
    assert blocks == [128, 128, 128, 128, 256, 256, 512, 512, 512, 512]
    blocks = [m.conv1.out_channels for m in model.decoder if isinstance(m, ResidualBlock)]
    assert blocks == [512] * 5 + [256] * 3 + [128] * 6
    assert sum(isinstance(m, AttentionBlock) for m in model.modules()) == 2
    assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


def test_decoding_ids_equals_decoding_the_quantised_vectors(small: VQGAN) -> None:
    pixels = pictures()
    ids = small.encode(pixels)
    with torch.no_grad():
        vectors = small.features(pixels)
        quantised = small.quantizer(vectors.flatten(0, 1)).vectors.view_as(vectors)
        assert torch.allclose(quantised, small.lookup(ids), atol=1e-6)
        assert torch.allclose(small.decode(quantised), small.decode(small.lookup(ids)), atol=1e-5)


def test_encode_is_deterministic_and_independent_of_the_batch(small: VQGAN) -> None:
    pixels = pictures(4)
    ids = small.encode(pixels)
    assert torch.equal(ids, small.encode(pixels))
    assert torch.equal(ids[2:3], small.encode(pixels[2:3]))


def test_blocks_start_as_the_identity() -> None:
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(ResidualBlock(16, 16, 4)(x), x)
    assert torch.equal(AttentionBlock(16, 4)(x), x)


def test_attention_mixes_positions_but_respects_their_order() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(8, 4)
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(1, 8, 3, 3)
    order = torch.randperm(9)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    assert torch.allclose(block(x).flatten(2)[:, :, order], block(shuffled).flatten(2), atol=1e-5)
    changed = x.clone()
    changed[..., 0, 0] += 1
    assert not torch.allclose(block(x)[..., 2, 2], block(changed)[..., 2, 2], atol=1e-4)


def test_wrong_picture_size_is_named(small: VQGAN) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 48, 48\).*\[B, 3, 24, 24\]"):
        small.encode(pictures(2, 48))
