from __future__ import annotations

import io
import resource
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vilg.data import pixels as pixels_module
from megatron_vilg.data.pixels import read_pixels, read_train_and_held_out
from megatron_vilg.data.shards import ShardWriter
from megatron_vilg.data.split_names import hash_split
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


def test_blocks_are_put_together_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path, 5)
    whole = read_pixels(tmp_path, "train", 8, max_bad_share=0.0)
    for pictures in (1, 2, 5, 6):
        monkeypatch.setattr(pixels_module, "BLOCK_BYTES", pictures * 3 * 8 * 8 + 1)
        assert torch.equal(read_pixels(tmp_path, "train", 8, max_bad_share=0.0), whole)


def _collect(mebibytes: int) -> int:
    """Collect pictures of so many MiB; their bytes."""
    pictures = pixels_module._Pictures(pixels_module._Room("x", 256, 1 << 30))
    picture = Image.new("RGB", (256, 256), (1, 2, 3))
    for _ in range((mebibytes << 20) // (3 * 256 * 256)):
        pictures.add(SimpleNamespace(decode=lambda: picture))  # type: ignore[arg-type]
    return pictures.tensor().numel()


def _peak_of_64_mebibytes() -> float:
    """How far the peak of this process's memory rises, in bytes of the pictures that it collects."""
    pixels_module.BLOCK_BYTES = 4 << 20
    _collect(4)  # the first time reads code of libraries into memory, too
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    collected = _collect(64)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / collected


def test_memory_holds_each_picture_once() -> None:
    with get_context("fork").Pool(1) as processes:
        peak = processes.apply(_peak_of_64_mebibytes)
    assert 0.9 < peak < 1.3


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


def write_unnamed_tar(folder: Path, count: int) -> list[str]:
    """A tar whose name says no split; returns its keys."""
    with ShardWriter(folder, "laion") as writer:
        for index in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (index, 0, 255)).save(buffer, "PNG")
            writer.add(f"{index:03d}", buffer.getvalue(), "一只猫", {})
    return [f"{index:03d}" for index in range(count)]


def test_a_small_tar_of_which_no_key_is_held_out(tmp_path: Path) -> None:
    keys = write_unnamed_tar(tmp_path, 6)
    assert all(hash_split(key, 0.01) == "train" for key in keys)
    train, held_out = read_train_and_held_out(tmp_path, 8, max_bad_share=0.0, val_share=0.01)
    assert len(train) == 6 and held_out is None


def test_bad_records_are_judged_over_all_splits(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train", 20)
    write_pairs(tmp_path / "val", 2)
    (tmp_path / "val" / "000.png").write_bytes(b"broken")
    train, held_out = read_train_and_held_out(tmp_path, 8, max_bad_share=0.01)
    assert len(train) == 20 and held_out is not None and len(held_out) == 1
    with pytest.raises(DataError, match="1 of 22 records"):
        read_train_and_held_out(tmp_path, 8, max_bad_share=0.0)


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "val", 8)
    with pytest.raises(DataError, match="has no split 'train'; it has val"):
        read_train_and_held_out(tmp_path, 8, max_bad_share=0.01)
    write_pairs(tmp_path / "train", 1)
    (tmp_path / "train" / "000.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="8 usable pairs held out and none to train on"):
        read_train_and_held_out(tmp_path, 8, max_bad_share=0.01)


def test_more_pictures_than_memory_allows_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, 4)
    assert len(read_pixels(tmp_path, "train", 8, max_bad_share=0.0, max_bytes=4 * 192)) == 4
    with pytest.raises(DataError, match=r"more than 3 pictures of 8 px.*image_size.*PixelSource"):
        read_pixels(tmp_path, "train", 8, max_bad_share=0.0, max_bytes=3 * 192)


def test_all_splits_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "train", 3)
    write_pairs(tmp_path / "val", 2)
    monkeypatch.setattr(pixels_module, "MAX_BYTES", 5 * 192)
    train, held_out = read_train_and_held_out(tmp_path, 8, max_bad_share=0.0)
    assert len(train) == 3 and held_out is not None and len(held_out) == 2
    monkeypatch.setattr(pixels_module, "MAX_BYTES", 4 * 192)
    with pytest.raises(DataError, match="more than 4 pictures of 8 px"):
        read_train_and_held_out(tmp_path, 8, max_bad_share=0.0)
