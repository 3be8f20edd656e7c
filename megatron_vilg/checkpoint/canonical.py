"""The canonical form: whole tensors under stable names in safetensors files, with an index where there are several.

``model.safetensors`` holds the weights, ``optimizer.safetensors`` the optimizer's state; larger parts become
``model-00001-of-00004.safetensors`` ... and ``model.safetensors.index.json``, as Hugging Face's libraries expect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megatron_vilg.checkpoint.manifest import FILE_NAME, Manifest, find_damage, read_manifest
from megatron_vilg.checkpoint.safetensors_file import SafetensorsFile
from megatron_vilg.checkpoint.tensors import MODEL, TensorInfo, TensorSource, part_of
from megatron_vilg.errors import CheckpointError

FILE_BYTES = 2 << 30
"""Largest file of tensors, unless one tensor is larger."""
FORMAT = "canonical"
INDEX = ".safetensors.index.json"
_FILE = re.compile(r"(?P<part>[a-z_]+?)(-\d{5}-of-(?P<count>\d{5}))?\.safetensors")


class CanonicalSource(TensorSource):
    """A folder of whole tensors.

    Args:
        path: the folder.
        manifest: what it will say, while it is being written; None: read it.

    Raises:
        CheckpointError: it has no manifest, or files are missing or do not hold what the manifest says.
    """

    format = "canonical folder (safetensors)"

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        super().__init__(path)
        self.manifest = read_manifest(path) if manifest is None else manifest
        self._file_of: dict[str, tuple[SafetensorsFile, str]] = {}
        tensors: dict[str, TensorInfo] = {}
        files = self.manifest.files if manifest is None else [file.name for file in path.iterdir()]
        names = sorted(name for name in files if _FILE.fullmatch(name))
        for name in names:
            file = SafetensorsFile(self.descriptor(path / name), path / name)
            match = _FILE.fullmatch(name)
            assert match is not None
            if match["count"] and sum(n.startswith(f"{match['part']}-") for n in names) != int(match["count"]):
                raise CheckpointError(f"{path}: {name} is one of {int(match['count'])} files, the others are missing")
            for short, info in file.tensors.items():
                full = f"{match['part']}.{short}"
                if full in tensors:
                    raise CheckpointError(f"{path}: {full} is in two files")
                tensors[full] = info
                self._file_of[full] = file, short
        if not tensors:
            raise CheckpointError(f"{path}: no safetensors file of tensors in it")
        self.tensors = tensors
        require_tensors(path, self.manifest, tensors)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        file, short = self._file_of[name]
        return file.rows(short, start, stop)


class FileSource(TensorSource):
    """One safetensors file on its own."""

    format = "safetensors file"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.manifest = None
        self._file = SafetensorsFile(self.descriptor(path), path)
        self.tensors = {f"{MODEL}.{name}": info for name, info in self._file.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        return self._file.rows(name.removeprefix(f"{MODEL}."), start, stop)

    def listed_by(self) -> Manifest | None:
        """The manifest beside the file, if it lists it: without a digest a changed value cannot be told.

        Raises:
            CheckpointError: there is one that cannot be used.
        """
        folder = self.path.parent
        manifest = read_manifest(folder) if (folder / FILE_NAME).is_file() else None
        return manifest if manifest is not None and self.path.name in manifest.files else None

    def verify(self) -> list[str]:
        """Compare the file with its digest, where there is one."""
        try:
            manifest = self.listed_by()
        except CheckpointError as error:
            return [str(error)]
        return find_damage(self.path.parent, manifest, [self.path.name]) if manifest is not None else []


def require_tensors(path: Path, manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    """Compare names, shapes and element types with the manifest, if it lists them.

    Raises:
        CheckpointError: with every tensor that differs (the first twenty).
    """
    if not manifest.tensors:
        return
    problems = []
    for name in sorted(manifest.tensors.keys() | tensors.keys()):
        entry, info = manifest.tensors.get(name), tensors.get(name)
        if entry is None or info is None:
            problems.append(f"{name}: {'not in the manifest' if entry is None else 'missing'}")
        elif entry.shape != info.shape or entry.dtype != dtype_name(info):
            problems.append(
                f"{name}: {dtype_name(info)} {list(info.shape)}, manifest says {entry.dtype} {list(entry.shape)}"
            )
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{path}: does not hold what {FILE_NAME} says\n  " + "\n  ".join(problems[:20]) + more)


def dtype_name(info: TensorInfo) -> str:
    """``float32`` for ``torch.float32``."""
    return str(info.dtype).removeprefix("torch.")


def plan_files(
    names: Sequence[str], tensors: Mapping[str, TensorInfo], file_bytes: int = FILE_BYTES
) -> dict[str, list[str]]:
    """File name to the full names it holds, in the order given."""
    groups: dict[str, list[list[str]]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        part, size = part_of(name), tensors[name].num_bytes
        files = groups.setdefault(part, [[]])
        if files[-1] and sizes.get(part, 0) + size > file_bytes:
            files.append([])
            sizes[part] = 0
        files[-1].append(name)
        sizes[part] = sizes.get(part, 0) + size
    plan = {}
    for part, files in groups.items():
        for number, content in enumerate(files, 1):
            tail = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
            plan[f"{part}{tail}.safetensors"] = content
    return plan


def write_indices(folder: Path, plan: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo]) -> None:
    """Write the index of each part that takes several files."""
    parts = {part_of(names[0]) for names in plan.values() if names}
    for part in parts:
        files = {file: names for file, names in plan.items() if file.startswith(f"{part}-")}
        if not files:
            continue
        weight_map = {name.partition(".")[2]: file for file, names in files.items() for name in names}
        total = sum(tensors[name].num_bytes for names in files.values() for name in names)
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{part}{INDEX}").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
