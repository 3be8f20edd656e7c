"""The order of tokens in which every pattern is a band, and the tiles of scores that are not empty in it.

Attention does not care in which order tokens stand, so block-sparse kernels see the picture first (from a tile border
on; column by column for column layers, which in raster order would touch every tile) and everything else behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.ops.rules import AttentionRule, full_length_mask


def arranged_positions(rule: AttentionRule, direction: int) -> Tensor:
    """Position in the row of every token in the kernels' order: int64 [T] on the CPU."""
    spec, side = rule.spec, rule.spec.image_side
    position = torch.arange(spec.length)
    image = spec.image_slice(direction)
    picture = position[image]
    if rule.pattern == "column":
        picture = picture.view(side, side).T.flatten()
    return torch.cat([picture, position[: image.start], position[image.stop :]])


@dataclass(frozen=True, slots=True, eq=False)
class TileList:
    """The tiles of one rule and direction that hold any key of any query, by rows and by columns of tiles."""

    order: Tensor
    """int32 [padded T]: position of each token in the kernels' order, -1 behind the last."""
    masks: Tensor
    """int8 [distinct tiles, rows, columns]: 1 where a query may see a key when all text slots are used."""
    by_query: tuple[Tensor, Tensor, Tensor]
    """int32: start of each query tile's list [tiles + 1]; key tile; number of its mask."""
    by_key: tuple[Tensor, Tensor, Tensor]
    """The same by key tile."""

    @property
    def num_tiles(self) -> int:
        """Tiles that have to be computed."""
        return len(self.by_query[1])


@lru_cache(maxsize=64)
def tile_list(rule: AttentionRule, direction: int, rows: int, columns: int, device: torch.device) -> TileList:
    """Tiles of ``rows`` queries and ``columns`` keys; one number divides the other."""
    order = arranged_positions(rule, direction)
    mask = full_length_mask(rule, direction, torch.device("cpu"))[order][:, order]
    padding = -len(order) % max(rows, columns)
    mask = F.pad(mask, (0, padding, 0, padding))
    tiles = mask.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    some = tiles.flatten(2).any(2)
    masks, kind = tiles.flatten(2).flatten(0, 1).unique(dim=0, return_inverse=True)
    kind = kind.view(some.shape)

    def by_row(present: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = F.pad(present.sum(dim=1).cumsum(0), (1, 0))
        return tuple(x.to(device, torch.int32) for x in (start, present.nonzero()[:, 1], kinds[present]))  # type: ignore[return-value]

    return TileList(
        F.pad(order, (0, padding), value=-1).to(device, torch.int32),
        masks.view(-1, rows, columns).to(device, torch.int8),
        by_row(some, kind),
        by_row(some.T, kind.T),
    )
