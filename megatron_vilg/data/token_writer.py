"""Write a token cache: part by part, resumable, shared out among any number of jobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vilg.config.schema import DataConfig
from megatron_vilg.data.images import random_views, square, to_tensor
from megatron_vilg.data.records import ReadReport, Record, RecordPart
from megatron_vilg.data.shards import file_sha256
from megatron_vilg.data.source_parts import is_text
from megatron_vilg.data.text import TextTokenizer
from megatron_vilg.data.token_files import (
    FORMAT,
    MANIFEST_FILE,
    CacheSettings,
    check_same_settings,
    read_json,
    whole_file,
    write_json,
)
from megatron_vilg.errors import DataError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

_PICTURES_AT_ONCE = 64
_EARLY_CHECK = 1000


EncodeImages = Callable[[Tensor], Tensor]
"""Pixels float32 [B, 3, S, S] in [-1, 1] to codes int64 [B, N], both on the CPU."""


def write_token_cache(
    out: Path | str,
    records_by_split: Mapping[str, Sequence[RecordPart]],
    text_tokenizer: TextTokenizer,
    encode_images: EncodeImages,
    *,
    image_size: int,
    views: DataConfig,
    image_tokenizer_hash: str,
    codebook_size: int,
    grid_side: int,
    num_text_slots: int,
    seed: int,
    worker: tuple[int, int] = (0, 1),
) -> bool:
    """Encode every part that is not there yet; whoever completes the last one writes the manifest.

    Calling it again goes on where it stopped: complete shards are checked by their sum and kept.

    Args:
        out: cache folder, made if missing.
        records_by_split: from ``find_records``; one shard per part.
        text_tokenizer: for captions and their other wordings.
        encode_images: the frozen image tokenizer.
        image_size: side S of the pixels that ``encode_images`` takes.
        views: ``num_views`` and how views are drawn; ``max_bad_share``.
        image_tokenizer_hash: identity of the image tokenizer, kept in the manifest.
        codebook_size: number of codes; ids must be below it.
        grid_side: codes along one side; ``encode_images`` returns its square.
        num_text_slots: L; longer captions are cut and counted.
        seed: of the views; those of a picture depend on it, the split, the part and the place in it alone.
        worker: (index, count): this call encodes every count-th part from index on, so that many jobs can share
            the work without talking to each other.

    Returns:
        Whether the cache is complete (False while other workers are not done).

    Raises:
        DataError: the folder holds shards with other settings, codes out of range, too many bad records, no pairs.
    """
    settings = CacheSettings(
        image_size=image_size,
        grid_side=grid_side,
        codebook_size=codebook_size,
        num_text_slots=num_text_slots,
        image_tokenizer_sha256=image_tokenizer_hash,
        text_tokenizer_sha256=text_tokenizer.sha256,
        text_vocab_size=text_tokenizer.vocab_size,
        num_views=views.num_views,
        view_shift_pixels=views.view_shift_pixels,
        view_zoom=views.view_zoom,
        view_flip=views.view_flip,
        seed=seed,
    )
    writer = _Writer(Path(out), settings, text_tokenizer, encode_images)
    return writer.encode(records_by_split, worker, views.max_bad_share)


class _Writer:
    """Writes the shards of one cache folder."""

    def __init__(
        self,
        out: Path,
        settings: CacheSettings,
        text_tokenizer: TextTokenizer,
        encode_images: EncodeImages,
    ) -> None:
        self.out, self.settings = out, settings
        self.text_tokenizer, self.encode_images = text_tokenizer, encode_images
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(out.glob("*-*.json")):
            check_same_settings(f"{path}", read_json(path)["settings"], settings.to_json())

    def encode(
        self, records_by_split: Mapping[str, Sequence[RecordPart]], worker: tuple[int, int], max_bad_share: float
    ) -> bool:
        """Write this worker's share of the shards, and the manifest if no other is missing."""
        index, count = worker
        if not 0 <= index < count:
            raise DataError(f"worker = {index}/{count}: the index must be from 0 to {count - 1}")
        jobs = [(split, number, part) for split, parts in records_by_split.items() for number, part in enumerate(parts)]
        report = ReadReport()
        for split, number, part in tqdm(jobs[index::count], desc="encode", unit="shard", disable=None):
            report.add(self.shard(split, number, part))
            if report.read + report.num_skipped >= _EARLY_CHECK:
                report.check("the source", max_bad_share)
        return self.finish(jobs, max_bad_share)

    def shard(self, split: str, number: int, part: RecordPart) -> ReadReport:
        """Write one shard, or keep it if it is complete and made from the same files."""
        stem = f"{split}-{number:05d}"
        done = self._complete(stem, part)
        if done is not None:
            return ReadReport.from_json(done["report"])
        (self.out / MANIFEST_FILE).unlink(missing_ok=True)
        origin = {"source": part.name, "stamp": part.stamp, "fingerprint": part.fingerprint}  # as it is before reading
        report = ReadReport()
        num_views = self.settings.num_views if split == "train" else 0
        columns = _Columns(self.settings.num_text_slots)
        for start, pixels in self._batches(part.read(report), columns):
            generator = torch.Generator().manual_seed(view_seed(self.settings.seed, split, number, start))
            columns.images.append(self._codes(pixels, num_views, generator, part.name))
        arrays = columns.arrays((1 + num_views, self.settings.grid_side**2))
        self._write(stem, origin, arrays, columns, report)
        return report

    def _batches(self, records: Iterator[Record], columns: _Columns) -> Iterator[tuple[int, Tensor]]:
        """Squares [B, 3, S, S] of the pictures with the number of the first; the texts go to ``columns`` on the way.

        Each picture is cut as it is read: as many whole ones as make a batch would take gigabytes.
        """
        start, squares = 0, list[Tensor]()
        for record in records:
            squares.append(to_tensor(square(record.decode(), self.settings.image_size)))
            columns.add_text(record, self.text_tokenizer.encode_batch([record.caption, *record.alternates]))
            if len(squares) == _PICTURES_AT_ONCE:
                yield start, torch.stack(squares)
                start, squares = start + len(squares), []
        if squares:
            yield start, torch.stack(squares)

    def _codes(self, pixels: Tensor, num_views: int, generator: torch.Generator, where: str) -> np.ndarray:
        options = self.settings
        versions = [pixels]
        for _ in range(num_views):
            versions.append(
                random_views(
                    pixels,
                    generator,
                    shift_pixels=options.view_shift_pixels,
                    zoom=options.view_zoom,
                    flip=options.view_flip,
                )
            )
        codes = torch.stack([self.encode_images(version) for version in versions], dim=1)
        wanted = (len(pixels), 1 + num_views, options.grid_side**2)
        if tuple(codes.shape) != wanted or int(codes.min()) < 0 or int(codes.max()) >= options.codebook_size:
            raise DataError(
                f"image tokenizer on {where}: gave codes of shape {tuple(codes.shape)} from {int(codes.min())} to "
                f"{int(codes.max())}; the cache needs shape {wanted}, codes 0 to {options.codebook_size - 1}. "
                "Do image_tokenizer.image_size, its levels and codebook_size belong to this tokenizer?"
            )
        return codes.numpy().astype(np.uint16)

    def _write(
        self, stem: str, origin: dict[str, str], arrays: dict[str, np.ndarray], columns: _Columns, report: ReadReport
    ) -> None:
        with whole_file(self.out / f"{stem}.jsonl") as records, whole_file(self.out / f"{stem}.safetensors") as shard:
            safetensors.numpy.save_file(arrays, shard)
            records.write_text("".join(columns.lines), encoding="utf-8")
            shard.chmod(records.stat().st_mode)  # safetensors makes files that nobody else may read
            checksum = file_sha256(shard)
        note = {
            "settings": self.settings.to_json(),
            **origin,
            "sha256": checksum,
            "pairs": len(columns.lines),
            "captions": len(columns.lengths),
            "longest_caption": columns.longest,
            "cut_captions": columns.cut,
            "report": report.to_json(),
        }
        write_json(self.out / f"{stem}.json", note)

    def _complete(self, stem: str, part: RecordPart) -> dict[str, Any] | None:
        note_path, shard = self.out / f"{stem}.json", self.out / f"{stem}.safetensors"
        if not note_path.is_file() or not shard.is_file() or not (self.out / f"{stem}.jsonl").is_file():
            return None
        note, stamp = read_json(note_path), part.stamp
        if not _is_same_source(note, part, stamp):
            logger.info("%s: its source has changed, encoding it again", stem)
            return None
        if note.get("stamp") != stamp:  # copied, or touched: the contents need not be compared again next time
            write_json(note_path, note | {"stamp": stamp})
        if file_sha256(shard) != note["sha256"]:
            logger.warning("%s: damaged, encoding it again", shard)
            return None
        return note

    def finish(self, jobs: Sequence[tuple[str, int, RecordPart]], max_bad_share: float) -> bool:
        """Write the manifest if every shard is there."""
        report, shards, notes = ReadReport(), dict[str, list[dict[str, Any]]](), []
        paths = [self.out / f"{split}-{number:05d}.json" for split, number, _ in jobs]
        if not all(path.is_file() for path in paths):
            return False
        for path, (split, _, part) in zip(paths, jobs, strict=True):
            note = read_json(path)
            if not _is_same_source(note, part, part.stamp):
                return False
            notes.append(note)
            report.add(ReadReport.from_json(note["report"]))
            entry = {"name": path.stem, "pairs": note["pairs"], "sha256": note["sha256"]}
            shards.setdefault(split, []).append(entry)
        report.check("the source", max_bad_share)
        counts = {split: sum(int(shard["pairs"]) for shard in of_split) for split, of_split in shards.items()}
        if not counts.get("train"):
            raise DataError(f"the source gives no pair to train on (pairs by split: {counts}; {report.summary()})")
        cut = sum(note["cut_captions"] for note in notes)
        manifest = {
            "format": FORMAT,
            "settings": self.settings.to_json(),
            "pairs": counts,
            "captions": sum(note["captions"] for note in notes),
            "cut_captions": cut,
            "longest_caption": max(note["longest_caption"] for note in notes),
            "report": report.to_json(),
            "shards": shards,
        }
        write_json(self.out / MANIFEST_FILE, manifest)
        logger.info("token cache %s: %s", self.out, ", ".join(f"{n} {split}" for split, n in counts.items()))
        if cut:
            logger.warning(
                "%d of %d captions (other wordings included) are longer than model.num_text_slots = %d and were cut; "
                "the longest has %d tokens",
                cut,
                manifest["captions"],
                self.settings.num_text_slots,
                manifest["longest_caption"],
            )
        return True


