"""A finished token cache, memory-mapped: pairs by number, whatever shard they lie in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vilg.data.token_files import FORMAT, MANIFEST_FILE, CacheSettings, check_same_settings, read_json
from megatron_vilg.data.token_writer import EncodeImages, write_token_cache
from megatron_vilg.errors import DataError

__all__ = ["CacheSettings", "CachedRecord", "EncodeImages", "SplitTokens", "TokenCache", "write_token_cache"]

_DTYPES = {"U16": np.uint16, "I64": np.int64}


@dataclass(frozen=True, slots=True)
class CachedRecord:
    """What a source said about one pair, for evaluation."""

    key: str
    caption: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Shard:
    image_ids: np.ndarray
    text_ids: np.ndarray
    text_len: np.ndarray
    caption_start: np.ndarray


class SplitTokens:
    """The tokens of one split; pairs are numbered from 0 through all shards."""

    def __init__(self, folder: Path, names: Sequence[str], pairs: Sequence[int]) -> None:
        self._folder, self._names = folder, tuple(names)
        self._shards = [_open_shard(folder / f"{name}.safetensors") for name in names]
        for name, shard, count in zip(names, self._shards, pairs, strict=True):
            if len(shard.image_ids) != count or len(shard.caption_start) != count + 1:
                raise DataError(
                    f"{folder / name}.safetensors holds {len(shard.image_ids)} pairs, {MANIFEST_FILE} says {count}: "
                    "encode again"
                )
        self._first = np.concatenate([[0], np.cumsum(np.asarray(pairs, np.int64))])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def num_views(self) -> int:
        """Views beside the picture itself."""
        return self._shards[0].image_ids.shape[1] - 1 if self._shards else 0

    def images(self, pairs: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Codes of pair ``pairs[i]`` in view ``views[i]`` (0: the picture itself): uint16 [B, N]."""
        return self._gather(pairs, lambda shard, local, at: shard.image_ids[local, views[at]])

    def num_captions(self, pairs: np.ndarray) -> np.ndarray:
        """Wordings of each pair, the canonical one included: int64 [B]."""
        return self._gather(pairs, lambda shard, local, _: shard.caption_start[local + 1] - shard.caption_start[local])

    def captions(self, pairs: np.ndarray, wordings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Wording ``wordings[i]`` (0: canonical) of pair ``pairs[i]``: ids uint16 [B, L] and lengths uint16 [B]."""
        ids = self._gather(pairs, lambda shard, local, at: shard.text_ids[shard.caption_start[local] + wordings[at]])
        lengths = self._gather(
            pairs, lambda shard, local, at: shard.text_len[shard.caption_start[local] + wordings[at]]
        )
        return ids, lengths

    def records(self) -> list[CachedRecord]:
        """Key, caption and fields of every pair, in the order of their numbers."""
        records = []
        for name in self._names:
            with (self._folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
                records += [CachedRecord(**json.loads(line)) for line in lines]
        return records

    def _gather(self, pairs: np.ndarray, take: Any) -> np.ndarray:
        if len(self._shards) == 1:
            return np.asarray(take(self._shards[0], pairs, slice(None)))
        owner = np.searchsorted(self._first, pairs, side="right") - 1
        result: np.ndarray | None = None
        for number in np.unique(owner):
            at = np.flatnonzero(owner == number)
            piece = take(self._shards[number], pairs[at] - self._first[number], at)
            if result is None:
                result = np.empty((len(pairs), *piece.shape[1:]), piece.dtype)
            result[at] = piece
        return result if result is not None else np.asarray(take(self._shards[0], pairs, slice(None)))


class TokenCache:
    """A finished cache folder."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.settings: dict[str, Any] = manifest["settings"]
        self._splits: dict[str, SplitTokens] = {}

    @classmethod
    def open(cls, path: Path | str, *, expect: Mapping[str, Any] | None = None) -> TokenCache:
        """Open a cache and check that it was made for this run.

        Args:
            path: cache folder.
            expect: fields of ``CacheSettings`` with the values this run needs.

        Raises:
            DataError: no finished cache there, another format, or settings that differ (both sides are named).
        """
        folder = Path(path)
        if not (folder / MANIFEST_FILE).is_file():
            state = "is not finished" if folder.is_dir() and any(folder.glob("*.safetensors")) else "does not exist"
            raise DataError(
                f"token cache {str(folder)!r} {state}. Run `vilg data encode --data DATA --out {folder} ...` "
                "(again: it goes on where it stopped)"
            )
        manifest = read_json(folder / MANIFEST_FILE)
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"token cache {str(folder)!r} has format {manifest.get('format')!r}, this version reads {FORMAT}: "
                "encode again"
            )
        check_same_settings(f"token cache {str(folder)!r}", manifest["settings"], expect or {})
        return cls(folder, manifest)

    @property
    def splits(self) -> dict[str, int]:
        """Pairs by split."""
        return dict(self.manifest["pairs"])

    def split(self, name: str) -> SplitTokens:
        """The tokens of one split.

        Raises:
            DataError: no such split, or a shard that is missing or damaged.
        """
        if name not in self.manifest["shards"]:
            raise DataError(f"token cache {str(self.folder)!r} has no split {name!r}; it has {', '.join(self.splits)}")
        if name not in self._splits:
            shards = self.manifest["shards"][name]
            self._splits[name] = SplitTokens(self.folder, [s["name"] for s in shards], [s["pairs"] for s in shards])
        return self._splits[name]

    def records(self, split: str) -> list[CachedRecord]:
        """Key, caption and fields of every pair of a split."""
        return self.split(split).records()


def _open_shard(path: Path) -> _Shard:
    """Map a safetensors file without reading it: 8 bytes of header length, a JSON header, then the numbers."""
    try:
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        arrays = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                if start + last > len(data):
                    raise ValueError("it is cut off")
                arrays[name] = data[start + first : start + last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return _Shard(**arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Run `vilg data encode` again, it replaces it") from error
