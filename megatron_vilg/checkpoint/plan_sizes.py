"""Canonical manifest and shard plan of a model that need not exist: names, shapes and bytes, no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from megatron_vilg.checkpoint.canonical import FORMAT, dtype_name
from megatron_vilg.checkpoint.describe import tree_lines
from megatron_vilg.checkpoint.manifest import Manifest, TensorEntry
from megatron_vilg.checkpoint.new_folder import gigabytes
from megatron_vilg.checkpoint.reshape import canonical_files, rank_files, rank_layout
from megatron_vilg.checkpoint.tensors import MODEL, MOMENTUM_SLOT, OPTIMIZER, TensorInfo, in_order
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.cost import is_hidden_matrix
from megatron_vilg.models.vilg import ViLG

ADAM = ("exp_avg", "exp_avg_sq")


def canonical_tensors(run: RunConfig) -> dict[str, TensorInfo]:
    """Weights and optimizer state of a configuration by full name, moments not quantised; every size must be known.

    Raises:
        ValueError: the vocabulary of the text tokenizer is not known.
    """
    with torch.device("meta"):
        model = ViLG(run.model)
    tensors = {f"{MODEL}.{name}": _info(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if run.optim.name == "muon" and is_hidden_matrix(name, parameter.ndim):
            tensors[f"{OPTIMIZER}.{MOMENTUM_SLOT}.{name}"] = _info(parameter)
            continue
        tensors |= {f"{OPTIMIZER}.{slot}.{name}": _info(parameter) for slot in ADAM}
        tensors[f"{OPTIMIZER}.step.{name}"] = TensorInfo((), torch.float32)
    return tensors


def _info(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def planned(run: RunConfig, sizes: tuple[int | None, int | None], *, fold: bool) -> tuple[list[str], dict[str, Any]]:
    """Canonical files and, for ``sizes`` tensor x pipeline, each rank's files.

    Returns:
        Lines for people, and the same as plain data.
    """
    run = run.resolve()
    if not run.model.text_vocab_size:
        run = run.resolve(text_vocab_size=run.text_tokenizer.vocab_size)
    tensors = canonical_tensors(run)
    names = in_order(tensors)
    _, plan = canonical_files(tensors, names, Options())
    manifest = Manifest(
        kind="pretrain",
        format=FORMAT,
        model=dataclasses.asdict(run.model),
        stream=dataclasses.asdict(run.model.spec),
        text_vocab_size=run.model.text_vocab_size,
        image_vocab_size=run.model.image_vocab_size,
        tensors={name: TensorEntry(shape=info.shape, dtype=dtype_name(info)) for name, info in tensors.items()},
    )
    found: dict[str, Any] = {
        "manifest": dataclasses.asdict(manifest),
        "files": {file: sum(tensors[name].num_bytes for name in held) for file, held in plan.items()},
    }
    weights = {name: info for name, info in tensors.items() if name.startswith(f"{MODEL}.")}
    lines = [*tree_lines(weights, fold=fold), "", *_totals(tensors)]
    lines += [f"{file:44} {gigabytes(size)}" for file, size in found["files"].items()]
    tensor, pipeline = sizes
    if tensor is not None and pipeline is not None:
        layout, cuts = rank_layout(manifest, tensors, names, tensor, pipeline)
        files = rank_files(tensors, names, layout, cuts, Options())
        found["layout"] = dataclasses.asdict(layout)
        found["ranks"] = {
            file: sum(info.num_bytes for info in held.values()) for file, held in sorted(files.content.items())
        }
        lines += ["", *(f"{file:44} {gigabytes(size)}" for file, size in found["ranks"].items())]
    return lines, found


def _totals(tensors: dict[str, TensorInfo]) -> Iterator[str]:
    for part, what in ((MODEL, "weights"), (OPTIMIZER, "optimizer state")):
        infos = [info for name, info in tensors.items() if name.startswith(f"{part}.")]
        numbers = sum(info.numel for info in infos)
        yield f"{what}: {len(infos)} tensors, {numbers:,} numbers, {gigabytes(sum(i.num_bytes for i in infos))}"
