from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vilg.config.schema import DataConfig
from megatron_vilg.data.images import square
from megatron_vilg.data.loader import PairLoader
from megatron_vilg.data.pair_pixels import PixelCache, write_pixel_cache
from megatron_vilg.data.records import find_records, read_records
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import DataError
from megatron_vilg.sequence import StreamSpec
from tests.train.token_caches import SIDE, SLOTS, write_cache


def test_pictures_follow_the_pair_numbers(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "tokens", {"train": 7, "val": 2})
    pairs = tmp_path / "tokens-pairs"
    pixels = write_pixel_cache(tmp_path / "pixels", cache, find_records(pairs))
    wanted = np.stack([np.asarray(square(r.decode(), 8)) for r in read_records(pairs, "train")]).transpose(0, 3, 1, 2)
    numbers = np.array([5, 0, 5, 6])
    assert np.array_equal(pixels.split("train").read(numbers), wanted[numbers])
    assert len(pixels.split("val")) == 2
    spec = StreamSpec(num_text_slots=SLOTS, image_side=SIDE)
    loader = PairLoader(cache, "train", DataConfig(), spec, 3, 0, pixels)
    batch = loader.batch(4)
    assert batch.pixels is not None
    assert np.array_equal(batch.pixels.numpy(), wanted[batch.sample_ids.numpy()])
    assert np.array_equal(batch.slice(1, 3).pixels.numpy(), wanted[batch.sample_ids.numpy()[1:3]])
    assert loader.clean_batch([2]).pixels.shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match="no pictures of the split 'test'; there are train, val"):
        pixels.split("test")


def test_complete_shards_are_kept_and_missing_ones_written_again(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "tokens", {"train": 3, "val": 1})
    records = find_records(tmp_path / "tokens-pairs")
    write_pixel_cache(tmp_path / "pixels", cache, records)
    train, val = (tmp_path / "pixels" / f"{name}-00000.npy" for name in ("train", "val"))
    before = train.stat().st_mtime_ns
    val.unlink()
    with pytest.raises(DataError, match="val-00000.npy: is missing"):
        PixelCache(tmp_path / "pixels", cache)
    write_pixel_cache(tmp_path / "pixels", cache, records)
    assert train.stat().st_mtime_ns == before and val.is_file()
    np.save(train, np.zeros((3, 3, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"holds uint8 \(3, 3, 4, 4\), expected uint8 \(3, 3, 8, 8\)"):
        PixelCache(tmp_path / "pixels", cache)


def test_a_picture_that_was_replaced_is_written_again(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_png: Callable[..., bytes], make_cache: Any
) -> None:
    source = make_folder(tmp_path / "d", 4)
    for number in (2, 9):
        (source / "p002.png").write_bytes(make_png(number))
        make_cache.write(source, tmp_path / "tokens")
        pixels = write_pixel_cache(tmp_path / "pixels", TokenCache.open(tmp_path / "tokens"), find_records(source))
        wanted = np.asarray(Image.open(io.BytesIO(make_png(number)))).transpose(2, 0, 1)
        assert np.array_equal(pixels.split("train").read(np.array([2]))[0], wanted)


def test_other_pairs_are_refused(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    cache = write_cache(tmp_path / "tokens", {"train": 3})
    other = make_shards(tmp_path / "other", {"train": 3})
    with pytest.raises(DataError, match="are not the 3 that the token cache was made from"):
        write_pixel_cache(tmp_path / "pixels", cache, find_records(other))
    with pytest.raises(DataError, match="has 3 parts of the split 'train'.* has 1 shards"):
        many = make_shards(tmp_path / "many", {"train": 3}, per_shard=1)
        write_pixel_cache(tmp_path / "pixels", cache, find_records(many))
