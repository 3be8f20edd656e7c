"""Tokenizers that a run is given or has already: refused if they do not fit it, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_vilg.checkpoint.files import PARTIAL, publish, remove, with_suffix
from megatron_vilg.checkpoint.image_tokenizer import KIND, WORK_NAME, image_tokenizer_hash
from megatron_vilg.checkpoint.manifest import FILE_NAME, read_manifest
from megatron_vilg.config.load import dump_run_config
from megatron_vilg.config.schema import ImageTokenizerConfig, RunConfig
from megatron_vilg.data.text import MANIFEST_FILE as TEXT_MANIFEST
from megatron_vilg.data.text import MODEL_FILE as TEXT_MODEL
from megatron_vilg.data.text import TextTokenizer
from megatron_vilg.errors import CheckpointError, ConfigError, DataError
from megatron_vilg.log import get_logger

log = get_logger(__name__)
TEXT_TOKENIZER = "text_tokenizer"
IMAGE_TOKENIZER = "image_tokenizer"
SECONDS = "seconds.json"
"""File of the seconds of the stages that a run has done itself."""
_HABITS = ("log_every", "picture_every", "checkpoint_every")
"""Options of the tokenizer's training that change nothing about its weights."""
_DECODER = (
    "kind",
    "patch",
    "channels",
    "channel_multipliers",
    "num_res_blocks",
    "attention_levels",
    "latent_channels",
    "codebook_dim",
)
"""What gives a decoder its shape, in both kinds of tokenizer."""


_KINDS = {
    TEXT_TOKENIZER: "a text tokenizer",
    IMAGE_TOKENIZER: "an image tokenizer",
    "run": "the folder of a run or of an exported model",
    "tokens": "a token cache",
    "model": "a folder of other weights",
}
"""What a folder may be that was given as a tokenizer, for messages."""


def read_seconds(out: Path) -> dict[str, float]:
    """What the file says, by stage; nothing, with a warning, if it is damaged: no run shall end for its timings."""
    path = out / SECONDS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(stage): float(seconds) for stage, seconds in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s: cannot be read (%s); the seconds of earlier stages do not count", path, error)
        return {}


def settle_tokenizers(run: RunConfig, out: Path, given: Mapping[str, Path | None]) -> None:
    """Check the tokenizers that were given and those of the run folder, then copy what it has not yet.

    A tokenizer that was given must have the sizes of ``run``, and be the run's own where that is there already. One
    that the run itself has trained must have been trained with the options of ``run``, ``precision=auto`` and how often
    something is logged aside. Whether it was trained on the same pictures is not asked: that would take reading all of
    them at each start.

    Args:
        run: checked configuration, ``precision`` as it was asked for.
        out: run folder; nothing in it is changed if anything is wrong.
        given: folder of the tokenizer called ``text_tokenizer`` and ``image_tokenizer``; None: none was given.

    Raises:
        ConfigError: a tokenizer is missing, of another kind, damaged, of other sizes or settings, or not the run's own.
        DataError, CheckpointError: a tokenizer in the run folder is damaged, or copying failed.
    """
    problems: list[str] = []
    for name, source in given.items():
        problems += _problems(run, out, name, source)
    if problems:
        raise ConfigError(problems)
    for name, source in given.items():
        if source is not None and not (out / name).is_dir():
            _copy(source, out / name)


def _problems(run: RunConfig, out: Path, name: str, source: Path | None) -> list[str]:
    target, given = out / name, f"{_flag(name)}={source}"
    if target.is_dir():
        if source is None:
            return _other_settings(run, out, name) or _other_sizes(run, target, name, str(target))
        if not source.is_dir():
            log.warning("%s: is not there (any more); the run goes on with %s, which it has", given, target)
        elif (theirs := _identity(name, source)) != (own := _identity(name, target)):
            return [
                f"{given}: is not the tokenizer that this run has, {target} (SHA-256 {theirs[:12]}, there {own[:12]}). "
                "Works: leave the option out, or another --out"
            ]
        return _other_sizes(run, target, name, str(target))
    if source is None:
        return []
    return unusable_tokenizer(name, source) or _other_sizes(run, source, name, given)


def unusable_tokenizer(name: str, source: Path) -> list[str]:
    """What is wrong with the tokenizer that an option names, in one line: nothing is there, something else, or damage.

    Args:
        name: ``text_tokenizer`` or ``image_tokenizer``; the option is called alike.
        source: the folder.
    """
    given = f"{_flag(name)}={source}"
    inside = f", for example {source / name}" if (source / name).is_dir() else ""
    works = f"Works: the folder of a trained tokenizer{inside}"
    if not source.is_dir():
        return [f"{given}: no such folder. {works}"]
    kind = _kind_of(source)
    if kind != name:
        found = f"is {_KINDS[kind]}" if kind else "no tokenizer in this folder"
        return [f"{given}: {found}, where {_KINDS[name]} is needed. {works}"]
    try:
        _identity(name, source)
    except (DataError, CheckpointError) as error:
        return [f"{given}: {error}. {works}"]
    return []


