"""Tensors on disk, read a few rows at a time: what every format offers to the tools that copy and compare.

Memory is bounded by :data:`PIECE_BYTES` (or one row, where a row is larger), never by a tensor or a file.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_vilg.checkpoint.manifest import REMEDY, Manifest
from megatron_vilg.errors import CheckpointError

PIECE_BYTES = 1 << 20
"""Bytes read at a time: fits the cache of one core, so that checking and writing a piece cost no memory traffic."""
MOMENTUM_SLOT = "momentum_buffer"
"""Muon's only state, which hidden matrices have instead of Adam's moments."""
QUANTISED = ("codes", "scale")
"""What a quantised moment of an optimizer consists of."""
UNKNOWN_AT_FIRST = ("gate.average",)
"""What training starts with as NaN: the critic's gate has seen no picture before the first step."""
MODEL, OPTIMIZER = "model", "optimizer"
"""First words of tensor names: ``model.NAME`` and ``optimizer.SLOT.NAME``."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and element type of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Size of the first dimension; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape without the first dimension."""
        return self.shape[1:]

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return self.numel // self.num_rows if self.num_rows else 0


class TensorSource:
    """Named tensors in a folder or file. Subclasses fill the attributes and read rows, in several threads at once."""

    path: Path
    manifest: Manifest | None
    """What the folder says about itself; None where the format has no such file."""
    tensors: Mapping[str, TensorInfo]
    """By full name: ``model.NAME``, ``optimizer.SLOT.NAME``, or another first word for other parts of a run."""
    format: str
    """Name of the format, for people."""
    is_verified = False
    """Whether the digests of all files were compared when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[Path, int] = {}
        self._opening = threading.Lock()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, contiguous, on the CPU: [stop - start, ...]; of a scalar [1].

        Raises:
            CheckpointError: the file is shorter than it should be, or cannot be read.
        """
        raise NotImplementedError

    def verify(self) -> list[str]:
        """What is wrong with the folder beyond the digests of its files; empty when nothing is."""
        return []

    def descriptor(self, path: Path) -> int:
        """An open file descriptor, kept until :meth:`close`."""
        with self._opening:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read ({error.strerror}). {REMEDY}") from error
            return self._open[path]

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class DictSource(TensorSource):
    """Tensors in memory, by full name."""

    format = "tensors in memory"

    def __init__(self, values: Mapping[str, Tensor], manifest: Manifest | None, path: Path) -> None:
        super().__init__(path)
        self.values, self.manifest = values, manifest
        self.tensors = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        value = self.values[name]
        return (value if value.ndim else value.reshape(1))[start:stop].contiguous()


def pieces(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Row ranges of at most :data:`PIECE_BYTES` each that together are the tensor."""
    row_bytes = info.row_numel * info.dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, info.num_rows, step):
        yield start, min(start + step, info.num_rows)


def read_whole(source: TensorSource, name: str) -> Tensor:
    """One whole tensor in its shape."""
    info = source.tensors[name]
    return source.rows(name, 0, info.num_rows).reshape(info.shape)


def read_bytes(descriptor: int, offset: int, count: int, name: str) -> Tensor:
    """``count`` bytes of a file: uint8 [count].

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    out = torch.empty(count, dtype=torch.uint8)
    view = memoryview(out.numpy().data)
    done = 0
    while done < count:
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read ({error.strerror}). {REMEDY}") from error
        if not got:
            raise CheckpointError(
                f"{name}: ends at byte {offset + done}, expected {offset + count}; it was cut short. {REMEDY}"
            )
        done += got
    return out


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts ``blocks.2`` before ``blocks.10``."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"[.]", name)]


def in_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names in the order in which files hold them: by part, wide elements first (alignment), then by number."""
    return sorted(tensors, key=lambda name: (name.split(".")[0], -tensors[name].dtype.itemsize, natural(name)))


def part_of(name: str) -> str:
    """First word of a full name: ``model``, ``optimizer``, ..."""
    return name.partition(".")[0]


def parameter_of(name: str) -> str:
    """The parameter that a full name belongs to: ``optimizer.exp_avg.norm.weight`` to ``norm.weight``.

    Quantised state has one word more: ``optimizer.exp_avg.codes.norm.weight``.
    """
    part, _, rest = name.partition(".")
    if not part.endswith(OPTIMIZER):
        return rest
    parameter = rest.partition(".")[2]
    first, _, behind = parameter.partition(".")
    return behind if first in QUANTISED else parameter


def count_not_finite(name: str, values: Tensor) -> int:
    """How many elements of a tensor are NaN or infinite and should not be; a sum tells the usual case in one pass."""
    if name in UNKNOWN_AT_FIRST or not values.is_floating_point() or not values.numel():
        return 0
    if bool(torch.isfinite(values.sum(dtype=torch.float32))):
        return 0
    return int((~torch.isfinite(values)).sum())
