"""Which format a folder is in, and what of a run lies beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_vilg.checkpoint.canonical import CanonicalSource, FileSource
from megatron_vilg.checkpoint.dcp_folder import METADATA, DcpSource
from megatron_vilg.checkpoint.deepspeed_folder import DeepSpeedSource, is_deepspeed
from megatron_vilg.checkpoint.export import holds_weights
from megatron_vilg.checkpoint.files import sha256_of
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import (
    FILE_NAME,
    ORIGIN,
    REMEDY,
    TOKENIZERS,
    Manifest,
    read_manifest,
    read_sound_manifest,
    require_own_step,
)
from megatron_vilg.checkpoint.rank_folder import FORMAT as RANKS
from megatron_vilg.checkpoint.rank_folder import RankSource
from megatron_vilg.checkpoint.tensors import TensorSource
from megatron_vilg.config.load import read_run_folder_config
from megatron_vilg.config.schema import ImageTokenizerConfig, RunConfig
from megatron_vilg.data.text import TextTokenizer
from megatron_vilg.errors import CheckpointError, ConfigError, DataError

CONFIG_NAME = "config.json"
GENERATOR, IMAGE_TOKENIZER, RERANKER, RESTYLER = "pretrain", "image-tokenizer", "reranker", "restyler"
RECONSTRUCTOR = "reconstructor"
"""First word of the names of a reconstructor's weights in the whole model, and the kind of its folder."""
CHECKPOINT_FOLDER, EXPORT_FOLDER = "checkpoints", "export"


def open_source(path: Path, look: Callable[[TensorSource], None] | None = None) -> TensorSource:
    """Open tensors in whatever of our formats they are; a run folder stands for its newest sound checkpoint.

    Args:
        path: what to open.
        look: of a run folder, called with the newest checkpoint before all of its files are read to see whether it is
            sound; raises if that shows already what cannot work.

    Raises:
        CheckpointError: there is nothing of the kind, or it is incomplete or damaged; says what was looked for.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return FileSource(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"{path}: is a file, and of files only *.safetensors are opened. Works: a folder; `vilg checkpoint convert "
            "--from taming` (llamagen, dalle) reads image tokenizers of others"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (path / CHECKPOINT_FOLDER).is_dir():
        checkpoints = Checkpointer(path / CHECKPOINT_FOLDER, RunConfig().checkpoint)
        if look is not None:
            _look_at_newest(checkpoints, look)
        newest = checkpoints.latest()
        if newest is None:
            raise CheckpointError(f"{path / CHECKPOINT_FOLDER}: no complete checkpoint in it")
        source = DcpSource(newest)
        source.is_verified = True
        return source
    if (path / METADATA).is_file():
        return DcpSource(path)
    if (path / FILE_NAME).is_file():
        return RankSource(path) if read_manifest(path).format == RANKS else CanonicalSource(path)
    if is_deepspeed(path):
        return DeepSpeedSource(path)
    if any(path.glob("mp_rank_*_*")) or any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: has no {FILE_NAME}, so it is not complete; write it again")
    raise CheckpointError(
        f"{path}: no tensors found. Looked for a run folder ({CHECKPOINT_FOLDER}/step-*), a checkpoint ({METADATA}), "
        f"a folder of ranks (mp_rank_*_*), a canonical folder (*.safetensors with {FILE_NAME}), and DeepSpeed's "
        "*_optim_states.pt"
    )


def open_run(path: Path, look: Callable[[TensorSource], None] | None = None) -> TensorSource:
    """:func:`open_source`, and a run folder that has no checkpoints stands for its export."""
    exported = path / EXPORT_FOLDER
    if not any((path / CHECKPOINT_FOLDER).glob("step-*")) and holds_weights(exported):
        return open_source(exported)
    return open_source(path, look)


def _look_at_newest(checkpoints: Checkpointer, look: Callable[[TensorSource], None]) -> None:
    steps = checkpoints.steps()
    if not steps:
        return
    try:
        source = DcpSource(checkpoints.path(steps[-1]))
    except CheckpointError:  # an older one will be taken
        return
    with source:
        look(source)


def manifest_of(source: TensorSource) -> Manifest:
    """What the source says about itself.

    Raises:
        CheckpointError: nothing, as a single file of weights does.
    """
    if source.manifest is None:
        raise CheckpointError(
            f"{source.path}: a file of weights alone does not say what they are. Works: a folder with {FILE_NAME}, "
            "which `convert --to safetensors` writes around its file; `inspect` and `verify` take the file, too"
        )
    return source.manifest


def open_newest(path: Path) -> TensorSource:
    """:func:`open_source` to judge by: a run folder stands for its newest checkpoint, never for an older one.

    Raises:
        CheckpointError: as there, or the newest checkpoint is damaged or has the name of another step; says which
            older ones are sound.
    """
    checkpoints = Checkpointer(path / CHECKPOINT_FOLDER, RunConfig().checkpoint)
    steps = checkpoints.steps()
    if not steps:
        return open_source(path)
    newest = checkpoints.path(steps[-1])
    try:
        require_own_step(newest, read_sound_manifest(newest))
    except CheckpointError as error:
        sound = [older.name for older in map(checkpoints.path, steps[:-1]) if _is_sound(older)]
        found = f"of the older ones are sound: {', '.join(sound)}" if sound else "no older one is sound"
        raise CheckpointError(f"{error}\n  {checkpoints.folder}: {found}") from error
    source = DcpSource(newest)
    source.is_verified = True
    return source


def _is_sound(folder: Path) -> bool:
    try:
        require_own_step(folder, read_sound_manifest(folder))
    except CheckpointError:
        return False
    return True


def companions(source: TensorSource) -> tuple[Mapping[str, Any], dict[str, Path]]:
    """The configuration that belongs to some weights, and the tokenizers that lie beside them.

    Returns:
        The content of ``config.json`` (of the manifest alone, where there is no such file), and each tokenizer folder
        that was found, by name.

    Raises:
        CheckpointError: the configuration or a tokenizer beside the weights is not the one they were made with, or
            is damaged or incomplete.
    """
    manifest = manifest_of(source)
    if manifest.kind == IMAGE_TOKENIZER:
        return manifest.model, {}
    folders = _folders_of(source.path)
    config: Mapping[str, Any] = {"model": dict(manifest.model)}
    if manifest.kind in (RERANKER, RESTYLER):  # its config.json is no run's
        config = manifest.model
    elif (file_of_run := config_file(source)) is not None:
        config = _read_config(file_of_run, source)
    found = {}
    for name in TOKENIZERS:
        beside = next((folder / name for folder in folders if (folder / name).is_dir()), None)
        if beside is not None:
            require_tokenizer(beside, manifest)
            found[name] = beside
    return config, found


def config_file(source: TensorSource) -> Path | None:
    """The run's ``config.json`` that belongs to some weights; None where there is none."""
    return next((file for f in _folders_of(source.path) if (file := f / CONFIG_NAME).is_file()), None)


