"""``vilg checkpoint convert`` to and from end-to-end runs: a starting point made of parts, and a run taken apart."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vilg.config.check import require
from megatron_vilg.config.load import COMMAND_LINE, RUN_FILE, Loaded, load_with_origins, write_run_folder_config
from megatron_vilg.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_vilg.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_vilg.checkpoint.transfer import Options

_TRAINING_ONLY = ("dropout", "embedding_gradient_shrink", "init_std")
"""Options of a model that change how it is trained, and not what its weights compute."""


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
    from megatron_vilg.generate.load import load_parts
    from megatron_vilg.train.end_to_end import EndToEndEngine

    config_file = _config_file(args.load_dir)
    known = load_with_origins(None, config_file).run.resolve()
    if known.reconstructor.enabled:
        raise CheckpointError(f"{args.load_dir}: has a reconstructor already; `vilg train` goes on with it")
    loaded = load_with_origins(None, config_file, ["reconstructor.enabled=true", *args.overrides])
    _run_of(loaded, known.model, known.model.text_vocab_size)  # says what is wrong before any weights are read
    parts = load_parts(args.load_dir, torch.device("cpu"))
    with open_source(parts.source) as source:
        _, folders = companions(source)
    run = _run_of(loaded, parts.config.model, parts.text_tokenizer.vocab_size)
    engine = EndToEndEngine(_alone(run), torch.device("cpu"), load_image_tokenizer(folders["image_tokenizer"]))
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
        model=dataclasses.asdict(run.model),
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


def _config_file(load_dir: Path) -> Path:
    """The configuration beside the weights that ``load_parts`` will read."""
    from megatron_vilg.checkpoint.export import holds_weights
    from megatron_vilg.checkpoint.manifest import read_manifest
    from megatron_vilg.generate.load import EXPORT_FOLDER, find_weights, require_generator

    exported = next((folder for folder in (load_dir, load_dir / EXPORT_FOLDER) if holds_weights(folder)), None)
    if exported is not None:
        require_generator(exported, read_manifest(exported))
    found = next((f / RUN_FILE for f in (exported, load_dir) if f is not None and (f / RUN_FILE).is_file()), None)
    if found is None:
        find_weights(load_dir)  # where there are none, that is what to say
        raise CheckpointError(f"{load_dir}: no {RUN_FILE}; end-to-end training starts from the run's own options")
    return found


def _run_of(loaded: Loaded, weights: ModelConfig, text_vocab_size: int) -> RunConfig:
    """The options of the new run, whose model is that of the weights.

    Raises:
        ConfigError: the command line asks for another model, or options break rules.
    """
    asked = dataclasses.asdict(loaded.run.model)
    asked = {name: value for name, value in asked.items() if loaded.origin(f"model.{name}") == COMMAND_LINE}
    problems = [
        f"model.{name}={value}: the weights are those of model.{name}={getattr(weights, name)}. Works: without it; "
        f"{', '.join(_TRAINING_ONLY)} of a model can change"
        for name, value in asked.items()
        if name not in _TRAINING_ONLY and value != getattr(weights, name)
    ]
    if not loaded.run.reconstructor.enabled:
        problems.append("reconstructor.enabled=False: is what --to end-to-end switches on. Works: without it")
    if problems:
        raise ConfigError(problems)
    model = dataclasses.replace(weights, **{name: asked[name] for name in _TRAINING_ONLY if name in asked})
    run = dataclasses.replace(loaded.run, model=model).resolve(text_vocab_size=text_vocab_size or None)
    require(_alone(run))
    return run


def _alone(run: RunConfig) -> RunConfig:
    """The same on one process, which is what there is here, however many trained or will."""
    return dataclasses.replace(run, parallel=ParallelConfig())


def _num_bytes(state: object) -> int:
    from torch import Tensor

    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_num_bytes, state.values())) if isinstance(state, dict) else 0
