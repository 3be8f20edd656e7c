"""Write a training checkpoint from any source of whole tensors: one tensor in memory at a time, no process group."""

from __future__ import annotations

import dataclasses
import io
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_vilg.checkpoint.dcp_folder import DcpSource
from megatron_vilg.checkpoint.files import FULL, is_full
from megatron_vilg.checkpoint.manifest import Manifest, current_versions, write_manifest
from megatron_vilg.checkpoint.new_folder import Background, new_folder
from megatron_vilg.checkpoint.safetensors_file import WRITE_BYTES
from megatron_vilg.checkpoint.sources import manifest_of
from megatron_vilg.checkpoint.tensors import OPTIMIZER, TensorInfo, TensorSource, count_not_finite, pieces
from megatron_vilg.checkpoint.transfer import Options, require_equal
from megatron_vilg.errors import CheckpointError

ONE_FILE_BYTES = 64 << 20
"""Checkpoints up to this size are written as one file."""
PART_BYTES = 64 << 20
"""Larger tensors are stored in parts; each thread that writes holds one."""
WRITERS = 2


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
        part_bytes: larger tensors are stored in parts of so many bytes (or one row). A thread writes one part and
            forgets it before it asks for the next, and so has one piece of memory for all of them: fresh memory costs
            as much as writing. None: whole tensors, each in memory of its own.
    """

    def __init__(self, source: TensorSource, options: Options, part_bytes: int | None) -> None:
        super().__init__()
        self.source, self.options, self.part_bytes = source, options, part_bytes
        self.total = sum(info.num_bytes for info in source.tensors.values())
        self.done = 0
        self.not_finite: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._memory = threading.local()

    def create_local_plan(self) -> SavePlan:
        """torch's plan, with large tensors in parts."""
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        return self.plan

    def _parts(self, item: WriteItem) -> Iterator[WriteItem]:
        info, data = self.source.tensors[item.index.fqn], item.tensor_data
        assert data is not None, f"{item.index.fqn} is no tensor"
        if self.part_bytes is None or info.num_bytes <= self.part_bytes or not info.shape:
            yield item
            return
        step = max(1, self.part_bytes // (info.row_numel * info.dtype.itemsize))
        for start in range(0, info.num_rows, step):
            offsets = torch.Size([start] + [0] * len(info.row_shape))
            sizes = torch.Size([min(step, info.num_rows - start), *info.row_shape])
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
            yield WriteItem(
                index=MetadataIndex(item.index.fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=dataclasses.replace(data, chunk=chunk),
            )

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The (part of a) tensor, read from the source."""
        name, data = write_item.index.fqn, write_item.tensor_data
        assert data is not None, f"{name} is no tensor"
        info, shape = self.source.tensors[name], tuple(data.chunk.sizes)
        part = TensorInfo(shape, info.dtype)
        first = data.chunk.offsets[0] if shape else 0
        values = self._empty(part)
        for start, stop in pieces(part):
            rows = self.source.rows(name, first + start, first + stop)
            not_finite = count_not_finite(name, rows)
            values[start:stop] = rows
            with self._counting:
                self.not_finite[name] += not_finite
                self.done += rows.numel() * rows.dtype.itemsize
                if self.options.progress is not None:
                    self.options.progress("writing", self.done, self.total)
        return values.reshape(shape)

    def _empty(self, part: TensorInfo) -> Tensor:
        if self.part_bytes is None or not part.numel:
            return torch.empty((part.num_rows, *part.row_shape), dtype=part.dtype)
        memory = getattr(self._memory, "bytes", bytearray())
        if len(memory) < part.num_bytes:
            self._memory.bytes = memory = bytearray(max(part.num_bytes, min(self.part_bytes, self.total)))
        # A storage of exactly this size: torch copies what is part of a larger one.
        return torch.frombuffer(memory, dtype=part.dtype, count=part.numel).view(part.num_rows, *part.row_shape)


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
    manifest = dataclasses.replace(
        manifest_of(source),
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
                require_equal(source, result, names, dataclasses.replace(options, dtype=None))
            known = background.finish(source.path)
        finally:
            background.close()
        return write_manifest(partial, manifest, known)


def _save(source: TensorSource, names: Sequence[str], partial: Path, options: Options) -> None:
    # torch keeps all tensors of a file in memory until it is closed, so a large checkpoint gets a file per part.
    is_small = sum(info.num_bytes for info in source.tensors.values()) <= ONE_FILE_BYTES
    planner = LazyPlanner(source, options, None if is_small else PART_BYTES)
    # Files are forced to the disk together, before the folder gets its name; one by one takes much longer.
    threads = 1 if is_small else WRITERS
    writer = dcp.FileSystemWriter(partial, single_file_per_rank=is_small, sync_files=False, thread_count=threads)
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
        # new_folder says then which folder cannot be written, by the name that it was going to have
        raise OSError(FULL if is_full(partial) else repr(cause)) from error
    bad = [
        f"{name} ({count} of {source.tensors[name].numel} values)"
        for name, count in planner.not_finite.items()
        if count
    ]
    if bad and not options.allow_non_finite:
        raise CheckpointError(f"{source.path}: values that are not finite: {', '.join(bad[:8])}")
