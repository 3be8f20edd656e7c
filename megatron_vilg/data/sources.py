"""Where pairs lie on disk: a folder of files, a ``.jsonl`` list, or tar shards; what each holds, unchecked."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_vilg.errors import DataError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SPLITS = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}
_KEPT_SPLITS = ("val", "test", "eval", "heldout")


@dataclass(frozen=True, slots=True)
class Found:
    """One key of a source with whatever was found under it; ``problem`` names what is wrong, if anything."""

    key: str
    image: bytes | None
    caption: str | None
    fields: dict[str, Any]
    problem: str = ""


class Part(Protocol):
    """A stretch of a source that is read in one go: one tar, or a run of files or lines."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the files behind the part change (names and sizes; contents are not read)."""
        ...

    def read(self, *, with_images: bool) -> Iterator[Found]:
        """What the part holds, always in the same order; ``image`` stays None if it is not asked for."""
        ...


def split_from_name(name: str) -> str | None:
    """``train-00001`` -> ``train``, ``val-pairs-00000`` -> ``val-pairs``, ``00003`` -> None.

    Everything that starts with ``train`` is the split ``train`` (``train-scenes-00000`` too).
    """
    stem = re.sub(r"[-_.]?\d+(-of-\d+)?$", "", name.lower())
    head = re.split(r"[-_.]", stem)[0]
    if _SPLITS.get(head) == "train":
        return "train"
    if stem in _SPLITS:
        return _SPLITS[stem]
    return stem if head in _KEPT_SPLITS else None


def hash_split(key: str, val_share: float) -> str:
    """``val`` for about ``val_share`` of all keys, ``train`` for the rest; depends on the key alone."""
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_share else "train"


def _digest(*values: object) -> str:
    return hashlib.sha256("\0".join(str(v) for v in values).encode()).hexdigest()[:16]


def _parse_fields(data: bytes | None) -> tuple[dict[str, Any], str]:
    if data is None:
        return {}, ""
    try:
        fields = json.loads(data)
    except ValueError:
        return {}, "broken json"
    return (fields, "") if isinstance(fields, dict) else ({}, "broken json")


def _caption_of(text: bytes | None, fields: dict[str, Any]) -> str | None:
    if text is not None:
        return text.decode("utf-8", errors="replace").removeprefix("\ufeff")
    caption = fields.get("caption", fields.get("text"))
    return caption if isinstance(caption, str) else None


def _find(key: str, files: dict[str, bytes], *, with_images: bool) -> Found | None:
    """Assemble one key from its files by suffix; None if there is neither picture nor caption."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in files), None)
    if suffix is None and "txt" not in files:
        return None
    fields, problem = _parse_fields(files.get("json"))
    if suffix is None:
        problem = "missing picture"
    image = files[suffix] if suffix is not None and with_images else None
    return Found(key, image, _caption_of(files.get("txt"), fields), fields, problem)


@dataclass(frozen=True, slots=True)
class TarPart:
    """One WebDataset or img2dataset shard: files of one key stand together, named ``KEY.SUFFIX``."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        return _digest(self.path.name, self.path.stat().st_size)

    def read(self, *, with_images: bool) -> Iterator[Found]:
        key: str | None = None
        files: dict[str, bytes] = {}
        try:
            for member_key, suffix, data in self._members(with_images):
                if member_key != key or suffix in files:
                    if key is not None and (found := _find(key, files, with_images=with_images)):
                        yield found
                    key, files = member_key, {}
                files[suffix] = data
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            # The key in hand may lack files that were cut off: it counts as part of the damage.
            yield Found(f"{self.path.name} after {key or 'nothing'}", None, None, {}, f"truncated tar ({error})")
            return
        if key is not None and (found := _find(key, files, with_images=with_images)):
            yield found

    def _members(self, with_images: bool) -> Iterator[tuple[str, str, bytes]]:
        compressed = not self.path.name.endswith(".tar")
        with _open_tar_file(self.path, compressed) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if member.isfile() and stem:
                    wanted = with_images or suffix.lower() not in IMAGE_SUFFIXES
                    stream = tar.extractfile(member) if wanted else None
                    data = stream.read() if stream is not None else b""
                    yield f"{folder}/{stem}" if folder else stem, suffix.lower(), data
                tar.members = []  # type: ignore[attr-defined]  # it would remember every member of a large shard
            # tarfile ends silently on a damaged header, so look for the zero block that closes an archive.
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("no end of archive")


def _open_tar_file(path: Path, compressed: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class FolderPart:
    """A run of keys of a folder; each with the paths of its files, relative to the folder."""

    root: Path
    index: int
    entries: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def name(self) -> str:
        return f"{self.root} (part {self.index})"

    @property
    def fingerprint(self) -> str:
        return _digest(*((path, (self.root / path).stat().st_size) for _, paths in self.entries for path in paths))

    def read(self, *, with_images: bool) -> Iterator[Found]:
        for key, paths in self.entries:
            files = {}
            for path in paths:
                suffix = _suffix(path)
                skip = suffix in IMAGE_SUFFIXES and not with_images
                files[suffix] = b"" if skip else (self.root / path).read_bytes()
            if found := _find(key, files, with_images=with_images):
                yield found


@dataclass(frozen=True, slots=True)
class JsonlPart:
    """A run of lines of a ``.jsonl`` file, given by their byte offsets."""

    path: Path
    index: int
    offsets: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.path} (part {self.index})"

    @property
    def fingerprint(self) -> str:
        return _digest(self.path.name, self.path.stat().st_size, self.offsets)

    def read(self, *, with_images: bool) -> Iterator[Found]:
        with self.path.open("rb") as file:
            for offset in self.offsets:
                file.seek(offset)
                yield self._parse(file.readline(), offset, with_images)

    def _parse(self, line: bytes, offset: int, with_images: bool) -> Found:
        fields, problem = _parse_fields(line)
        where = f"{self.path.name} byte {offset}"
        if problem:
            return Found(where, None, None, {}, problem)
        key, image_path = _jsonl_key(fields)
        if image_path is None:
            return Found(key or where, None, None, {}, "missing picture")
        path = self.path.parent / image_path
        if not path.is_file():
            return Found(key, None, None, {}, "missing picture")
        rest = {k: v for k, v in fields.items() if k not in ("image", "file_name", "caption", "text")}
        return Found(key, path.read_bytes() if with_images else None, _caption_of(None, fields), rest)


