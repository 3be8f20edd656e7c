"""A batch of pairs in both directions, and what each direction has to predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.ops.cross_entropy import IGNORE as IGNORE
from megatron_vilg.sequence import Direction, StreamSpec, TextToken


@dataclass(frozen=True, slots=True)
class PairBatch:
    """P pairs; axis 1 is the direction, because the two rows of a pair may see different versions of it.

    The text-to-image row may see another wording or an empty caption and noised codes; the image-to-text
    row may see a shifted copy of the picture. Targets are always clean.
    """

    text_ids: Tensor
    """int64 [P, 2, L]: what each row is fed, PAD behind the text."""
    text_len: Tensor
    """int64 [P, 2]: tokens before the padding, 0 to L."""
    image_ids: Tensor
    """int64 [P, 2, N]: codes that each row is fed, raster order."""
    target_image_ids: Tensor
    """int64 [P, N]: codes that text-to-image predicts."""
    sample_ids: Tensor
    """int64 [P]: number of each pair in its data set; for reports of bad samples and resume checks."""
    pixels: Tensor | None = None
    """uint8 [P, 3, S, S]: the true pictures, in end-to-end runs only."""

    def __len__(self) -> int:
        return self.text_ids.shape[0]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Model inputs: text_ids [2P, L], image_ids [2P, N], text_len [2P]; row ``r`` has direction ``r % 2``."""
        return self.text_ids.flatten(0, 1), self.image_ids.flatten(0, 1), self.text_len.flatten(0, 1)

    def slice(self, start: int, stop: int) -> PairBatch:
        """The pairs ``start`` to ``stop`` (a micro-batch)."""
        return self.each(lambda x: x[start:stop])

    def take(self, numbers: Tensor) -> PairBatch:
        """The pairs with these places in the batch: int64 [n]."""
        return self.each(lambda x: x[numbers])

    def to(self, device: torch.device | str) -> PairBatch:
        """A copy on another device."""
        return self.each(lambda x: x.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        """A copy whose tensors are what ``change`` makes of these."""
        return PairBatch(
            text_ids=change(self.text_ids),
            text_len=change(self.text_len),
            image_ids=change(self.image_ids),
            target_image_ids=change(self.target_image_ids),
            sample_ids=change(self.sample_ids),
            pixels=None if self.pixels is None else change(self.pixels),
        )


def build_targets(batch: PairBatch, spec: StreamSpec) -> Tensor:
    """Labels of both directions in one tensor, so that a pipeline schedule can carry them.

    Returns:
        int64 [P, N + L + 1]: the N image labels, then the text labels ``t_1..t_m EOS`` followed by ``IGNORE``.
    """
    text = batch.text_ids[:, Direction.IMAGE_TO_TEXT]
    length = batch.text_len[:, Direction.IMAGE_TO_TEXT, None]
    labels = torch.nn.functional.pad(text, (0, 1), value=TextToken.PAD)
    position = torch.arange(spec.num_text_slots + 1, device=text.device)
    labels = torch.where(position == length, TextToken.EOS.value, labels)
    labels = torch.where(position > length, IGNORE, labels)
    return torch.cat([batch.target_image_ids, labels], dim=1)
