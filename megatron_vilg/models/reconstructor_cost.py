"""What a reconstructor and its critic cost, from their sizes alone: parameters, operations, bytes kept for backward.

The networks are written down once more as lists of layers, from which all figures follow. No torch in here, so that
``vilg plan`` answers at once; tests compare names, shapes, operations and bytes with the real networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

from megatron_vilg.config.schema import ImageTokenizerConfig, ModelConfig, ReconstructorConfig

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, and what it costs for one picture."""

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of its parameters."""
    flops: int = 0
    """Of its forward pass, a multiply and an add as two."""
    products: int = 0
    """Values kept for the backward pass in the type of products: inputs of convolutions, queries, keys, values."""
    floats: int = 0
    """Values kept in float32 whatever the type of products: inputs of norms and of what directly follows them."""
    casts: int = 0
    """Values kept in the type of products only where that is not float32, as a copy of what is kept anyway."""
    made: int = 0
    """Values of its output."""


@lru_cache(maxsize=16)
def reconstructor_layers(
    config: ReconstructorConfig, model: ModelConfig, tokenizer: ImageTokenizerConfig
) -> tuple[Layer, ...]:
    """``Reconstructor(config, model, tokenizer)`` in the order of its ``named_parameters``."""
    count, width, inner = tokenizer.grid_side**2, model.width, config.mapping_width or model.width
    mapping = [
        Layer("norm", _vectors(width), floats=count * width, made=count * width),
        _linear("up", width, inner, count),
        Layer("gelu", products=count * inner, made=count * inner),
        _linear("down", inner, tokenizer.codebook_dim, count),
    ]
    modules = _dvae_decoder(tokenizer) if tokenizer.kind == "dvae" else _vqgan_decoder(tokenizer)
    return (*_named("mapping", mapping), *_numbered("decoder", modules))


@lru_cache(maxsize=16)
def critic_layers(channels: int, side: int, *, shares_norms: bool = False) -> tuple[Layer, ...]:
    """``PatchCritic(channels)`` for pictures of ``side`` pixels.

    Its norms and what follows them are counted in float32. Where they are over several ranks (``shares_norms``) they
    keep two tensors each, the centred and the normalised one.
    """
    modules = [[_conv("", 3, channels, 4, side, side // 2)], [_pointwise(channels, side // 2)]]
    width, side = channels, side // 2
    for target, halves in ((2 * channels, True), (4 * channels, True), (8 * channels, False)):
        after = side // 2 if halves else side - 1
        norm = _norm("", target, after)
        modules += [
            [_conv("", width, target, 4, side, after, bias=False)],
            [replace(norm, floats=norm.floats * (2 if shares_norms else 1))],
            [_pointwise(target, after)],
        ]
        width, side = target, after
    return _numbered("layers", [*modules, [_conv("", width, 1, 4, side, side - 1)]])


def parameter_shapes(layers: Iterable[Layer]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    return {f"{layer.name}.{name}": shape for layer in layers for name, shape in layer.shapes.items()}


def num_values(layers: Iterable[Layer]) -> int:
    """Values of all parameters."""
    return sum(prod(shape) for shape in parameter_shapes(layers).values())


def forward_flops(layers: Iterable[Layer]) -> int:
    """Floating-point operations of the forward pass of one picture; the backward pass takes twice as many."""
    return sum(layer.flops for layer in layers)


def kept_bytes(layers: Iterable[Layer], compute: int) -> float:
    """What the forward pass of one picture keeps for its backward pass, products having ``compute`` bytes a value."""
    return float(
        sum(
            compute * (layer.products + (layer.casts if compute < FLOAT_BYTES else 0)) + FLOAT_BYTES * layer.floats
            for layer in layers
        )
    )


def widest(layers: Iterable[Layer]) -> int:
    """Values of the largest output for one picture."""
    return max(layer.made for layer in layers)


def _vqgan_decoder(config: ImageTokenizerConfig) -> list[list[Layer]]:
    widths = [config.channels * m for m in config.channel_multipliers]
    side, width, entry = config.grid_side, widths[-1], config.codebook_dim
    modules: list[list[Layer]] = []
    if config.latent_channels:
        modules.append([_conv("", entry, config.latent_channels, 1, side, side)])
        entry = config.latent_channels
    modules.append([_conv("", entry, width, 3, side, side)])
    if config.bottom_attention:
        modules += [_residual(width, width, side), _attention(width, side), _residual(width, width, side)]
    for level, target in reversed(list(enumerate(widths))):
        if level < len(widths) - 1:
            side *= 2
            modules.append([_conv("conv", width, width, 3, side, side)])
        for _ in range(config.num_res_blocks + 1):
            modules.append(_residual(width, target, side))
            if level in config.attention_levels:
                modules.append(_attention(target, side))
            width = target
    modules += [[_norm("", width, side)], [_pointwise(width, side)]]
    return [*modules, [_conv("", width, 3 * config.patch**2, 3, side, side)]]


def _residual(inputs: int, outputs: int, side: int) -> list[Layer]:
    """Norm, SiLU, convolution, twice; the skip reads what the first norm keeps."""
    layers = [
        _norm("norm1", inputs, side),
        _pointwise(inputs, side),
        _conv("conv1", inputs, outputs, 3, side, side),
        _norm("norm2", outputs, side),
        _pointwise(outputs, side),
        _conv("conv2", outputs, outputs, 3, side, side),
    ]
    if inputs != outputs:
        skip = _conv("skip", inputs, outputs, 1, side, side)
        layers.append(replace(skip, products=0, casts=skip.products))
    return layers


def _attention(channels: int, side: int) -> list[Layer]:
    count = side**2
    return [
        _norm("norm", channels, side),
        _conv("qkv", channels, 3 * channels, 1, side, side),
        Layer("mix", flops=4 * count**2 * channels, products=3 * count * channels, floats=count),
        _conv("out", channels, channels, 1, side, side),
    ]


def _dvae_decoder(config: ImageTokenizerConfig) -> list[list[Layer]]:
    side, width, modules = config.grid_side, config.codebook_dim, []
    for level, multiplier in enumerate(reversed(config.channel_multipliers)):
        if level:
            side *= 2
            modules.append([Layer("", made=side**2 * width)])
        for _ in range(config.num_res_blocks):
            modules.append(_bottleneck(width, config.channels * multiplier, side))
            width = config.channels * multiplier
    return [*modules, [Layer("")], [_conv("", width, 6 * config.patch**2, 1, side, side)]]


def _bottleneck(inputs: int, outputs: int, side: int) -> list[Layer]:
    """ReLU and convolution, four times; a ReLU keeps what its convolution keeps, and the skip the input besides."""
    inner = max(1, outputs // 4)
    widths = (inputs, inner, inner, inner, outputs)
    sizes = enumerate(zip((1, 3, 3, 3), widths, widths[1:], strict=False))
    layers = [_conv(f"residual.{2 * i + 1}", before, after, k, side, side) for i, (k, before, after) in sizes]
    return layers if inputs == outputs else [*layers, _conv("skip", inputs, outputs, 1, side, side)]


def _conv(name: str, inputs: int, outputs: int, kernel: int, before: int, after: int, *, bias: bool = True) -> Layer:
    """From a side of ``before`` to one of ``after``."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (outputs, inputs, kernel, kernel)}
    if bias:
        shapes["bias"] = (outputs,)
    count = after**2
    flops = 2 * count * inputs * outputs * kernel**2
    return Layer(name, shapes, flops=flops, products=before**2 * inputs, made=count * outputs)


def _linear(name: str, inputs: int, outputs: int, count: int) -> Layer:
    shapes = {"weight": (outputs, inputs), "bias": (outputs,)}
    return Layer(name, shapes, 2 * count * inputs * outputs, products=count * inputs, made=count * outputs)


def _norm(name: str, channels: int, side: int) -> Layer:
    return Layer(name, _vectors(channels), floats=side**2 * channels, made=side**2 * channels)


def _pointwise(channels: int, side: int) -> Layer:
    """A SiLU or LeakyReLU, which keeps its input."""
    return Layer("", floats=side**2 * channels, made=side**2 * channels)


def _vectors(size: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (size,), "bias": (size,)}


def _named(parent: str, layers: Iterable[Layer]) -> Iterator[Layer]:
    return (replace(layer, name=f"{parent}.{layer.name}".rstrip(".")) for layer in layers)


def _numbered(parent: str, modules: Sequence[Iterable[Layer]]) -> tuple[Layer, ...]:
    """Names as in a ``Sequential`` of these modules."""
    return tuple(layer for i, layers in enumerate(modules) for layer in _named(f"{parent}.{i}", layers))