def _is_same_source(note: Mapping[str, Any], part: RecordPart, stamp: str) -> bool:
    """Whether a shard was made from what the part holds now: untouched files, or equal contents."""
    return bool(note.get("stamp") == stamp or note["fingerprint"] == part.fingerprint)


class _Columns:
    """The growing columns of one shard."""

    def __init__(self, num_text_slots: int) -> None:
        self.num_text_slots = num_text_slots
        self.images: list[np.ndarray] = []
        self.rows: list[list[int]] = []
        self.lengths: list[int] = []
        self.starts = [0]
        self.lines: list[str] = []
        self.cut = 0
        self.longest = 0

    def add_text(self, record: Record, captions: Sequence[Sequence[int]]) -> None:
        """Append the captions of one pair, the canonical one first."""
        for ids in captions:
            kept = list(ids[: self.num_text_slots])
            self.cut += len(ids) > self.num_text_slots
            self.longest = max(self.longest, len(ids))
            self.rows.append(kept + [0] * (self.num_text_slots - len(kept)))
            self.lengths.append(len(kept))
        self.starts.append(len(self.lengths))
        line = {"key": record.key, "caption": record.caption, "fields": record.fields}
        text = json.dumps(line, ensure_ascii=False, sort_keys=True)
        self.lines.append((text if is_text(text) else json.dumps(line, sort_keys=True)) + "\n")

    def arrays(self, image_shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """The columns as the shard holds them."""
        images = np.concatenate(self.images) if self.images else np.empty((0, *image_shape), np.uint16)
        return {
            "image_ids": images,
            "text_ids": np.asarray(self.rows, np.uint16).reshape(-1, self.num_text_slots),
            "text_len": np.asarray(self.lengths, np.uint16),
            "caption_start": np.asarray(self.starts, np.int64),
        }


def view_seed(seed: int, split: str, number: int, start: int) -> int:
    """Seed of the views of the pictures from ``start`` on in a shard: nothing else influences them."""
    words = np.random.SeedSequence([seed % 2**32, *split.encode(), number, start]).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])
