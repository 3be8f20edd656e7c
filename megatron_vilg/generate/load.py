"""Find and read what drawing and captioning need, in a run folder or an exported one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_vilg.checkpoint.averages import as_exported
from megatron_vilg.checkpoint.canonical import CanonicalSource
from megatron_vilg.checkpoint.dcp_folder import DcpSource
from megatron_vilg.checkpoint.export import WEIGHTS_NAME, holds_weights, load_model_folder
from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import FILE_NAME, Manifest, read_manifest, read_sound_manifest
from megatron_vilg.checkpoint.reranker import FOLDER as RERANKER_FOLDER
from megatron_vilg.checkpoint.reranker import load_reranker
from megatron_vilg.checkpoint.restyler import FOLDER as RESTYLER_FOLDER
from megatron_vilg.checkpoint.restyler import load_restyler
from megatron_vilg.checkpoint.share import load_share
from megatron_vilg.checkpoint.sources import CHECKPOINT_FOLDER, EXPORT_FOLDER, GENERATOR, require_tokenizer
from megatron_vilg.config.load import RUN_FILE, read_run_folder_config
from megatron_vilg.config.schema import ModelConfig, RunConfig
from megatron_vilg.data.text import TextTokenizer
from megatron_vilg.errors import CheckpointError, ConfigError, DataError
from megatron_vilg.generate.restyle import Restyling
from megatron_vilg.generate.weights import use_bf16
from megatron_vilg.log import get_logger
from megatron_vilg.models.dual_encoder import DualEncoder
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.models.reconstructor import Reconstructor
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import Implementation, choose_implementation
from megatron_vilg.parallel.decoding import cut_for_decoding
from megatron_vilg.parallel.mesh import Mesh

log = get_logger(__name__)

TEXT_TOKENIZER_FOLDER, IMAGE_TOKENIZER_FOLDER = "text_tokenizer", "image_tokenizer"


@dataclass(frozen=True, slots=True)
class Parts:
    """A generator and what belongs to it, on one device."""

    model: ViLG
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    config: RunConfig
    source: Path
    """The exported folder or checkpoint that the weights came from."""
    step: int
    """Optimizer steps behind the weights."""
    reranker: DualEncoder | None
    """What ``vilg train-reranker`` left there."""
    restyling: Restyling | None
    """What ``vilg train-restyler`` left there."""


def load_parts(
    path: Path,
    device: torch.device,
    *,
    mesh: Mesh | None = None,
    in_bf16: bool = False,
    for_drawing: bool = True,
) -> Parts:
    """Read a run folder (its export if there is one, else its newest checkpoint) or an exported folder.

    Args:
        path: the folder.
        device: of this process.
        mesh: ranks that each read and hold a share of the generator, along ``tp``, and all make this call; None: this
            process has all of it.
        in_bf16: keep the transformer's weights in bf16.
        for_drawing: read reranker and restyler too, where there are any.

    Raises:
        CheckpointError: nothing of that kind is there, or it is incomplete, damaged, or does not fit together.
        ConfigError: the generator cannot be shared out among so many ranks.
    """
    mesh = mesh or Mesh(device)
    source = find_weights(path)
    folders = [source, path] if source != path else [path]
    if path.name == EXPORT_FOLDER:
        folders.append(path.resolve().parent)
    manifest = read_manifest(source)
    require_generator(source, manifest)
    newest = max(Checkpointer(path / CHECKPOINT_FOLDER, RunConfig().checkpoint).steps(), default=0)
    if newest > manifest.step:
        log.warning("%s holds step %d, but there is a checkpoint of step %d", source, manifest.step, newest)
    config = _read_config(source if (source / RUN_FILE).is_file() else path, manifest)
    _check_ranks(config.model, mesh.size("tp"))
    text_folder, image_folder = _beside(folders, TEXT_TOKENIZER_FOLDER), _beside(folders, IMAGE_TOKENIZER_FOLDER)
    try:
        text_tokenizer = TextTokenizer.load(text_folder)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    image_tokenizer = load_image_tokenizer(image_folder)
    _check_fit(source, config.model, text_tokenizer, image_tokenizer)
    for folder in (text_folder, image_folder):  # others of the same sizes draw nonsense
        require_tokenizer(folder, manifest)
    model = _load_model(source, config, device, mesh, in_bf16)
    reranker = None
    if for_drawing:
        reranker = _load_reranker(folders, config.model.num_text_slots, text_folder, image_folder)
    if reranker is not None:
        reranker = reranker.to(device)
    restyling = _load_restyler(folders, image_folder, device) if for_drawing else None
    return Parts(model, text_tokenizer, image_tokenizer.to(device), config, source, manifest.step, reranker, restyling)


def find_weights(path: Path) -> Path:
    """The exported folder or the checkpoint to read for ``path``.

    Raises:
        CheckpointError: there is neither; says what was looked for.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run folder (`vilg train --out RUN`) or an exported one")
    for folder in (path, path / EXPORT_FOLDER):
        if holds_weights(folder):
            return folder
    if path.resolve().parent.name == CHECKPOINT_FOLDER and (path / FILE_NAME).is_file():
        raise CheckpointError(
            f"{path}: is one checkpoint of a run. Works: the run folder, {path.resolve().parent.parent}, whose newest "
            f"one is taken, or what `vilg checkpoint merge --load-dir {path} --save-dir E` writes"
        )
    newest = Checkpointer(path / CHECKPOINT_FOLDER, RunConfig().checkpoint).latest()
    if newest is None:
        raise CheckpointError(
            f"{path}: no generator here. Looked for {WEIGHTS_NAME}, {EXPORT_FOLDER}/{WEIGHTS_NAME} and a complete "
            f"{CHECKPOINT_FOLDER}/step-*; name a run folder (`vilg train --out RUN`) or an exported one"
        )
    return newest


