"""Where pairs lie on disk: a folder of files, a ``.jsonl`` list, or tar shards; cut into parts by split."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vilg.data.source_parts import (
    IMAGE_SUFFIXES,
    FolderPart,
    JsonlPart,
    Part,
    clean_name,
    list_key,
    parse_fields,
    suffix_of,
)
from megatron_vilg.data.split_names import (
    hash_split,
    split_from_name,
    warn_of_doubt,
    warn_of_picture_names,
    warn_of_splits_in_splits,
)
from megatron_vilg.data.tar_parts import TarPart
from megatron_vilg.errors import DataError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LISTS_SHOWN = 3

PartsBySplit = dict[str, list[tuple[Part, bool]]]
"""The flag beside a part says that it holds other splits too, told apart by the hash of the key."""


def find_parts(path: Path | str, *, val_share: float, part_size: int) -> PartsBySplit:
    """Detect what ``path`` is and cut it into parts by split, in a fixed order.

    Split names come from the names of shards or of several lists and the folders that they lie in, the folders that
    pictures lie in, or the field ``split`` of a line; the name of ``path`` itself says nothing. A source without any is
    split by the hash of its keys. Where only some names say a split, the others are training pairs, and a warning names
    them.

    Args:
        path: folder, ``.jsonl`` file, tar, or a glob of tars (``**`` stands for any number of folders).
        val_share: share of keys that become ``val`` where a source names no splits.
        part_size: keys per part of folders and lists; a tar is always one part.

    Raises:
        DataError: nothing that can be read was found there, tars among pictures with captions, or several lists that
            name no splits.
    """
    text, source = str(path), Path(path)
    if source.is_dir():
        if (parts := _parts_below(source, val_share, part_size)) is not None:
            return parts
    elif source.is_file() and source.name.endswith(TAR_SUFFIXES):
        return _tar_parts([source], source.parent, val_share)
    elif source.is_file() and source.suffix == ".jsonl":
        return _jsonl_parts(source, val_share, part_size)
    elif glob.has_magic(text) and not source.exists():
        base = Path(*_before_magic(source))
        if tars := [tar for tar in map(Path, glob.glob(text, recursive=True)) if _is_tar(tar, base)]:
            return _tar_parts(sorted(tars), base, val_share)
    raise DataError(
        f"data: found no pairs at {text!r}. Give a folder of NAME.png|jpg|jpeg|webp with NAME.txt, a .jsonl file "
        'with lines like {"image": "a.png", "caption": "..."}, or tar shards (a folder, one file, or "DIR/*.tar")'
    )


def _parts_below(root: Path, val_share: float, part_size: int) -> PartsBySplit | None:
    """What a folder holds; None: no pairs."""
    files = list(_walk(root))
    keys = _keys(files)
    captioned = [key for key, paths in keys.items() if _is_captioned(paths)]
    tars = sorted(root / name for name in files if name.endswith(TAR_SUFFIXES))
    if tars and captioned:
        suffix = next(suffix for suffix in TAR_SUFFIXES if tars[0].name.endswith(suffix))
        pattern = os.path.join(glob.escape(str(root)), "**", f"*{suffix}")
        raise DataError(
            f"data: {clean_name(str(root))!r} holds both tars ({len(tars)}, the first "
            f"{clean_name(str(tars[0].relative_to(root)))}) and pictures with captions of their own ({len(captioned)}, "
            f"the first {clean_name(captioned[0])}), and nothing says which are meant. Works: a folder with one kind "
            f"alone, or for the tars {clean_name(pattern)!r}"
        )
    if tars:
        return _tar_parts(tars, root, val_share)
    has_pictures = any(suffix_of(path) in IMAGE_SUFFIXES for paths in keys.values() for path in paths)
    lists = [name for name in files if name.endswith(".jsonl")]
    lists = [name for name in lists if os.sep not in name] or (lists if has_pictures else [])
    if lists and not captioned:
        return _parts_of_lists(root, lists, val_share, part_size)
    return _folder_parts(root, keys, val_share, part_size) if has_pictures else None


def _is_tar(path: Path, base: Path) -> bool:
    """Whether a path that a pattern found below ``base`` is a tar, and not one found again through a link back."""
    if not path.name.endswith(TAR_SUFFIXES) or path.is_dir():
        return False
    folders = [os.path.realpath(base / folder) for folder in path.relative_to(base).parents]
    return len(set(folders)) == len(folders)


def _walk(root: Path, inside: tuple[tuple[int, int], ...] = (), below: str = "") -> Iterator[str]:
    """All files below ``root`` by their paths from there, in a fixed order; hidden ones are left out.

    Links are followed, but not into a folder that they lie in. A link to nothing is a file, so that it gets named.
    """
    folder = root / below
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning("%s: is left out (%s)", clean_name(str(folder)), error.strerror)
        return
    identity = (status.st_dev, status.st_ino)
    if identity in inside:
        return
    subfolders = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = os.path.join(below, entry.name)
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            subfolders.append(path)
        elif entry.is_symlink() or entry.is_file():
            yield path
    for path in subfolders:
        yield from _walk(root, (*inside, identity), path)


def _before_magic(pattern: Path) -> Iterator[str]:
    for piece in pattern.parts:
        if glob.has_magic(piece):
            return
        yield piece


def _tar_parts(tars: Sequence[Path], base: Path, val_share: float) -> PartsBySplit:
    names = [_split_of_file(tar.relative_to(base).parts) for tar in tars]
    shown = (clean_name(str(tar.relative_to(base))) for tar in tars)
    warn_of_doubt(clean_name(str(base)), dict(zip(shown, names, strict=True)))
    if any(names):
        parts: PartsBySplit = {}
        for tar, name in zip(tars, names, strict=True):
            parts.setdefault(name or "train", []).append((TarPart(tar), False))
        return parts
    splits = ("train", "val") if val_share > 0 else ("train",)
    return {split: [(TarPart(tar), val_share > 0) for tar in tars] for split in splits}


def _split_of_file(path: Sequence[str]) -> str | None:
    """By its own name, else by that of the nearest folder."""
    *folders, file = path
    splits = map(split_from_name, [file.split(".")[0], *reversed(folders)])
    return next((split for split in splits if split is not None), None)


def _keys(files: Sequence[str]) -> dict[str, list[str]]:
    """Paths by their name without suffix; only keys with a picture or a ``.txt``."""
    keys: dict[str, list[str]] = {}
    for path in files:
        if suffix_of(path) in (*IMAGE_SUFFIXES, "txt", "json"):
            keys.setdefault(os.path.splitext(path)[0].replace(os.sep, "/"), []).append(path)
    return {k: v for k, v in keys.items() if any(suffix_of(path) in (*IMAGE_SUFFIXES, "txt") for path in v)}


def _is_captioned(paths: Sequence[str]) -> bool:
    suffixes = {suffix_of(path) for path in paths}
    return not suffixes.isdisjoint(IMAGE_SUFFIXES) and not suffixes.isdisjoint(("txt", "json"))


def _folder_parts(root: Path, keys: dict[str, list[str]], val_share: float, part_size: int) -> PartsBySplit:
    """The first folder on the way down that names a split decides.

    Not the nearest, as with tars: below the splits lie folders of kinds of things, of trains and test tubes too.
    """
    where = clean_name(str(root))
    names = {folder: _split_of_folder(folder) for folder in sorted({key.rpartition("/")[0] for key in keys})}
    warn_of_doubt(where, {shown: split for shown, split in sorted(names.values())})
    warn_of_splits_in_splits(where, {clean_name(folder): split for folder, (_, split) in names.items()})
    named = any(split for _, split in names.values())
    if not named:
        warn_of_picture_names(where, [clean_name(key.rpartition("/")[2]) for key in keys])
    by_split: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for key in sorted(keys):
        name = clean_name(key)
        split = (names[key.rpartition("/")[0]][1] or "train") if named else hash_split(name, val_share)
        by_split.setdefault(split, []).append((name, tuple(keys[key])))
    return {
        split: [
            (FolderPart(root, i, tuple(entries[start : start + part_size])), False)
            for i, start in enumerate(range(0, len(entries), part_size))
        ]
        for split, entries in by_split.items()
    }


def _split_of_folder(folder: str) -> tuple[str, str | None]:
    """How to call what lies in a folder, and its split."""
    pieces = folder.split("/") if folder else []
    for number, piece in enumerate(pieces, 1):
        if (split := split_from_name(piece)) is not None:
            return clean_name("/".join(pieces[:number]) + "/"), split
    return clean_name(folder + "/") if folder else "files in no folder", None


def _parts_of_lists(root: Path, lists: Sequence[str], val_share: float, part_size: int) -> PartsBySplit:
    """One list at the top says no split by its name; several, and those in folders, do, as tars do."""
    splits = [_split_of_file(name.split(os.sep)) for name in lists]
    if len(lists) == 1:
        return _jsonl_parts(root / lists[0], val_share, part_size, splits[0] if os.sep in lists[0] else None)
    if not all(splits):
        names = ", ".join(map(clean_name, lists[:_LISTS_SHOWN])) + (", ..." if len(lists) > _LISTS_SHOWN else "")
        raise DataError(
            f"data: {str(root)!r} has {len(lists)} lists ({names}), and not all are called after their splits. Works: "
            "one of these lists itself, or names like train.jsonl and val.jsonl"
        )
    parts: PartsBySplit = {}
    for name, split in zip(lists, splits, strict=True):
        for chosen, of_split in _jsonl_parts(root / name, val_share, part_size, split).items():
            parts.setdefault(chosen, []).extend(of_split)
    return parts


def _jsonl_parts(path: Path, val_share: float, part_size: int, default: str | None = None) -> PartsBySplit:
    """``default`` is the split of lines that say none."""
    lines: list[tuple[int, str, str]] = []
    names: dict[str, str | None] = {}
    try:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    fields, _ = parse_fields(line)
                    split = fields.get("split")
                    name = clean_name(split) if isinstance(split, str) else "lines without a split"
                    names.setdefault(name, (split_from_name(name) if isinstance(split, str) else None) or default)
                    lines.append((offset, list_key(fields)[0], name))
                offset += len(line)
    except OSError as error:
        raise DataError(f"data: {clean_name(str(path))}: cannot be read ({error.strerror})") from error
    warn_of_doubt(clean_name(str(path)), names)
    named = any(names.values())
    by_split: dict[str, list[int]] = {}
    for offset, key, name in lines:
        chosen = (names[name] or "train") if named else hash_split(key, val_share)
        by_split.setdefault(chosen, []).append(offset)
    return {
        split: [
            (JsonlPart(path, i, tuple(offsets[start : start + part_size])), False)
            for i, start in enumerate(range(0, len(offsets), part_size))
        ]
        for split, offsets in by_split.items()
    }
