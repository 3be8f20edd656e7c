"""Convolutional image tokenizer: encoder, codebook, decoder (VQGAN; shape of taming-transformers' f8 model)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models.channels_last import to_channels_last
from megatron_vilg.models.quantizer import VectorQuantizer


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm as taming-transformers sets it."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside an identity (1x1 where channels change); starts as the identity."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, h, w] to [B, channels_out, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        skipped: Tensor = self.skip(x)
        return skipped + h


class AttentionBlock(nn.Module):
    """One head of full self-attention over the positions of a feature map, beside an identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w], same out."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.out(mixed)


class Halve(nn.Module):
    """3x3 convolution of stride 2; pads right and bottom only, as taming-transformers does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] to [B, channels, h / 2, w / 2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Double(nn.Module):
    """Nearest-neighbour upsampling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] to [B, channels, 2 h, 2 w]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _level(config: ImageTokenizerConfig, level: int, width: int, target: int, num_blocks: int) -> Iterator[nn.Module]:
    """Residual blocks of one resolution, each with attention behind it if the level has it."""
    for _ in range(num_blocks):
        yield ResidualBlock(width, target, config.norm_groups)
        if level in config.attention_levels:
            yield AttentionBlock(target, config.norm_groups)
        width = target


def _bottom(config: ImageTokenizerConfig, channels: int) -> Iterator[nn.Module]:
    if config.bottom_attention:
        yield ResidualBlock(channels, channels, config.norm_groups)
        yield AttentionBlock(channels, config.norm_groups)
        yield ResidualBlock(channels, channels, config.norm_groups)


class Encoder(nn.Sequential):
    """Pixels [B, 3, S, S] to [B, codebook_dim, grid_side, grid_side].

    taming-transformers ends in a 3x3 convolution to 256 channels and a 1x1 to the code size, which
    ``latent_channels`` gives. By default the 1x1 stands alone: vectors that do not mix their neighbours once more are
    easier to quantise (in 400 steps of the demo the commitment loss falls from 0.139 to 0.104, and held-out PSNR
    rises from 19.6 to 20.7 dB).
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        widths = [config.channels * m for m in config.channel_multipliers]
        width = config.channels if config.latent_channels else widths[0]
        parts: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch),
            nn.Conv2d(3 * config.patch**2, width, 3, padding=1),
        ]
        for level, target in enumerate(widths):
            if level:
                parts.append(Halve(width))
            parts += _level(config, level, width, target, config.num_res_blocks)
            width = target
        parts += _bottom(config, width)
        parts += [group_norm(width, config.norm_groups), nn.SiLU()]
        if config.latent_channels:
            parts.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))
            width = config.latent_channels
        parts.append(nn.Conv2d(width, config.codebook_dim, 1))
        super().__init__(*parts)


class Decoder(nn.Sequential):
    """Vectors [B, codebook_dim, grid_side, grid_side] to pixels [B, 3, S, S]; the encoder's mirror."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        widths = [config.channels * m for m in config.channel_multipliers]
        width = widths[-1]
        parts: list[nn.Module] = []
        if config.latent_channels:
            parts.append(nn.Conv2d(config.codebook_dim, config.latent_channels, 1))
        parts.append(nn.Conv2d(config.latent_channels or config.codebook_dim, width, 3, padding=1))
        parts += _bottom(config, width)
        for level, target in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                parts.append(Double(width))
            parts += _level(config, level, width, target, config.num_res_blocks + 1)
            width = target
        parts += [group_norm(width, config.norm_groups), nn.SiLU(), nn.Conv2d(width, 3 * config.patch**2, 3, padding=1)]
        parts.append(nn.PixelShuffle(config.patch))
        super().__init__(*parts)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last convolution, where gradients of losses are compared (VQGAN equation 7)."""
        conv = self[-2]
        assert isinstance(conv, nn.Conv2d)
        return conv.weight


class VQGAN(nn.Module):
    """The image tokenizer of the paper (section 3.1.1) behind :class:`models.image_tokenizer.ImageTokenizer`.

    S = image_size, N = grid_side ** 2, K codes of size C. Codes are low-dimensional and of length 1 by default
    (ViT-VQGAN, LlamaGen), which keeps all of them in use.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(config)
        self.decoder = Decoder(config)
        to_channels_last(self)

    @property
    def codebook(self) -> Tensor:
        """float32 [K, C]."""
        return self.quantizer.codebook.detach()

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to the vectors before quantisation, float32 [B, N, C].

        Raises:
            ValueError: the pictures have another size than the configuration says.
        """
        size = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; this tokenizer reads [B, 3, {size}, {size}]")
        grid: Tensor = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return self.quantizer.prepare(grid.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to ids int64 [B, N] in raster order."""
        vectors = self.features(pixels)
        return self.quantizer.choose(vectors.flatten(0, 1)).view(vectors.shape[:2])

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids [B, N] to their vectors, float32 [B, N, C]."""
        return self.quantizer.lookup(ids)

    def decode(self, z_emb: Tensor) -> Tensor:
        """Vectors [B, N, C] to pixels float32 [B, 3, S, S], not clamped; any vectors, not only codes."""
        side = self.config.grid_side
        grid = z_emb.transpose(1, 2).unflatten(2, (side, side)).contiguous(memory_format=torch.channels_last)
        pixels: Tensor = self.decoder(grid)
        return pixels.float()
