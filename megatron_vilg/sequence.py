"""Where every token of a pair stands: the language that data, model, attention and decoding share.

Each (image, text) pair becomes two rows of equal length (paper section 3.1.2, layout of ``docs/design.md``)::

    text-to-image:  [CLS] t_1..t_L [SEP] | [BOI] z_1..z_N          predicts z_1..z_N
    image-to-text:  [BOI] z_1..z_N [EOI] | [BOS] t_1..t_L          predicts t_1..t_L [EOS]

Left of the bar is the source (seen in both directions), right of it the target (seen from the left only).
Rows are padded to ``length``, a multiple of ``multiple_of``. Only integers here: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

NUM_SPECIALS = 2
"""Special tokens around a source: one before it, one behind it."""


class Direction(IntEnum):
    """Row kind. In a batch of 2P rows, row ``r`` has direction ``r % 2`` and belongs to pair ``r // 2``."""

    TEXT_TO_IMAGE = 0
    IMAGE_TO_TEXT = 1


class TextToken(IntEnum):
    """Ids that the text tokenizer reserves, in this order, before its pieces."""

    PAD = 0
    UNK = 1
    BOS = 2
    EOS = 3
    CLS = 4
    SEP = 5


class ImageBoundary(IntEnum):
    """Rows of the small table for tokens that open and close an image."""

    BOI = 0
    EOI = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSpec:
    """Sizes of a row and the slices that follow from them.

    ``L = num_text_slots`` (special tokens not counted), ``N = image_side ** 2``, ``T = length``.
    """

    num_text_slots: int
    image_side: int
    multiple_of: int = 16

    @property
    def num_image_tokens(self) -> int:
        """N, the image tokens of one picture."""
        return self.image_side**2

    @property
    def num_predicted(self) -> int:
        """Positions of a pair that predict a token, both directions: N + L + 1."""
        return self.num_image_tokens + self.num_text_slots + 1

    @property
    def num_used(self) -> int:
        """Positions that carry a token: N + L + 3. The rest up to ``length`` is padding."""
        return self.num_image_tokens + self.num_text_slots + NUM_SPECIALS + 1

    @property
    def length(self) -> int:
        """T: the row length, padded up to ``multiple_of``."""
        return -(-self.num_used // self.multiple_of) * self.multiple_of

    def source_length(self, direction: int) -> int:
        """Positions of the source, its two special tokens included; the target starts right there."""
        inside = self.num_text_slots if direction == Direction.TEXT_TO_IMAGE else self.num_image_tokens
        return inside + NUM_SPECIALS

    def source_slice(self, direction: int) -> slice:
        """The source block of a row."""
        return slice(0, self.source_length(direction))

    def target_slice(self, direction: int) -> slice:
        """The positions whose outputs are predictions: N of them (image) or L + 1 (text and its end)."""
        start = self.source_length(direction)
        count = self.num_image_tokens if direction == Direction.TEXT_TO_IMAGE else self.num_text_slots + 1
        return slice(start, start + count)

    def image_slice(self, direction: int) -> slice:
        """The positions whose *inputs* are z_1..z_N."""
        start = self.source_length(direction) + 1 if direction == Direction.TEXT_TO_IMAGE else 1
        return slice(start, start + self.num_image_tokens)

    def text_slice(self, direction: int) -> slice:
        """The positions whose *inputs* are t_1..t_L."""
        start = 1 if direction == Direction.TEXT_TO_IMAGE else self.source_length(direction) + 1
        return slice(start, start + self.num_text_slots)
