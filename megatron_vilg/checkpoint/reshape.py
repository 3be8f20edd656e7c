"""Merge any checkpoint into whole tensors, and cut whole tensors for any layout: on the CPU, no process group."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vilg.checkpoint.averages import as_exported
from megatron_vilg.checkpoint.canonical import (
    FILE_BYTES,
    FORMAT,
    CanonicalSource,
    dtype_name,
    plan_files,
    write_indices,
)
from megatron_vilg.checkpoint.export import WEIGHTS_NAME
from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash
from megatron_vilg.checkpoint.layout import Layout, check_layout, cut_of
from megatron_vilg.checkpoint.manifest import (
    FILE_NAME,
    ORIGIN,
    TOKENIZERS,
    Manifest,
    TensorEntry,
    current_versions,
    write_manifest,
)
from megatron_vilg.checkpoint.new_folder import Background, new_folder, require_outside
from megatron_vilg.checkpoint.rank_folder import FORMAT as RANKS
from megatron_vilg.checkpoint.rank_folder import RankSource
from megatron_vilg.checkpoint.sources import CONFIG_NAME, IMAGE_TOKENIZER, companions, manifest_of
from megatron_vilg.checkpoint.tensors import MODEL, TensorInfo, TensorSource, in_order, parameter_of, part_of
from megatron_vilg.checkpoint.transfer import Files, Options, converted, require_equal, write_files
from megatron_vilg.checkpoint.verify import require_sound, wrong_names
from megatron_vilg.errors import CheckpointError

Opener = Callable[[Path, Manifest], TensorSource]


def chosen_names(source: TensorSource, *, optimizer: bool) -> list[str]:
    """Full names of the tensors to copy, in the order of files.

    Raises:
        CheckpointError: there are no weights, or no optimizer state although it was asked for; nothing says what they
            are; or they are not what the manifest describes, or, where there is none (DeepSpeed's), the configuration
            beside them.
    """
    manifest = manifest_of(source)
    names = [name for name in in_order(source.tensors) if optimizer or part_of(name) == MODEL]
    if not any(part_of(name) == MODEL for name in names):
        raise CheckpointError(f"{source.path}: no weights in it")
    if optimizer and all(part_of(name) == MODEL for name in names):
        raise CheckpointError(f"{source.path}: holds weights only, no optimizer state. Works: without --optimizer")
    if not (source.path / FILE_NAME).is_file():
        what = f"{source.path}: does not fit its configuration; is the {CONFIG_NAME} beside it the one of its run?"
        require_sound(wrong_names(manifest, source.tensors), what)
    elif not manifest.tensors:  # a list of tensors was compared when the folder was opened
        require_sound(wrong_names(manifest, source.tensors), f"{source.path}: is not the model of its {FILE_NAME}")
    return names


def merge(
    source: TensorSource,
    folder: Path,
    *,
    optimizer: bool = False,
    options: Options | None = None,
    file_bytes: int = FILE_BYTES,
) -> Manifest:
    """Write whole tensors under canonical names, with configuration and tokenizers where they lie beside the source.

    Args:
        source: any checkpoint with a manifest.
        folder: must not exist.
        optimizer: whether everything besides the weights is written too; without it the weights are the averaged ones
            where the run averages any, as it exports them.
        options: conversion, tolerance, progress.
        file_bytes: largest file.

    Raises:
        CheckpointError: the source is damaged or incomplete, or writing failed. Then ``folder`` is not there.
    """
    options = options or Options()
    source = source if optimizer else as_exported(source)
    names = chosen_names(source, optimizer=optimizer)
    files, plan = canonical_files(source.tensors, names, options, file_bytes)
    config, extra = companions(source)

    def finish(partial: Path) -> None:
        write_indices(partial, plan, {name: converted(name, source.tensors[name], options) for name in names})

    manifest = derived_manifest(source, names, options, format=FORMAT, layout={})
    return write_folder(source, folder, files, names, manifest, CanonicalSource, options, config, extra, finish)


ONE_FILE = 1 << 62
"""More bytes than any model has: everything in one file."""


def convert(source: TensorSource, folder: Path, to: str, *, optimizer: bool = False, options: Options) -> Manifest:
    """Write a folder to share.

    Args:
        source: a generator or an image tokenizer in any form, with a manifest.
        folder: must not exist.
        to: ``vilg``, as :func:`merge`; ``safetensors``: all weights in one file, which carries the configuration in
            its header; ``pretrained``: weights, configuration and both tokenizers, all that drawing needs.
        optimizer: with ``vilg``, whether everything besides the weights is written too.
        options: conversion, tolerance, progress.

    Raises:
        CheckpointError: as :func:`merge`, or a tokenizer is missing for ``pretrained``.
    """
    require_companions(source, to)
    file_bytes = ONE_FILE if to == "safetensors" else FILE_BYTES
    return merge(source, folder, optimizer=optimizer and to == "vilg", options=options, file_bytes=file_bytes)


def require_companions(source: TensorSource, to: str) -> None:
    """Refuse to share what lacks something, as :func:`convert` does.

    Raises:
        CheckpointError: as :func:`sources.companions`, or a tokenizer is missing for ``pretrained``.
    """
    _, found = companions(source)
    missing = [name for name in TOKENIZERS if name not in found]
    if to == "pretrained" and missing and manifest_of(source).kind != IMAGE_TOKENIZER:
        raise CheckpointError(
            f"{source.path}: no {' and no '.join(missing)} beside it, and without them nobody can draw. "
            "Works: copy them there from the run, or --to vilg"
        )


def canonical_files(
    tensors: Mapping[str, TensorInfo], names: Sequence[str], options: Options, file_bytes: int = FILE_BYTES
) -> tuple[Files, dict[str, list[str]]]:
    """What each canonical file will hold; needs shapes only."""
    stored = {name: converted(name, tensors[name], options) for name in names}
    plan = plan_files(names, stored, file_bytes)
    files = Files()
    for file, content in plan.items():
        for name in content:
            files.add(file, name, stored[name])
    return files, plan


def shard(
    source: TensorSource,
    folder: Path,
    tensor: int,
    pipeline: int,
    *,
    optimizer: bool = False,
    options: Options | None = None,
) -> Manifest:
    """Write one folder for each rank of a tensor x pipeline layout.

    Raises:
        CheckpointError: the layout cannot hold the model, the source is damaged, or writing failed. Then ``folder``
            is not there.
    """
    options = options or Options()
    source = source if optimizer else as_exported(source)
    names = chosen_names(source, optimizer=optimizer)
    layout, cuts = rank_layout(manifest_of(source), source.tensors, names, tensor, pipeline)
    files = rank_files(source.tensors, names, layout, cuts, options)
    config, extra = companions(source)
    manifest = derived_manifest(source, names, options, format=RANKS, layout=dataclasses.asdict(layout), cuts=cuts)
    return write_folder(source, folder, files, names, manifest, RankSource, options, config, extra)


def rank_layout(
    manifest: Manifest, tensors: Mapping[str, TensorInfo], names: Sequence[str], tensor: int, pipeline: int
) -> tuple[Layout, dict[str, int]]:
    """The layout of a model for so many ranks, and where each tensor that is cut is cut.

    Raises:
        CheckpointError: such a layout cannot hold the model, or the manifest describes no generator.
    """
    model = manifest.model
    if "num_layers" not in model or "num_heads" not in model:
        raise CheckpointError(f"holds {manifest.kind!r}, which has no layers to share out; generators have")
    layout = Layout(tensor, pipeline, int(model["num_layers"]))
    found = {name: cut_of(name, tensors[name], tensors.get(f"{MODEL}.{parameter_of(name)}")) for name in names}
    cuts = {name: dim for name, dim in found.items() if dim is not None}
    check_layout(layout, int(model["num_heads"]), tensors, cuts)
    return layout, cuts


def rank_files(
    tensors: Mapping[str, TensorInfo], names: Sequence[str], layout: Layout, cuts: Mapping[str, int], options: Options
) -> Files:
    """What each rank's files will hold; needs shapes only."""
    files = Files()
    for name in names:
        info = converted(name, tensors[name], options)
        stage = layout.stage_of(name)
        for rank, part in enumerate(layout.parts(name, info, cuts.get(name))):
            files.add(f"{layout.folder(rank, stage)}/{part_of(name)}.safetensors", name, info, part)
    return files


def derived_manifest(
    source: TensorSource,
    names: Sequence[str],
    options: Options,
    *,
    format: str,
    layout: Mapping[str, int],
    cuts: Mapping[str, int] | None = None,
) -> Manifest:
    """The manifest of a copy of ``source``, without its files."""
    cuts = cuts or {}
    stored = {name: converted(name, source.tensors[name], options) for name in names}
    base = manifest_of(source)
    origin = {"name": source.path.resolve().name, "format": source.format, **dict(base.versions)}
    is_same = all(info.dtype == source.tensors[name].dtype for name, info in stored.items())
    if base.kind == IMAGE_TOKENIZER and is_same and (source.path / WEIGHTS_NAME).is_file():
        origin[ORIGIN] = image_tokenizer_hash(source.path)
    return dataclasses.replace(
        base,
        layout=layout,
        format=format,
        source=origin,
        tensors={
            name: TensorEntry(shape=info.shape, dtype=dtype_name(info), cut=cuts.get(name))
            for name, info in stored.items()
        },
        versions=current_versions(),
        files={},
    )


def write_folder(
    source: TensorSource,
    folder: Path,
    files: Files,
    names: Sequence[str],
    manifest: Manifest,
    opener: Opener,
    options: Options,
    config: Mapping[str, Any],
    extra: Mapping[str, Path],
    finish: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write, read back, compare, complete with the manifest, rename.

    Raises:
        CheckpointError: something is wrong with the source, the disk or the result. Then ``folder`` is not there.
    """
    require_outside(folder, extra)
    more = sum(file.stat().st_size for path in extra.values() for file in path.rglob("*") if file.is_file())
    with new_folder(folder, files.num_bytes + more) as partial:
        background = Background(partial)
        try:
            background.check_source(source)
            text = json.dumps(config, ensure_ascii=False, indent=1)
            metadata = {"kind": manifest.kind, "step": str(manifest.step), "config": text}
            write_files(source, files, partial, background, options, metadata)
            (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
            for name, path in extra.items():
                shutil.copytree(path, partial / name)
            if finish is not None:
                finish(partial)
            with opener(partial, manifest) as result:
                require_equal(source, result, names, options)
            known = background.finish(source.path)
        finally:
            background.close()
        return write_manifest(partial, manifest, known)
