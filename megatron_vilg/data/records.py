"""The one reader of image-text pairs: any source in, checked records out, bad ones counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vilg.data.images import decode_image
from megatron_vilg.data.source_parts import Found, Part, is_text
from megatron_vilg.data.sources import find_parts
from megatron_vilg.data.split_names import hash_split
from megatron_vilg.errors import DataError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

SEVERAL_PICTURES = "several pictures under one name"
_NAMES_KEPT = 10
_LOGGED_PER_REASON = 3
_FORGIVEN = 8
_EARLY_CHECK = 1000


@dataclass(slots=True)
class Record:
    """One pair."""

    key: str
    """Name within its source."""
    image: bytes
    """The picture file as it was found; empty where pictures were not asked for."""
    caption: str
    """The canonical caption, white space tidied."""
    fields: dict[str, Any]
    """Whatever else the source says; ``alternates`` holds other wordings of the caption."""
    _decoded: Image.Image | None = field(default=None, repr=False, compare=False)

    def decode(self) -> Image.Image:
        """The picture in RGB, decoded once.

        Raises:
            DataError: the file is no readable picture.
        """
        if self._decoded is None:
            self._decoded = decode_image(self.image)
        return self._decoded

    @property
    def alternates(self) -> list[str]:
        """Other wordings: distinct, not empty, not the canonical caption."""
        given = self.fields.get("alternates")
        texts = [tidy_caption(text) for text in given if isinstance(text, str)] if isinstance(given, list) else []
        return [text for text in dict.fromkeys(texts) if text and text != self.caption and is_text(text)]


@dataclass(slots=True)
class ReadReport:
    """How many pairs were read, and which were left out for what reason."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    """First names by reason."""

    @property
    def num_skipped(self) -> int:
        """Bad records of all reasons; a further picture under the name of a record makes none."""
        return self.skipped.total() - self.skipped[SEVERAL_PICTURES]

    def skip(self, reason: str, name: str) -> None:
        """Count one bad record, or a further picture; the first of each reason are logged by name."""
        self.skipped[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(name)
        if self.skipped[reason] <= _LOGGED_PER_REASON:
            logger.warning("skipped %s: %s", name, reason)

    def add(self, other: ReadReport) -> None:
        """Take over the counts and names of another part."""
        self.read += other.read
        self.skipped.update(other.skipped)
        for reason, names in other.names.items():
            mine = self.names.setdefault(reason, [])
            mine.extend(names[: _NAMES_KEPT - len(mine)])

    def check(self, where: str, max_bad_share: float) -> None:
        """Raise if too many records are bad.

        A few are always forgiven (a quarter of the set, at most eight), so that one bad file does not stop a tiny
        set; ``max_bad_share = 0`` forgives none.

        Raises:
            DataError: the share is above the limit.
        """
        total = self.read + self.num_skipped
        limit = max(max_bad_share * total, min(_FORGIVEN, total // 4)) if max_bad_share > 0 else 0
        if self.num_skipped > limit:
            more = min(1.0, self.num_skipped / total + 0.01)
            works = f"or remove them, or allow more, for example data.max_bad_share={more:.2f}"
            raise DataError(
                f"data.max_bad_share = {max_bad_share:g}: {self.num_skipped} of {total} records of {where} are bad "
                f"({self.summary(bad_only=True)}). Repair {works if self.read else 'them: none is good'}"
            )

    def summary(self, *, bad_only: bool = False) -> str:
        """Counts by reason, with the first names; ``bad_only`` leaves out further pictures."""
        return "; ".join(
            f"{count} {reason}: {', '.join(self.names[reason][:_LOGGED_PER_REASON])}"
            for reason, count in sorted(self.skipped.items())
            if not (bad_only and reason == SEVERAL_PICTURES)
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {"read": self.read, "skipped": dict(sorted(self.skipped.items())), "names": self.names}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ReadReport:
        """The inverse of ``to_json``."""
        return cls(values["read"], Counter(values["skipped"]), {k: list(v) for k, v in values["names"].items()})


@dataclass(frozen=True, slots=True)
class RecordPart:
    """A stretch of one split that is read in one go; the unit that encoding jobs share out."""

    part: Part
    split: str
    val_share: float
    mixed: bool
    """Whether the part also holds other splits, told apart by the hash of the key."""

    @property
    def name(self) -> str:
        """For messages."""
        return self.part.name

    @property
    def stamp(self) -> str:
        """Quick to find; where it is what it was, the files behind the part are too (``Part.stamp``)."""
        return self._mine(self.part.stamp)

    @property
    def fingerprint(self) -> str:
        """From the contents of the files behind the part; reads them all."""
        return self._mine(self.part.fingerprint)

    def _mine(self, text: str) -> str:
        return f"{self.split}:{self.val_share if self.mixed else 0:g}:{text}"

    def read(self, report: ReadReport, *, with_images: bool = True) -> Iterator[Record]:
        """The good records, in a fixed order; bad ones go to ``report``.

        Args:
            report: counts and names are added to it.
            with_images: False leaves ``Record.image`` empty and unchecked, which is quick where only captions matter.
        """
        for found in self.part.read(with_images=with_images):
            if self.mixed and not found.problem and hash_split(found.key, self.val_share) != self.split:
                continue
            if self.mixed and found.problem and self.split != "train":
                continue  # a damaged shard is read once per split but counted once
            for name in found.further:
                report.skip(SEVERAL_PICTURES, name)
            record = _check(found, report, with_images=with_images)
            if record is not None:
                yield record


def _check(found: Found, report: ReadReport, *, with_images: bool) -> Record | None:
    reason = found.problem
    caption = tidy_caption(found.caption or "")
    if not reason and found.caption is None:
        reason = "missing caption"
    elif not reason and not caption:
        reason = "empty caption"
    if reason:
        report.skip(reason.split(" (")[0], found.key)
        return None
    record = Record(found.key, found.image or b"", caption, found.fields)
    if with_images:
        try:
            record.decode()
        except DataError as error:
            logger.debug("%s: %s", found.key, error)
            report.skip("unreadable picture", found.key)
            return None
    report.read += 1
    return record


def tidy_caption(text: str) -> str:
    """Runs of white space, line ends included, become one space; none is left at the ends."""
    return " ".join(text.split())


def find_records(path: Path | str, *, val_share: float = 0.0, part_size: int = 2048) -> dict[str, list[RecordPart]]:
    """The parts of a source by split, ``train`` first; see ``sources.find_parts`` for what is recognised.

    Raises:
        DataError: nothing readable at ``path``.
    """
    parts = find_parts(path, val_share=val_share, part_size=part_size)
    return {
        split: [RecordPart(part, split, val_share, mixed) for part, mixed in parts[split]]
        for split in sorted(parts, key=lambda name: (name != "train", name))
    }


def read_records(
    path: Path | str,
    split: str | None = None,
    *,
    report: ReadReport | None = None,
    max_bad_share: float = 0.01,
    val_share: float = 0.0,
    with_images: bool = True,
) -> Iterator[Record]:
    """Read a folder, a ``.jsonl`` file or tar shards, always in the same order.

    Args:
        path: folder of ``NAME.png|jpg|jpeg|webp`` + ``NAME.txt`` (+ ``NAME.json``); ``.jsonl`` file with lines
            ``{"image": PATH, "caption": TEXT, ...}``; folder, file or glob of WebDataset or img2dataset tars.
        split: only this one; None reads all, ``train`` first.
        report: filled while reading.
        max_bad_share: share of bad records above which reading stops (``ReadReport.check``).
        val_share: share of keys that form ``val`` where the source names no splits.
        with_images: False reads captions and fields only.

    Raises:
        DataError: nothing found, no such split, too many bad records, or no good one.
    """
    parts = find_records(path, val_share=val_share)
    if split is not None:
        parts = {split: require_split(parts, split, path)}
    for _, record in read_parts(parts, path, report=report, max_bad_share=max_bad_share, with_images=with_images):
        yield record


def require_split(parts: Mapping[str, list[RecordPart]], split: str, path: Path | str) -> list[RecordPart]:
    """The parts of one split of the source ``path``.

    Raises:
        DataError: no such split.
    """
    if split not in parts:
        raise DataError(f"data: {str(path)!r} has no split {split!r}; it has {', '.join(parts)}")
    return parts[split]


def read_parts(
    parts: Mapping[str, Sequence[RecordPart]],
    path: Path | str,
    *,
    report: ReadReport | None = None,
    max_bad_share: float = 0.01,
    with_images: bool = True,
) -> Iterator[tuple[str, Record]]:
    """Read several splits one after the other: each record with the name of its split.

    Bad records are judged over all splits together, so that one in a small split does not count for more. A split
    that turns out to be empty gives nothing.

    Args:
        parts: from ``find_records``.
        path: the source, for messages.
        report: filled while reading.
        max_bad_share: share of bad records above which reading stops (``ReadReport.check``).
        with_images: False reads captions and fields only.

    Raises:
        DataError: too many bad records, or no good one.
    """
    report = ReadReport() if report is None else report
    for name, of_split in parts.items():
        for part in of_split:
            for record in part.read(report, with_images=with_images):
                if report.num_skipped and report.read % _EARLY_CHECK == 0:
                    report.check(str(path), max_bad_share)
                yield name, record
    report.check(str(path), max_bad_share)
    if report.read == 0:
        reasons = report.summary() or "nothing in it"
        raise DataError(f"data: no usable pair at {str(path)!r} ({reasons})")
    if total := report.skipped.total():
        logger.warning("%s: read %d pairs, skipped %d (%s)", path, report.read, total, report.summary())
