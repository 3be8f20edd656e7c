"""Take an end-to-end run apart: generator, reconstructor and image tokenizer, each as a folder of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vilg.checkpoint.averages import Selected, as_exported
from megatron_vilg.checkpoint.canonical import FORMAT, CanonicalSource
from megatron_vilg.checkpoint.new_folder import new_folder, require_outside
from megatron_vilg.checkpoint.reshape import canonical_files, derived_manifest, write_folder
from megatron_vilg.checkpoint.sources import RECONSTRUCTOR, companions
from megatron_vilg.checkpoint.tensors import MODEL, TensorSource, in_order
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.errors import CheckpointError


def split_end_to_end(source: TensorSource, folder: Path, options: Options | None = None) -> dict[str, int]:
    """Write ``generator/`` (to draw from codes with), ``reconstructor/`` (mapping and decoder), ``image_tokenizer/``.

    Args:
        source: an end-to-end run's checkpoint or export, in any form.
        folder: must not exist.
        options: conversion, tolerance, progress.

    Returns:
        How many tensors each part has.

    Raises:
        CheckpointError: there is no reconstructor in it, or what belongs to it is missing, or writing failed.
    """
    options = options or Options()
    source = as_exported(source)
    prefix = f"{MODEL}.{RECONSTRUCTOR}."
    weights = [name for name in in_order(source.tensors) if name.startswith(f"{MODEL}.")]
    inside = {f"{MODEL}.{name.removeprefix(prefix)}": name for name in weights if name.startswith(prefix)}
    outside = {name: name for name in weights if not name.startswith(prefix)}
    if not inside or source.manifest is None:
        raise CheckpointError(f"{source.path}: no reconstructor in it (no weights {RECONSTRUCTOR}.*)")
    config, extra = companions(source)
    if "image_tokenizer" not in extra:
        raise CheckpointError(f"{source.path}: no image_tokenizer beside it. Works: copy it there from the run")
    alone = {**config, RECONSTRUCTOR: {**config.get(RECONSTRUCTOR, {}), "enabled": False}}
    kept = {key: config[key] for key in ("model", "image_tokenizer", RECONSTRUCTOR) if key in config}
    require_outside(folder, extra)
    size = sum(source.tensors[name].num_bytes for name in weights)
    with new_folder(folder, size) as partial:
        _write(Selected(source, outside, source.manifest), partial / "generator", options, alone, extra)
        identity = dataclasses.replace(source.manifest, kind=RECONSTRUCTOR)
        _write(Selected(source, inside, identity), partial / RECONSTRUCTOR, options, kept, {})
        shutil.copytree(extra["image_tokenizer"], partial / "image_tokenizer")
    return {"generator": len(outside), RECONSTRUCTOR: len(inside)}


def _write(
    source: Selected, folder: Path, options: Options, config: Mapping[str, Any], extra: Mapping[str, Path]
) -> None:
    names = in_order(source.tensors)
    files, _ = canonical_files(source.tensors, names, options, file_bytes=1 << 62)
    manifest = derived_manifest(source, names, options, format=FORMAT, layout={})
    write_folder(source, folder, files, names, manifest, CanonicalSource, options, config, extra)
