"""All pictures of a source in memory, as bytes, for training and measuring an image tokenizer."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vilg.data.images import square
from megatron_vilg.data.records import Record, RecordPart, find_records, read_parts, require_split
from megatron_vilg.errors import DataError

MAX_BYTES = 8 << 30
"""Most memory that pictures may take, of all splits together: 1.2 million of 48 px, 43,000 of 256 px."""
BLOCK_BYTES = 64 << 20
"""Pictures are collected in pieces of this size. While they are put together, memory holds one piece twice."""


def read_pixels(
    path: Path | str,
    split: str,
    size: int,
    *,
    max_bad_share: float,
    val_share: float = 0.0,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Read one split as uint8 [n, 3, size, size].

    Args:
        path: anything ``read_records`` reads.
        split: name of the split.
        size: side in pixels that every picture is cut (centred square) and resized to.
        max_bad_share: share of bad records above which reading stops.
        val_share: share of keys that form ``val`` where the source names no splits.
        max_bytes: most memory; ``BLOCK_BYTES`` beside it are needed for a moment.

    Raises:
        DataError: nothing found, no such split, too many bad records, or more pictures than fit.
    """
    parts = {split: require_split(find_records(path, val_share=val_share), split, path)}
    pictures = _Pictures(_Room(path, size, max_bytes))
    for _, record in _read(parts, path, max_bad_share):
        pictures.add(record)
    return pictures.tensor()


def read_train_and_held_out(
    path: Path | str, size: int, *, max_bad_share: float, val_share: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The split ``train`` and all others together; None where the others are empty or there are none.

    Raises:
        DataError: as :func:`read_pixels`, with ``MAX_BYTES`` for both, or no usable pair to train on.
    """
    parts = find_records(path, val_share=val_share)
    require_split(parts, "train", path)
    room = _Room(path, size, MAX_BYTES)
    train, others = _Pictures(room), _Pictures(room)
    for split, record in _read(parts, path, max_bad_share):
        (train if split == "train" else others).add(record)
    if not len(train):
        raise DataError(f"data: {str(path)!r} has {len(others)} usable pairs held out and none to train on")
    return train.tensor(), others.tensor() if len(others) else None


@dataclass(slots=True)
class _Room:
    """Memory for square pictures, which several collections share."""

    path: Path | str
    size: int
    max_bytes: int
    taken: int = 0
    """Pictures of all collections."""

    @property
    def picture_bytes(self) -> int:
        return 3 * self.size * self.size

    def take(self) -> None:
        """Count one picture more, or refuse it."""
        most = self.max_bytes // self.picture_bytes
        if self.taken == most:
            raise DataError(
                f"{self.path}: more than {most} pictures of {self.size} px do not fit into "
                f"{self.max_bytes / 2**30:g} GiB of memory. Train on a part of them, choose a smaller "
                "image_tokenizer.image_size, or call train_image_tokenizer with a PixelSource that reads batches from "
                "disk."
            )
        self.taken += 1


class _Pictures:
    """A growing number of square pictures, in blocks that go as soon as their content is where it stays."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._shape = (3, room.size, room.size)
        self._per_block = max(1, BLOCK_BYTES // room.picture_bytes)
        self._blocks: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, record: Record) -> None:
        picture = np.asarray(square(record.decode(), self._room.size), dtype=np.uint8)
        self._room.take()
        place = self._count % self._per_block
        if place == 0:
            self._blocks.append(_returned_memory(self._per_block * self._room.picture_bytes).reshape(-1, *self._shape))
        self._blocks[-1][place] = picture.transpose(2, 0, 1)
        self._count += 1

    def tensor(self) -> Tensor:
        """uint8 [n, 3, size, size]; nothing is left here."""
        pictures = torch.empty((self._count, *self._shape), dtype=torch.uint8)
        self._blocks.reverse()
        for start in range(0, self._count, self._per_block):
            part = pictures[start : start + self._per_block]
            part.copy_(torch.from_numpy(self._blocks.pop()[: len(part)]))
        self._count = 0
        return pictures


def _returned_memory(size: int) -> np.ndarray:
    """uint8 [size] that is taken page by page as it is filled, and that the system has back as soon as it is dropped.

    That of the C library is kept for later where training has asked for that (``keep_freed_memory``).
    """
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _read(
    parts: Mapping[str, Sequence[RecordPart]], path: Path | str, max_bad_share: float
) -> Iterator[tuple[str, Record]]:
    records = read_parts(parts, path, max_bad_share=max_bad_share)
    return iter(tqdm(records, desc=f"reading {', '.join(parts)}", unit="picture", disable=None))
