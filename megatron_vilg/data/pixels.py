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


def read_pixels(path: Path | str, split: str, size: int, *, max_bad_share: float, max_bytes: int = MAX_BYTES) -> Tensor:
    """Read one split as uint8 [n, 3, size, size].

    Args:
        path: anything ``read_records`` reads.
        split: name of the split.
        size: side in pixels that every picture is cut (centred square) and resized to.
        max_bad_share: share of bad records above which reading stops.
        max_bytes: most memory.

    Raises:
        DataError: nothing found, no such split, too many bad records, or more pictures than fit.
    """
    pictures: list[np.ndarray] = []
    room = max_bytes // (3 * size * size)
    for record in tqdm(
        read_records(path, split, max_bad_share=max_bad_share), desc=f"reading {split}", unit="picture", disable=None
    ):
        if len(pictures) == room:
            raise DataError(
                f"{path}: more than {room} pictures of {size} px do not fit into {max_bytes / 2**30:g} GiB of memory. "
                "Train on a part of them, choose a smaller image_tokenizer.image_size, or call "
                "train_image_tokenizer with a PixelSource that reads batches from disk."
            )
        pictures.append(np.asarray(square(record.decode(), size), dtype=np.uint8))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def read_train_and_held_out(path: Path | str, size: int, *, max_bad_share: float) -> tuple[Tensor, Tensor | None]:
    """The split ``train`` and all others together; None where there are no others.

    Raises:
        DataError: as :func:`read_pixels`.
    """
    others = [split for split in find_records(path) if split != "train"]
    train = read_pixels(path, "train", size, max_bad_share=max_bad_share)
    held_out = [read_pixels(path, split, size, max_bad_share=max_bad_share) for split in others]
    return train, torch.cat(held_out) if held_out else None
