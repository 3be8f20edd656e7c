"""Attention under a rule through torch's FlexAttention. On a CPU it is eager and has no backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_vilg.ops.rules import AttentionRule
from megatron_vilg.ops.tiles import arranged_positions, tile_list

BLOCK = 64
"""Side of a mask block: at 128, torch's default, row layers keep half of all blocks, at 64 under a third."""
_TILES = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), BLOCK)
"""Of the compiled kernels, forward and backward; torch's own choice in bfloat16, 128, would not divide a mask block."""


def flex_mask(rule: AttentionRule, direction: int, text_len: Tensor) -> BlockMask:
    """The block mask for rows of one direction; its block lists are made once per rule."""
    mask = copy.copy(_block_lists(rule, direction, text_len.device))
    mask.mask_mod = _predicate(rule, direction, text_len)
    return mask


def flex(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, direction: int, mask: BlockMask) -> Tensor:
    """Rows of one direction; q, k, v and the result are [B, T, A, H]."""
    order, back = _order(rule, direction, q.device)
    arranged = (x[:, order].transpose(1, 2) for x in (q, k, v))
    options = None if q.device.type == "cpu" else _TILES
    out = _kernel(rule, direction, q.device.type)(*arranged, block_mask=mask, kernel_options=options)
    return out.transpose(1, 2)[:, back]


@lru_cache(maxsize=64)
def _order(rule: AttentionRule, direction: int, device: torch.device) -> tuple[Tensor, Tensor]:
    order = arranged_positions(rule, direction).to(device)
    return order, order.argsort()


@lru_cache(maxsize=64)
def _kernel(rule: AttentionRule, direction: int, device_type: str) -> Callable[..., Any]:
    """One compiled kernel per rule: a shared one would be compiled again for each predicate, then give up."""
    kernel: Callable[..., Any] = flex_attention
    return kernel if device_type == "cpu" else torch.compile(kernel, dynamic=False)


@lru_cache(maxsize=64)
def _block_lists(rule: AttentionRule, direction: int, device: torch.device) -> BlockMask:
    """Blocks that hold something. Only blocks without text keys count as full: text slots may be unused."""
    tiles = tile_list(rule, direction, BLOCK, BLOCK, torch.device("cpu"))
    start, key, kind = tiles.by_query
    count = len(start) - 1
    order = tiles.order.view(count, BLOCK)
    text = rule.spec.text_slice(direction)
    plain = ~((order >= text.start) & (order < text.stop)).any(dim=1)
    present = torch.zeros(count, count, dtype=torch.bool)
    full = torch.zeros(count, count, dtype=torch.bool)
    query = torch.repeat_interleave(torch.arange(count), start.diff())
    present[query, key] = True
    full[query, key] = tiles.masks.flatten(1).all(1)[kind] & plain[key]

    def lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        number = blocks.sum(dim=1, dtype=torch.int32)
        indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
        return number[None, None].to(device), indices[None, None].to(device)

    length = rule.spec.length
    return BlockMask.from_kv_blocks(
        *lists(present & ~full), *lists(full), BLOCK_SIZE=BLOCK, mask_mod=None, seq_lengths=(length, length)
    )


def _predicate(rule: AttentionRule, direction: int, text_len: Tensor) -> Callable[..., Tensor]:
    """``rule.allowed`` on indices in the kernels' order."""
    spec = rule.spec
    image, count, side = spec.image_slice(direction), spec.num_image_tokens, spec.image_side
    column_major = rule.pattern == "column"

    def position(index: Tensor) -> Tensor:
        raster = index % side * side + index // side if column_major else index
        other = index - count
        other = torch.where(other < image.start, other, other + count)
        return torch.where(index < count, raster + image.start, other)

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule.allowed(direction, position(query), position(key), text_len[row])

    return allowed
