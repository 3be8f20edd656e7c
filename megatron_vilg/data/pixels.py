"""All pictures of a source in memory, as bytes, for training and measuring an image tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vilg.data.images import square
from megatron_vilg.data.records import find_records, read_records
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
    pictures: list[np.ndarray] = []
    room = max_bytes // (3 * size * size)
    records = read_records(path, split, max_bad_share=max_bad_share, val_share=val_share)
    for record in tqdm(records, desc=f"reading {split}", unit="picture", disable=None):
        if len(pictures) == room:
            raise DataError(
                f"{path}: more than {room} pictures of {size} px do not fit into {max_bytes / 2**30:g} GiB of memory. "
                "Train on a part of them, choose a smaller image_tokenizer.image_size, or call "
                "train_image_tokenizer with a PixelSource that reads batches from disk."
            )
        pictures.append(np.asarray(square(record.decode(), size), dtype=np.uint8))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def read_train_and_held_out(
    path: Path | str, size: int, *, max_bad_share: float, val_share: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The split ``train`` and all others together; None where there are no others.

    Raises:
        DataError: as :func:`read_pixels`.
    """

    def read(split: str) -> Tensor:
        return read_pixels(path, split, size, max_bad_share=max_bad_share, val_share=val_share)

    others = [split for split in find_records(path, val_share=val_share) if split != "train"]
    train = read("train")
    return train, torch.cat([read(split) for split in others]) if others else None
