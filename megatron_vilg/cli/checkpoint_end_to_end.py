"""``vilg checkpoint convert`` to and from end-to-end runs: a starting point made of parts, and a run taken apart."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vilg.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_vilg.checkpoint.transfer import Options


def start_end_to_end(args: argparse.Namespace) -> int:
    """Write a run folder at step 0: the generator as it is, the tokenizer's decoder cloned, the mapping initialised.

    Needs memory for the model and its optimizer. The same weights for the same seed (``train.seed``).
    """
    import torch

    from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer
    from megatron_vilg.checkpoint.manager import Checkpointer
    from megatron_vilg.checkpoint.manifest import current_versions, read_manifest
    from megatron_vilg.checkpoint.new_folder import new_folder
    from megatron_vilg.checkpoint.sources import CHECKPOINT_FOLDER, companions, open_source
    from megatron_vilg.config.check import require
    from megatron_vilg.config.load import load_run_config, write_run_folder_config
    from megatron_vilg.config.schema import ParallelConfig
    from megatron_vilg.generate.load import load_parts
    from megatron_vilg.train.end_to_end import EndToEndEngine

    parts = load_parts(args.load_dir, torch.device("cpu"))
    if parts.config.reconstructor.enabled:
        raise CheckpointError(f"{args.load_dir}: has a reconstructor already; `vilg train` goes on with it")
    with open_source(parts.source) as source:
        _, folders = companions(source)
    config_file = _config_file(parts.source, args.load_dir)
    run = load_run_config(None, config_file, ["reconstructor.enabled=true", *args.overrides])
    run = dataclasses.replace(run, model=parts.config.model).resolve(text_vocab_size=parts.text_tokenizer.vocab_size)
    alone = dataclasses.replace(run, parallel=ParallelConfig())  # here is one process, however many trained or will
    require(alone)
    engine = EndToEndEngine(alone, torch.device("cpu"), load_image_tokenizer(folders["image_tokenizer"]))
    engine.model.load_state_dict(parts.model.state_dict(), strict=False)
    manifest = dataclasses.replace(
        read_manifest(parts.source),
        step=0,
        samples_seen=0,
        format="",
        layout={},
        counters={},
        tensors={},
        source={"name": parts.source.name, "step": str(parts.step)},
        stream=dataclasses.asdict(run.model.spec),
        tokenizers={
            "text_tokenizer": parts.text_tokenizer.sha256,
            "image_tokenizer": image_tokenizer_hash(folders["image_tokenizer"]),
        },
        text_vocab_size=run.model.text_vocab_size,
        image_vocab_size=run.model.image_vocab_size,
        versions=current_versions(),
        files={},
    )
    state = engine.state_dict()
    with new_folder(args.save_dir, _num_bytes(state)) as partial:
        write_run_folder_config(run, partial)
        for name, folder in folders.items():
            shutil.copytree(folder, partial / name)
        Checkpointer(partial / CHECKPOINT_FOLDER, run.checkpoint).save(0, state, manifest)
    print(f"{args.save_dir}: starting point of end-to-end training; go on with `vilg train --out {args.save_dir} ...`")
    return 0


def split_run(args: argparse.Namespace, options: Options) -> int:
    """Write generator, reconstructor and image tokenizer of an end-to-end run apart from each other."""
    from megatron_vilg.checkpoint.parts import split_end_to_end
    from megatron_vilg.checkpoint.sources import open_source
    from megatron_vilg.generate.load import find_weights

    with open_source(find_weights(args.load_dir)) as source:
        counts = split_end_to_end(source, args.save_dir, options)
    shown = ", ".join(f"{name} ({count} tensors)" for name, count in counts.items())
    print(f"{args.save_dir}: {shown}, image_tokenizer; read back and equal to {source.path}")
    return 0


def _config_file(source: Path, load_dir: Path) -> Path:
    found = next((f for f in (source / "config.json", load_dir / "config.json") if f.is_file()), None)
    if found is None:
        raise CheckpointError(f"{load_dir}: no config.json; end-to-end training starts from the run's own options")
    return found


def _num_bytes(state: object) -> int:
    from torch import Tensor

    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_num_bytes, state.values())) if isinstance(state, dict) else 0
