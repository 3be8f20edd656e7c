"""Pairs as token ids on disk: written once by frozen tokenizers, memory-mapped by training.

A cache is a folder. Per part of the source and split there is one shard::

    train-00000.safetensors   image_ids uint16 [n, 1 + views, N], text_ids uint16 [m, L], text_len uint16 [m],
                              caption_start int64 [n + 1]: captions caption_start[i] .. caption_start[i + 1] belong to
                              pair i, the first of them is the canonical one; view 0 is the picture itself
    train-00000.jsonl         per pair: key, caption, fields
    train-00000.json          written when the shard is complete: counts, sums, what it was made from

and ``manifest.json``, written last: a folder without it is not finished. Only ``train`` has views.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vilg.errors import DataError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
MOST_IDS = 2**16


_OPTIONS = {
    "image_size": "image_tokenizer.image_size",
    "grid_side": "model.image_side",
    "codebook_size": "image_tokenizer.codebook_size",
    "num_text_slots": "model.num_text_slots",
    "text_vocab_size": "model.text_vocab_size",
    "num_views": "data.num_views",
    "view_shift_pixels": "data.view_shift_pixels",
    "view_zoom": "data.view_zoom",
    "view_flip": "data.view_flip",
    "seed": "train.seed",
}
"""What people call the fields of ``CacheSettings``, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """All that determines the tokens, apart from the pairs; two shards of one cache agree in every field."""

    image_size: int
    grid_side: int
    codebook_size: int
    num_text_slots: int
    image_tokenizer_sha256: str
    text_tokenizer_sha256: str
    text_vocab_size: int
    num_views: int
    view_shift_pixels: float
    view_zoom: float
    view_flip: bool
    seed: int

    def __post_init__(self) -> None:
        if max(self.codebook_size, self.text_vocab_size) > MOST_IDS:
            raise DataError(
                f"image_tokenizer.codebook_size = {self.codebook_size}, text vocabulary = {self.text_vocab_size}: "
                f"a token cache holds 16-bit ids, so at most {MOST_IDS} of each work"
            )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {name: getattr(self, name) for name in self.__slots__}


def check_same_settings(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare fields of ``CacheSettings``.

    Raises:
        DataError: with the option behind every field that differs, and both its values.
    """
    names = {name: _OPTIONS.get(name, name) for name in wanted}
    check_same(where, {names[n]: found.get(n) for n in wanted}, {names[n]: value for n, value in wanted.items()})


def check_same(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the fields of ``wanted``.

    Raises:
        DataError: with both values of every field that differs.
    """
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        lines = [f"  {name}: {found.get(name)!r} there, {wanted[name]!r} asked for" for name in different]
        raise DataError(
            "\n".join([f"{where} was made with other settings:", *lines])
            + "\nUse the settings it was made with, or another folder (or remove this one)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the small files of a cache.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove the file and encode again") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds no JSON object; remove the file and encode again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write as a whole or not at all; two processes may write the same file at once."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write a file under; it becomes ``path`` when the block ends, and is removed where that fails."""
    partial = partial_path(path)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        with suppress(OSError):  # what is left on a full disk would keep it full
            partial.unlink()
        raise


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed: a new name at every call.

    Process numbers would not do, which containers and machines that share a folder count each for themselves.
    """
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
