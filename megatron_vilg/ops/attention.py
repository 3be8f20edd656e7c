"""Attention under a rule: one predicate (``ops.rules``), five ways to execute it.

* *dense*: scores written out in the arithmetic's type, in fp32 and fp64 the reference;
* *sdpa*: torch's fused kernel with a mask;
* *fold*: blocks of image queries beside their own few keys (``ops.fold_plan``): on a CPU with a backward pass of its
  own, elsewhere through torch's fused kernel;
* *flex*: FlexAttention over block lists;
* *triton*: our block-sparse kernel.

``prepare`` does what depends only on text lengths, once per forward pass and pattern; ``attend`` is called by every
layer. Rows of a batch alternate between the directions unless one direction is named. Shape letters: B rows,
T positions, A heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.errors import ConfigError
from megatron_vilg.ops.attention_choice import Implementation, implementation_of
from megatron_vilg.ops.fold import fold_attention, fold_bias
from megatron_vilg.ops.fold_cpu import FoldRow, fold_attention_cpu, fold_rows
from megatron_vilg.ops.fold_plan import fold_plan
from megatron_vilg.ops.rules import AttentionRule, dense_mask, text_keys_used
from megatron_vilg.sequence import Direction


def choose_implementation(
    requested: Implementation | Literal["auto"],
    image_side: int,
    device: torch.device | str = "cpu",
    *,
    training: bool = False,
) -> tuple[Implementation, str]:
    """The implementation that ``ops.attention`` stands for here, and the reason, for the log.

    Raises:
        ConfigError: what was asked for does not run on this device.
    """
    on_cpu = torch.device(device).type == "cpu"
    if requested == "triton" and (problem := _triton_problem(on_cpu)):
        raise ConfigError([f"ops.attention=triton: {problem}. Works here: fold"])
    if requested == "flex" and on_cpu and training:
        raise ConfigError(["ops.attention=flex: torch's FlexAttention has no backward pass on a CPU. Works here: fold"])
    return implementation_of(requested, image_side)


def _triton_problem(on_cpu: bool) -> str:
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'megatron_vilg[kernels]')"
    if on_cpu:
        from triton import knobs

        if not knobs.runtime.interpret:
            return "Triton needs a GPU, and TRITON_INTERPRET=1, its slow interpreter, is not set"
    return ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rule made ready for one batch; pass it to ``attend``."""

    rule: AttentionRule
    direction: Direction | None
    """``None``: rows alternate, row ``r`` has direction ``r % 2``."""
    implementation: Implementation
    bias: Tensor | None
    """dense, sdpa: 0 where allowed and -inf elsewhere, [B, 1, T, T], in the arithmetic's type."""
    parts: tuple[Any, ...] = ()
    """The others: what each direction needs, of its own kind."""


def prepare(
    rule: AttentionRule,
    text_len: Tensor,
    implementation: Implementation,
    direction: Direction | None = None,
    dtype: torch.dtype = torch.float32,
) -> Prepared:
    """Make ``rule`` ready for rows with text lengths int64 [B] and queries of type ``dtype``."""
    device = text_len.device
    directions = tuple(Direction) if direction is None else (direction,)
    lengths = [text_len[i :: len(directions)] for i in range(len(directions))]
    if implementation == "fold" and any(fold_plan(rule, d, device) is None for d in directions):
        implementation = "sdpa"
    if implementation in ("dense", "sdpa"):
        halves = [dense_mask(rule, d, n) for d, n in zip(directions, lengths, strict=True)]
        mask = _join(halves)[:, None]
        bias = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, float("-inf"))
        return Prepared(rule, direction, implementation, bias)
    parts = tuple(_part(rule, d, n, implementation, dtype) for d, n in zip(directions, lengths, strict=True))
    return Prepared(rule, direction, implementation, None, parts)


def _part(
    rule: AttentionRule, direction: int, text_len: Tensor, implementation: Implementation, dtype: torch.dtype
) -> Any:
    """What ``implementation`` needs to know about rows of one direction."""
    if implementation == "flex":
        from megatron_vilg.ops.flex import flex_mask

        return flex_mask(rule, direction, text_len)
    if implementation == "triton":
        from megatron_vilg.ops.triton_attention import used_keys

        return used_keys(rule, direction, text_len)
    plan = fold_plan(rule, direction, text_len.device)
    assert plan is not None
    used = text_keys_used(rule.spec, direction, text_len)
    return fold_rows(plan, used) if text_len.device.type == "cpu" else (plan, fold_bias(plan, used, dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
    """Softmax attention; q, k, v and the result are [B, T, A, H]."""
    if prepared.bias is not None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if prepared.implementation == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=prepared.bias).transpose(1, 2)
        # Written out: for short rows torch's fused CPU kernel spends more time in its backward than this does.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + prepared.bias
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)
    if prepared.implementation == "fold" and q.device.type == "cpu":
        rows: tuple[FoldRow, ...] = tuple(row for pair in zip(*prepared.parts, strict=True) for row in pair)
        return fold_attention_cpu(q, k, v, rows)
    execute = _EXECUTE[prepared.implementation]
    if prepared.direction is not None:
        return execute(q, k, v, prepared.rule, prepared.direction, prepared.parts[0])
    return _join([execute(q[d::2], k[d::2], v[d::2], prepared.rule, d, prepared.parts[d]) for d in Direction])


def _fold(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, direction: int, part: Any) -> Tensor:
    return fold_attention(q, k, v, *part)


def _flex(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, direction: int, part: Any) -> Tensor:
    from megatron_vilg.ops.flex import flex

    return flex(q, k, v, rule, direction, part)


def _triton(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, direction: int, part: Any) -> Tensor:
    from megatron_vilg.ops.triton_attention import triton_attention

    return triton_attention(q, k, v, rule, direction, part)


_EXECUTE: dict[str, Callable[..., Tensor]] = {"fold": _fold, "flex": _flex, "triton": _triton}


def _join(halves: list[Tensor]) -> Tensor:
    """Rows of each direction back to alternating rows; rows of a single direction stay as they are."""
    return halves[0] if len(halves) == 1 else torch.stack(halves, dim=1).flatten(0, 1)


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


def dense_block(rule: AttentionRule, direction: Direction, queries: slice, keys: slice, used: Tensor) -> Tensor:
    """The rule between two ranges of positions: bool [B, 1, queries, keys]; ``used`` is bool [B, T]."""
    position = torch.arange(rule.spec.length, device=used.device)
    q, k = position[queries, None], position[None, keys]
    mask = rule.allowed(direction, q, k, rule.spec.num_text_slots)
    return ((mask & used[:, None, keys]) | (q == k))[:, None]
