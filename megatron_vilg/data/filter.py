"""Filter pairs by rules on captions, pictures, copies and similarity; what is left out is listed with the reason."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import platform
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import PIL
from PIL import Image
from tqdm import tqdm

from megatron_vilg import __version__
from megatron_vilg.data.filter_rules import (
    NO_NOUN,
    SPECIAL_CHARACTERS,
    TOO_LONG,
    CaptionRules,
    Segmenter,
    choose_segmenter,
)
from megatron_vilg.data.records import ReadReport, Record, RecordPart, find_records
from megatron_vilg.data.shards import ShardWriter
from megatron_vilg.data.similarity import ScoreFile, Scorer, call_scorer
from megatron_vilg.data.source_parts import clean_name
from megatron_vilg.data.split_names import split_from_name
from megatron_vilg.data.token_files import partial_path, write_json
from megatron_vilg.errors import ConfigError, DataError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

TOO_SMALL, DUPLICATE, NO_SCORE, LOW_SIMILARITY = "too_small", "duplicate", "no_score", "low_similarity"
RULES = (TOO_LONG, NO_NOUN, SPECIAL_CHARACTERS, TOO_SMALL, DUPLICATE, NO_SCORE, LOW_SIMILARITY)
"""The order in which a pair meets them; it gets the first reason that applies. What cannot be read comes before."""

_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
_PIXELS_AT_ONCE = 1 << 26
"""Pixels of pictures that a scorer gets at a time: whole photographs in 64s would take gigabytes."""
_NO_SPLIT = "pairs"
"""Name of shards that say no split, so that a later command divides them by their keys, as it would the source."""


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """What to leave out."""

    max_words: int = 15
    """Captions of so many words and more; 0: no limit."""
    require_noun: str = "auto"
    """``yes``, ``no``, or ``auto``: where nouns can be told."""
    special_characters: str = "reject"
    """``reject`` or ``keep``."""
    min_side: int = 0
    """Pictures whose shorter side has fewer pixels."""
    duplicates: str = "pairs"
    """``pairs``: the same picture with the same caption; ``pictures``: whatever the caption; ``keep``: not compared."""
    min_similarity: float = 0.5
    """Pairs are kept whose similarity is above it."""
    score_batch: int = 64
    """Most pairs that a scorer gets at a time; fewer where pictures are large."""

    def __post_init__(self) -> None:
        choices = {
            "require_noun": ("auto", "yes", "no"),
            "special_characters": ("reject", "keep"),
            "duplicates": ("pairs", "pictures", "keep"),
        }
        least = {"max_words": 0, "min_side": 0, "score_batch": 1}
        problems = [
            f"--{name.replace('_', '-')}={getattr(self, name)}: works {', '.join(works)}"
            for name, works in choices.items()
            if getattr(self, name) not in works
        ]
        problems += [
            f"--{name.replace('_', '-')}={getattr(self, name)}: works {low} or more"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if self.min_similarity != self.min_similarity:
            problems.append("--min-similarity=nan: works a number, such as 0.5")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class Similarity:
    """Where similarities come from: a file, or a function with the name that the user gave; neither: not checked."""

    file: ScoreFile | None = None
    scorer: Scorer | None = None
    name: str = ""
    """Of the file or the function."""


def filter_pairs(
    source: Path | str, out: Path, options: FilterOptions, similarity: Similarity | None = None
) -> dict[str, Any]:
    """Write the pairs of a source that no rule rejects as shards, with ``report.json`` and ``rejects.jsonl``.

    Splits, keys, the order of pairs, and their picture files stay. Memory grows by one digest for each pair (about 100
    bytes with the set that holds it), and not at all where duplicates are kept.

    Args:
        source: whatever ``read_records`` reads.
        out: new or empty folder; it appears, or is filled, when everything is complete.
        options: the rules.
        similarity: None: not checked.

    Returns:
        The content of ``report.json``.

    Raises:
        ConfigError: ``out`` lies inside the source.
        DataError: no usable pair; a scorer or a file of scores that does not fit; a full disk.
        MissingPackageError: nouns are demanded and no package can tell them.
    """
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError([f"--output={out}: lies inside --input={source}; name a place outside of it"])
    parts = find_records(source)
    segmenter = choose_segmenter(options.require_noun)
    similarity = similarity or Similarity()
    with _folder_aside(out) as folder, ExitStack() as stack:
        rejects = stack.enter_context((folder / "rejects.jsonl").open("w", encoding="utf-8"))
        prefixes = _shard_prefixes(source, parts)
        writers = {split: stack.enter_context(_writer(folder, split, prefixes[split])) for split in parts}
        work = _Work(options, segmenter, similarity, rejects, writers)
        with tqdm(desc="filter", unit=" pairs", disable=None) as bar:
            work.read(parts, bar.update)
        work.check(source)
        stack.close()  # the last shards get their names
        report = work.report(source)
        write_json(folder / "report.json", report)
    return report


class _Bad(ReadReport):
    """Tells of each bad record at once."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__()
        self._tell = tell

    def skip(self, reason: str, name: str) -> None:
        """Count one, and tell."""
        super().skip(reason, name)
        self._tell(re.sub(r"\W+", "_", reason).lower(), name)


