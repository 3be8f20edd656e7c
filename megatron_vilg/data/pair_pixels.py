"""The pictures behind a token cache, as bytes, by the same pair numbers: what end-to-end training reconstructs.

A token cache holds no pixels. Here a folder holds, per shard of the cache, ``train-00000.npy`` (uint8 [n, 3, S, S]) and
``train-00000.json`` (which keys, written last). A picture takes 3 S^2 bytes: 7 kB at 48 px, 197 kB at 256 px.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vilg.data.images import square
from megatron_vilg.data.records import ReadReport, RecordPart
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.data.token_files import read_json, whole_file, write_json
from megatron_vilg.errors import DataError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)


class SplitPixels:
    """The pictures of one split, memory-mapped; pairs are numbered as in the token cache."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = tuple(shards)
        self._first = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, pairs: np.ndarray) -> np.ndarray:
        """Pictures of the pairs with these numbers: uint8 [B, 3, S, S]."""
        owner = np.searchsorted(self._first, pairs, side="right") - 1
        rows = [self._shards[shard][pair - self._first[shard]] for shard, pair in zip(owner, pairs, strict=True)]
        return np.stack(rows) if rows else np.empty((0, *self._shards[0].shape[1:]), np.uint8)


class PixelCache:
    """The pictures of all splits of a token cache."""

    def __init__(self, folder: Path, cache: TokenCache) -> None:
        """Open a finished folder; :func:`write_pixel_cache` makes one.

        Raises:
            DataError: a shard is missing, damaged, or belongs to other pairs.
        """
        self._splits: dict[str, SplitPixels] = {}
        for split, shards in cache.manifest["shards"].items():
            keys = _keys_of(cache, split)
            found = []
            for shard in shards:
                wanted = _note(cache, shard, keys)
                found.append(_open(folder / f"{shard['name']}.npy", wanted))
            if found:
                self._splits[split] = SplitPixels(found)

    def split(self, name: str) -> SplitPixels:
        """The pictures of one split.

        Raises:
            DataError: no such split.
        """
        if name not in self._splits:
            raise DataError(f"no pictures of the split {name!r}; there are {', '.join(self._splits)}")
        return self._splits[name]


def write_pixel_cache(
    folder: Path, cache: TokenCache, records_by_split: Mapping[str, Sequence[RecordPart]]
) -> PixelCache:
    """Write the pictures that are missing, shard by shard; again: goes on where it stopped.

    Args:
        folder: where; made if missing.
        cache: the finished token cache.
        records_by_split: the very parts that the cache was made from (``find_records`` with the same options).

    Raises:
        DataError: these are not the pairs of the cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = int(cache.settings["image_size"])
    for split, shards in cache.manifest["shards"].items():
        keys = _keys_of(cache, split)
        parts = records_by_split.get(split, ())
        if len(parts) != len(shards):
            raise DataError(
                f"the data has {len(parts)} parts of the split {split!r}, the token cache {str(cache.folder)!r} has "
                f"{len(shards)} shards: it was made from other data, or with another data.shard_size"
            )
        for shard, part in zip(shards, parts, strict=True):
            wanted = _note(cache, shard, keys)
            path = folder / f"{shard['name']}.npy"
            if not _is_complete(path, wanted):
                _write(path, part, size, wanted)
    return PixelCache(folder, cache)


def _write(path: Path, part: RecordPart, size: int, wanted: dict[str, Any]) -> None:
    keys, pictures = [], []
    for record in part.read(ReadReport()):
        keys.append(record.key)
        pictures.append(np.asarray(square(record.decode(), size), dtype=np.uint8).transpose(2, 0, 1))
    if _digest(keys) != wanted["keys_sha256"]:
        raise DataError(
            f"{part.name}: its {len(keys)} pairs are not the {wanted['pairs']} that the token cache was made from; "
            "name the same --data"
        )
    with whole_file(path) as partial, partial.open("wb") as file:
        np.save(file, np.stack(pictures) if pictures else np.empty((0, 3, size, size), np.uint8))
    write_json(path.with_suffix(".json"), wanted)
    logger.info("%s: %d pictures of %d px", path, len(keys), size)


def _open(path: Path, wanted: dict[str, Any]) -> np.ndarray:
    if not _is_complete(path, wanted):
        raise DataError(f"{path}: is missing, or holds other pictures than the token cache; train again to write it")
    shard: np.ndarray = np.load(path, mmap_mode="r")
    expected = (wanted["pairs"], 3, wanted["image_size"], wanted["image_size"])
    if shard.dtype != np.uint8 or shard.shape != expected:
        raise DataError(f"{path}: holds {shard.dtype} {shard.shape}, expected uint8 {expected}; remove it")
    return shard


def _is_complete(path: Path, wanted: dict[str, Any]) -> bool:
    note = path.with_suffix(".json")
    return path.is_file() and note.is_file() and read_json(note) == wanted


def _note(cache: TokenCache, shard: Mapping[str, Any], keys: Iterator[str]) -> dict[str, Any]:
    """What the pictures of a shard of the cache belong to; takes its keys from ``keys``."""
    mine = list(itertools.islice(keys, shard["pairs"]))
    return {
        "image_size": int(cache.settings["image_size"]),
        "pairs": len(mine),
        "keys_sha256": _digest(mine),
        "tokens_sha256": shard["sha256"],  # a picture that was replaced keeps its key, but not its tokens
    }


def _keys_of(cache: TokenCache, split: str) -> Iterator[str]:
    return (record.key for record in cache.records(split))


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
