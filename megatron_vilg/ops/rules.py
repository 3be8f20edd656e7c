"""Who may see whom: the one predicate that every attention path derives from.

Paper section 3.1.2 and figure 2, with the masks of DALL-E (appendix B.1) for the image part:

* sources see their whole source, targets see the source and the targets to their left;
* image tokens see each other only within the layer's pattern. Text-to-image (causal): *row* the last ``W``
  tokens in raster order and itself, *column* the same column above, *conv* the causal half of a square window.
  Image-to-text (both ways): the same row, the same column, the whole window;
* special tokens are not part of the grid, so no pattern restricts them.

Everything is written with ``&``, ``|``, ``~`` and comparisons, so that it works on Python ints and on index
tensors alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vilg.sequence import Direction, StreamSpec

Pattern = Literal["full", "row", "column", "conv"]


def layer_patterns(num_layers: int, pattern: Literal["paper", "full"]) -> tuple[Pattern, ...]:
    """The pattern of each layer: column for every i with i mod 4 = 2 (i from 1), conv for the last, row elsewhere.

    Source: paper section 3.1.2; the index base is DALL-E's (appendix B.1).
    """
    if pattern == "full":
        full: tuple[Pattern, ...] = ("full",)
        return full * num_layers
    kinds: list[Pattern] = ["column" if i % 4 == 2 else "row" for i in range(1, num_layers + 1)]
    kinds[-1] = "conv"
    return tuple(kinds)


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """The rule of one layer; hashable, so that masks can be cached by it."""

    pattern: Pattern
    spec: StreamSpec
    conv_kernel: int = 11
    conv_wrap: bool = True
    image_to_text_row: Literal["same_row", "window"] = "same_row"

    def allowed(self, direction: int, q: Any, k: Any, text_len: Any) -> Any:
        """Whether position ``q`` may attend to position ``k``.

        Args:
            direction: row kind, one for all positions.
            q, k: positions 0..T-1; ints or broadcastable integer tensors.
            text_len: text tokens of the row, 0..L; the slots behind them are never keys.

        Returns:
            A bool or a boolean tensor of the broadcast shape. Every position may see itself, so no query is
            without a key; padding is seen by nobody else.
        """
        spec = self.spec
        source = spec.source_length(direction)
        text, image = spec.text_slice(direction), spec.image_slice(direction)
        real = (k < spec.num_used) & ((k < text.start + text_len) | (k >= text.stop))
        in_source = (q < source) & (k < source)
        in_target = (q >= source) & (q < spec.num_used) & (k <= q)
        visible = (in_source | in_target) & real
        if self.pattern != "full":
            off_grid = (q < image.start) | (q >= image.stop) | (k < image.start) | (k >= image.stop)
            visible = visible & (off_grid | self._near(direction, q - image.start, k - image.start))
        return visible | (q == k)

    def _near(self, direction: int, q: Any, k: Any) -> Any:
        """The image pattern on raster indices; causality is not part of it."""
        side = self.spec.image_side
        if self.pattern == "column":
            return q % side == k % side
        if self.pattern == "row":
            if direction == Direction.IMAGE_TO_TEXT and self.image_to_text_row == "same_row":
                return q // side == k // side
            return (q - k <= side) & (k - q <= side)
        half = self.conv_kernel // 2
        if not self.conv_wrap:
            rows, columns = q // side - k // side, q % side - k % side
            return (rows <= half) & (rows >= -half) & (columns <= half) & (columns >= -half)
        # k = q + dr * side + dc with |dr|, |dc| <= half: for some dr the remainder is small enough.
        offset = k - q + half * side + half
        within = (offset >= 0) & (offset <= 2 * half * side + 2 * half)
        if 2 * half + 1 >= side:
            return within
        return within & (offset % side <= 2 * half)


@lru_cache(maxsize=64)
def full_length_mask(rule: AttentionRule, direction: int, device: torch.device) -> Tensor:
    """The rule as bool [T, T] for a row whose text slots are all used."""
    position = torch.arange(rule.spec.length, device=device)
    mask: Tensor = rule.allowed(direction, position[:, None], position[None, :], rule.spec.num_text_slots)
    return mask


def text_keys_used(spec: StreamSpec, direction: int, text_len: Tensor) -> Tensor:
    """Which keys are not unused text slots: bool [B, T] for text lengths int64 [B]."""
    text = spec.text_slice(direction)
    position = torch.arange(spec.length, device=text_len.device)
    return (position < text.start + text_len[:, None]) | (position >= text.stop)


def dense_mask(rule: AttentionRule, direction: int, text_len: Tensor) -> Tensor:
    """The rule as bool [B, T, T] for rows of one direction with text lengths int64 [B]."""
    mask = full_length_mask(rule, direction, text_len.device) & text_keys_used(rule.spec, direction, text_len)[:, None]
    return mask | torch.eye(rule.spec.length, dtype=torch.bool, device=text_len.device)
