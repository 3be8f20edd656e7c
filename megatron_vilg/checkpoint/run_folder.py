"""A run folder to train on from, made of weights (and optimizer state) in any form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_vilg.checkpoint.dcp_write import write_training_checkpoint
from megatron_vilg.checkpoint.new_folder import new_folder, require_outside
from megatron_vilg.checkpoint.reshape import chosen_names
from megatron_vilg.checkpoint.sources import CHECKPOINT_FOLDER, CONFIG_NAME, GENERATOR, companions, manifest_of
from megatron_vilg.checkpoint.tensors import MODEL, OPTIMIZER, TensorSource, part_of
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.errors import CheckpointError


def write_run_folder(source: TensorSource, folder: Path, *, options: Options | None = None) -> int:
    """Write ``checkpoints/step-N``, configuration and tokenizers: what ``vilg train --out`` resumes from.

    Returns:
        How many tensors the checkpoint holds.

    Raises:
        CheckpointError: the trainer could not go on from the source (no generator, no optimizer state, weights not in
            fp32), it is damaged, or writing failed. Then ``folder`` is not there.
    """
    names = trainable_names(source)
    config, extra = companions(source)
    require_outside(folder, extra)
    with new_folder(folder, sum(source.tensors[name].num_bytes for name in names)) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for name, path in extra.items():
            shutil.copytree(path, partial / name)
        step = f"step-{manifest_of(source).step:08d}"
        write_training_checkpoint(source, partial / CHECKPOINT_FOLDER / step, names, options)
    return len(names)


def trainable_names(source: TensorSource) -> list[str]:
    """Full names of the tensors that the trainer goes on from: all there are.

    Raises:
        CheckpointError: it cannot; says why.
    """
    kind = manifest_of(source).kind
    if kind != GENERATOR:
        raise CheckpointError(
            f"{source.path}: holds {kind!r}, and the trainer goes on with a generator only. Works: "
            f"with the run's {CONFIG_NAME} beside DeepSpeed's files, or a folder of a generator"
        )
    if all(part_of(name) != OPTIMIZER for name in source.tensors):
        raise CheckpointError(
            f"{source.path}: holds no optimizer state, without which the trainer does not go on. Works: the run "
            "itself, or what `merge --optimizer` made of it"
        )
    dtypes = {str(i.dtype) for n, i in source.tensors.items() if part_of(n) == MODEL and i.dtype.is_floating_point}
    if dtypes - {"torch.float32"}:
        raise CheckpointError(
            f"{source.path}: holds weights in {', '.join(sorted(dtypes))}, and the trainer keeps them in fp32. Works: "
            "the run itself, or what `merge --optimizer` made of it without --dtype"
        )
    return chosen_names(source, optimizer=True)