def _jsonl_key(fields: dict[str, Any]) -> tuple[str, str | None]:
    """Key and picture path of a line: ``image`` and ``caption``, or ``file_name`` and ``text``."""
    image = fields.get("image", fields.get("file_name"))
    path = image if isinstance(image, str) and image else None
    return str(fields.get("key") or (os.path.splitext(path)[0] if path else "")), path


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def find_parts(path: Path | str, *, val_share: float, part_size: int) -> dict[str, list[tuple[Part, bool]]]:
    """Detect what ``path`` is and cut it into parts by split, in a fixed order.

    Split names come from shard names, first-level folders or the field ``split`` of a line; a source without any
    is split by the hash of its keys. The flag beside a part says that it holds other splits too, by that hash.

    Args:
        path: folder, ``.jsonl`` file, tar, or a glob of tars.
        val_share: share of keys that become ``val`` where a source names no splits.
        part_size: keys per part of folders and lists; a tar is always one part.

    Raises:
        DataError: nothing that can be read was found there.
    """
    text = str(path)
    source = Path(path)
    if glob.has_magic(text) and not source.exists():
        tars = sorted(Path(p) for p in glob.glob(text) if p.endswith(TAR_SUFFIXES))
    elif source.is_dir():
        tars = sorted(p for p in source.rglob("*") if p.name.endswith(TAR_SUFFIXES) and p.is_file())
    else:
        tars = [source] if source.name.endswith(TAR_SUFFIXES) and source.is_file() else []
    if tars:
        return _tar_parts(tars, val_share)
    if source.is_file() and source.suffix == ".jsonl":
        return _jsonl_parts(source, val_share, part_size)
    if source.is_dir():
        lists = sorted(source.glob("*.jsonl"))
        parts = _folder_parts(source, val_share, part_size)
        if parts:
            return parts
        if len(lists) == 1:
            return _jsonl_parts(lists[0], val_share, part_size)
    raise DataError(
        f"data: found no pairs at {text!r}. Give a folder of NAME.png|jpg|jpeg|webp with NAME.txt, a .jsonl file "
        'with lines like {"image": "a.png", "caption": "..."}, or tar shards (a folder, one file, or "DIR/*.tar")'
    )


def _tar_parts(tars: Sequence[Path], val_share: float) -> dict[str, list[tuple[Part, bool]]]:
    names = [split_from_name(tar.name.split(".")[0]) or split_from_name(tar.parent.name) for tar in tars]
    parts: dict[str, list[tuple[Part, bool]]] = {}
    if any(names):
        for tar, name in zip(tars, names, strict=True):
            parts.setdefault(name or "train", []).append((TarPart(tar), False))
        return parts
    splits = ("train", "val") if val_share > 0 else ("train",)
    return {split: [(TarPart(tar), val_share > 0) for tar in tars] for split in splits}


def _folder_parts(root: Path, val_share: float, part_size: int) -> dict[str, list[tuple[Part, bool]]]:
    keys: dict[str, list[str]] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            relative = os.path.relpath(os.path.join(folder, file), root)
            if _suffix(file) in (*IMAGE_SUFFIXES, "txt", "json") and not file.startswith("."):
                keys.setdefault(os.path.splitext(relative)[0].replace(os.sep, "/"), []).append(relative)
    pictured = {k: v for k, v in keys.items() if any(_suffix(p) in (*IMAGE_SUFFIXES, "txt") for p in v)}
    if not any(_suffix(path) in IMAGE_SUFFIXES for paths in pictured.values() for path in paths):
        return {}
    names = {key: split_from_name(key.split("/")[0]) if "/" in key else None for key in pictured}
    named = any(names.values())
    by_split: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for key in sorted(pictured):
        split = (names[key] or "train") if named else hash_split(key, val_share)
        by_split.setdefault(split, []).append((key, tuple(pictured[key])))
    return {
        split: [
            (FolderPart(root, i, tuple(entries[start : start + part_size])), False)
            for i, start in enumerate(range(0, len(entries), part_size))
        ]
        for split, entries in by_split.items()
    }


def _jsonl_parts(path: Path, val_share: float, part_size: int) -> dict[str, list[tuple[Part, bool]]]:
    lines: list[tuple[int, str, str | None]] = []
    with path.open("rb") as file:
        offset = 0
        for line in file:
            if line.strip():
                fields, _ = _parse_fields(line)
                split = fields.get("split")
                lines.append(
                    (offset, _jsonl_key(fields)[0], split_from_name(split) if isinstance(split, str) else None)
                )
            offset += len(line)
    named = any(split for _, _, split in lines)
    by_split: dict[str, list[int]] = {}
    for offset, key, split in lines:
        chosen = (split or "train") if named else hash_split(key, val_share)
        by_split.setdefault(chosen, []).append(offset)
    return {
        split: [
            (JsonlPart(path, i, tuple(offsets[start : start + part_size])), False)
            for i, start in enumerate(range(0, len(offsets), part_size))
        ]
        for split, offsets in by_split.items()
    }
