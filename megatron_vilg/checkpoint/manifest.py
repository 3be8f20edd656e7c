"""What is in a checkpoint or model folder, what it belongs to, and how to notice damage.

``manifest.json`` is the last file written: a folder without one is not complete. It lists size and digest of every
other file and carries a digest of itself. The digest (XXH3, 128 bits) is against accidents: whoever can change a file
on purpose can change the manifest too, and SHA-256 costs as much as all the rest of a copy. No torch here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_vilg import __version__
from megatron_vilg.checkpoint.files import PARTIAL, digest_of, sha256_of, write_text
from megatron_vilg.errors import CheckpointError

REMEDY = "Works: copy what is damaged again from where it came from, or take an earlier checkpoint"
FILE_NAME = "manifest.json"
TOKENIZERS = {"text_tokenizer": "spm.model", "image_tokenizer": "model.safetensors"}
"""Folder of each tokenizer in a run, and the file in it whose digest manifests state."""
ORIGIN = "sha256"
"""Key in ``source`` of an image tokenizer that was converted without changing a value: digest of the weights file that
it had before, by which generators and token caches know it."""
STEP_NAME = re.compile(r"step-(\d{8,})")
"""Name of a run's checkpoint after so many finished optimizer steps."""
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 has SHA-256 of every file."""
IDENTITY = ("kind", "model", "stream", "tokenizers", "text_vocab_size", "image_vocab_size")
"""Fields that must agree before weights may be loaded; step, layout and versions may differ."""


def current_versions() -> dict[str, str]:
    """Versions of this package and of torch, without importing torch."""
    return {"megatron_vilg": __version__, "torch": metadata.version("torch")}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a folder."""

    size: int
    """Bytes."""
    xxh3: str = ""
    """XXH3 (128 bits) of the content, hexadecimal."""
    sha256: str = ""
    """What folders of format version 1 have instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor of a folder, as a whole, whatever parts it is stored in."""

    shape: tuple[int, ...]
    dtype: str
    """Name of the element type, for example ``float32``."""
    cut: int | None = None
    """Dimension along which ranks hold parts of it; None: each rank that has it holds all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Identity, progress and content of a folder. Mappings hold plain JSON values."""

    kind: str
    """What the weights are, for example ``pretrain`` or ``image-tokenizer``."""
    step: int = 0
    """Finished optimizer steps."""
    samples_seen: int = 0
    """Samples consumed over all ranks, those left behind by going back included; the loader resumes here."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The model's configuration section."""
    stream: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``StreamSpec``."""
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Digest of each tokenizer file by name."""
    text_vocab_size: int = 0
    """True size, without padding for a layout."""
    image_vocab_size: int = 0
    """True size, without padding for a layout."""
    layout: Mapping[str, int] = field(default_factory=dict)
    """Parallel layout that wrote the folder; only a record."""
    counters: Mapping[str, int | float | str] = field(default_factory=dict)
    """Plain numbers of the training loop that are no tensors, such as skipped steps."""
    versions: Mapping[str, str] = field(default_factory=current_versions)
    """Package versions that wrote the folder; only a record."""
    format: str = ""
    """How tensors are stored: ``canonical``, ``ranks``; empty where only one form is possible."""
    source: Mapping[str, str] = field(default_factory=dict)
    """What the folder was converted from; only a record, but for :data:`ORIGIN`."""
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    """Every tensor by full name, where a tool wrote the folder."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """Every other file by its relative path; filled in by :func:`write_manifest`."""
    format_version: int = FORMAT_VERSION
    """Version of this file format."""

    def compare(self, expected: Manifest, *, where: str | Path = "checkpoint") -> None:
        """Check that this manifest belongs to ``expected`` (fields of :data:`IDENTITY`).

        Raises:
            CheckpointError: with both sides of every field that differs.
        """
        lines: list[str] = []
        for name in IDENTITY:
            lines += _differences(name, _plain(getattr(self, name)), _plain(getattr(expected, name)))
        if lines:
            raise CheckpointError(
                f"{where}: belongs to another configuration\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\n  Use the values of the checkpoint, or another output folder."
            )


def _plain(value: Any) -> Any:
    """``value`` as JSON would give it back, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value))


