"""Which tensor of a foreign image tokenizer is which of ours: taming-transformers, LlamaGen, DALL-E's dVAE.

A rule names one of our tensors and the foreign tensors it is made of, stacked along the first dimension and reshaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models.dvae import DVAE, Bottleneck
from megatron_vilg.models.vqgan import VQGAN, AttentionBlock, Double, Halve, ResidualBlock

Dialect = Literal["taming", "llamagen"]
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
_WEIGHT_AND_BIAS = ("weight", "bias")

ONE_HOT_INPUT = ("decoder.blocks.input.w", "decoder.blocks.input.b")
"""The first convolution of DALL-E's decoder takes one-hot codes: its columns, with its bias, are our codes."""


@dataclass(frozen=True, slots=True)
class NameRule:
    """One of our tensors and what it is made of."""

    ours: str
    theirs: tuple[str, ...]


@dataclass(slots=True)
class _Place:
    """Where a walk through a network stands."""

    level: int
    block: int = 0
    in_middle: bool = False


def vqgan_rules(model: VQGAN, dialect: Dialect) -> Iterator[NameRule]:
    """Rules for every tensor of an imported VQGAN but the averages of its codebook, which only training needs."""
    config = model.config
    levels = len(config.channel_multipliers)
    yield from _network(model.encoder, "encoder", config, dialect, list(range(levels)), "quant_conv")
    yield from _network(model.decoder, "decoder", config, dialect, list(reversed(range(levels))), "post_quant_conv")
    if config.code_choice == "logits":
        yield NameRule("quantizer.code", ("quantize.embed.weight",))
        yield from _pair("quantizer.logits", "quantize.proj")
    else:
        yield NameRule("quantizer.code", ("quantize.embedding.weight",))


def _pair(ours: str, *theirs: str) -> Iterator[NameRule]:
    for kind in _WEIGHT_AND_BIAS:
        yield NameRule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs))


def _network(
    network: nn.Sequential, side: str, config: ImageTokenizerConfig, dialect: Dialect, levels: list[int], outer: str
) -> Iterator[NameRule]:
    """Walk through our network; it has the order of theirs."""
    convolutions = [name for name, part in network.named_children() if isinstance(part, nn.Conv2d)]
    edges = ["conv_in", "conv_out", outer] if side == "encoder" else [outer, "conv_in", "conv_out"]
    edge_names = dict(zip(convolutions, edges, strict=True))
    middle = _middle_of(network) if config.bottom_attention else []
    per_level = config.num_res_blocks + (side == "decoder")
    number, blocks = 0, 0
    for name, part in network.named_children():
        ours = f"{side}.{name}"
        if name in edge_names:
            edge = edge_names[name]
            yield from _pair(ours, edge if edge == outer else f"{side}.{edge}")
        elif isinstance(part, nn.GroupNorm):
            yield from _pair(ours, f"{side}.norm_out")
        elif isinstance(part, Halve | Double):
            kind = "downsample" if isinstance(part, Halve) else "upsample"
            yield from _pair(f"{ours}.conv", f"{_level_name(side, dialect, levels, number)}.{kind}.conv")
            number, blocks = number + 1, 0
        elif name in middle:
            theirs = _middle_name(side, dialect, middle.index(name))
            yield from _block(part, ours, theirs)
        elif isinstance(part, ResidualBlock):
            assert blocks < per_level
            res = "block" if dialect == "taming" else "res"
            yield from _block(part, ours, f"{_level_name(side, dialect, levels, number)}.{res}.{blocks}")
            blocks += 1
        elif isinstance(part, AttentionBlock):
            yield from _block(part, ours, f"{_level_name(side, dialect, levels, number)}.attn.{blocks - 1}")


def _middle_of(network: nn.Sequential) -> list[str]:
    """Our names of the three blocks at the lowest resolution: last in an encoder, first in a decoder."""
    blocks = [name for name, part in network.named_children() if isinstance(part, ResidualBlock | AttentionBlock)]
    is_decoder = any(isinstance(part, Double) for part in network) or isinstance(network[-1], nn.PixelShuffle)
    return blocks[:3] if is_decoder else blocks[-3:]


def _level_name(side: str, dialect: Dialect, levels: list[int], number: int) -> str:
    """Their name of the ``number``-th level that the walk meets. taming counts by resolution, LlamaGen by order."""
    if dialect == "llamagen":
        return f"{side}.conv_blocks.{number}"
    return f"{side}.{'down' if side == 'encoder' else 'up'}.{levels[number]}"


def _middle_name(side: str, dialect: Dialect, index: int) -> str:
    return f"{side}.mid.{('block_1', 'attn_1', 'block_2')[index] if dialect == 'taming' else index}"


def _block(part: nn.Module, ours: str, theirs: str) -> Iterator[NameRule]:
    if isinstance(part, AttentionBlock):
        yield from _pair(f"{ours}.norm", f"{theirs}.norm")
        yield from _pair(f"{ours}.qkv", *(f"{theirs}.{name}" for name in "qkv"))
        yield from _pair(f"{ours}.out", f"{theirs}.proj_out")
        return
    for mine, name in _RESIDUAL.items():
        if not isinstance(getattr(part, mine), nn.Identity):
            yield from _pair(f"{ours}.{mine}", f"{theirs}.{name}")


def dvae_rules(model: DVAE) -> Iterator[NameRule]:
    """Rules for DALL-E's published encoder and decoder (``dall_e``: parameters ``w`` and ``b``)."""
    per_group = model.config.num_res_blocks
    for network, side in ((model.encoder, "encoder"), (model.decoder, "decoder")):
        blocks = [(name, part) for name, part in network.named_children() if isinstance(part, Bottleneck)]
        edges = [name for name, part in network.named_children() if isinstance(part, nn.Conv2d)]
        edge_names = ("input", "output.conv") if side == "encoder" else ("output.conv",)
        for name, edge in zip(edges, edge_names, strict=True):
            yield from _w_and_b(f"{side}.{name}", f"{side}.blocks.{edge}")
        for index, (name, part) in enumerate(blocks):
            group, block = divmod(index, per_group)
            theirs = f"{side}.blocks.group_{group + 1}.block_{block + 1}"
            for number, inner in enumerate(("1", "3", "5", "7"), 1):
                yield from _w_and_b(f"{side}.{name}.residual.{inner}", f"{theirs}.res_path.conv_{number}")
            if not isinstance(part.skip, nn.Identity):
                yield from _w_and_b(f"{side}.{name}.skip", f"{theirs}.id_path")
    yield NameRule("code", ONE_HOT_INPUT)


def _w_and_b(ours: str, theirs: str) -> Iterator[NameRule]:
    yield NameRule(f"{ours}.weight", (f"{theirs}.w",))
    yield NameRule(f"{ours}.bias", (f"{theirs}.b",))
