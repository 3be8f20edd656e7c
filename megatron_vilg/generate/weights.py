"""Weights made ready for decoding, where few rows meet large matrices and reading these is what takes the time.

*packed*, on a CPU: oneDNN reads a matrix that was packed beforehand about twice as fast (``docs/performance.md``). The
results are the same but for rounding. A packed layer is a copy: it takes the memory of the weights once more, and does
not follow later changes of them.

*int8*: matrices of the blocks as int8 with one scale per output (symmetric, nearest), activations and everything else
bf16. It replaces the weights, at half of the bytes of bf16; results change by about one percent of a layer's output.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vilg.models.layers import Block, FeedForward, SelfAttention
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.linear import has_onednn, onednn_product
from megatron_vilg.parallel.decoding import SharedLinear

PACK_FROM_STEPS = 32
"""Steps from which packing pays: it takes as long as five to ten steps, and saves up to half of each."""

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer without gradients, packed for ``num_rows`` rows; under autocast in autocast's type.

    Args:
        activation: as for ``ops.linear.onednn_product``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, num_rows: int, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.dtype = _arithmetic(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype), num_rows)
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return onednn_product(x.to(self.dtype), self.packed, self.bias, self.activation)


class PackedShare(nn.Module):
    """A rank's share of a linear layer, packed, and the exchange that follows it."""

    def __init__(self, share: SharedLinear, num_rows: int) -> None:
        super().__init__()
        self.packed = PackedLinear(share.weight, None, num_rows)
        self.exchange = share.exchange

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return self.exchange(self.packed(x))


class Int8Linear(nn.Module):
    """A linear layer without gradients whose matrix is int8; its arithmetic is bf16."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if rows.device.type == "cpu":
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:  # compiled, the conversion becomes part of the product
            out = F.linear(rows, self.weight.to(torch.bfloat16)) * self.scale
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1])


def use_bf16(model: ViLG) -> None:
    """Weights of the transformer in bf16, in place; a reconstructor keeps its own."""
    for part in (model.embed, model.blocks, model.norm, model.heads):
        assert part is not None
        cast(nn.Module, part).to(torch.bfloat16)


def use_int8(model: ViLG) -> None:
    """Matrices of the blocks in int8, everything else of the transformer in bf16, in place."""
    for block in model.blocks.values():
        for parent in (cast(Block, block).attention, cast(Block, block).mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    use_bf16(model)


class FusedFeedForward(FeedForward):
    """A feed-forward part whose first layer applies the GELU itself."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return cast(Tensor, self.down(self.up(x)))


class JointAttention(SelfAttention):
    """Attention with queries, keys and values from one product."""

    qkv: nn.Module

    def project_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [B, T, D] to queries, keys and values [B, T, A, H]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        return q, k, v


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs such a matrix here."""
    if weight.device.type != "cpu" or not has_onednn():
        return False
    dtype = _arithmetic(weight)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _arithmetic(weight: Tensor) -> torch.dtype:
    """The type in which a product with this matrix is computed here."""
    if torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32:
        return torch.get_autocast_dtype("cpu")
    return weight.dtype


def can_pack_block(block: Block) -> bool:
    """Whether the block's layers are plain ones, and oneDNN packs their matrices here."""
    return isinstance(block.mlp.up, nn.Linear) and can_pack(block.mlp.up.weight)


def packed_linear(layer: nn.Linear, num_rows: int) -> PackedLinear | PackedShare:
    """The layer packed for ``num_rows`` rows a step."""
    if isinstance(layer, SharedLinear):
        return PackedShare(layer, num_rows)
    return PackedLinear(layer.weight, layer.bias, num_rows)


def packed_block(block: Block, num_rows: int) -> Block:
    """A twin of ``block`` whose linear layers are packed for ``num_rows`` rows a step."""
    attention, mlp = block.attention, block.mlp
    heads = _twin(attention, out=packed_linear(attention.out, num_rows), qkv=_joint(attention, num_rows))
    heads.__class__ = JointAttention
    up = PackedLinear(mlp.up.weight, mlp.up.bias, num_rows, activation="gelu")  # also a rank's share: its own features
    forward = _twin(mlp, up=up, down=packed_linear(mlp.down, num_rows))
    forward.__class__ = FusedFeedForward
    return _twin(block, attention=heads, mlp=forward)


def _twin(module: Module, **children: nn.Module) -> Module:
    """A copy of the module that shares all but the children given."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def _joint(attention: SelfAttention, num_rows: int) -> PackedLinear:
    """One layer for the three projections; the keys, which have no bias, get zeros."""
    layers = (attention.q, attention.k, attention.v)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [weight.new_zeros(len(x.weight)) if x.bias is None else x.bias.detach() for x in layers]
    return PackedLinear(weight, torch.cat(biases), num_rows)
