"""A trained reranker as one folder: ``model.safetensors`` (feature network included), ``config.json``, a manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_vilg.checkpoint.export import load_model_folder, save_model_folder
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.checkpoint.sources import RERANKER
from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.dual_encoder import DualEncoder

FOLDER = "reranker"
"""Its name in a run folder, or in an exported one."""


def save_reranker(
    encoder: DualEncoder,
    folder: Path,
    *,
    tokenizers: Mapping[str, str],
    counters: Mapping[str, int | float | str] | None = None,
) -> Path:
    """Write a reranker; an older one of that name is replaced only when the new one is complete.

    Args:
        folder: where; its parent is created.
        tokenizers: digests of the tokenizers whose ids and pictures it was trained on, by name.
        counters: plain facts for the manifest, such as the quality reached.

    Raises:
        CheckpointError: the folder holds something else, or writing failed.
    """
    config = dataclasses.asdict(encoder.config)
    manifest = Manifest(
        kind=RERANKER,
        step=encoder.config.num_steps,
        model=config,
        tokenizers=tokenizers,
        text_vocab_size=encoder.pieces.num_embeddings,
        stream={"num_text_slots": encoder.places.num_embeddings},
        counters=counters or {},
    )
    return save_model_folder(folder, encoder.state_dict(), config, manifest)


def load_reranker(folder: Path) -> tuple[DualEncoder, Manifest]:
    """Read a reranker in evaluation mode, on the CPU, frozen, and what it belongs to.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, or holds something else.
    """
    manifest = read_manifest(folder)
    if manifest.kind != RERANKER:
        raise CheckpointError(f"{folder}: holds {manifest.kind!r}, not {RERANKER!r}; move it away, or name another run")
    values, weights = load_model_folder(folder)
    try:
        config = TypeAdapter(RerankerConfig).validate_python(values)
        encoder = DualEncoder(config, manifest.text_vocab_size, int(manifest.stream["num_text_slots"]))
        encoder.load_state_dict(weights)
    except (ValidationError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: its configuration does not fit this version of the package: {error}"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: weights do not fit the configuration beside them: {error}") from error
    return encoder.requires_grad_(False).eval(), manifest
