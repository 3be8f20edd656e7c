"""Published architectures written straight from their description: weights by published name, functions on tensors.

Nothing of the package is used here, so that agreement means something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    padding = 0 if stride == 2 else weight.shape[-1] // 2
    return F.conv2d(x, weight, w[f"{name}.bias"], stride=stride, padding=padding)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    b, c, height, width = x.shape
    groups = x.reshape(b, 32, -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    x = groups.reshape(b, c, height, width)
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual(w: Weights, name: str, x: Tensor) -> Tensor:
    h = conv(w, f"{name}.conv1", swish(norm(w, f"{name}.norm1", x)))
    h = conv(w, f"{name}.conv2", swish(norm(w, f"{name}.norm2", h)))
    return (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x) + h


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    h = norm(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", h).flatten(2) for part in "qkv")
    scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])
    mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), v)
    return x + conv(w, f"{name}.proj_out", mixed.reshape(x.shape))


def level(w: Weights, name: str, x: Tensor, blocks: int, res: str) -> Tensor:
    for block in range(blocks):
        x = residual(w, f"{name}.{res}.{block}", x)
        if f"{name}.attn.{block}.q.weight" in w:
            x = attention(w, f"{name}.attn.{block}", x)
    return x


def middle(w: Weights, names: tuple[str, str, str], x: Tensor) -> Tensor:
    return residual(w, names[2], attention(w, names[1], residual(w, names[0], x)))


def vqgan_encode(w: Weights, x: Tensor, levels: int, blocks: int, *, llamagen: bool) -> Tensor:
    """Pixels [B, 3, S, S] to vectors [B, C, h, w] before quantisation."""
    prefix, res = ("encoder.conv_blocks", "res") if llamagen else ("encoder.down", "block")
    x = conv(w, "encoder.conv_in", x)
    for number in range(levels):
        x = level(w, f"{prefix}.{number}", x, blocks, res)
        if number < levels - 1:
            x = conv(w, f"{prefix}.{number}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = middle(w, middle_names("encoder", llamagen), x)
    x = conv(w, "encoder.conv_out", swish(norm(w, "encoder.norm_out", x)))
    return conv(w, "quant_conv", x)


def vqgan_decode(w: Weights, z: Tensor, levels: int, blocks: int, *, llamagen: bool) -> Tensor:
    """Vectors [B, C, h, w] to pixels [B, 3, S, S]."""
    x = conv(w, "decoder.conv_in", conv(w, "post_quant_conv", z))
    x = middle(w, middle_names("decoder", llamagen), x)
    for step in range(levels):
        name = f"decoder.conv_blocks.{step}" if llamagen else f"decoder.up.{levels - 1 - step}"
        x = level(w, name, x, blocks + 1, "res" if llamagen else "block")
        if step < levels - 1:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(w, f"{name}.upsample.conv", x)
    return conv(w, "decoder.conv_out", swish(norm(w, "decoder.norm_out", x)))


def middle_names(side: str, llamagen: bool) -> tuple[str, str, str]:
    return tuple(f"{side}.mid.{n}" for n in ((0, 1, 2) if llamagen else ("block_1", "attn_1", "block_2")))  # type: ignore[return-value]


def nearest(codebook: Tensor, z: Tensor) -> Tensor:
    """Index of the code at the least Euclidean distance: [B, h, w]."""
    distance = (z[:, None] - codebook[None, :, :, None, None]).square().sum(2)
    return distance.argmin(1)


def lookup(codebook: Tensor, ids: Tensor) -> Tensor:
    """[B, h, w] to [B, C, h, w]."""
    return codebook[ids].permute(0, 3, 1, 2)


class RandomWeights(dict[str, Tensor]):
    """Random tensors under published names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def put(self, name: str, *shape: int, scale: float | None = None) -> None:
        fan_in = math.prod(shape[1:]) or 1
        self[name] = torch.randn(shape, generator=self.generator) * (scale if scale is not None else fan_in**-0.5)

    def conv(self, name: str, c_in: int, c_out: int, kernel: int) -> None:
        self.put(f"{name}.weight", c_out, c_in, kernel, kernel)
        self.put(f"{name}.bias", c_out, scale=0.1)

    def norm(self, name: str, channels: int) -> None:
        self.put(f"{name}.weight", channels, scale=0.3)
        self[f"{name}.weight"] += 1
        self.put(f"{name}.bias", channels, scale=0.1)

    def residual(self, name: str, c_in: int, c_out: int) -> None:
        self.norm(f"{name}.norm1", c_in)
        self.conv(f"{name}.conv1", c_in, c_out, 3)
        self.norm(f"{name}.norm2", c_out)
        self.conv(f"{name}.conv2", c_out, c_out, 3)
        if c_in != c_out:
            self.conv(f"{name}.nin_shortcut", c_in, c_out, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def middle(self, names: tuple[str, str, str], channels: int) -> None:
        self.residual(names[0], channels, channels)
        self.attention(names[1], channels)
        self.residual(names[2], channels, channels)


def random_vqgan(
    *,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention_levels: tuple[int, ...],
    z_channels: int,
    codes: int,
    code_dim: int,
    gumbel: bool = False,
    llamagen: bool = False,
) -> RandomWeights:
    """A whole state dict in the exact names of taming-transformers or LlamaGen."""
    w = RandomWeights(seed=5)
    levels, res = len(multipliers), "res" if llamagen else "block"
    width = channels
    w.conv("encoder.conv_in", 3, channels, 3)
    for number, multiplier in enumerate(multipliers):
        name = f"encoder.conv_blocks.{number}" if llamagen else f"encoder.down.{number}"
        for block in range(blocks):
            w.residual(f"{name}.{res}.{block}", width, channels * multiplier)
            width = channels * multiplier
            if number in attention_levels:
                w.attention(f"{name}.attn.{block}", width)
        if number < levels - 1:
            w.conv(f"{name}.downsample.conv", width, width, 3)
    w.middle(middle_names("encoder", llamagen), width)
    w.norm("encoder.norm_out", width)
    w.conv("encoder.conv_out", width, z_channels, 3)
    w.conv("quant_conv", z_channels, code_dim, 1)
    w.conv("post_quant_conv", code_dim, z_channels, 1)
    w.conv("decoder.conv_in", z_channels, width, 3)
    w.middle(middle_names("decoder", llamagen), width)
    for step, number in enumerate(reversed(range(levels))):
        name = f"decoder.conv_blocks.{step}" if llamagen else f"decoder.up.{number}"
        for block in range(blocks + 1):
            w.residual(f"{name}.{res}.{block}", width, channels * multipliers[number])
            width = channels * multipliers[number]
            if number in attention_levels:
                w.attention(f"{name}.attn.{block}", width)
        if number:
            w.conv(f"{name}.upsample.conv", width, width, 3)
    w.norm("decoder.norm_out", width)
    w.conv("decoder.conv_out", width, 3, 3)
    if gumbel:
        w.conv("quantize.proj", code_dim, codes, 1)
        w.put("quantize.embed.weight", codes, code_dim, scale=1.0)
    else:
        w.put("quantize.embedding.weight", codes, code_dim, scale=1.0)
    return w


def random_dalle(*, hidden: int, init: int, codes: int, blocks: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of DALL-E's encoder and decoder in their exact names."""
    sides: list[dict[str, Tensor]] = []
    for side in ("encoder", "decoder"):
        w = RandomWeights(seed=len(side) + len(sides))

        def put(name: str, c_in: int, c_out: int, kernel: int, w: RandomWeights = w) -> None:
            w.put(f"{name}.w", c_out, c_in, kernel, kernel)
            w.put(f"{name}.b", c_out, scale=0.1)

        widths = [hidden, 2 * hidden, 4 * hidden, 8 * hidden]
        put(
            "blocks.input",
            3 if side == "encoder" else codes,
            hidden if side == "encoder" else init,
            7 if side == "encoder" else 1,
        )
        width = hidden if side == "encoder" else init
        for group, target in enumerate(widths if side == "encoder" else widths[::-1], 1):
            for block in range(1, blocks + 1):
                name = f"blocks.group_{group}.block_{block}"
                inner = target // 4
                kernels = (3, 3, 3, 1) if side == "encoder" else (1, 3, 3, 3)
                sizes = [(width, inner), (inner, inner), (inner, inner), (inner, target)]
                for number, ((c_in, c_out), kernel) in enumerate(zip(sizes, kernels, strict=True), 1):
                    put(f"{name}.res_path.conv_{number}", c_in, c_out, kernel)
                if width != target:
                    put(f"{name}.id_path", width, target, 1)
                width = target
        put("blocks.output.conv", width, codes if side == "encoder" else 6, 1)
        sides.append(dict(w))
    return sides[0], sides[1]


def dalle_run(w: Weights, x: Tensor, *, decoder: bool, blocks: int = 2) -> Tensor:
    """DALL-E's encoder on mapped pixels, or its decoder on one-hot codes."""

    def apply(name: str, x: Tensor) -> Tensor:
        weight = w[f"{name}.w"]
        return F.conv2d(x, weight, w[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = apply("blocks.input", x)
    for group in range(1, 5):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            h = x
            for number in range(1, 5):
                h = apply(f"{name}.res_path.conv_{number}", h.clamp(min=0))
            x = (apply(f"{name}.id_path", x) if f"{name}.id_path.w" in w else x) + h / (4 * blocks) ** 2
        if group < 4:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if decoder else F.max_pool2d(x, 2)
    return apply("blocks.output.conv", x.clamp(min=0))