def require_generator(source: Path, manifest: Manifest) -> None:
    """Refuse weights of anything else.

    Raises:
        CheckpointError: says what they are.
    """
    if manifest.kind != GENERATOR:
        raise CheckpointError(f"{source}: holds {manifest.kind!r}, not a generator ({GENERATOR!r}); name a run folder")


def _read_config(folder: Path, manifest: Manifest) -> RunConfig:
    """The configuration, with the model's sizes as the manifest of the weights states them."""
    try:
        config = read_run_folder_config(folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its configuration cannot be read: {error}") from error
    try:
        return replace(config, model=ModelConfig(**manifest.model)) if manifest.model else config
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its manifest does not fit this version of the package: {error}") from error


def _beside(folders: list[Path], name: str) -> Path:
    """The first ``folder / name`` that exists."""
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    raise CheckpointError(
        f"{folders[0]}: the generator's {name} is missing; looked for "
        f"{', '.join(str(folder / name) for folder in folders)}. Copy it there from the run"
    )


def _load_reranker(folders: list[Path], num_text_slots: int, *tokenizers: Path) -> DualEncoder | None:
    """The reranker in the first of ``folders`` that has one, which must be of these tokenizers and as many slots."""
    found = next((folder / RERANKER_FOLDER for folder in folders if (folder / RERANKER_FOLDER).is_dir()), None)
    if found is None:
        return None
    reranker, manifest = load_reranker(found)
    for tokenizer in tokenizers:
        try:
            require_tokenizer(tokenizer, manifest)
        except CheckpointError as error:
            raise CheckpointError(
                f"{found}: was trained with other tokenizers ({error}). Works: vilg train-reranker --load RUN again, "
                "or move it away"
            ) from error
    if (slots := reranker.places.num_embeddings) != num_text_slots:
        raise CheckpointError(
            f"{found}: was trained on captions of {slots} text slots, the generator has {num_text_slots}. Works: vilg "
            "train-reranker --load RUN again, or move it away"
        )
    log.info("choices among drawings listen to %s too", found)
    return reranker


def _load_restyler(folders: list[Path], tokenizer: Path, device: torch.device) -> Restyling | None:
    """The restyler in the first of ``folders`` that has one, which must be of this image tokenizer."""
    found = next((folder / RESTYLER_FOLDER for folder in folders if (folder / RESTYLER_FOLDER).is_dir()), None)
    if found is None:
        return None
    model, library, manifest = load_restyler(found)
    try:
        require_tokenizer(tokenizer, manifest)
    except CheckpointError as error:
        raise CheckpointError(
            f"{found}: was trained with another image tokenizer ({error}). Works: vilg train-restyler --load RUN "
            "again, or move it away"
        ) from error
    log.info("things in manners that training never showed them in are drawn by %s", found)
    return Restyling(model.to(device), library)


def _check_fit(source: Path, model: ModelConfig, text: TextTokenizer, image: ImageTokenizer) -> None:
    pairs = (
        ("text tokens", model.text_vocab_size, "text tokenizer", text.vocab_size),
        ("image codes", model.image_vocab_size, "image tokenizer", image.config.codebook_size),
        ("codes per row", model.image_side, "image tokenizer", image.config.grid_side),
    )
    wrong = [
        f"{what}: the model has {mine}, the {owner} has {theirs}"
        for what, mine, owner, theirs in pairs
        if mine != theirs
    ]
    if wrong:
        raise CheckpointError(f"{source}: the tokenizers are not those of the model: " + "; ".join(wrong))


def _check_ranks(model: ModelConfig, ranks: int) -> None:
    heads = model.num_heads
    if heads % ranks:
        works = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError([f"--tensor={ranks}: must divide the generator's {heads} attention heads. Works: {works}."])


def _load_model(source: Path, config: RunConfig, device: torch.device, mesh: Mesh, in_bf16: bool) -> ViLG:
    implementation, reason = _implementation(config, device)
    log.info("attention over whole rows: %s (%s); decoding: one cache per pattern", implementation, reason)
    with torch.device("meta"):
        model = ViLG(config.model, implementation)
        if config.reconstructor.enabled:
            model.reconstructor = Reconstructor(config.reconstructor, config.model, config.image_tokenizer)
    is_shared = mesh.size("tp") > 1
    if is_shared:
        cut_for_decoding(model, mesh.axis("tp"))
    if in_bf16:
        use_bf16(model)
    model.to_empty(device=device)
    if is_shared or not holds_weights(source):
        _load_share(source, model, mesh)
    else:
        _, state = load_model_folder(source)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{source}: weights do not fit the configuration beside them: {error}") from error
    return model.requires_grad_(False).eval()


def _implementation(config: RunConfig, device: torch.device) -> tuple[Implementation, str]:
    """What the run was trained with, or where that does not run, what ``auto`` takes: results are the same."""
    side = config.model.image_side
    try:
        return choose_implementation(config.ops.attention, side, device)
    except ConfigError as error:
        implementation, reason = choose_implementation("auto", side, device)
        return implementation, f"{reason}; the run's {str(error).splitlines()[-1].strip()}"


def _load_share(source: Path, model: ViLG, mesh: Mesh) -> None:
    is_exported = holds_weights(source)
    if is_exported:  # a checkpoint's digests were compared when it was found
        _require_sound(source, mesh)
    # Both are read as data: torch's own reader of checkpoints would execute what is in their pickle.
    with CanonicalSource(source) if is_exported else DcpSource(source) as tensors:
        load_share(as_exported(tensors), model.state_dict(), ranks=mesh.size("tp"), rank=mesh.rank("tp"))
    if mesh.size("tp") > 1:
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        log.info("each of %d ranks holds %.1f MB of weights", mesh.size("tp"), held / 1e6)


def _require_sound(source: Path, mesh: Mesh) -> None:
    """Compare digests on the main rank, for all: each of them has to read everything."""
    problem = None
    if mesh.is_main:
        try:
            read_sound_manifest(source)
        except CheckpointError as error:
            problem = str(error)
    if problem := mesh.from_main(problem):
        raise CheckpointError(problem)
