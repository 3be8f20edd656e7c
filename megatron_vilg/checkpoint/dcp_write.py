"""Write a training checkpoint from any source of whole tensors: one tensor in memory at a time, no process group."""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_vilg.checkpoint.dcp_folder import DcpSource
from megatron_vilg.checkpoint.manifest import Manifest, current_versions, write_manifest
from megatron_vilg.checkpoint.new_folder import Background, new_folder
from megatron_vilg.checkpoint.safetensors_file import WRITE_BYTES
from megatron_vilg.checkpoint.tensors import OPTIMIZER, TensorInfo, TensorSource, count_not_finite, part_of, pieces
from megatron_vilg.checkpoint.transfer import Options, equal_bits
from megatron_vilg.errors import CheckpointError

ONE_FILE_BYTES = 64 << 20
"""Checkpoints up to this size are written as one file."""


class PieceStream(io.FileIO):
    """A file that is written a little at a time (:data:`WRITE_BYTES`), whatever it is given."""

    def write(self, data: Any, /) -> int:
        """Write all of ``data``; returns its bytes."""
        view = memoryview(data).cast("B")
        count = len(view)
        while view:
            view = view[super().write(view[:WRITE_BYTES]) :]
        return count


class PieceFileSystem(FileSystem):
    """torch's own, which hands whole tensors to the kernel, with :class:`PieceStream` in place of its files."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file without a buffer of its own."""
        with PieceStream(path, mode) as stream:
            yield stream


class LazyPlanner(dcp.DefaultSavePlanner):
    """Plans with tensors that have a shape only, and reads each when it is written.

    Args:
        source: where they are.
        options: progress.
        one_at_a_time: a tensor is written and forgotten before the next is asked for, so that all can use the same
            memory: fresh memory for each costs as much as writing it.
    """

    def __init__(self, source: TensorSource, options: Options, *, one_at_a_time: bool) -> None:
        super().__init__()
        self.source, self.options = source, options
        self.total = sum(info.num_bytes for info in source.tensors.values())
        self._shared = bytearray(max(info.num_bytes for info in source.tensors.values()) if one_at_a_time else 0)
        self.done = 0
        self.bad: list[str] = []

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of that name, read from the source."""
        info = self.source.tensors[index.fqn]
        whole, not_finite = self._memory(info), 0
        for start, stop in pieces(info):
            rows = self.source.rows(index.fqn, start, stop)
            not_finite += count_not_finite(index.fqn, rows)
            whole[start:stop] = rows
            self.done += rows.numel() * rows.dtype.itemsize
            if self.options.progress is not None:
                self.options.progress("writing", self.done, self.total)
        if not_finite:
            self.bad.append(f"{index.fqn} ({not_finite} of {info.numel} values)")
        return whole.reshape(info.shape)

    def _memory(self, info: TensorInfo) -> Tensor:
        if self._shared and info.numel:
            # A storage of exactly this size: torch copies what is part of a larger one.
            whole = torch.frombuffer(self._shared, dtype=info.dtype, count=info.numel)
        else:
            whole = torch.empty(info.numel, dtype=info.dtype)
        return whole.view(info.num_rows, *info.row_shape)


def write_training_checkpoint(
    source: TensorSource, folder: Path, names: Sequence[str], options: Options | None = None
) -> Manifest:
    """Write a checkpoint folder that the trainer loads in any layout.

    Args:
        source: whole tensors with a manifest.
        folder: ``.../checkpoints/step-00001000``, of the manifest's step; must not exist.
        names: the tensors to write.
        options: tolerance and progress; nothing is converted.

    Raises:
        CheckpointError: as :func:`checkpoint.reshape.merge`.
    """
    options = options or Options()
    if source.manifest is None:
        raise CheckpointError(f"{source.path}: has no manifest that says what it is")
    manifest = dataclasses.replace(
        source.manifest,
        format="",
        layout={},
        source={"name": source.path.resolve().name, "format": source.format},
        tensors={},
        versions=current_versions(),
        files={},
    )
    size = sum(source.tensors[name].num_bytes for name in names)
    with new_folder(folder, size) as partial:
        background = Background(partial)
        try:
            background.check_source(source)
            _save(source, names, partial, options)
            for path in partial.iterdir():
                background.digest(path)
            with DcpSource(partial, manifest) as result:
                _require_equal(source, result, names, options)
            known = background.finish(source.path)
        finally:
            background.close()
        return write_manifest(partial, manifest, known)


def _save(source: TensorSource, names: Sequence[str], partial: Path, options: Options) -> None:
    # torch keeps all tensors of a file in memory until it is closed, so a large checkpoint gets a file per tensor.
    is_small = sum(info.num_bytes for info in source.tensors.values()) <= ONE_FILE_BYTES
    planner = LazyPlanner(source, options, one_at_a_time=not is_small)
    # Files are forced to the disk together, before the folder gets its name; one by one takes much longer.
    writer = dcp.FileSystemWriter(partial, single_file_per_rank=is_small, sync_files=False)
    writer.fs = PieceFileSystem()
    state: dict[str, Any] = {}
    for name in names:
        info = source.tensors[name]
        part, _, rest = name.partition(".")
        inner = state.setdefault(part, {})
        if part.endswith(OPTIMIZER):
            slot, _, rest = rest.partition(".")
            inner = inner.setdefault(slot, {})
        inner[rest] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        cause = next((cause for cause, _ in error.failures.values()), error)
        if isinstance(cause, CheckpointError | OSError) or not isinstance(cause, Exception):
            raise cause from error
        raise CheckpointError(f"{partial}: cannot be written ({cause!r})") from error
    if planner.bad and not options.allow_non_finite:
        raise CheckpointError(f"{source.path}: values that are not finite: {', '.join(planner.bad[:8])}")


def _require_equal(source: TensorSource, result: TensorSource, names: Sequence[str], options: Options) -> None:
    """Read the checkpoint back and compare it with the source bit by bit."""
    done, total = 0, sum(source.tensors[name].num_bytes for name in names)
    if dict(result.tensors) != {name: source.tensors[name] for name in names}:
        raise CheckpointError(f"{result.path}: names or shapes are not those of {source.path}")
    for name in names:
        for start, stop in pieces(source.tensors[name]):
            rows: Tensor = source.rows(name, start, stop)
            if not equal_bits(rows, result.rows(name, start, stop)):
                raise CheckpointError(f"{result.path}: values of {name} differ from {source.path}")
            done += rows.numel() * rows.dtype.itemsize
            if options.progress is not None:
                options.progress("comparing", done, total)


def has_optimizer(names: Sequence[str]) -> bool:
    """Whether the trainer can go on from these tensors, rather than start anew with these weights."""
    return any(part_of(name) == OPTIMIZER for name in names)
