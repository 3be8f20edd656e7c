"""Files of ``torch.save`` as descriptions of tensors, read in place; nothing in them is executed."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.checkpoint.inert import Described, Record, read_pickle
from megatron_vilg.checkpoint.manifest import REMEDY
from megatron_vilg.checkpoint.tensors import PIECE_BYTES, TensorInfo, read_bytes
from megatron_vilg.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Lengths of name and extra field at the end of a zip entry's 30-byte header."""


class FileWindow(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self.descriptor, self.start, self.length, self.place = descriptor, start, length, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes from the start of the window."""
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; positions count from the start of the window."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        self.place = base + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the window goes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.length - self.place))
        got = os.preadv(self.descriptor, [view[:count]], self.start + self.place) if count else 0
        self.place += got
        return got


class TorchFile:
    """What one ``torch.save`` wrote: plain data with :class:`Described` in place of tensors.

    Args:
        descriptor: open file; stays the caller's.
        path: its name, for messages.
        start: where in the file the archive begins (checkpoints of torch.distributed hold one per tensor).
        length: bytes of the archive; None: the rest of the file.

    Raises:
        CheckpointError: no such archive, or it is damaged.
    """

    def __init__(self, descriptor: int, path: Path, start: int = 0, length: int | None = None) -> None:
        self.descriptor, self.path, self.start = descriptor, path, start
        self.length = os.fstat(descriptor).st_size - start if length is None else length
        try:
            with zipfile.ZipFile(FileWindow(descriptor, start, self.length)) as archive:
                self._entries = {entry.filename: entry for entry in archive.infolist()}
                self.root = _root_of(list(self._entries), path)
                """Name that torch.save gave the archive: that of the file it was written to, or ``archive``."""
                order = self._entries.get(f"{self.root}/byteorder")
                if order is not None and archive.read(order).strip() != b"little":
                    raise CheckpointError(f"{path}: was written on a big-endian machine, which is not supported")
                self.content: Any = read_pickle(io.BytesIO(archive.read(f"{self.root}/data.pkl")), str(path))
        except (
            *(zipfile.BadZipFile, zlib.error, KeyError, OSError, struct.error, EOFError),
            *(ValueError, OverflowError, RuntimeError),  # names, sizes or flags of entries that are damaged
        ) as error:
            raise CheckpointError(
                f"{path}: is no whole file of torch.save ({error}). {REMEDY}; what torch before 1.6 wrote has another "
                "form: load and save it once with torch"
            ) from error

    def place_of(self, tensor: Described) -> int:
        """Byte of the file at which the storage of ``tensor`` begins."""
        entry = self._entry(tensor)
        header = bytes(read_bytes(self.descriptor, self.start + entry.header_offset, 30, str(self.path)).numpy())
        name_length, extra_length = _LOCAL_HEADER.unpack(header)
        begin = entry.header_offset + 30 + name_length + extra_length
        if begin + entry.file_size > self.length:
            raise CheckpointError(f"{self.path}: ends inside a tensor; it was cut short. {REMEDY}")
        return self.start + begin

    def check(self, tensor: Described) -> None:
        """Compare the storage of ``tensor`` with its CRC-32.

        Raises:
            CheckpointError: they differ.
        """
        entry, begin, crc = self._entry(tensor), self.place_of(tensor), 0
        for done in range(0, entry.file_size, PIECE_BYTES):
            count = min(PIECE_BYTES, entry.file_size - done)
            crc = zlib.crc32(read_bytes(self.descriptor, begin + done, count, str(self.path)).numpy().data, crc)
        if crc != entry.CRC:
            raise CheckpointError(f"{self.path}: a tensor does not match its checksum; the file is damaged. {REMEDY}")

    def rows(self, tensor: Described, start: int, stop: int) -> Tensor:
        """Rows of a tensor: [stop - start, ...]; of a scalar [1]."""
        info = TensorInfo(tensor.shape, tensor.dtype)
        if stop <= start or not info.numel:
            return torch.empty((max(0, stop - start), *info.row_shape), dtype=tensor.dtype)
        begin = self.place_of(tensor)
        size = tensor.dtype.itemsize
        if _is_contiguous(tensor):
            first = begin + (tensor.offset + start * info.row_numel) * size
            count = (stop - start) * info.row_numel * size
            self._within(tensor, first + count - begin)
            raw = read_bytes(self.descriptor, first, count, str(self.path))
            return raw.view(tensor.dtype).reshape(stop - start, *info.row_shape)
        reach = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True))
        self._within(tensor, (tensor.offset + reach) * size)
        raw = read_bytes(self.descriptor, begin + tensor.offset * size, reach * size, str(self.path))
        return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride)[start:stop].contiguous()

    def _entry(self, tensor: Described) -> zipfile.ZipInfo:
        entry = self._entries.get(f"{self.root}/data/{tensor.storage.key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: the numbers of a tensor are missing; the file is damaged. {REMEDY}")
        return entry

    def _within(self, tensor: Described, end: int) -> None:
        if end > self._entry(tensor).file_size or min(tensor.stride, default=0) < 0 or tensor.offset < 0:
            raise CheckpointError(f"{self.path}: a tensor reaches beyond its numbers; the file is damaged. {REMEDY}")


def _root_of(names: list[str], path: Path) -> str:
    roots = [name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: is no file of torch.save (no data.pkl inside)")
    return roots[0]


def _is_contiguous(tensor: Described) -> bool:
    expected = 1
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def named_tensors(content: Any, prefix: str = "") -> dict[str, Described]:
    """Tensors in nested mappings, and in modules pickled whole, by dotted name.

    Raises:
        RecursionError: a mapping contains itself.
    """
    if isinstance(content, Described):
        return {prefix: content}
    if isinstance(content, Record) and isinstance(content.state, dict):
        groups = [content.state.get(key) for key in ("_parameters", "_buffers", "_modules")]
        content = {key: value for group in groups if isinstance(group, dict) for key, value in group.items()}
    if not isinstance(content, dict):
        return {}
    found: dict[str, Described] = {}
    for key, value in content.items():
        found |= named_tensors(value, f"{prefix}.{key}" if prefix else str(key))
    return found
