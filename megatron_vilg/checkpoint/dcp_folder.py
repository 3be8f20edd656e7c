"""Training checkpoints (folders of torch.distributed.checkpoint) without a process group, and without their pickle.

``.metadata`` is a pickle; it is read as data (:mod:`checkpoint.inert`). Any layout can have written the folder: a
tensor is a set of boxes, each a little archive inside some ``*.distcp`` file.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.checkpoint.inert import Described, Record, read_pickle
from megatron_vilg.checkpoint.manifest import REMEDY, Manifest, find_damage, read_manifest, require_no_damage
from megatron_vilg.checkpoint.tensors import TensorInfo, TensorSource
from megatron_vilg.checkpoint.torch_file import TorchFile
from megatron_vilg.errors import CheckpointError

METADATA = ".metadata"
_FEW_BOXES = 64
"""Up to as many boxes are compared pair by pair for overlap; more are counted only."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class DcpSource(TensorSource):
    """A checkpoint folder of the trainer.

    Args:
        path: the folder.
        manifest: what it will say, while it is being written; None: read it.

    Raises:
        CheckpointError: it has no manifest, or its metadata is damaged or does not cover every tensor.
    """

    format = "training checkpoint (DCP)"

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        super().__init__(path)
        self.manifest = read_manifest(path) if manifest is None else manifest
        if manifest is None:  # lengths in a damaged pickle may ask for any amount of memory
            require_no_damage(path, find_damage(path, self.manifest, [METADATA]))
        self.tensors, self._boxes = read_metadata(path)
        self._last = threading.local()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        info, boxes = self.tensors[name], self._boxes[name]
        for box in boxes:
            first = box.offsets[0] if box.offsets else 0
            if box.sizes[1:] == info.row_shape and first <= start and stop <= first + (box.sizes or (1,))[0]:
                return self._box_rows(box, info, start - first, stop - first)
        out = torch.empty((stop - start, *info.row_shape), dtype=info.dtype)
        for box in boxes:
            low, high = max(start, box.offsets[0]), min(stop, box.offsets[0] + box.sizes[0])
            if low < high:
                place = tuple(slice(o, o + s) for o, s in zip(box.offsets[1:], box.sizes[1:], strict=True))
                part = self._box_rows(box, info, low - box.offsets[0], high - box.offsets[0])
                out[(slice(low - start, high - start), *place)] = part
        return out

    def _box_rows(self, box: Box, info: TensorInfo, start: int, stop: int) -> Tensor:
        last: tuple[Box, TorchFile, Described] | None = getattr(self._last, "archive", None)
        if last is None or last[0] is not box:
            path = self.path / box.file
            archive = TorchFile(self.descriptor(path), path, box.begin, box.length)
            tensor = archive.content
            if not isinstance(tensor, Described) or tensor.shape != box.sizes or tensor.dtype != info.dtype:
                raise CheckpointError(
                    f"{path}: a tensor is not the one that {METADATA} names; the folder is damaged. {REMEDY}"
                )
            self._last.archive = last = box, archive, tensor
        return last[1].rows(last[2], start, stop)


def read_metadata(path: Path) -> tuple[dict[str, TensorInfo], dict[str, list[Box]]]:
    """Tensors of a checkpoint folder, and the boxes of each.

    Raises:
        CheckpointError: the metadata is missing or damaged, names something else than tensors or files outside the
            folder, or boxes do not add up to their tensor.
    """
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            content = read_pickle(stream, str(file))
        entries: Mapping[str, Any] = content.state["state_dict_metadata"]
        places = {
            (index.state["fqn"], index.state.get("offset")): info.state
            for index, info in content.state["storage_data"].items()
        }
        tensors, boxes = {}, {}
        for name, entry in entries.items():
            tensors[name], boxes[name] = _tensor(path, name, entry, places)
        return tensors, boxes
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). {REMEDY}") from error
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{file}: is not what torch.distributed.checkpoint writes ({error!r})") from error


def _tensor(
    path: Path, name: str, entry: Record, places: Mapping[tuple[str, Any], Mapping[str, Any]]
) -> tuple[TensorInfo, list[Box]]:
    if not entry.origin.endswith("TensorStorageMetadata"):
        raise CheckpointError(f"{path}: {name} is no tensor; these tools read checkpoints of tensors only")
    info = TensorInfo(tuple(entry.state["size"]), entry.state["properties"].state[0])
    boxes = []
    for chunk in entry.state["chunks"]:
        offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
        place = places.get((name, offsets))
        if place is None:
            raise CheckpointError(f"{path}: {METADATA} does not say where {name} at {list(offsets)} lies")
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{path}: {name} is stored compressed, which these tools do not read")
        relative = str(place["relative_path"])
        if os.path.isabs(relative) or ".." in Path(relative).parts:
            raise CheckpointError(f"{path}: {METADATA} names a file outside the folder: {relative}")
        boxes.append(Box(offsets, sizes, relative, int(place["offset"]), int(place["length"])))
    if problem := next(_uncovered(info, boxes), None):
        raise CheckpointError(f"{path}: {name} {list(info.shape)}: {problem}")
    return info, boxes


def _uncovered(info: TensorInfo, boxes: list[Box]) -> Iterator[str]:
    """Why boxes are not a partition of the tensor."""
    for box in boxes:
        ends = [offset + size for offset, size in zip(box.offsets, box.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, info.shape, strict=True)):
            yield f"a part at {list(box.offsets)} of {list(box.sizes)} lies outside"
    if len(boxes) <= _FEW_BOXES:
        for one, other in itertools.combinations(boxes, 2):
            if all(
                a < b + t and b < a + s
                for a, s, b, t in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            ):
                yield f"parts at {list(one.offsets)} and {list(other.offsets)} overlap"
    covered = sum(TensorInfo(box.sizes, info.dtype).numel for box in boxes)
    if covered != info.numel:
        yield f"its parts hold {covered} of {info.numel} numbers"
