"""Discrete VAE as an image tokenizer (DALL-E, appendix A): Gumbel-softmax codes, logit-Laplace pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models.channels_last import to_channels_last
from megatron_vilg.models.pixel_losses import logit_laplace_pixels, squeezed

_REVIVED_NOISE = 0.1
"""How far a revived code starts from the code it splits, as a share of that code's size."""


class Bottleneck(nn.Module):
    """Four convolutions with ReLU before each, narrower inside, beside an identity (1x1 where channels change).

    Args:
        kernels: 3, 3, 3, 1 in the encoder and 1, 3, 3, 3 in the decoder.
        gain: what the residual is multiplied by; ``1 / blocks ** 2``.
    """

    def __init__(self, channels_in: int, channels_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        inner = max(1, channels_out // 4)
        widths = [channels_in, inner, inner, inner, channels_out]
        parts: list[nn.Module] = []
        for kernel, before, after in zip(kernels, widths, widths[1:], strict=False):
            parts += [nn.ReLU(), _conv(before, after, kernel)]
        self.residual = nn.Sequential(*parts)
        self.skip = _conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, h, w] to [B, channels_out, h, w]."""
        skipped: Tensor = self.skip(x)
        return skipped + self.gain * self.residual(x)


def _conv(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    """A convolution of stride 1 as DALL-E starts it: N(0, 1 / fan-in), bias zero."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, 0.0, (channels_in * kernel**2) ** -0.5)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class DVAEEncoder(nn.Sequential):
    """Pixels [B, 3, S, S] to code logits [B, K, grid_side, grid_side]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        widths = [config.channels * m for m in config.channel_multipliers]
        gain = (len(widths) * config.num_res_blocks) ** -2.0
        width = widths[0]
        parts: list[nn.Module] = [nn.PixelUnshuffle(config.patch), _conv(3 * config.patch**2, width, 7)]
        for level, target in enumerate(widths):
            if level:
                parts.append(nn.MaxPool2d(2))
            for _ in range(config.num_res_blocks):
                parts.append(Bottleneck(width, target, (3, 3, 3, 1), gain))
                width = target
        parts += [nn.ReLU(), _conv(width, config.codebook_size, 1)]
        super().__init__(*parts)

    @property
    def head(self) -> nn.Conv2d:
        """The last convolution: one row of weights per code."""
        conv = self[-1]
        assert isinstance(conv, nn.Conv2d)
        return conv


class DVAEDecoder(nn.Sequential):
    """Vectors [B, codebook_dim, grid_side, grid_side] to the parameters of the pixels [B, 6, S, S]: mu, then ln b.

    DALL-E's decoder begins with a 1x1 convolution of one-hot codes. That convolution is the codebook here, so that
    any vectors can be decoded.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        gain = (len(widths) * config.num_res_blocks) ** -2.0
        width = config.codebook_dim
        parts: list[nn.Module] = []
        for level, target in enumerate(widths):
            if level:
                parts.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(config.num_res_blocks):
                parts.append(Bottleneck(width, target, (1, 3, 3, 3), gain))
                width = target
        parts += [nn.ReLU(), _conv(width, 6 * config.patch**2, 1), nn.PixelShuffle(config.patch)]
        super().__init__(*parts)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last convolution, where gradients of losses are compared."""
        conv = self[-2]
        assert isinstance(conv, nn.Conv2d)
        return conv.weight


class DVAE(nn.Module):
    """The tokenizer of the paper's end-to-end ablation (section 5) behind :class:`ImageTokenizer`.

    S = image_size, N = grid_side ** 2, K codes of size C. Of :class:`ImageTokenizerConfig` it does not use
    ``bottom_attention``, ``attention_levels``, ``latent_channels``, ``norm_groups`` (it has no norms),
    ``l2_normalise``, ``codebook_update`` and ``commitment_weight``.
    """

    use: Tensor

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DVAEEncoder(config)
        self.code = nn.Parameter(torch.randn(config.codebook_size, config.codebook_dim))
        self.decoder = DVAEDecoder(config)
        self.register_buffer("use", torch.ones(config.codebook_size))
        to_channels_last(self)

    @property
    def codebook(self) -> Tensor:
        """float32 [K, C]."""
        return self.code.detach()

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to code logits, float32 [B, N, K].

        Raises:
            ValueError: the pictures have another size than the configuration says.
        """
        size = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; this tokenizer reads [B, 3, {size}, {size}]")
        if self.config.squeeze_input:
            pixels = squeezed(pixels)
        grid: Tensor = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return grid.flatten(2).transpose(1, 2).float()

    def soft_codes(self, logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
        """Gumbel-softmax: logits [B, N, K] to mixtures of codes [B, N, C]; the colder, the closer to one code.

        Args:
            uniforms: float32 [B, N, K], uniform on [0, 1).
        """
        uniform = uniforms.clamp(1e-20, 1.0 - 1e-7)
        noisy = logits - (-uniform.log()).log()
        return (noisy / temperature).softmax(-1) @ self.code

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to ids int64 [B, N] in raster order: the likeliest codes, without noise."""
        return self.features(pixels).argmax(-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids [B, N] to their vectors, float32 [B, N, C]."""
        return F.embedding(ids, self.code)

    def parameters_of(self, z_emb: Tensor) -> Tensor:
        """Vectors [B, N, C] to the parameters of their pixels [B, 6, S, S]."""
        side = self.config.grid_side
        grid = z_emb.transpose(1, 2).unflatten(2, (side, side)).contiguous(memory_format=torch.channels_last)
        found: Tensor = self.decoder(grid)
        return found

    def decode(self, z_emb: Tensor) -> Tensor:
        """Vectors [B, N, C] to pixels float32 [B, 3, S, S], not clamped; any vectors, not only codes."""
        return logit_laplace_pixels(self.parameters_of(z_emb))

    @torch.no_grad()
    def follow(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Note which codes a step chose (ids of any shape), and let dead ones split busy ones.

        A dead code takes over vector and encoder row of a code drawn by use, moved a little, so that the two can
        share its work.

        Args:
            generator: CPU generator of this step alone. Where no code is dead nothing is drawn: noise for all codes, as
                replacing some takes it, is 17 million numbers at DALL-E's sizes, 0.7 seconds of a core.

        Returns:
            How many codes were replaced (scalar tensor).
        """
        config = self.config
        counts = torch.bincount(ids.flatten(), minlength=config.codebook_size).to(self.use)
        self.use.mul_(config.ema_decay).add_(counts, alpha=1.0 - config.ema_decay)
        dead = self.use < config.dead_code_threshold
        if not dead.any():
            return dead.sum()
        weight = torch.where(dead, 1e-9, self.use).cpu()
        model = torch.multinomial(weight, config.codebook_size, replacement=True, generator=generator)
        model = model.to(dead.device)
        for rows in (self.code, self.encoder.head.weight):
            noise = torch.randn(rows.shape, generator=generator).to(rows)
            size = rows[model].flatten(1).norm(dim=1) / rows[0].numel() ** 0.5
            shape = (-1, *([1] * (rows.ndim - 1)))
            fresh = rows[model] + _REVIVED_NOISE * size.view(shape) * noise
            rows.copy_(torch.where(dead.view(shape), fresh, rows))
        bias = self.encoder.head.bias
        assert bias is not None
        bias.copy_(torch.where(dead, bias[model], bias))
        self.use.masked_fill_(dead, 1.0)
        return dead.sum()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of code distributions [..., K] from the uniform one, nats per token: scalar mean."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * log_q).sum(-1).mean() + torch.log(torch.tensor(float(logits.shape[-1])))
