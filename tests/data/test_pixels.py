from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vilg.data.pixels import read_pixels, read_train_and_held_out
from megatron_vilg.errors import DataError


def write_pairs(folder: Path, count: int, size: tuple[int, int] = (20, 10)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", size, (index * 10, 0, 255)).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text("一只猫", encoding="utf-8")


def test_pictures_become_squares_of_bytes(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    pixels = read_pixels(tmp_path, "train", 8, max_bad_share=0.0)
    assert pixels.shape == (3, 3, 8, 8) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert np.array_equal(pixels[:, :, 0, 0].numpy(), [[0, 0, 255], [10, 0, 255], [20, 0, 255]])


def test_a_source_without_other_splits_has_nothing_held_out(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    train, held_out = read_train_and_held_out(tmp_path, 8, max_bad_share=0.0)
    assert len(train) == 2 and held_out is None


def test_a_share_is_held_out_by_key(tmp_path: Path) -> None:
    write_pairs(tmp_path, 20)
    train, held_out = read_train_and_held_out(tmp_path, 8, max_bad_share=0.0, val_share=0.3)
    assert held_out is not None and len(held_out) > 0
    both = torch.cat([train, held_out])[:, 0, 0, 0]
    assert sorted(both.tolist()) == [10 * index for index in range(20)]


def test_more_pictures_than_memory_allows_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, 4)
    assert len(read_pixels(tmp_path, "train", 8, max_bad_share=0.0, max_bytes=4 * 192)) == 4
    with pytest.raises(DataError, match=r"more than 3 pictures of 8 px.*image_size.*PixelSource"):
        read_pixels(tmp_path, "train", 8, max_bad_share=0.0, max_bytes=3 * 192)