def _differences(name: str, found: Any, expected: Any) -> Iterator[str]:
    """One line per leaf where two JSON values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            yield from _differences(f"{name}.{key}", found.get(key, "(absent)"), expected.get(key, "(absent)"))
    elif found != expected:
        yield f"{name}: checkpoint has {found!r}, this run has {expected!r}"


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's content in a fixed spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Complete a folder: list its files in ``manifest`` and write ``manifest.json``.

    Args:
        folder: everything but the manifest is there already.
        manifest: its ``files`` are replaced.
        known: files whose size and digest were read from the disk already; they are listed, seen here or not.

    Returns:
        The manifest with ``files`` filled in.
    """
    known = known or {}
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(PARTIAL))
    seen = {path.relative_to(folder).as_posix(): path for path in paths if path != folder / FILE_NAME}
    # On a shared disk a list of names may lack for a while what other machines have written and read back.
    names = sorted(seen.keys() | known.keys())
    files = {name: known[name] if name in known else entry_of(seen[name]) for name in names}
    manifest = dataclasses.replace(manifest, files=files, format_version=FORMAT_VERSION)
    content = _plain(dataclasses.asdict(manifest))
    text = json.dumps({**content, "digest": _digest(content)}, ensure_ascii=False, indent=1)
    write_text(folder / FILE_NAME, text + "\n")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` of a folder.

    Raises:
        CheckpointError: it is missing, is no JSON, was changed, or has another format version.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {FILE_NAME}, so this is no complete checkpoint or model folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the folder is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; the folder is damaged")
    version = content.get("format_version")
    if version is None:
        raise CheckpointError(f"{folder}: {_stranger(content)}")
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this package reads {known}. "
            "Works: the version of megatron_vilg that wrote it, or a later one"
        )
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise CheckpointError(f"{path}: content does not match its own digest; it was changed or is damaged")
    try:
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        tensors = {
            name: TensorEntry(shape=tuple(entry["shape"]), dtype=entry["dtype"], cut=entry["cut"])
            for name, entry in content.pop("tensors", {}).items()
        }
        return Manifest(files=files, tensors=tensors, **content)
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: fields do not fit format_version {version} ({error})") from error


def _stranger(content: Mapping[str, Any]) -> str:
    """What a folder is whose manifest has no format version: that of a checkpoint or model always has one."""
    works = "Works: a run folder, one of its checkpoints, or an exported model"
    for key, what in (("sentencepiece", "a text tokenizer"), ("longest_caption", "a token cache")):
        if key in content:
            return f"is {what}, which holds no tensors. {works}"
    return f"its {FILE_NAME} has no format_version, so it is not of a checkpoint or model. {works}"


def entry_of(path: Path) -> FileEntry:
    """Size and digest of a file, read from the disk."""
    return FileEntry(size=path.stat().st_size, xxh3=digest_of(path))


def fair_share(manifest: Manifest, index: int, count: int) -> set[str]:
    """The files that reader ``index`` of ``count`` takes, of about as many bytes as the others'."""
    by_size = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
    return set(by_size[index::count])


def find_damage(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> list[str]:
    """Compare the files of a folder with its manifest, content included.

    Args:
        folder: where they are.
        manifest: what they should be.
        names: only these; None: all.

    Returns:
        One line per missing, unreadable, resized or changed file; empty when the folder is sound.
    """
    problems = []
    for name, entry in manifest.files.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry.size:
                problems.append(f"{name} has {size} bytes instead of {entry.size}")
            elif not _has_content(path, entry):
                problems.append(f"{name} has the right size but its content changed")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def _has_content(path: Path, entry: FileEntry) -> bool:
    return digest_of(path) == entry.xxh3 if entry.xxh3 else sha256_of(path) == entry.sha256


def read_sound_manifest(folder: Path) -> Manifest:
    """:func:`read_manifest`, then check every file against it.

    Raises:
        CheckpointError: as there, or naming each file that is missing, resized or changed.
    """
    manifest = read_manifest(folder)
    require_no_damage(folder, find_damage(folder, manifest))
    return manifest


def require_own_step(folder: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint under the name of another step, which would be taken for an older or a newer one.

    Raises:
        CheckpointError: the folder is called ``step-N``, and its manifest says another step.
    """
    named = STEP_NAME.fullmatch(folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise CheckpointError(
            f"{folder}: the folder is named for step {int(named[1])}, its {FILE_NAME} says step {manifest.step}. "
            f"Works: the name step-{manifest.step:08d}"
        )


def require_no_damage(folder: Path, problems: Sequence[str]) -> None:
    """Raise ``CheckpointError`` with what :func:`find_damage` found, if it found anything."""
    if problems:
        raise CheckpointError(f"{folder}: damaged: {'; '.join(problems)}. {REMEDY}")
