"""One safetensors file: rows read in place, and written as they come."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_vilg.checkpoint.manifest import REMEDY
from megatron_vilg.checkpoint.tensors import TensorInfo, as_bytes, read_bytes
from megatron_vilg.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000
WRITE_BYTES = 64 << 10
"""Bytes per write: for larger ones Linux looks for page-cache memory in one piece, which can take five times longer."""


class SafetensorsFile:
    """Header of a safetensors file, and rows of its tensors.

    Raises:
        CheckpointError: it is none, or does not have the size that its header says.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor, self.path = descriptor, path
        size = os.fstat(descriptor).st_size
        try:
            (length,) = _LENGTH.unpack(bytes(read_bytes(descriptor, 0, 8, str(path)).numpy()))
            if length > min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path}: is no safetensors file, or was cut short inside its header. {REMEDY}")
            header = json.loads(bytes(read_bytes(descriptor, 8, length, str(path)).numpy()))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.tensors: dict[str, TensorInfo] = {}
            self._begin: dict[str, int] = {}
            spans = []
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} has element type {entry['dtype']}, which is not read. "
                        f"Works: {', '.join(DTYPES)}"
                    )
                info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                begin, end = entry["data_offsets"]
                if end - begin != info.num_bytes or begin < 0:
                    raise CheckpointError(f"{path}: {name} has {end - begin} bytes instead of {info.num_bytes}")
                self.tensors[name] = info
                self._begin[name] = 8 + length + begin
                spans.append((begin, end))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: its header cannot be read ({error}); the file is damaged. {REMEDY}"
            ) from error
        place = 0
        for begin, end in sorted(spans):
            if begin != place:
                raise CheckpointError(f"{path}: tensors overlap or leave gaps; the file is damaged. {REMEDY}")
            place = end
        if 8 + length + place != size:
            raise CheckpointError(
                f"{path}: has {size} bytes, its header says {8 + length + place}; it was cut short. {REMEDY}"
            )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor: [stop - start, ...]; of a scalar [1]."""
        info = self.tensors[name]
        row_bytes = info.row_numel * info.dtype.itemsize
        begin = self._begin[name] + start * row_bytes
        raw = read_bytes(self.descriptor, begin, (stop - start) * row_bytes, str(self.path))
        return raw.view(info.dtype).reshape(stop - start, *info.row_shape)


class SafetensorsWriter:
    """Writes the header at once, then rows in the order of the header.

    Args:
        path: a new file.
        tensors: what will come, in this order; wide elements first, so that all are aligned.
        metadata: texts for the header.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._left = {name: info.num_bytes for name, info in tensors.items()}
        self._order = [name for name, left in self._left.items() if left]
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        place = 0
        for name, info in tensors.items():
            offsets = [place, place + info.num_bytes]
            header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
            place += info.num_bytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        # Blocks taken at once instead of piece by piece cost a tenth of the time, and a full disk is noticed here.
        os.posix_fallocate(self._file, 0, _LENGTH.size + len(text) + place)
        self._write(memoryview(_LENGTH.pack(len(text)) + text))

    def write(self, name: str, rows: Tensor) -> int:
        """Append rows of ``name``; returns how many bytes were written."""
        data = as_bytes(rows.contiguous())
        if not data.numel():
            return 0
        assert self._order and self._order[0] == name, f"{name} comes out of order"
        self._left[name] -= data.numel()
        assert self._left[name] >= 0, f"{name} has more rows than its header says"
        if not self._left[name]:
            self._order.pop(0)
        self._write(memoryview(data.numpy().data))
        return data.numel()

    def close(self, *, complete: bool = True) -> None:
        """Close the file; ``complete``: all rows must have come."""
        os.close(self._file)
        assert not (complete and self._order), f"rows are missing from {self._order[:1]} on"

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._file, view[:WRITE_BYTES]) :]
