"""A run folder to train on from, made of weights (and optimizer state) in any form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_vilg.checkpoint.dcp_write import write_training_checkpoint
from megatron_vilg.checkpoint.new_folder import new_folder
from megatron_vilg.checkpoint.reshape import chosen_names
from megatron_vilg.checkpoint.sources import CHECKPOINT_FOLDER, CONFIG_NAME, companions
from megatron_vilg.checkpoint.tensors import TensorSource
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.errors import CheckpointError


def write_run_folder(source: TensorSource, folder: Path, *, optimizer: bool, options: Options | None = None) -> int:
    """Write ``checkpoints/step-N``, configuration and tokenizers: what ``vilg train --out`` resumes from.

    Returns:
        How many tensors the checkpoint holds.

    Raises:
        CheckpointError: the source is damaged or says not what it is, or writing failed. Then ``folder`` is not there.
    """
    if source.manifest is None:
        raise CheckpointError(f"{source.path}: has no manifest that says what it is; convert it first")
    names = chosen_names(source, optimizer=optimizer)
    config, extra = companions(source)
    with new_folder(folder, sum(source.tensors[name].num_bytes for name in names)) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for name, path in extra.items():
            shutil.copytree(path, partial / name)
        step = f"step-{source.manifest.step:08d}"
        write_training_checkpoint(source, partial / CHECKPOINT_FOLDER / step, names, options)
    return len(names)