class _Work:
    """One pass over a source."""

    def __init__(
        self,
        options: FilterOptions,
        segmenter: Segmenter,
        similarity: Similarity,
        rejects: TextIO,
        writers: dict[str, ShardWriter],
    ) -> None:
        noun = options.require_noun != "no" and segmenter.knows_nouns
        self.rules = CaptionRules(segmenter, options.max_words, noun, options.special_characters == "reject")
        self.options, self.similarity = options, similarity
        self._rejects_file, self._writers = rejects, writers
        self.kept: Counter[str] = Counter()
        self.rejected: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.alternates_dropped = 0
        self._split = ""
        self._bad = _Bad(lambda reason, name: self._reject(reason, self._split, name))
        self._seen: set[bytes] = set()
        self._waiting: list[tuple[str, Record]] = []
        self._waiting_pixels = 0
        self._scored = 0
        self._unscored = ""

    def read(self, parts: dict[str, list[RecordPart]], progress: Callable[[], object]) -> None:
        """Judge every pair and write it where it belongs."""
        for split, of_split in parts.items():
            self._split = split
            for part in of_split:
                for record in part.read(self._bad):
                    self._judge(split, record)
                    progress()
        self._score_waiting()

    def _judge(self, split: str, record: Record) -> None:
        reason = self.rules.reason(record.caption) or self._picture_reason(record)
        if reason:
            self._reject(reason, split, record.key, record.caption)
        elif self.similarity.scorer is not None:
            self._wait(split, record)
        elif self.similarity.file is not None:
            self._compare(split, record, self.similarity.file.get(split, record.key))
        else:
            self._keep(split, record)

    def _picture_reason(self, record: Record) -> str:
        picture = record.decode()
        if min(picture.size) < self.options.min_side:
            return TOO_SMALL
        if self.options.duplicates == "keep":
            return ""
        # Of the pixels, so that the same picture in another file is recognised.
        digest = hashlib.sha256(repr(picture.size).encode() + b"\0")
        digest.update(picture.tobytes())
        if self.options.duplicates == "pairs":
            digest.update(record.caption.encode())
        name = digest.digest()[:16]
        if name in self._seen:
            return DUPLICATE
        self._seen.add(name)
        return ""

    def _wait(self, split: str, record: Record) -> None:
        width, height = record.decode().size
        if self._waiting_pixels + width * height > _PIXELS_AT_ONCE:
            self._score_waiting()
        self._waiting.append((split, record))
        self._waiting_pixels += width * height
        if len(self._waiting) == self.options.score_batch:
            self._score_waiting()

    def _score_waiting(self) -> None:
        scorer, waiting = self.similarity.scorer, self._waiting
        if scorer is None or not waiting:
            return
        scores = call_scorer(scorer, self.similarity.name, [(r.decode(), r.caption) for _, r in waiting])
        for (split, record), score in zip(waiting, scores, strict=True):
            self._compare(split, record, score)
        self._waiting, self._waiting_pixels = [], 0

    def _compare(self, split: str, record: Record, score: float | None) -> None:
        self._scored += score is not None
        if score is None:
            self._unscored = record.key
            self._reject(NO_SCORE, split, record.key, record.caption)
        elif score > self.options.min_similarity:
            self._keep(split, record)
        else:
            self._reject(LOW_SIMILARITY, split, record.key, record.caption, score)

    def _keep(self, split: str, record: Record) -> None:
        fields = record.fields
        wordings = record.alternates
        good = [text for text in wordings if not self.rules.reason(text)]
        if len(good) < len(wordings):  # training takes them for the caption, so the same rules hold
            self.alternates_dropped += len(wordings) - len(good)
            fields = fields | {"alternates": good}
        key = record.key
        if not _is_member_name(key):
            key, fields = f"pair-{self.kept[split]:08d}", fields | {"key": record.key}
        image, suffix = _picture_file(record)
        self._writers[split].add(key, image, record.caption, fields, suffix=suffix)
        self.kept[split] += 1

    def _reject(
        self, reason: str, split: str, key: str, caption: str | None = None, score: float | None = None
    ) -> None:
        self.rejected[split][reason] += 1
        line: dict[str, Any] = {"key": key, "split": split, "reason": reason, "caption": caption}
        if score is not None:
            line["score"] = score
        self._rejects_file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def check(self, source: Path | str) -> None:
        """See that there was something to judge.

        Raises:
            DataError: no readable pair, or no score for any of them.
        """
        if self._bad.read == 0:
            raise DataError(f"data: no usable pair at {str(source)!r} ({self._bad.summary() or 'nothing in it'})")
        scores = self.similarity.file
        missing = sum(counts[NO_SCORE] for counts in self.rejected.values())
        if scores is not None and missing and not self._scored:
            raise DataError(
                f"--scores={scores.path}: has none of {missing} pairs; it names pairs like {scores.example()!r} "
                f"and the source like {self._unscored!r}. Works: the keys of the pairs as id"
            )

    def report(self, source: Path | str) -> dict[str, Any]:
        """The content of ``report.json``."""
        rejected = sum(self.rejected.values(), Counter())
        unchecked = self._unchecked()
        return {
            "kept": self.kept.total(),
            "read": self._bad.read + self._bad.num_skipped,
            "rejected": _in_order(rejected),
            "not_checked": unchecked,
            "splits": {
                split: {"kept": self.kept[split], "rejected": _in_order(self.rejected[split], with_zeros=False)}
                for split in self._writers
            },
            "alternates_dropped": self.alternates_dropped,
            "input": clean_name(str(source)),
            "options": dataclasses.asdict(self.options) | {"similarity": clean_name(self.similarity.name) or None},
            "words": self.rules.segmenter.name,
            "versions": {
                "megatron_vilg": __version__,
                "python": platform.python_version(),
                "pillow": PIL.__version__,
                "unicode": unicodedata.unidata_version,
            },
        }

    def _unchecked(self) -> list[str]:
        has_scores = self.similarity.file is not None or self.similarity.scorer is not None
        is_checked = {
            TOO_LONG: self.options.max_words > 0,
            NO_NOUN: self.rules.require_noun,
            SPECIAL_CHARACTERS: self.rules.reject_special,
            TOO_SMALL: self.options.min_side > 0,
            DUPLICATE: self.options.duplicates != "keep",
            NO_SCORE: has_scores,
            LOW_SIMILARITY: has_scores,
        }
        return [rule for rule in RULES if not is_checked[rule]]


