"""Folded attention in plain torch operations: every block of image queries beside its own few keys, in one batch.

For devices with a fast fused kernel; on a CPU ``fold_cpu`` does the same without copies. Shape letters: B rows,
T positions, A heads, H head size, N image tokens, G globals.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.ops.fold_plan import FoldPlan


def fold_bias(plan: FoldPlan, used: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Additive masks for ``fold_attention``, once per batch: of the image queries and of the rest.

    Args:
        used: bool [B, T], False for text slots that hold no token.
    """
    seen = torch.zeros(len(used), 1, 1, len(plan.globals), device=used.device)
    seen = seen.masked_fill(~used[:, None, None, plan.globals], float("-inf"))
    blocks, block, _ = plan.window_bias.shape
    window = plan.window_bias.expand(len(used), -1, -1, -1)
    image = torch.cat([seen.expand(-1, blocks, block, -1), window], dim=-1).flatten(0, 1)[:, None]
    rest = rest_bias(plan, used)[:, None]
    return image.to(dtype), rest.to(dtype)


def rest_bias(plan: FoldPlan, used: Tensor) -> Tensor:
    """Additive mask of the queries outside the image: float32 [B, R, rest_keys]."""
    position = torch.arange(used.shape[1], device=used.device)
    itself = position[plan.rest][:, None] == position[: plan.rest_keys]
    allowed = (plan.rest_mask & used[:, None, : plan.rest_keys]) | itself
    return torch.zeros(allowed.shape, device=used.device).masked_fill_(~allowed, float("-inf"))


def fold_attention(q: Tensor, k: Tensor, v: Tensor, plan: FoldPlan, bias: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of one direction; q, k, v and the result are [B, T, A, H]."""
    rows, _, heads, size = q.shape
    query = plan.arrange(q[:, plan.image], 1).reshape(-1, plan.block, heads, size).transpose(1, 2)
    image_bias, rest_bias = bias
    out = F.scaled_dot_product_attention(query, _windows(k, plan), _windows(v, plan), attn_mask=image_bias)
    image = plan.restore(out.transpose(1, 2).reshape(rows, -1, heads, size), 1)
    head, keys = q[:, plan.rest].transpose(1, 2), slice(0, plan.rest_keys)
    rest = F.scaled_dot_product_attention(
        head, k[:, keys].transpose(1, 2), v[:, keys].transpose(1, 2), attn_mask=rest_bias
    ).transpose(1, 2)
    before = plan.image.start
    return torch.cat([rest[:, :before], image, rest[:, before:], v[:, plan.num_used :]], dim=1)


def _windows(x: Tensor, plan: FoldPlan) -> Tensor:
    """Keys or values of each block: globals, then its window: [B, T, A, H] to [B * blocks, A, G + window, H]."""
    image = F.pad(plan.arrange(x[:, plan.image], 1), (0, 0, 0, 0, plan.before, plan.after))
    windows = image.unfold(1, plan.window, plan.block).permute(0, 1, 2, 4, 3)
    shared = x[:, plan.globals].transpose(1, 2)[:, None].expand(-1, plan.num_blocks, -1, -1, -1)
    return torch.cat([shared, windows], dim=3).flatten(0, 1)
