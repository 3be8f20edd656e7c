"""Block-sparse attention in Triton, forward and backward, over the tiles that a rule leaves.

The scheme is FlashAttention-2's (online softmax, one pass per gradient); what differs is that each tile of queries
walks a list of key tiles, that tokens are read through an order in which every pattern is a band (``ops.tiles``), and
that masks are a few distinct tiles of 0 and 1. Products take the inputs' type, sums and softmax are fp32. Nothing here
knows a pattern. With ``TRITON_INTERPRET=1`` set before the import, it runs without a GPU.

Shape letters: B rows, T positions, A heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vilg.config.check import TRITON_HEAD_SIZES
from megatron_vilg.ops.rules import AttentionRule, text_keys_used
from megatron_vilg.ops.tiles import TileList, tile_list

ROWS, COLUMNS = 64, 32
"""Queries and keys of a tile: at 64 x 32 a quarter of a dense mask is left; 16 x 16 would save a tenth of that."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tokens(x, position, stride, SIZE: tl.constexpr):
    """Rows of tokens: [positions, H]; zeros where the position is -1."""
    feature = tl.arange(0, SIZE)
    places = x + position[:, None] * stride + feature[None, :]
    return tl.load(places, mask=position[:, None] >= 0, other=0.0)


@triton.jit
def _store_tokens(x, position, stride, value, SIZE: tl.constexpr):
    feature = tl.arange(0, SIZE)
    places = x + position[:, None] * stride + feature[None, :]
    tl.store(places, value.to(x.dtype.element_ty), mask=position[:, None] >= 0)


