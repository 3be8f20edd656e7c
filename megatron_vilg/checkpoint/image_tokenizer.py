"""A trained image tokenizer as one folder: ``model.safetensors``, ``config.json``, ``manifest.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_vilg.checkpoint.export import WEIGHTS_NAME, load_model_folder, save_model_folder
from megatron_vilg.checkpoint.files import sha256_of
from megatron_vilg.checkpoint.manifest import ORIGIN, Manifest, read_manifest, read_sound_manifest
from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.tokenizers import AnyTokenizer, build_image_tokenizer

KIND = "image-tokenizer"
WORK_NAME = "image_tokenizer_training"
"""Folder beside a tokenizer with its training's checkpoints, metrics and sample pictures."""


def save_image_tokenizer(
    tokenizer: AnyTokenizer, folder: Path, *, step: int = 0, extra: Mapping[str, int | float | str] | None = None
) -> Path:
    """Write a tokenizer; an older one of that name is replaced only when the new one is complete.

    Args:
        tokenizer: codebook averages are saved too, so that training could go on.
        folder: where; its parent is created.
        step: finished optimizer steps.
        extra: further plain facts for the manifest, such as the quality reached.

    Raises:
        CheckpointError: the folder holds something else, or writing failed.
    """
    config = dataclasses.asdict(tokenizer.config)
    manifest = Manifest(
        kind=KIND,
        step=step,
        model=config,
        image_vocab_size=tokenizer.config.codebook_size,
        counters=dict(extra or {}),
    )
    return save_model_folder(folder, tokenizer.state_dict(), config, manifest)


def load_image_tokenizer(folder: Path) -> AnyTokenizer:
    """Read a tokenizer in evaluation mode, on the CPU, frozen.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, or holds something else.
    """
    _checked(folder, read_manifest(folder))
    values, weights = load_model_folder(folder)
    try:
        config = TypeAdapter(ImageTokenizerConfig).validate_python(values)
    except ValidationError as error:
        raise CheckpointError(
            f"{folder}: its configuration does not fit this version of the package: {error}"
        ) from error
    tokenizer = build_image_tokenizer(config)
    try:
        tokenizer.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: weights do not fit the configuration beside them: {error}") from error
    return tokenizer.requires_grad_(False).eval()


def image_tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the weights file, or of the one it was converted from bit by bit: what a token cache was made with.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, or holds something else.
    """
    manifest = _checked(folder, read_sound_manifest(folder))
    return manifest.source.get(ORIGIN) or sha256_of(folder / WEIGHTS_NAME)


def _checked(folder: Path, manifest: Manifest) -> Manifest:
    if manifest.kind != KIND:
        raise CheckpointError(
            f"{folder}: holds {manifest.kind!r}, not {KIND!r}; name the image_tokenizer folder of a run"
        )
    return manifest
