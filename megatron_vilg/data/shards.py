"""Write pairs as WebDataset shards whose bytes depend on the pairs alone."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class ShardWriter:
    """Writes ``PREFIX-00000.tar``, ``PREFIX-00001.tar``, ...: per pair KEY.png (or .jpg, .webp), KEY.txt and KEY.json.

    Owner and time are fixed, so equal pairs give equal files. Each shard is written as ``NAME.partial`` and renamed
    when it is complete.
    """

    def __init__(self, folder: Path, prefix: str, *, pairs_per_shard: int = 2048) -> None:
        self.folder, self.prefix, self.pairs_per_shard = folder, prefix, pairs_per_shard
        self.shards: list[Path] = []
        self.num_pairs = 0
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.shards):05d}.tar.partial"

    def add(self, key: str, image: bytes, caption: str, fields: Mapping[str, Any], *, suffix: str = "png") -> None:
        """Append one pair; ``image`` is a file of the kind that ``suffix`` names."""
        if self._tar is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # USTAR wherever that can hold a name, an extra header for longer ones.
            self._tar = tarfile.TarFile(self._partial, "w", format=tarfile.PAX_FORMAT)
        text = json.dumps(fields, ensure_ascii=False, sort_keys=True)
        # Half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON's escape.
        fields_file = text.encode(errors="backslashreplace")
        for ending, data in ((suffix, image), ("txt", caption.encode()), ("json", fields_file)):
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size, member.mtime, member.mode = len(data), 0, 0o644
            self._tar.addfile(member, io.BytesIO(data))
        self.num_pairs += 1
        self._in_shard += 1
        if self._in_shard == self.pairs_per_shard:
            self.close()

    def close(self) -> None:
        """Finish the shard in hand, if any."""
        if self._tar is None:
            return
        self._tar.close()
        target = self._partial.with_suffix("")
        self._partial.rename(target)
        self.shards.append(target)
        self._tar, self._in_shard = None, 0


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
