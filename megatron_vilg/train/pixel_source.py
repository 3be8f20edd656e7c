"""Where image tokenizer training gets its pictures from: a batch is a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import zlib
from typing import Protocol

import torch
from torch import Tensor

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.images import random_views
from megatron_vilg.errors import DataError


def seeded(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose, index)."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{purpose}:{index}".encode()))


class PixelSource(Protocol):
    """Training pictures of an image tokenizer.

    Anything with these two members will do, for example a reader of shards for sets that do not fit into
    memory; resuming is exact if ``batch`` is a pure function of ``step``.
    """

    @property
    def fingerprint(self) -> str:
        """Changes when the pictures change; a run does not resume on other pictures."""
        ...

    def batch(self, step: int) -> Tensor:
        """float32 [B, 3, S, S] in [-1, 1] on the CPU, for the step with this number (from 0)."""
        ...


class PixelsInMemory:
    """Pictures kept as bytes: 3 S^2 bytes each, so 48 px take 7 kB and 256 px 197 kB (5,000 of those are 1 GB).

    Each pass shows every picture once, in an order of its own. The last ``augment_share`` of each batch is
    shifted and zoomed as the ``data.view_*`` options say.
    """

    def __init__(self, pixels: Tensor, run: RunConfig) -> None:
        """Take over uint8 pictures [n, 3, S, S].

        Raises:
            DataError: no pictures, or not of the tokenizer's size.
        """
        size = run.image_tokenizer.image_size
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise DataError(
                f"training pictures are {pixels.dtype} {list(pixels.shape)}; "
                f"image_tokenizer.image_size={size} needs uint8 [n, 3, {size}, {size}]"
            )
        if not len(pixels):
            raise DataError("there are no training pictures; at least one is needed")
        self._pixels = pixels
        self._options = run.image_tokenizer_train
        self._views = run.data
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self._fingerprint = hashlib.sha256(pixels.contiguous().numpy().data).hexdigest()

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the bytes."""
        return self._fingerprint

    def batch(self, step: int) -> Tensor:
        """float32 [batch_size, 3, S, S] in [-1, 1]."""
        size = self._options.batch_size
        rows = torch.stack([self._row(step * size + k) for k in range(size)])
        pixels = self._pixels[rows].float() / 127.5 - 1.0
        plain = size - round(self._options.augment_share * size)
        if plain == size:
            return pixels
        views = random_views(
            pixels[plain:],
            seeded(self._options.seed, "views", step),
            shift_pixels=self._views.view_shift_pixels,
            zoom=self._views.view_zoom,
            flip=self._views.view_flip,
        )
        return torch.cat([pixels[:plain], views])

    def _row(self, position: int) -> Tensor:
        """Which picture is shown at a position of the endless stream of passes."""
        turn, offset = divmod(position, len(self._pixels))
        if self._order[0] != turn:
            order = torch.randperm(len(self._pixels), generator=seeded(self._options.seed, "order", turn))
            self._order = (turn, order)
        return self._order[1][offset]
