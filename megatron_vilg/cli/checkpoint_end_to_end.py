"""``vilg checkpoint convert`` to and from end-to-end runs: a starting point made of parts, and a run taken apart."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from typing import TYPE_CHECKING

from megatron_vilg.config.check import require
from megatron_vilg.config.load import COMMAND_LINE, Loaded, load_with_origins, write_run_folder_config
from megatron_vilg.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_vilg.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_vilg.checkpoint.tensors import TensorSource
    from megatron_vilg.checkpoint.transfer import Options

_TRAINING_ONLY = ("dropout", "embedding_gradient_shrink", "init_std")
"""Options of a model that change how it is trained, and not what its weights compute."""

_JOINT = ("reconstructor.enabled=true", "data.target_view_probability=0", "data.target_view_fall=0")
"""What the new run has whatever the old one had: a reconstructor, which learns the pictures themselves."""


def start_end_to_end(args: argparse.Namespace) -> int:
    """Write a run folder at step 0: the generator as it is, the tokenizer's decoder cloned, the mapping initialised.

    Needs memory for the model and its optimizer. The same weights for the same seed (``train.seed``).
    """
    import torch

    from megatron_vilg.checkpoint.files import sha256_of
    from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
    from megatron_vilg.checkpoint.manager import Checkpointer
    from megatron_vilg.checkpoint.manifest import TOKENIZERS, current_versions
    from megatron_vilg.checkpoint.new_folder import new_folder, require_outside
    from megatron_vilg.checkpoint.reshape import require_companions
    from megatron_vilg.checkpoint.sources import CHECKPOINT_FOLDER, companions, manifest_of, open_run
    from megatron_vilg.checkpoint.tensors import MODEL, part_of, read_whole
    from megatron_vilg.checkpoint.verify import problems_of, require_sound
    from megatron_vilg.train.end_to_end import EndToEndEngine

    def look(source: TensorSource) -> None:
        _new_run(args, source)

    with open_run(args.load_dir, look) as source:
        run = _new_run(args, source)
        require_companions(source, "pretrained")
        _, folders = companions(source)
        require_outside(args.save_dir, folders)
        require_sound(problems_of(source), source.path)
        engine = EndToEndEngine(_alone(run), torch.device("cpu"), load_image_tokenizer(folders["image_tokenizer"]))
        weights = (name for name in source.tensors if part_of(name) == MODEL)
        engine.model.load_state_dict({n.partition(".")[2]: read_whole(source, n) for n in weights}, strict=False)
        known = manifest_of(source)
    manifest = dataclasses.replace(
        known,
        step=0,
        samples_seen=0,
        format="",
        layout={},
        counters={},
        tensors={},
        source={"name": source.path.name, "step": str(known.step)},
        model=dataclasses.asdict(run.model),
        stream=dataclasses.asdict(run.model.spec),
        tokenizers={name: sha256_of(folders[name] / file) for name, file in TOKENIZERS.items()},
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
    from megatron_vilg.checkpoint.sources import open_run

    with open_run(args.load_dir) as source:
        counts = split_end_to_end(source, args.save_dir, options)
    shown = ", ".join(f"{name} ({count} tensors)" for name, count in counts.items())
    print(f"{args.save_dir}: {shown}, image_tokenizer; read back and equal to {source.path}")
    return 0


def _new_run(args: argparse.Namespace, source: TensorSource) -> RunConfig:
    """The options of the new run, from those beside the weights; says what is wrong before any weights are read."""
    from megatron_vilg.checkpoint.sources import CONFIG_NAME, config_file, manifest_of
    from megatron_vilg.generate.load import require_generator

    manifest = manifest_of(source)
    require_generator(source.path, manifest)
    file = config_file(source)
    if file is None:
        raise CheckpointError(
            f"{source.path}: no {CONFIG_NAME} beside it; end-to-end training starts from the run's own options"
        )
    known = load_with_origins(None, file).run.resolve()
    if known.reconstructor.enabled or any(name.startswith("model.reconstructor.") for name in source.tensors):
        raise CheckpointError(f"{args.load_dir}: has a reconstructor already; `vilg train` goes on with it")
    loaded = load_with_origins(None, file, [*_JOINT, *args.overrides])
    weights = ModelConfig(**manifest.model) if manifest.model else known.model
    return _run_of(loaded, weights, manifest.text_vocab_size or weights.text_vocab_size)


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
