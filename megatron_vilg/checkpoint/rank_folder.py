"""Per-rank files for systems that start each rank from its own folder: ``mp_rank_TT_PPP/model.safetensors``.

Names are the canonical ones (layers count through all stages), values are the rank's part. The manifest on top lists
whole shapes and where each tensor is cut, so the folder can be put together again without knowing the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_vilg.checkpoint.layout import Layout
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.checkpoint.safetensors_file import SafetensorsFile
from megatron_vilg.checkpoint.tensors import TensorInfo, TensorSource, part_of, pieces
from megatron_vilg.errors import CheckpointError

FORMAT = "ranks"


class RankSource(TensorSource):
    """A folder of ranks, put together.

    Args:
        path: the folder.
        manifest: what it will say, while it is being written; None: read it.

    Raises:
        CheckpointError: it has no manifest, ranks are missing, or parts do not add up to what the manifest says.
    """

    format = "per-rank folders"

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        super().__init__(path)
        self.manifest = manifest = read_manifest(path) if manifest is None else manifest
        if manifest.format != FORMAT:
            raise CheckpointError(f"{path}: its manifest says {manifest.format or 'no format'}, not {FORMAT!r}")
        self.layout = layout_of(path, manifest.layout)
        self.cuts = {name: entry.cut for name, entry in manifest.tensors.items()}
        self.tensors = {
            name: TensorInfo(entry.shape, getattr(torch, entry.dtype)) for name, entry in manifest.tensors.items()
        }
        self._parts: dict[str, list[SafetensorsFile]] = {}
        self._read_headers()

    def _read_headers(self) -> None:
        files: dict[str, SafetensorsFile] = {}
        seen = 0
        for name, info in self.tensors.items():
            stage = self.layout.stage_of(name)
            parts = self.layout.parts(name, info, self.cuts[name])
            short = name.partition(".")[2]
            for rank, part in enumerate(parts):
                file = f"{self.layout.folder(rank, stage)}/{part_of(name)}.safetensors"
                if file not in files:
                    files[file] = SafetensorsFile(self.descriptor(self.path / file), self.path / file)
                found, wanted = files[file].tensors.get(short), TensorInfo(part.shape(info.shape), info.dtype)
                if found != wanted:
                    raise CheckpointError(f"{self.path / file}: {short} is {found}, expected {wanted}")
                self._parts.setdefault(name, []).append(files[file])
                seen += 1
        if extra := sum(len(file.tensors) for file in files.values()) - seen:
            raise CheckpointError(f"{self.path}: ranks hold {extra} tensors that the manifest does not list")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        info, cut, files = self.tensors[name], self.cuts[name], self._parts[name]
        short = name.partition(".")[2]
        if cut is None or len(files) == 1:
            return files[0].rows(short, start, stop)
        if cut:
            return torch.cat([file.rows(short, start, stop) for file in files], dim=cut)
        each = math.ceil(info.shape[0] / len(files))
        found = []
        for rank, file in enumerate(files):
            low, high = max(start, rank * each), min(stop, (rank + 1) * each)
            if low < high:
                found.append(file.rows(short, low - rank * each, high - rank * each))
        return found[0] if len(found) == 1 else torch.cat(found)

    def verify(self) -> list[str]:
        """Tensors that every rank holds whole must be the same in all of them."""
        return list(self._unequal_copies())

    def _unequal_copies(self) -> Iterator[str]:
        for name, files in self._parts.items():
            if self.cuts[name] is not None or len(files) == 1:
                continue
            short = name.partition(".")[2]
            for start, stop in pieces(self.tensors[name]):
                first = files[0].rows(short, start, stop)
                if any(not _same(first, file.rows(short, start, stop)) for file in files[1:]):
                    yield f"{name} differs between ranks that should hold the same"
                    break


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def layout_of(path: Path, values: object) -> Layout:
    """The layout that a manifest of ranks states.

    Raises:
        CheckpointError: it is incomplete.
    """
    try:
        return Layout(**dict(values))  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its manifest states no layout of ranks ({error})") from error