def _in_order(counts: Counter[str], *, with_zeros: bool = True) -> dict[str, int]:
    """Unreadable ones by name, then the rules in their order."""
    bad = {reason: counts[reason] for reason in sorted(counts.keys() - set(RULES))}
    return bad | {rule: counts[rule] for rule in RULES if counts[rule] or with_zeros}


def _shard_prefixes(source: Path | str, parts: dict[str, list[RecordPart]]) -> dict[str, str]:
    """How the shards of each split are called."""
    # Pairs of a source that names no splits would be val with this share.
    if set(parts) == {"train"} and set(find_records(source, val_share=1.0)) != {"train"}:
        return {"train": _NO_SPLIT}
    return {split: split for split in parts}


def _writer(folder: Path, split: str, prefix: str) -> ShardWriter:
    if prefix == _NO_SPLIT or split_from_name(f"{prefix}-00000".partition(".")[0]) == split:
        return ShardWriter(folder, prefix)
    # A split with a dot in its name: those of tars end there, those of folders do not.
    return ShardWriter(folder / split, _NO_SPLIT)


def _is_member_name(key: str) -> bool:
    """Whether the reader finds a member of a tar again by this key."""
    base = key.rpartition("/")[2]
    return bool(base) and not base.startswith(".") and "\0" not in key


def _picture_file(record: Record) -> tuple[bytes, str]:
    """The file as it was found and its suffix; a PNG of it if it is of a kind that has none in a shard."""
    with Image.open(io.BytesIO(record.image)) as opened:
        suffix = _SUFFIXES.get(opened.format or "")
    if suffix is not None:
        return record.image, suffix
    file = io.BytesIO()
    record.decode().save(file, "PNG")
    return file.getvalue(), "png"


@contextmanager
def _folder_aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it when the block ends without an error, and else is removed.

    Raises:
        DataError: the disk is full, or ``out`` was filled meanwhile.
    """
    final = out.resolve()
    partial = partial_path(final)
    try:
        partial.mkdir(parents=True)
        yield partial
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise DataError(
            f"--output={out}: cannot be written ({error.strerror}); nothing was left there. Works: a new folder, "
            "where there is room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