def _folders_of(path: Path) -> list[Path]:
    """Where a run keeps what belongs to its weights: beside them, or above their folder of checkpoints."""
    path = path.resolve()
    above = [path.parent.parent] if path.parent.name == CHECKPOINT_FOLDER else []
    return [path, *above, path.parent]


def _read_config(path: Path, source: TensorSource) -> Mapping[str, Any]:
    """The content of a run's ``config.json``, whose model, pictures and reconstructor must be those of the weights."""
    manifest = manifest_of(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    sections = ("model", "image_tokenizer", RECONSTRUCTOR)
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in sections):
        raise CheckpointError(
            f"{path}: is no configuration of a run (an object with the objects {', '.join(sections)}). Works: the one "
            "that the run wrote, or none"
        )
    try:
        read_run_folder_config(path.parent)
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: is no configuration of a run that this version of the package reads, and lies where that of the "
            f"weights would. Works: the one that the run wrote, or none: {error}"
        ) from error
    model = content.get("model", {})
    differing = [
        f"{key}: {manifest.model[key]!r} in the manifest, {model[key]!r} in {CONFIG_NAME}"
        for key in sorted(manifest.model.keys() & model.keys())
        if json.loads(json.dumps(manifest.model[key])) != model[key]
    ]
    if manifest.kind == GENERATOR:
        if "image_tokenizer" in content:
            differing += _wrong_pictures(content["image_tokenizer"], manifest, CONFIG_NAME)
        has_one = any(name.startswith(f"model.{RECONSTRUCTOR}.") for name in source.tensors)
        if content.get(RECONSTRUCTOR, {}).get("enabled", has_one) != has_one:
            differing.append(f"{RECONSTRUCTOR}.enabled: {has_one} by the weights, {not has_one} in {CONFIG_NAME}")
    if differing:
        raise CheckpointError(
            f"{path}: is not the configuration of these weights. Works: the one that the run wrote, or none\n  "
            + "\n  ".join(differing)
        )
    return content


def _wrong_pictures(values: Mapping[str, Any], manifest: Manifest, where: str) -> list[str]:
    """How an image tokenizer's options contradict the codes that a generator draws."""
    try:
        config = TypeAdapter(ImageTokenizerConfig).validate_python(dict(values))
    except ValidationError as error:
        return [f"image_tokenizer: does not fit this version of the package: {error}"]
    pairs = (("image_side", config.grid_side), ("image_vocab_size", config.codebook_size))
    return [
        f"{key}: {manifest.model[key]} in the manifest, {found} by image_tokenizer in {where}"
        for key, found in pairs
        if manifest.model.get(key, 0) not in (0, found)
    ]


def require_tokenizer(folder: Path, manifest: Manifest) -> None:
    """A tokenizer beside weights must be complete by its own manifest, and the one that theirs names.

    Args:
        folder: named as in a run.
        manifest: of the weights.

    Raises:
        CheckpointError: it is not; says which one it should be.
    """
    file = folder / TOKENIZERS[folder.name]
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing, the tokenizer is incomplete")
    expected, found = manifest.tokenizers.get(folder.name), sha256_of(file)
    if expected not in (None, found) and expected != _origin_of(folder):
        raise CheckpointError(
            f"{file}: is not the tokenizer of these weights (SHA-256 {found}, their manifest says {expected}). "
            "Put the right one there, or move the wrong one away"
        )
    if folder.name == "image_tokenizer":
        own = read_sound_manifest(folder)
        if own.kind != IMAGE_TOKENIZER:
            raise CheckpointError(f"{folder}: holds {own.kind!r}, not {IMAGE_TOKENIZER!r}. {REMEDY}")
        if wrong := _wrong_pictures(own.model, manifest, FILE_NAME):
            raise CheckpointError(f"{folder}: is not the tokenizer of these weights: {'; '.join(wrong)}")
        return
    try:
        TextTokenizer.load(folder)
    except (DataError, AttributeError) as error:  # the latter: its manifest is JSON, but no object
        raise CheckpointError(f"{folder}: cannot be used ({error}). {REMEDY}") from error


def _origin_of(folder: Path) -> str | None:
    """SHA-256 of the weights file that an image tokenizer was converted from bit by bit; None where it was not."""
    is_converted = folder.name == "image_tokenizer" and (folder / FILE_NAME).is_file()
    return read_manifest(folder).source.get(ORIGIN) if is_converted else None
