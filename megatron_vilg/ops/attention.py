"""Attention under a rule: a dense reference, torch's fused kernel, and a folded form for row and column layers.

``prepare`` does what depends only on text lengths, once per forward pass and pattern; ``attend`` is called by
every layer. Shape letters: B rows, T positions, A heads, H head size, W = image side, N = W * W image tokens.

*fold*: image tokens of a row (column) layer see the few tokens that every image token may see ("globals": text and
special tokens) and their own line, so the scores are [N, globals] and [W, W, line keys] instead of [N, T].
At 32 x 32 tokens that is about a sixth of the dense work (``docs/performance.md``). Each direction is folded on
its own; rows of a batch alternate between the directions unless one direction is named. Layers that do not fold
(conv, full) go through *sdpa*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.ops.rules import AttentionRule, dense_mask, text_keys_used
from megatron_vilg.sequence import Direction

Implementation = Literal["dense", "sdpa", "fold"]

FOLD_FROM_SIDE = 16
"""Image side from which folding is faster than a dense mask (measured on CPU; see ``benchmarks/``)."""


def choose_implementation(requested: Implementation | Literal["auto"], image_side: int) -> tuple[Implementation, str]:
    """The implementation that ``ops.attention`` stands for here, and the reason, for the log."""
    if requested in get_args(Implementation):
        return cast(Implementation, requested), "asked for"
    if image_side >= FOLD_FROM_SIDE:
        return "fold", f"model.image_side={image_side} >= {FOLD_FROM_SIDE}"
    return "dense", f"model.image_side={image_side} < {FOLD_FROM_SIDE}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rule made ready for one batch; pass it to ``attend``."""

    rule: AttentionRule
    direction: Direction | None
    """``None``: rows alternate, row ``r`` has direction ``r % 2``."""
    implementation: Implementation
    bias: Tensor | None
    """dense, sdpa: 0 where allowed and -inf elsewhere, [B, 1, T, T], in the arithmetic's type."""
    used: Tensor | None
    """fold: bool [B, T], False for text slots that hold no token."""


def prepare(
    rule: AttentionRule,
    text_len: Tensor,
    implementation: Implementation,
    direction: Direction | None = None,
    dtype: torch.dtype = torch.float32,
) -> Prepared:
    """Make ``rule`` ready for rows with text lengths int64 [B] and queries of type ``dtype``."""
    if implementation == "fold" and not _folds(rule):
        implementation = "sdpa"
    if implementation == "fold":
        return Prepared(rule, direction, implementation, None, _per_direction(_used, rule, text_len, direction))
    mask = _per_direction(dense_mask, rule, text_len, direction)[:, None]
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return Prepared(rule, direction, implementation, bias, None)


