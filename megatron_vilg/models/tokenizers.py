"""The image tokenizer that a configuration names."""

from __future__ import annotations

from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models.dvae import DVAE, DVAEDecoder
from megatron_vilg.models.vqgan import VQGAN, Decoder

AnyTokenizer = VQGAN | DVAE
"""Both fulfil :class:`models.image_tokenizer.ImageTokenizer`."""


def build_image_tokenizer(config: ImageTokenizerConfig) -> AnyTokenizer:
    """A tokenizer with random weights."""
    return DVAE(config) if config.kind == "dvae" else VQGAN(config)


def build_decoder(config: ImageTokenizerConfig) -> Decoder | DVAEDecoder:
    """Only its decoder, vectors [B, C, grid_side, grid_side] to [B, 3 or 6, S, S], with random weights."""
    return DVAEDecoder(config) if config.kind == "dvae" else Decoder(config)
