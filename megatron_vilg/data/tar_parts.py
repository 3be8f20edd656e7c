"""What one tar holds: keys with pictures and captions, unchecked; damage is named where it begins."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_vilg.data.source_parts import (
    IMAGE_SUFFIXES,
    MISSING_PICTURE,
    UNREADABLE,
    Found,
    assemble,
    clean_name,
    content_of,
    digest,
    further_pictures,
    stamp_of,
)

TRUNCATED = "truncated tar"
BEHIND_END = "data behind the end of a tar"
APART = "file apart from its pair"
_BLOCK = 512
_AT_ONCE = 1 << 20


class _FurtherDataError(tarfile.TarError):
    """There is more behind the blocks that close an archive."""


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
        """For messages."""
        return clean_name(str(self.path))

    @property
    def stamp(self) -> str:
        """See ``Part``."""
        return digest(self.path.name, stamp_of(self.path))

    @property
    def fingerprint(self) -> str:
        """See ``Part``."""
        return digest(self.path.name, content_of(self.path))

    def read(self, *, with_images: bool) -> Iterator[Found]:
        """See ``Part``; damage, and whatever stands behind the end of the archive, is one more key with a problem."""
        sample = _Sample("", with_images)
        try:
            for key, stem, suffix, data in self._members(with_images):
                if key != sample.key or sample.has(stem, suffix):
                    yield from sample.finish()
                    sample = _Sample(key, with_images)
                yield from sample.add(stem, suffix, data)
        except _FurtherDataError as error:
            yield from sample.finish()
            yield Found(f"{clean_name(self.path.name)} {error}", None, None, {}, BEHIND_END)
            return
        except (tarfile.TarError, OSError) as error:
            # The key in hand may lack files that were cut off: it counts as part of the damage.
            where = f"{clean_name(self.path.name)} after {clean_name(sample.key) or 'nothing'}"
            lost = isinstance(error, (FileNotFoundError, PermissionError))
            yield Found(where, None, None, {}, f"{UNREADABLE if lost else TRUNCATED} ({error})")
            return
        yield from sample.finish()

    def _members(self, with_images: bool) -> Iterator[tuple[str, str, str, bytes]]:
        """Key, name without its last suffix, that suffix and the contents of each file.

        Raises:
            OSError: the file cannot be read, or its compression is damaged.
            tarfile.TarError: it is damaged, or goes on behind the end of the archive.
        """
        compressed = not self.path.name.endswith(".tar")
        try:
            with _open_tar_file(self.path, compressed) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    folder, slash, base = member.name.rpartition("/")
                    key = base.partition(".")[0]
                    if member.isfile() and key:
                        stem, _, suffix = base.rpartition(".") if "." in base else (base, "", "")
                        wanted = with_images or suffix.lower() not in IMAGE_SUFFIXES
                        stream = tar.extractfile(member) if wanted else None
                        data = stream.read() if stream is not None else b""
                        yield folder + slash + key, folder + slash + stem, suffix.lower(), data
                    if tar.offset <= member.offset:
                        raise tarfile.ReadError("a size below zero")  # it would come to the same member for ever
                    tar.members = []  # type: ignore[attr-defined]  # it would remember every member of a large shard
                _check_end(file, tar.offset)
        except (tarfile.TarError, OSError, MemoryError):
            raise
        except Exception as error:  # on damaged bytes tarfile and zlib also raise zlib.error, OverflowError, ValueError
            raise tarfile.ReadError(str(error) or type(error).__name__) from error


def _check_end(file: IO[bytes], offset: int) -> None:
    """tarfile ends silently on a damaged header, and at the first of several archives that were strung together.

    Raises:
        tarfile.ReadError: no zero block, which closes an archive, stands at ``offset``.
        _FurtherDataError: something other than zeros follows it.
    """
    file.seek(offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise tarfile.ReadError("no end of archive")
    offset += _BLOCK
    while data := file.read(_AT_ONCE):
        if data.count(0) != len(data):
            place = offset + len(data) - len(data.lstrip(b"\0"))
            raise _FurtherDataError(
                f"from byte {place} on (another tar? Of tars strung together only the first is read)"
            )
        offset += len(data)


class _Sample:
    """The files of one key of a tar so far, by their names without the last suffix."""

    def __init__(self, key: str, with_images: bool) -> None:
        self.key, self._with_images = key, with_images
        self._files: dict[str, dict[str, bytes]] = {}
        self._given: set[str] = set()
        self._last = key

    def has(self, stem: str, suffix: str) -> bool:
        """Whether such a file waits here."""
        return suffix in self._files.get(stem, {})

    def add(self, stem: str, suffix: str, data: bytes) -> Iterator[Found]:
        """Take over one file; once another name begins, a longer one that is complete is given back at once.

        Before it goes the pair of the key itself, if that is complete: pairs come in the order in which they stand.
        """
        last, self._last = self._last, stem
        if stem == self.key:
            self._files.setdefault(stem, {})[suffix] = data
        found = self._find(last) if last not in (stem, self.key) else None
        if found is not None and _is_pair(found):
            own = self._find(self.key)
            if own is not None and _is_pair(own):
                yield self._give(self.key, own)
            yield self._give(last, found)
        if stem != self.key:
            self._files.setdefault(stem, {})[suffix] = data

    def finish(self) -> Iterator[Found]:
        """Give back what is left; files whose pair went before them are named."""
        own = self._find(self.key)
        if own is not None:
            yield self._give(self.key, own)
        for stem, files in self._files.items():
            found = self._find(stem)
            if found is not None and _is_pair(found):
                yield found
            elif stem in self._given:
                for suffix in sorted(files.keys() & {*IMAGE_SUFFIXES, "txt", "json"}):
                    yield Found(clean_name(f"{stem}.{suffix}"), None, None, {}, APART)
            elif found is not None and self.key not in self._given:
                yield found

    def _give(self, stem: str, found: Found) -> Found:
        del self._files[stem]
        self._given.add(stem)
        return found

    def _find(self, stem: str) -> Found | None:
        files = self._files.get(stem, {})
        further = further_pictures([f"{stem}.{suffix}" for suffix in files])
        return assemble(clean_name(stem), files, further, with_images=self._with_images)


def _is_pair(found: Found) -> bool:
    """Whether a picture was found, and something that was to be its caption."""
    return found.problem != MISSING_PICTURE and (found.caption is not None or bool(found.problem))


def _open_tar_file(path: Path, compressed: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]