def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
    """Softmax attention; q, k, v and the result are [B, T, A, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if prepared.implementation == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=prepared.bias).transpose(1, 2)
    if prepared.implementation == "dense":
        assert prepared.bias is not None
        # Written out: for short rows torch's fused CPU kernel spends more time in its backward than this does.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + prepared.bias
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)
    assert prepared.used is not None
    if prepared.direction is not None:
        return _FOLD[prepared.direction](q, k, v, prepared.rule, prepared.used).transpose(1, 2)
    halves = [
        _FOLD[d](q[d::2], k[d::2], v[d::2], prepared.rule, prepared.used[d::2])
        for d in (Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT)
    ]
    return torch.stack(halves, dim=1).flatten(0, 1).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    text_len: Tensor,
    implementation: Implementation = "dense",
    direction: Direction | None = None,
) -> Tensor:
    """``prepare`` and ``attend`` in one call. q, k, v: [B, T, A, H] -> [B, T, A, H]."""
    return attend(q, k, v, prepare(rule, text_len, implementation, direction, q.dtype))


def _used(rule: AttentionRule, direction: int, text_len: Tensor) -> Tensor:
    return text_keys_used(rule.spec, direction, text_len)


def _per_direction(
    build: Callable[[AttentionRule, int, Tensor], Tensor],
    rule: AttentionRule,
    text_len: Tensor,
    direction: Direction | None,
) -> Tensor:
    if direction is not None:
        return build(rule, direction, text_len)
    halves = [build(rule, d, text_len[d::2]) for d in (Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT)]
    return torch.stack(halves, dim=1).flatten(0, 1)


def _folds(rule: AttentionRule) -> bool:
    if rule.pattern == "row":
        return rule.image_to_text_row == "same_row"
    return rule.pattern == "column"


def _lines(x: Tensor, side: int, pattern: str) -> Tensor:
    """Image states [B, A, N, H] as lines [B, A, line, position, H]: rows, or columns for a column layer."""
    x = x.unflatten(2, (side, side))
    return x.transpose(2, 3) if pattern == "column" else x


def _raster(x: Tensor, pattern: str) -> Tensor:
    """Lines back to raster order: [B, A, line, position, H] -> [B, A, N, H]."""
    return (x.transpose(2, 3) if pattern == "column" else x).flatten(2, 3)


@lru_cache(maxsize=16)
def _previous_and_own_line(side: int, device: torch.device) -> Tensor:
    """Additive mask [line, query, 2W] of a causal row layer: keys are the line above, then the own line."""
    column = torch.arange(side, device=device)
    own = column[None, :] <= column[:, None]
    above = column[None, :] >= column[:, None]
    mask = torch.cat([above, own], dim=1).expand(side, side, 2 * side).clone()
    mask[0, :, :side] = False
    return torch.zeros(mask.shape, device=device).masked_fill_(~mask, float("-inf"))


@lru_cache(maxsize=16)
def _causal_line(side: int, device: torch.device) -> Tensor:
    """Additive mask [1, query, W] of a causal column layer."""
    mask = torch.full((side, side), float("-inf"), device=device).triu_(1)
    return mask[None]


def _softmax_over_globals_and_line(
    q: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    k_line: Tensor,
    v_line: Tensor,
    global_bias: Tensor | None,
    line_bias: Tensor | None,
) -> Tensor:
    """One softmax over two groups of keys.

    q [B, A, lines, W, H]; global keys [B, A, G, H] are shared by all lines; line keys [B, A, lines, K, H].
    Biases broadcast to [B, A, lines, W, G] and [lines, W, K].
    """
    num_global = k_global.shape[2]
    q = q * q.shape[-1] ** -0.5
    flat = q.flatten(2, 3)
    to_global = (flat @ k_global.transpose(-1, -2)).unflatten(2, q.shape[2:4])
    to_line = q @ k_line.transpose(-1, -2)
    if global_bias is not None:
        to_global = to_global + global_bias
    if line_bias is not None:
        to_line = to_line + line_bias
    weights = torch.cat([to_global, to_line], dim=-1).softmax(dim=-1)
    from_global = weights[..., :num_global].flatten(2, 3) @ v_global
    return from_global.unflatten(2, q.shape[2:4]) + weights[..., num_global:] @ v_line


def _fold_text_to_image(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, used: Tensor) -> Tensor:
    """Rows ``[CLS] text [SEP] | [BOI] image``: all before the image is global to it."""
    spec, side = rule.spec, rule.spec.image_side
    image = spec.image_slice(Direction.TEXT_TO_IMAGE)
    head = slice(0, image.start)
    mask = dense_block(rule, Direction.TEXT_TO_IMAGE, head, head, used)
    out_head = F.scaled_dot_product_attention(q[:, :, head], k[:, :, head], v[:, :, head], attn_mask=mask)

    bias = torch.zeros(used[:, head].shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill_(~used[:, head], float("-inf"))[:, None, None, None]
    q_line, k_line, v_line = (_lines(x[:, :, image], side, rule.pattern) for x in (q, k, v))
    if rule.pattern == "row":
        k_line, v_line = (torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], dim=3) for x in (k_line, v_line))
        line_bias = _previous_and_own_line(side, q.device)
    else:
        line_bias = _causal_line(side, q.device)
    out_image = _softmax_over_globals_and_line(
        q_line, k[:, :, head], v[:, :, head], k_line, v_line, bias, line_bias.to(q.dtype)
    )
    return torch.cat([out_head, _raster(out_image, rule.pattern), v[:, :, image.stop :]], dim=2)


def _fold_image_to_text(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, used: Tensor) -> Tensor:
    """Rows ``[BOI] image [EOI] | [BOS] text``: the two boundary tokens are global to the image."""
    spec, side = rule.spec, rule.spec.image_side
    image = spec.image_slice(Direction.IMAGE_TO_TEXT)
    source = spec.source_slice(Direction.IMAGE_TO_TEXT)
    boundary = [0, source.stop - 1]
    q_line, k_line, v_line = (_lines(x[:, :, image], side, rule.pattern) for x in (q, k, v))
    out_image = _softmax_over_globals_and_line(q_line, k[:, :, boundary], v[:, :, boundary], k_line, v_line, None, None)
    out_boundary = F.scaled_dot_product_attention(q[:, :, boundary], k[:, :, source], v[:, :, source])
    text = slice(source.stop, spec.num_used)
    keys = slice(0, spec.num_used)
    mask = dense_block(rule, Direction.IMAGE_TO_TEXT, text, keys, used)
    out_text = F.scaled_dot_product_attention(q[:, :, text], k[:, :, keys], v[:, :, keys], attn_mask=mask)
    first, last = out_boundary[:, :, :1], out_boundary[:, :, 1:]
    return torch.cat([first, _raster(out_image, rule.pattern), last, out_text, v[:, :, spec.num_used :]], dim=2)


def dense_block(rule: AttentionRule, direction: Direction, queries: slice, keys: slice, used: Tensor) -> Tensor:
    """The rule between two ranges of positions: bool [B, 1, queries, keys]; ``used`` is bool [B, T]."""
    position = torch.arange(rule.spec.length, device=used.device)
    q, k = position[queries, None], position[None, keys]
    mask = rule.allowed(direction, q, k, rule.spec.num_text_slots)
    return ((mask & used[:, None, keys]) | (q == k))[:, None]


_FOLD = {
    Direction.TEXT_TO_IMAGE: _fold_text_to_image,
    Direction.IMAGE_TO_TEXT: _fold_image_to_text,
}