@triton.jit
def _allowed(m, n, at_m, at_n, used, masks, kind, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which scores of a tile count: the mask of its kind, without unused text slots, and every token sees itself."""
    real = tl.load(used + at_n, mask=at_n >= 0, other=0) != 0
    seen = (at_m[:, None] >= 0) & real[None, :]
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = tl.load(masks + kind * ROWS * COLUMNS + row[:, None] * COLUMNS + column[None, :])
    return (seen & (inside != 0)) | ((m[:, None] == n[None, :]) & (at_m[:, None] >= 0))


@triton.jit
def _forward(
    q, k, v, out, log_sum, order, used, masks, start, tiles, kinds,
    q_row, q_at, q_head, k_row, k_at, k_head, v_row, v_at, v_head, out_row, out_at, out_head,
    heads, length, padded, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, row, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    q += row.to(tl.int64) * q_row + head * q_head
    k += row.to(tl.int64) * k_row + head * k_head
    v += row.to(tl.int64) * v_row + head * v_head
    out += row.to(tl.int64) * out_row + head * out_head
    used += row * length
    m = tile * ROWS + tl.arange(0, ROWS)
    at_m = tl.load(order + m)
    query = _tokens(q, at_m, q_at, SIZE)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, SIZE], tl.float32)
    for i in range(tl.load(start + tile), tl.load(start + tile + 1)):
        n = tl.load(tiles + i) * COLUMNS + tl.arange(0, COLUMNS)
        at_n = tl.load(order + n)
        key = _tokens(k, at_n, k_at, SIZE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * _LOG2_E)
        allowed = _allowed(m, n, at_m, at_n, used, masks, tl.load(kinds + i), ROWS, COLUMNS)
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        value = _tokens(v, at_n, v_at, SIZE)
        mass = mass * shrink + tl.sum(weight, 1)
        total = total * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        highest = higher
    mass = tl.where(at_m >= 0, mass, 1.0)
    _store_tokens(out, at_m, out_at, total / mass[:, None], SIZE)
    tl.store(log_sum + tl.program_id(1).to(tl.int64) * padded + m, highest + tl.log2(mass))


@triton.jit
def _backward_query(
    q, k, v, grad, grad_q, log_sum, delta, order, used, masks, start, tiles, kinds,
    q_row, q_at, q_head, k_row, k_at, k_head, v_row, v_at, v_head, grad_row, grad_at, grad_head,
    heads, length, padded, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: their gradient. ``grad_q`` is contiguous [B, T, A, H]."""
    tile, row, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    q += row.to(tl.int64) * q_row + head * q_head
    k += row.to(tl.int64) * k_row + head * k_head
    v += row.to(tl.int64) * v_row + head * v_head
    grad += row.to(tl.int64) * grad_row + head * grad_head
    grad_q += row.to(tl.int64) * length * heads * SIZE + head * SIZE
    used += row * length
    m = tile * ROWS + tl.arange(0, ROWS)
    at_m = tl.load(order + m)
    query, slope = _tokens(q, at_m, q_at, SIZE), _tokens(grad, at_m, grad_at, SIZE)
    offset = tl.program_id(1).to(tl.int64) * padded + m
    level, shift = tl.load(log_sum + offset), tl.load(delta + offset)
    total = tl.zeros([ROWS, SIZE], tl.float32)
    for i in range(tl.load(start + tile), tl.load(start + tile + 1)):
        n = tl.load(tiles + i) * COLUMNS + tl.arange(0, COLUMNS)
        at_n = tl.load(order + n)
        key, value = _tokens(k, at_n, k_at, SIZE), _tokens(v, at_n, v_at, SIZE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * _LOG2_E)
        allowed = _allowed(m, n, at_m, at_n, used, masks, tl.load(kinds + i), ROWS, COLUMNS)
        weight = tl.where(allowed, tl.exp2(scores - level[:, None]), 0.0)
        by_weight = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
        by_score = weight * (by_weight - shift[:, None])
        total += tl.dot(by_score.to(key.dtype), key, input_precision=PRECISION)
    _store_tokens(grad_q, at_m, heads * SIZE, total * scale, SIZE)


@triton.jit
def _backward_key(
    q, k, v, grad, grad_k, grad_v, log_sum, delta, order, used, masks, start, tiles, kinds,
    q_row, q_at, q_head, k_row, k_at, k_head, v_row, v_at, v_head, grad_row, grad_at, grad_head,
    heads, length, padded, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: gradients of keys and values, both contiguous [B, T, A, H]."""
    tile, row, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    q += row.to(tl.int64) * q_row + head * q_head
    k += row.to(tl.int64) * k_row + head * k_head
    v += row.to(tl.int64) * v_row + head * v_head
    grad += row.to(tl.int64) * grad_row + head * grad_head
    offset = row.to(tl.int64) * length * heads * SIZE + head * SIZE
    used += row * length
    log_sum += tl.program_id(1).to(tl.int64) * padded
    delta += tl.program_id(1).to(tl.int64) * padded
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    at_n = tl.load(order + n)
    key, value = _tokens(k, at_n, k_at, SIZE), _tokens(v, at_n, v_at, SIZE)
    by_key = tl.zeros([COLUMNS, SIZE], tl.float32)
    by_value = tl.zeros([COLUMNS, SIZE], tl.float32)
    for i in range(tl.load(start + tile), tl.load(start + tile + 1)):
        m = tl.load(tiles + i) * ROWS + tl.arange(0, ROWS)
        at_m = tl.load(order + m)
        query, slope = _tokens(q, at_m, q_at, SIZE), _tokens(grad, at_m, grad_at, SIZE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * _LOG2_E)
        allowed = _allowed(m, n, at_m, at_n, used, masks, tl.load(kinds + i), ROWS, COLUMNS)
        weight = tl.where(allowed, tl.exp2(scores - tl.load(log_sum + m)[:, None]), 0.0)
        by_value += tl.dot(tl.trans(weight).to(slope.dtype), slope, input_precision=PRECISION)
        by_weight = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
        by_score = weight * (by_weight - tl.load(delta + m)[:, None])
        by_key += tl.dot(tl.trans(by_score).to(query.dtype), query, input_precision=PRECISION)
    _store_tokens(grad_k + offset, at_n, heads * SIZE, by_key * scale, SIZE)
    _store_tokens(grad_v + offset, at_n, heads * SIZE, by_value, SIZE)


def triton_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, direction: int, used: Tensor) -> Tensor:
    """Rows of one direction; q, k, v and the result are [B, T, A, H], ``used`` is uint8 [B, T].

    Raises:
        ValueError: the head size is no power of two from 16 to 256.
    """
    if q.shape[3] not in TRITON_HEAD_SIZES:
        raise ValueError(f"head size {q.shape[3]}: the Triton kernel takes {TRITON_HEAD_SIZES}; use ops.attention=fold")
    tiles = tile_list(rule, direction, ROWS, COLUMNS, q.device)
    out: Tensor = _TritonAttention.apply(q, k, v, used, tiles)
    return out


def used_keys(rule: AttentionRule, direction: int, text_len: Tensor) -> Tensor:
    """``used`` of ``triton_attention`` for text lengths int64 [B]."""
    return text_keys_used(rule.spec, direction, text_len).to(torch.uint8).contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _sizes(q: Tensor) -> dict[str, Any]:
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return {"SIZE": q.shape[3], "ROWS": ROWS, "COLUMNS": COLUMNS, "PRECISION": precision, "num_warps": 4}


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, used: Tensor, tiles: TileList) -> Tensor:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        rows, length, heads, size = q.shape
        padded = len(tiles.order)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_sum = torch.empty(rows, heads, padded, device=q.device)
        _forward[(padded // ROWS, rows * heads)](
            q, k, v, out, log_sum, tiles.order, used, tiles.masks, *tiles.by_query,
            *_strides(q, k, v, out), heads, length, padded, size**-0.5, **_sizes(q),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, used, out, log_sum)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, used, out, log_sum = ctx.saved_tensors
        tiles: TileList = ctx.tiles
        rows, length, heads, size = q.shape
        padded = len(tiles.order)
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        at = tiles.order.clamp(min=0).long()
        delta = (grad.float() * out).sum(-1).transpose(1, 2)[:, :, at].contiguous()
        grads = tuple(torch.empty(q.shape, dtype=x.dtype, device=q.device) for x in (q, k, v))
        sizes = (*_strides(q, k, v, grad), heads, length, padded, size**-0.5)
        shared = (log_sum, delta, tiles.order, used, tiles.masks)
        _backward_query[(padded // ROWS, rows * heads)](
            q, k, v, grad, grads[0], *shared, *tiles.by_query, *sizes, **_sizes(q)
        )
        _backward_key[(padded // COLUMNS, rows * heads)](
            q, k, v, grad, grads[1], grads[2], *shared, *tiles.by_key, *sizes, **_sizes(q)
        )
        return *grads, None, None
