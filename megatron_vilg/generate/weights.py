"""Weights packed for decoding on a CPU, where few rows meet large matrices.

Such a product is bound by reading its matrix, and oneDNN reads one that was packed beforehand about twice as fast
(``docs/performance.md``). The results are the same but for rounding. A packed layer is a copy: it takes the memory
of the weights once more, and does not follow later changes of them.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from megatron_vilg.models.layers import Block, SelfAttention

PACK_FROM_STEPS = 32
"""Steps from which packing pays: it takes as long as five to ten steps, and saves up to half of each."""

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer without gradients, packed for ``num_rows`` rows; under autocast in autocast's type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_rows: int) -> None:
        super().__init__()
        self.dtype = _arithmetic(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype), num_rows)
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")


class JointAttention(SelfAttention):
    """Attention with queries, keys and values from one product."""

    qkv: nn.Module

    def project_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [B, T, D] to queries, keys and values [B, T, A, H]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        return q, k, v


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs such a matrix here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    dtype = _arithmetic(weight)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _arithmetic(weight: Tensor) -> torch.dtype:
    """The type in which a product with this matrix is computed here."""
    if torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32:
        return torch.get_autocast_dtype("cpu")
    return weight.dtype


def packed_linear(layer: nn.Linear, num_rows: int) -> PackedLinear:
    """The layer packed for ``num_rows`` rows a step."""
    return PackedLinear(layer.weight, layer.bias, num_rows)


def packed_block(block: Block, num_rows: int) -> Block:
    """A twin of ``block`` whose linear layers are packed for ``num_rows`` rows a step."""
    attention, mlp = block.attention, block.mlp
    heads = _twin(attention, out=packed_linear(attention.out, num_rows), qkv=_joint(attention, num_rows))
    heads.__class__ = JointAttention
    up, down = packed_linear(mlp.up, num_rows), packed_linear(mlp.down, num_rows)
    return _twin(block, attention=heads, mlp=_twin(mlp, up=up, down=down))


def _twin(module: Module, **children: nn.Module) -> Module:
    """A copy of the module that shares all but the children given."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def _joint(attention: SelfAttention, num_rows: int) -> PackedLinear:
    """One layer for the three projections; the keys, which have no bias, get zeros."""
    layers = (attention.q, attention.k, attention.v)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in layers]
    return PackedLinear(weight, torch.cat(biases), num_rows)
