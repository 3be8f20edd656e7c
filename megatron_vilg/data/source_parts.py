"""What a run of files or of lines holds: keys with pictures and captions, unchecked; the same for tars: tar_parts."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_vilg.data.shards import file_sha256

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
NOT_UTF8 = "caption is not UTF-8"
MISSING_PICTURE = "missing picture"
UNREADABLE = "unreadable file"
_MOST_LEVELS = 100
"""Of nested JSON: more than anybody writes by hand, and few enough for every reader and writer behind this one."""
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class Found:
    """One key of a source with whatever was found under it; ``problem`` names what is wrong, if anything."""

    key: str
    image: bytes | None
    caption: str | None
    fields: dict[str, Any]
    problem: str = ""
    further: tuple[str, ...] = ()
    """Files of other pictures under the same name; they are not taken."""


class Part(Protocol):
    """A stretch of a source that is read in one go: one tar, or a run of files or lines."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def stamp(self) -> str:
        """Quick to find: sizes and times of the files behind the part. Equal stamps mean equal contents."""
        ...

    @property
    def fingerprint(self) -> str:
        """From the contents of all files behind the part, so that a copy of them has it too; reads them all."""
        ...

    def read(self, *, with_images: bool) -> Iterator[Found]:
        """What the part holds, always in the same order; ``image`` stays None if it is not asked for."""
        ...


