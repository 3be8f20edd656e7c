"""What one tar, a run of files or a run of lines holds: keys with pictures and captions, unchecked."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_vilg.data.shards import file_sha256

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
NOT_UTF8 = "caption is not UTF-8"
_MISSING_PICTURE = "missing picture"
_UNREADABLE = "unreadable file"


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
    """The JSON object in ``data`` and what is wrong with it, if anything."""
    if data is None:
        return {}, ""
    text = decode_text(data)
    if text is None:
        return {}, "json is not UTF-8"
    try:
        fields = json.loads(text)
    except ValueError:
        return {}, "broken json"
    return (fields, "") if isinstance(fields, dict) else ({}, "broken json")


def list_key(fields: dict[str, Any]) -> tuple[str, str | None]:
    """Key and picture path of a line: ``image`` and ``caption``, or ``file_name`` and ``text``."""
    image = fields.get("image", fields.get("file_name"))
    path = image if isinstance(image, str) and image else None
    return clean_name(str(fields.get("key") or (os.path.splitext(path)[0] if path else ""))), path


@dataclass(frozen=True, slots=True)
class TarPart:
    """One WebDataset or img2dataset shard: files of one key stand together, named ``KEY.SUFFIX``.

    A key ends at the first dot, and longer names that begin alike are further members of its sample. Where they are
    pairs themselves, or there is no such sample, they are keys of their own, as in a folder: ``apple.v1.png`` with
    ``apple.v1.txt`` is ``apple.v1``.
    """

    path: Path

    @property
    def name(self) -> str:
        return clean_name(str(self.path))

    @property
    def stamp(self) -> str:
        return _digest(self.path.name, _stamp(self.path))

    @property
    def fingerprint(self) -> str:
        return _digest(self.path.name, _content(self.path))

    def read(self, *, with_images: bool) -> Iterator[Found]:
        sample = _Sample("", with_images)
        try:
            for key, stem, suffix, data in self._members(with_images):
                if key != sample.key or sample.has(stem, suffix):
                    yield from sample.finish()
                    sample = _Sample(key, with_images)
                yield from sample.add(stem, suffix, data)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            # The key in hand may lack files that were cut off: it counts as part of the damage.
            where = f"{clean_name(self.path.name)} after {clean_name(sample.key) or 'nothing'}"
            lost = isinstance(error, (FileNotFoundError, PermissionError))
            yield Found(where, None, None, {}, f"{_UNREADABLE if lost else 'truncated tar'} ({error})")
            return
        yield from sample.finish()

    def _members(self, with_images: bool) -> Iterator[tuple[str, str, str, bytes]]:
        """Key, name without its last suffix, that suffix and the contents of each file."""
        compressed = not self.path.name.endswith(".tar")
        with _open_tar_file(self.path, compressed) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                where = f"{folder}/" if folder else ""
                key = base.partition(".")[0]
                if member.isfile() and key:
                    stem, _, suffix = base.rpartition(".") if "." in base else (base, "", "")
                    wanted = with_images or suffix.lower() not in IMAGE_SUFFIXES
                    stream = tar.extractfile(member) if wanted else None
                    data = stream.read() if stream is not None else b""
                    yield where + key, where + stem, suffix.lower(), data
                tar.members = []  # type: ignore[attr-defined]  # it would remember every member of a large shard
            # tarfile ends silently on a damaged header, so look for the zero block that closes an archive.
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("no end of archive")


class _Sample:
    """The files of one key of a tar so far, by their names without the last suffix."""

    def __init__(self, key: str, with_images: bool) -> None:
        self.key, self._with_images = key, with_images
        self._files: dict[str, dict[str, bytes]] = {}
        self._last = key

    def has(self, stem: str, suffix: str) -> bool:
        return suffix in self._files.get(stem, {})

    def add(self, stem: str, suffix: str, data: bytes) -> Iterator[Found]:
        """Take over one file; what was complete before it and has a longer name is given back at once."""
        if stem != self._last and self._last != self.key and self._last in self._files:
            found = self._find(self._last)
            if found is not None and _is_pair(found):
                del self._files[self._last]
                yield found
        self._files.setdefault(stem, {})[suffix] = data
        self._last = stem

    def finish(self) -> Iterator[Found]:
        own = self._find(self.key)
        if own is not None:
            yield own
        for stem in self._files:
            found = self._find(stem) if stem != self.key else None
            if found is not None and (own is None or _is_pair(found)):
                yield found

    def _find(self, stem: str) -> Found | None:
        files = self._files.get(stem, {})
        further = _further([f"{stem}.{suffix}" for suffix in files])
        return _find(clean_name(stem), files, further, with_images=self._with_images)


def _is_pair(found: Found) -> bool:
    """Whether a picture was found, and something that was to be its caption."""
    return found.problem != _MISSING_PICTURE and (found.caption is not None or bool(found.problem))


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
        return f"{clean_name(str(self.root))} (part {self.index})"

    @property
    def stamp(self) -> str:
        return _digest(*((path, _stamp(self.root / path)) for path in self._paths()))

    @property
    def fingerprint(self) -> str:
        return _digest(*((path, _content(self.root / path)) for path in self._paths()))

    def _paths(self) -> Iterator[str]:
        return (path for _, paths in self.entries for path in paths)

    def read(self, *, with_images: bool) -> Iterator[Found]:
        for key, paths in self.entries:
            try:
                files = {suffix_of(path): self._bytes(path, with_images) for path in paths}
            except OSError as error:
                yield Found(key, None, None, {}, f"{_UNREADABLE} ({error})")
                continue
            if found := _find(key, files, _further(paths), with_images=with_images):
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
        pictures = (_stamp(picture) for _, picture in self._pictures() if picture is not None)
        return _digest(self.path.name, _stamp(self.path), self.offsets, *pictures)

    @property
    def fingerprint(self) -> str:
        return _digest(*((line, picture and _content(picture)) for line, picture in self._pictures()))

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
        if image_path is None:
            return Found(key or where, None, None, {}, _MISSING_PICTURE)
        path = self.path.parent / image_path
        if not path.is_file():
            return Found(key, None, None, {}, _MISSING_PICTURE)
        try:
            image = path.read_bytes() if with_images else None
        except OSError as error:
            return Found(key, None, None, {}, f"{_UNREADABLE} ({error})")
        caption, garbled = _caption_of(None, fields)
        rest = {k: v for k, v in fields.items() if k not in ("image", "file_name", "caption", "text")}
        return Found(key, image, caption, rest, garbled)


def _further(paths: Sequence[str]) -> tuple[str, ...]:
    """The pictures among the files of one key but for the one that is taken: the last of the first suffix."""
    by_suffix = {suffix_of(path): path for path in paths}
    taken = next((by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix), None)
    return tuple(clean_name(path) for path in paths if suffix_of(path) in IMAGE_SUFFIXES and path != taken)


def _find(key: str, files: dict[str, bytes], further: tuple[str, ...], *, with_images: bool) -> Found | None:
    """Assemble one key from its files by suffix; None if there is neither picture nor caption."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in files), None)
    if suffix is None and "txt" not in files:
        return None
    fields, broken = parse_fields(files.get("json"))
    caption, garbled = _caption_of(files.get("txt"), fields)
    problem = _MISSING_PICTURE if suffix is None else broken or garbled
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


def _digest(*values: object) -> str:
    total = hashlib.sha256()
    for value in values:
        total.update(repr(value).encode(errors="backslashreplace") + b"\0")
    return total.hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, ...] | str:
    """Size, and when the contents and the entry of the file changed last."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return _UNREADABLE
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _content(path: Path) -> str:
    try:
        return file_sha256(path)
    except (OSError, ValueError):
        return _UNREADABLE
