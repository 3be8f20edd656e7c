"""Copy tensors from any source into safetensors files, piece by piece, and prove that they arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_vilg.checkpoint.layout import Part
from megatron_vilg.checkpoint.manifest import REMEDY
from megatron_vilg.checkpoint.new_folder import Background, InOrder, Progress
from megatron_vilg.checkpoint.safetensors_file import SafetensorsWriter
from megatron_vilg.checkpoint.tensors import (
    MODEL,
    TensorInfo,
    TensorSource,
    as_bytes,
    count_not_finite,
    part_of,
    pieces,
)
from megatron_vilg.errors import CheckpointError

_MOST_NAMED = 8
_PIECES_AHEAD = 16
"""How many pieces may have been read and not yet written."""
_COMPARERS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What may change on the way, and who watches."""

    dtype: torch.dtype | None = None
    """Element type of floating-point weights; None: as they are. Optimizer state is never converted."""
    allow_non_finite: bool = False
    """Whether NaN and infinite values may pass."""
    progress: Progress | None = None


def converted(name: str, info: TensorInfo, options: Options) -> TensorInfo:
    """What a tensor will be."""
    if options.dtype is None or part_of(name) != MODEL or not info.dtype.is_floating_point:
        return info
    return TensorInfo(info.shape, options.dtype)


@dataclass(slots=True)
class Files:
    """Safetensors files to write: what each holds, in order, and which part of a tensor goes where."""

    content: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    """Relative path to short name to what is stored."""
    routes: dict[str, list[tuple[str, Part]]] = field(default_factory=dict)
    """Full name to the files it goes to."""

    def add(self, file: str, name: str, info: TensorInfo, part: Part | None = None) -> None:
        """Store (a part of) tensor ``name``, which as a whole is ``info``, in ``file``."""
        part = part or Part()
        stored = TensorInfo(part.shape(info.shape), info.dtype)
        self.content.setdefault(file, {})[name.partition(".")[2]] = stored
        self.routes.setdefault(name, []).append((file, part))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors stored, copies counted."""
        return sum(info.num_bytes for tensors in self.content.values() for info in tensors.values())


def write_files(
    source: TensorSource,
    files: Files,
    folder: Path,
    background: Background,
    options: Options,
    metadata: Mapping[str, str],
) -> None:
    """Write all files, reading the source once; finished ones are handed to ``background``.

    Raises:
        CheckpointError: values are not finite, or the source cannot be read.
    """
    writers: dict[str, SafetensorsWriter] = {}
    left = {file: len(tensors) for file, tensors in files.content.items()}
    done, total, bad = 0, files.num_bytes, []

    def finish(file: str) -> None:
        writers.pop(file).close()
        background.digest(folder / file)

    try:
        with InOrder(_PIECES_AHEAD) as writing:
            for name, targets in files.routes.items():
                for file, _ in targets:
                    if file not in writers:
                        (folder / file).parent.mkdir(parents=True, exist_ok=True)
                        writers[file] = SafetensorsWriter(folder / file, files.content[file], metadata)
                short, not_finite = name.partition(".")[2], 0
                num_rows = source.tensors[name].num_rows
                for start, rows in converted_pieces(source, name, options):
                    not_finite += count_not_finite(name, rows)
                    for file, part in targets:
                        share = part.of(rows, start, num_rows)
                        writing.submit(writers[file].write, short, share)
                        done += share.numel() * share.element_size()
                    _report(options, "writing", done, total)
                if not_finite:
                    bad.append(f"{name} ({not_finite} of {source.tensors[name].numel} values)")
                for file, _ in targets:
                    left[file] -= 1
                    if not left[file]:
                        writing.submit(finish, file)
    finally:
        for writer in writers.values():
            writer.close(complete=False)
    if bad and not options.allow_non_finite:
        raise CheckpointError(_not_finite(source, bad, options))


def _not_finite(source: TensorSource, bad: Sequence[str], options: Options) -> str:
    shown = ", ".join(bad[:_MOST_NAMED]) + (f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else "")
    as_what = f" as {options.dtype}" if options.dtype is not None else ""
    hint = "--dtype=bf16 keeps the range of fp32; " if options.dtype == torch.float16 else ""
    return (
        f"{source.path}: values that are not finite{as_what}: {shown}. Works: an earlier checkpoint; "
        f"{hint}--allow-non-finite passes them on as they are"
    )


def converted_pieces(source: TensorSource, name: str, options: Options) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each piece, in the element type asked for."""
    dtype = converted(name, source.tensors[name], options).dtype
    for start, stop in pieces(source.tensors[name]):
        yield start, source.rows(name, start, stop).to(dtype)


def require_equal(source: TensorSource, result: TensorSource, names: Sequence[str], options: Options) -> None:
    """Read source and result once more and compare them bit by bit, after the source's own check of itself.

    Raises:
        CheckpointError: the source is damaged; or names, shapes or values differ: the first tensors that do.
    """
    if damage := source.verify():
        raise CheckpointError(f"{source.path}: damaged: {'; '.join(damage)}. {REMEDY}")
    wanted = {name: converted(name, source.tensors[name], options) for name in names}
    if dict(result.tensors) != wanted:
        differing = sorted(n for n in wanted.keys() | result.tensors.keys() if wanted.get(n) != result.tensors.get(n))
        raise CheckpointError(
            f"{result.path}: names or shapes are not those of {source.path}: {differing[:_MOST_NAMED]}"
        )
    wrong = _differing_tensors(source, result, names, options)
    problems = [f"values of {name} differ" for name in wrong[:_MOST_NAMED]] + result.verify()
    if problems:
        raise CheckpointError(f"{result.path}: is not what {source.path} holds: " + "; ".join(problems))


def _differing_tensors(source: TensorSource, result: TensorSource, names: Sequence[str], options: Options) -> list[str]:
    """Read source and result once more, two tensors at a time; the names of those that are not equal bit by bit."""

    def is_equal(name: str) -> bool:
        return all(
            equal_bits(rows, result.rows(name, start, start + len(rows)))
            for start, rows in converted_pieces(source, name, options)
        )

    done, total, wrong = 0, sum(result.tensors[name].num_bytes for name in names), []
    pool = ThreadPoolExecutor(_COMPARERS)
    try:
        for name, equal in zip(names, pool.map(is_equal, names), strict=True):
            if not equal:
                wrong.append(name)
            done += result.tensors[name].num_bytes
            _report(options, "comparing", done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return wrong


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bytes, so that NaN equals NaN and 0.0 does not equal -0.0."""
    # numpy compares bytes ten times as fast as torch.equal does, and eight at a time twice as fast as one.
    if one.shape != other.shape:
        return False
    first, second = (as_bytes(tensor).numpy() for tensor in (one, other))
    if not first.size % 8 and first.size == second.size:
        first, second = first.view(np.uint64), second.view(np.uint64)
    return np.array_equal(first, second)


def _report(options: Options, what: str, done: int, total: int) -> None:
    if options.progress is not None:
        options.progress(what, done, total)