def clean_name(name: str) -> str:
    r"""A file name as text that can be written anywhere: bytes that are not UTF-8 become ``\udcXX``."""
    return name.encode("utf-8", errors="backslashreplace").decode()


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8 and holds no zero characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def decode_text(data: bytes) -> str | None:
    """UTF-8 with or without a byte order mark, or UTF-16 with one; None if it is something else."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text if is_text(text) else None


def suffix_of(path: str) -> str:
    """``a/b.PNG`` -> ``png``."""
    return os.path.splitext(path)[1][1:].lower()


def parse_fields(data: bytes | None) -> tuple[dict[str, Any], str]:
    """The JSON object in ``data`` and what is wrong with it, if anything; nested too deep it is broken too."""
    if data is None:
        return {}, ""
    text = decode_text(data)
    if text is None:
        return {}, "json is not UTF-8"
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {}, "broken json"
    return (fields, "") if isinstance(fields, dict) and not _is_deep(fields) else ({}, "broken json")


def _is_deep(fields: dict[str, Any]) -> bool:
    level: list[Any] = [fields]
    for _ in range(_MOST_LEVELS):
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inside for value in values if isinstance(value, (dict, list))]
        if not level:
            return False
    return True


def list_key(fields: dict[str, Any]) -> tuple[str, str | None]:
    """Key and picture path of a line: ``image`` and ``caption``, or ``file_name`` and ``text``."""
    image = fields.get("image", fields.get("file_name"))
    path = image if isinstance(image, str) and image else None
    return clean_name(str(fields.get("key") or (os.path.splitext(path)[0] if path else ""))), path


@dataclass(frozen=True, slots=True)
class FolderPart:
    """A run of keys of a folder; each with the paths of its files, relative to the folder."""

    root: Path
    index: int
    entries: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def name(self) -> str:
        return f"{clean_name(str(self.root))} (part {self.index})"

    @property
    def stamp(self) -> str:
        return digest(*((path, stamp_of(self.root / path)) for path in self._paths()))

    @property
    def fingerprint(self) -> str:
        return digest(*((path, content_of(self.root / path)) for path in self._paths()))

    def _paths(self) -> Iterator[str]:
        return (path for _, paths in self.entries for path in paths)

    def read(self, *, with_images: bool) -> Iterator[Found]:
        for key, paths in self.entries:
            try:
                files = {suffix_of(path): self._bytes(path, with_images) for path in paths}
            except OSError as error:
                yield Found(key, None, None, {}, f"{UNREADABLE} ({error})")
                continue
            if found := assemble(key, files, further_pictures(paths), with_images=with_images):
                yield found

    def _bytes(self, path: str, with_images: bool) -> bytes:
        skip = suffix_of(path) in IMAGE_SUFFIXES and not with_images
        return b"" if skip else (self.root / path).read_bytes()


@dataclass(frozen=True, slots=True)
class JsonlPart:
    """A run of lines of a ``.jsonl`` file, given by their byte offsets."""

    path: Path
    index: int
    offsets: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{clean_name(str(self.path))} (part {self.index})"

    @property
    def stamp(self) -> str:
        pictures = (stamp_of(picture) for _, picture in self._pictures() if picture is not None)
        return digest(self.path.name, stamp_of(self.path), self.offsets, *pictures)

    @property
    def fingerprint(self) -> str:
        return digest(*((line, picture and content_of(picture)) for line, picture in self._pictures()))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            for offset in self.offsets:
                file.seek(offset)
                yield offset, file.readline().strip()

    def _pictures(self) -> Iterator[tuple[bytes, Path | None]]:
        for _, line in self._lines():
            path = list_key(parse_fields(line)[0])[1]
            yield line, None if path is None else self.path.parent / path

    def read(self, *, with_images: bool) -> Iterator[Found]:
        for offset, line in self._lines():
            yield self._parse(line, offset, with_images)

    def _parse(self, line: bytes, offset: int, with_images: bool) -> Found:
        fields, problem = parse_fields(line)
        where = f"{clean_name(self.path.name)} byte {offset}"
        if problem:
            return Found(where, None, None, {}, problem)
        key, image_path = list_key(fields)
        name = key if 0 < len(key) <= _LONGEST_NAME else where  # not a whole picture that stands in the line
        if image_path is None:
            return Found(name, None, None, {}, MISSING_PICTURE)
        path = self.path.parent / image_path
        try:
            if not path.is_file():
                return Found(name, None, None, {}, MISSING_PICTURE)
            image = path.read_bytes() if with_images else None
        except OSError as error:
            return Found(name, None, None, {}, f"{UNREADABLE} ({error.strerror})")
        caption, garbled = _caption_of(None, fields)
        rest = {k: v for k, v in fields.items() if k not in ("image", "file_name", "caption", "text")}
        return Found(key, image, caption, rest, garbled)


def further_pictures(paths: Sequence[str]) -> tuple[str, ...]:
    """The pictures among the files of one key but for the one that is taken: the last of the first suffix."""
    by_suffix = {suffix_of(path): path for path in paths}
    taken = next((by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix), None)
    return tuple(clean_name(path) for path in paths if suffix_of(path) in IMAGE_SUFFIXES and path != taken)


def assemble(key: str, files: dict[str, bytes], further: tuple[str, ...], *, with_images: bool) -> Found | None:
    """Assemble one key from its files by suffix; None if there is neither picture nor caption."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in files), None)
    if suffix is None and "txt" not in files:
        return None
    fields, broken = parse_fields(files.get("json"))
    caption, garbled = _caption_of(files.get("txt"), fields)
    problem = MISSING_PICTURE if suffix is None else broken or garbled
    image = files[suffix] if suffix is not None and with_images else None
    return Found(key, image, caption, fields, problem, further)


def _caption_of(text: bytes | None, fields: dict[str, Any]) -> tuple[str | None, str]:
    """The caption and what is wrong with it, if anything."""
    caption = fields.get("caption", fields.get("text")) if text is None else decode_text(text)
    if text is not None and caption is None:
        return None, NOT_UTF8
    if not isinstance(caption, str):
        return None, "" if caption is None else "caption is not text"
    return (caption, "") if is_text(caption) else (None, NOT_UTF8)


def digest(*values: object) -> str:
    """A short name for some values that are written alike only if they are equal."""
    total = hashlib.sha256()
    for value in values:
        total.update(repr(value).encode(errors="backslashreplace") + b"\0")
    return total.hexdigest()[:16]


def stamp_of(path: Path) -> tuple[int, ...] | str:
    """Size, and when the contents and the entry of the file changed last, or that it cannot be read."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return UNREADABLE
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def content_of(path: Path) -> str:
    """A digest of a file's bytes, or that they cannot be read."""
    try:
        return file_sha256(path)
    except (OSError, ValueError):
        return UNREADABLE
