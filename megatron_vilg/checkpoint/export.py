"""A model as one folder that can be passed on: whole tensors under stable names, no pickle.

``model.safetensors`` (weights), ``config.json`` (the resolved configuration), ``manifest.json`` (identity and digests),
and copies of what generating needs besides, such as the tokenizers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vilg.checkpoint.averages import AVERAGES, averages_in
from megatron_vilg.checkpoint.files import PARTIAL, publish, recover, remove, sync_tree, with_suffix
from megatron_vilg.checkpoint.manifest import FILE_NAME, Manifest, read_sound_manifest, write_manifest
from megatron_vilg.checkpoint.tensors import MODEL, part_of
from megatron_vilg.errors import CheckpointError, system_error

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_TENSORS = re.compile(r"(?P<part>[a-z_]+?)(-\d{5}-of-\d{5})?\.safetensors")


def save_model_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    manifest: Manifest,
    extra: Mapping[str, Path] | None = None,
) -> Path:
    """Write a model folder; an older model folder of that name is replaced only when the new one is complete.

    Args:
        folder: where; its parent is created.
        state: canonical name to whole tensor. Tensors that share memory are written separately.
        config: the resolved configuration as plain JSON values.
        manifest: identity; its list of files is filled in here.
        extra: further content, name in the folder to the file or folder to copy.

    Raises:
        CheckpointError: ``folder`` holds something else, an extra is missing or takes a reserved name,
            or writing failed. Then nothing was changed.
    """
    extra = extra or {}
    recover(folder)
    if folder.exists() and not (folder / FILE_NAME).is_file():
        raise CheckpointError(f"{folder}: exists and is no model folder (no {FILE_NAME}); choose another folder")
    for name, source in extra.items():
        if name in (WEIGHTS_NAME, CONFIG_NAME, FILE_NAME):
            raise CheckpointError(f"extra {name!r}: the name is reserved")
        if not source.exists():
            raise CheckpointError(f"extra {name!r}: {source} does not exist")
    partial = with_suffix(folder, PARTIAL)
    try:
        if partial.exists():
            remove(partial)
        partial.mkdir(parents=True)
        save_file(_apart(state), partial / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(config, ensure_ascii=False, indent=1)
        (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        # safetensors makes files that nobody else may read, whatever the umask says.
        (partial / WEIGHTS_NAME).chmod((partial / CONFIG_NAME).stat().st_mode)
        for name, source in extra.items():
            if source.is_dir():
                shutil.copytree(source, partial / name)
            else:
                shutil.copyfile(source, partial / name)
        sync_tree(partial)
        write_manifest(partial, manifest)
        publish(partial, folder)
    except (OSError, SafetensorError) as error:
        if partial.exists():
            remove(partial)
        told = system_error(error) or error
        raise CheckpointError(f"{folder}: cannot be written ({type(told).__name__}: {told})") from error
    return folder


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own as safetensors wants it; what is so already is not copied."""
    sharers = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    return {
        name: tensor.detach().to("cpu", copy=sharers[tensor.untyped_storage().data_ptr()] > 1).contiguous()
        for name, tensor in state.items()
    }


def holds_weights(folder: Path) -> bool:
    """Whether there is a model folder, be it of one file of weights or of several."""
    return (folder / WEIGHTS_NAME).is_file() or (folder / f"{WEIGHTS_NAME}.index.json").is_file()


def load_model_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model folder after checking every file against its manifest.

    Returns:
        The configuration and the tensors by canonical name, on the CPU: averaged ones, where the folder has any.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
    """
    manifest = read_sound_manifest(folder)
    files = {name: match["part"] for name in manifest.files if (match := _TENSORS.fullmatch(name))}
    weights = [name for name, part in files.items() if part == MODEL]
    missing = [
        name for name, there in ((WEIGHTS_NAME, weights), (CONFIG_NAME, CONFIG_NAME in manifest.files)) if not there
    ]
    if missing:
        raise CheckpointError(f"{folder}: no model folder, its manifest lists no {' and no '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        found = {
            f"{part}.{name}": tensor
            for file, part in files.items()
            if part == MODEL or part in AVERAGES
            for name, tensor in load_file(folder / file).items()
        }
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    averages = averages_in(found)
    names = [name for name in found if part_of(name) == MODEL]
    return config, {name.partition(".")[2]: found[averages.get(name, name)] for name in names}