def _kind_of(folder: Path) -> str:
    """A key of ``_KINDS``; empty: none of these."""
    if (folder / TEXT_MODEL).is_file():
        return TEXT_TOKENIZER
    if (folder / "checkpoints").is_dir() or (folder / TEXT_TOKENIZER).is_dir():
        return "run"
    manifest = folder / FILE_NAME
    try:
        content = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    except ValueError:
        return IMAGE_TOKENIZER  # damaged: which is then said
    kind = content.get("kind", "") if isinstance(content, dict) else ""
    if kind == KIND:
        return IMAGE_TOKENIZER
    return "tokens" if isinstance(content, dict) and "settings" in content else "model" if kind else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _identity(name: str, folder: Path) -> str:
    """SHA-256 of what the tokenizer is; every file of the folder is checked on the way."""
    return TextTokenizer.load(folder).sha256 if name == TEXT_TOKENIZER else image_tokenizer_hash(folder)


def _other_settings(run: RunConfig, out: Path, name: str) -> list[str]:
    """Options of a tokenizer that the run has trained itself which differ from those asked for now, in one line."""
    folder = out / name
    found = _text_settings(run, out) if name == TEXT_TOKENIZER else _image_settings(out)
    wanted = {
        f"{section}.{key}": value
        for section, options in dump_run_config(run).items()
        if isinstance(options, dict)
        for key, value in options.items()
    }
    differ = [path for path, value in found.items() if wanted.get(path, value) not in (value, "auto")]
    if not differ:
        return []
    lines = ", ".join(f"{path}={_shown(found[path])} (now {_shown(wanted[path])})" for path in differ)
    return [
        f"{folder}: was trained with {lines}. Works: the options it was trained with, another --out, or "
        f"{_flag(name)} {folder}, which takes it as it is"
    ]


def _text_settings(run: RunConfig, out: Path) -> dict[str, Any]:
    """Path of each option to what the run's tokenizer was trained with; empty if the run has not trained it."""
    if TEXT_TOKENIZER not in read_seconds(out):
        return {}
    true_size = TextTokenizer.load(out / TEXT_TOKENIZER).vocab_size
    manifest = json.loads((out / TEXT_TOKENIZER / TEXT_MANIFEST).read_text(encoding="utf-8"))
    settings = {f"text_tokenizer.{key}": value for key, value in manifest.get("settings", {}).items()}
    if run.text_tokenizer.vocab_size == true_size:  # what RUN/config.json says, once it is resolved
        settings.pop("text_tokenizer.vocab_size", None)
    return settings


def _image_settings(out: Path) -> dict[str, Any]:
    if not (out / WORK_NAME).is_dir():
        return {}
    manifest = read_manifest(out / IMAGE_TOKENIZER)
    settings = {f"image_tokenizer.{key}": value for key, value in manifest.model.items()}
    options = json.loads(str(manifest.counters.get("options", "{}")))
    return settings | {
        f"{'data' if key.startswith('view_') else 'image_tokenizer_train'}.{key}": value
        for key, value in options.items()
        if key not in _HABITS
    }


def _other_sizes(run: RunConfig, folder: Path, name: str, what: str) -> list[str]:
    """What the model would not fit, one line each."""
    if name == TEXT_TOKENIZER:
        wanted, found = run.model.text_vocab_size, TextTokenizer.load(folder).vocab_size
        return [f"model.text_vocab_size={wanted}: {what} has {found}. Works: 0"] if wanted not in (0, found) else []
    return _other_image_sizes(run, folder, what)


def _other_image_sizes(run: RunConfig, folder: Path, what: str) -> list[str]:
    try:
        found = TypeAdapter(ImageTokenizerConfig).validate_python(dict(read_manifest(folder).model))
    except ValidationError as error:
        raise CheckpointError(f"{folder}: its configuration does not fit this version: {error}") from error
    wanted = run.image_tokenizer
    names = ["image_size", "codebook_size", *(["codebook_dim"] if run.model.codebook_dim else [])]
    if run.reconstructor.enabled and run.reconstructor.decoder_start == "tokenizer":
        names += [name for name in _DECODER if name not in names]
    lines = [
        f"image_tokenizer.{name}={_shown(ours)}: {what} has {_shown(theirs)}. Works: {_shown(theirs)}"
        for name in names
        if (ours := getattr(wanted, name)) != (theirs := getattr(found, name))
    ]
    if not lines and found.grid_side != wanted.grid_side:
        lines.append(
            f"image_tokenizer.patch={wanted.patch}, image_tokenizer.channel_multipliers="
            f"{_shown(wanted.channel_multipliers)}: make {wanted.grid_side} tokens a side, {what} makes "
            f"{found.grid_side}. Works: {found.patch} and {_shown(found.channel_multipliers)}"
        )
    return lines


def _shown(value: object) -> str:
    return json.dumps(value, separators=(",", ":")).strip('"')


def _copy(source: Path, target: Path) -> None:
    """Copy a tokenizer folder into the run; complete or not at all."""
    partial = with_suffix(target, PARTIAL)
    try:
        if partial.exists():
            remove(partial)
        shutil.copytree(source, partial)
        publish(partial, target)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be copied to {target} ({error})") from error
