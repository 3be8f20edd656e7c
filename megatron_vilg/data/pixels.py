"""All pictures of a source in memory, as bytes, for training and measuring an image tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vilg.data.images import square
from megatron_vilg.data.records import Record, RecordPart, find_records, read_parts, require_split
from megatron_vilg.errors import DataError

MAX_BYTES = 8 << 30
"""Most memory that pictures may take: 1.2 million of 48 px, 43,000 of 256 px."""


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
        max_bytes: most memory.

    Raises:
        DataError: nothing found, no such split, too many bad records, or more pictures than fit.
    """
    parts = {split: require_split(find_records(path, val_share=val_share), split, path)}
    pictures = _Pictures(path, size, max_bytes)
    for _, record in _read(parts, path, max_bad_share):
        pictures.add(record)
    return pictures.tensor()


def read_train_and_held_out(
    path: Path | str, size: int, *, max_bad_share: float, val_share: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The split ``train`` and all others together; None where the others are empty or there are none.

    Raises:
        DataError: as :func:`read_pixels`, or no usable pair to train on.
    """
    parts = find_records(path, val_share=val_share)
    require_split(parts, "train", path)
    train, others = _Pictures(path, size, MAX_BYTES), _Pictures(path, size, MAX_BYTES)
    for split, record in _read(parts, path, max_bad_share):
        (train if split == "train" else others).add(record)
    if not len(train):
        raise DataError(f"data: {str(path)!r} has {len(others)} usable pairs held out and none to train on")
    return train.tensor(), others.tensor() if len(others) else None


class _Pictures:
    """A growing list of square pictures."""

    def __init__(self, path: Path | str, size: int, max_bytes: int) -> None:
        self._path, self._size, self._max_bytes = path, size, max_bytes
        self._room = max_bytes // (3 * size * size)
        self._pictures: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, record: Record) -> None:
        if len(self) == self._room:
            raise DataError(
                f"{self._path}: more than {self._room} pictures of {self._size} px do not fit into "
                f"{self._max_bytes / 2**30:g} GiB of memory. Train on a part of them, choose a smaller "
                "image_tokenizer.image_size, or call train_image_tokenizer with a PixelSource that reads batches from "
                "disk."
            )
        self._pictures.append(np.asarray(square(record.decode(), self._size), dtype=np.uint8))

    def tensor(self) -> Tensor:
        """uint8 [n, 3, size, size]."""
        return torch.from_numpy(np.stack(self._pictures)).permute(0, 3, 1, 2).contiguous()


def _read(
    parts: Mapping[str, Sequence[RecordPart]], path: Path | str, max_bad_share: float
) -> Iterator[tuple[str, Record]]:
    records = read_parts(parts, path, max_bad_share=max_bad_share)
    return iter(tqdm(records, desc=f"reading {', '.join(parts)}", unit="picture", disable=None))
