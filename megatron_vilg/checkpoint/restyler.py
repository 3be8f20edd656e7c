"""A trained restyler as one folder: ``model.safetensors`` (its library included), ``config.json``, a manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from megatron_vilg.checkpoint.export import load_model_folder, save_model_folder
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.checkpoint.sources import RESTYLER
from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.data.library import Library
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.restyler import Restyler

FOLDER = "restyler"
"""Its name in a run folder, or in an exported one."""
_LIBRARY = "library."
_NAMES = ("manners", "things", "manner_words", "thing_words")
_ARRAYS = ("thing", "manner", "codes")


def save_restyler(
    model: Restyler, library: Library, folder: Path, *, image_tokenizer: str, counters: Mapping[str, float]
) -> Path:
    """Write a restyler; an older one of that name is replaced only when the new one is complete.

    Args:
        folder: where; its parent is created.
        image_tokenizer: digest of the image tokenizer whose codes it draws.
        counters: plain facts for the manifest, such as the quality reached.

    Raises:
        CheckpointError: the folder holds something else, or writing failed.
    """
    options = dataclasses.asdict(model.config)
    config = {"restyler": options, "library": {name: getattr(library, name) for name in _NAMES}}
    manifest = Manifest(
        kind=RESTYLER,
        step=model.config.num_steps,
        model=options,
        tokenizers={"image_tokenizer": image_tokenizer},
        image_vocab_size=model.hidden_code,
        stream={
            "image_side": model.side,
            "codebook_dim": model.codebook.shape[1],
            "num_manners": model.num_manners,
            "num_pictures": len(library),
        },
        counters=counters,
    )
    arrays = {f"{_LIBRARY}{name}": _tensor(getattr(library, name)) for name in _ARRAYS}
    return save_model_folder(folder, model.state_dict() | arrays, config, manifest)


def load_restyler(folder: Path) -> tuple[Restyler, Library, Manifest]:
    """Read a restyler in evaluation mode, on the CPU, frozen, its library, and what it belongs to.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, or holds something else.
    """
    manifest = read_manifest(folder)
    if manifest.kind != RESTYLER:
        raise CheckpointError(f"{folder}: holds {manifest.kind!r}, not {RESTYLER!r}; move it away, or name another run")
    values, weights = load_model_folder(folder)
    try:
        config = TypeAdapter(RestylerConfig).validate_python(values["restyler"])
        arrays = {name: weights.pop(f"{_LIBRARY}{name}").numpy() for name in _ARRAYS}
        library = _library(values["library"], arrays)
        model = _layout(config, manifest)
        model.load_state_dict(weights)
    except (ValidationError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: its configuration does not fit this version of the package: {error}"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: weights do not fit the configuration beside them: {error}") from error
    return model.requires_grad_(False).eval(), library, manifest


def expected_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of such a folder, as its manifest implies.

    Raises:
        KeyError, ValueError: the manifest lacks something, or its configuration is none of this version.
    """
    config = TypeAdapter(RestylerConfig).validate_python(dict(manifest.model))
    with torch.device("meta"):
        model = _layout(config, manifest)
    count = int(manifest.stream["num_pictures"])
    arrays = {"thing": (count,), "manner": (count,), "codes": (count, model.num_codes)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes | {f"{_LIBRARY}{name}": shape for name, shape in arrays.items()}


def _layout(config: RestylerConfig, manifest: Manifest) -> Restyler:
    """A restyler whose weights are still to come."""
    sizes = manifest.stream
    codebook = torch.zeros(manifest.image_vocab_size, int(sizes["codebook_dim"]))
    return Restyler(config, codebook, int(sizes["image_side"]), int(sizes["num_manners"]))


def _tensor(values: np.ndarray) -> torch.Tensor:
    """In fp32, as the tools want all tensors of a folder: it holds such numbers exactly, up to 16 million."""
    return torch.from_numpy(values.astype(np.float32))


def _library(names: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Library:
    return Library(
        manners=tuple(names["manners"]),
        things=tuple(names["things"]),
        manner_words=tuple(map(tuple, names["manner_words"])),
        thing_words=tuple(map(tuple, names["thing_words"])),
        thing=arrays["thing"].astype(np.int64),
        manner=arrays["manner"].astype(np.int64),
        codes=arrays["codes"].astype(np.uint16),
    )
