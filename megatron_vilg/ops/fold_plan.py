"""How the image queries of a layer fall into short blocks that each see few keys.

Image tokens are put in raster order (row, convolution) or column by column (column layers), where every pattern is a
band: ``block`` neighbouring queries see keys from ``before`` in front of the block to ``after`` behind it, and the few
positions that all image tokens see ("globals": text and special tokens). At 32 x 32 tokens that leaves 48 image keys
per query of a row layer, 32 of a column layer and 197 of a convolution, instead of 1024; in captioning, which sees both
ways, 32, 32 and 362. All numbers and masks are read off ``AttentionRule.allowed``; nothing here knows a pattern but by
its name in the order of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.ops.rules import AttentionRule, full_length_mask


@dataclass(frozen=True, slots=True, eq=False)
class FoldPlan:
    """One rule and direction, cut into blocks. N image tokens, R other positions in use."""

    column_major: bool
    side: int
    image: slice
    globals: Tensor
    """int64 [G]: positions that every image query sees when all text slots are used."""
    block: int
    before: int
    after: int
    window_bias: Tensor
    """float32 [blocks, block, window]: 0 where allowed, else -inf."""
    rest: slice | Tensor
    """The R positions in use outside the image."""
    rest_keys: int
    """They see nothing from this position on."""
    rest_mask: Tensor
    """bool [R, rest_keys]: the rule between them when all text slots are used."""
    num_used: int

    @property
    def num_blocks(self) -> int:
        """Blocks of image queries."""
        return len(self.window_bias)

    @property
    def window(self) -> int:
        """Image keys that one block can see."""
        return self.before + self.block + self.after

    def arrange(self, x: Tensor, axis: int = 0) -> Tensor:
        """Image tokens along ``axis`` from raster order to the plan's order."""
        if not self.column_major:
            return x
        return x.unflatten(axis, (self.side, self.side)).transpose(axis, axis + 1).flatten(axis, axis + 1)

    restore = arrange
    """The way back: turning a square of tokens over twice leaves it as it was."""


@lru_cache(maxsize=64)
def fold_plan(rule: AttentionRule, direction: int, device: torch.device) -> FoldPlan | None:
    """The plan of a rule, or None where the blocks would see most of the picture anyway."""
    if rule.pattern == "full":
        return None
    spec, side = rule.spec, rule.spec.image_side
    mask = full_length_mask(rule, direction, torch.device("cpu"))
    image, count = spec.image_slice(direction), spec.num_image_tokens
    outside = torch.ones(spec.length, dtype=torch.bool)
    outside[image] = False
    seen = mask[image].all(dim=0) & outside
    if not torch.equal(seen, mask[image].any(dim=0) & outside):
        raise ValueError(f"{rule}: some positions outside the image are seen by some of its tokens only")
    order = torch.arange(count)
    column_major = rule.pattern == "column"
    if column_major:
        order = order.view(side, side).T.flatten()
    local = mask[image, image][order][:, order]
    block = side
    if rule.pattern == "row" and side % 2 == 0 and side >= 16:  # half a row, unless the window is just a whole one
        block = min(side // 2, side, key=lambda size: size + sum(_reach(local, size)))
    before, after = _reach(local, block)
    if before + block + after > count:
        return None
    outside[spec.num_used :] = False
    rest = outside.nonzero().flatten()
    rest_keys = int(mask[rest].any(dim=0).nonzero().max()) + 1
    return FoldPlan(
        column_major=column_major,
        side=side,
        image=image,
        globals=seen.nonzero().flatten().to(device),
        block=block,
        before=before,
        after=after,
        window_bias=_window_bias(local, block, before, after).to(device),
        rest=slice(0, len(rest)) if bool((rest == torch.arange(len(rest))).all()) else rest.to(device),
        rest_keys=rest_keys,
        rest_mask=mask[rest, :rest_keys].to(device),
        num_used=spec.num_used,
    )


def _reach(local: Tensor, block: int) -> tuple[int, int]:
    """How far in front of and behind its block a query sees."""
    before = after = 0
    for start in range(0, len(local), block):
        keys = local[start : start + block].any(dim=0).nonzero().flatten()
        before = max(before, start - int(keys[0]))
        after = max(after, int(keys[-1]) + 1 - start - block)
    return before, after


def _window_bias(local: Tensor, block: int, before: int, after: int) -> Tensor:
    """Additive masks of all blocks over their windows; places outside the picture are hidden."""
    padded = F.pad(local, (before, after))
    width = before + block + after
    windows = torch.stack([padded[i : i + block, i : i + width] for i in range(0, len(local), block)])
    return torch.zeros(windows.shape).masked_fill_(~windows, float("-inf"))
