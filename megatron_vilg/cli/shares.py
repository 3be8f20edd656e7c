"""One call of ``vilg generate`` shared out among workers: which prompts are whose, and how their parts become one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vilg.checkpoint.owner import Process, partial_of
from megatron_vilg.config.world import read_world
from megatron_vilg.errors import ConfigError
from megatron_vilg.log import get_logger

_log = get_logger(__name__)
PARTS = "parts"
"""Folder with one record per worker; they stay, so that a part can be drawn again."""
EARLIER = f"{PARTS}/earlier.json"
"""Where the record of an earlier call waits until the pictures of this one are complete."""
GRID_PROMPTS, GRID_IMAGES = 64, 64
"""A grid shows this many prompts, and pictures of each, at most: it is one picture, and has to fit into memory."""


@dataclass(frozen=True, slots=True)
class Share:
    """Worker ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    def prompts(self, total: int) -> range:
        """The numbers of this worker's prompts: neighbours, as many as another has, or one more."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def record(self, out: Path) -> Path:
        """The file that says what this worker drew."""
        return out / PARTS / f"{self.index:05d}-of-{self.count:05d}.json"


def chosen_share(option: str, tensor: int = 1) -> Share:
    """``auto`` (one worker per rank of torchrun or srun, else one), or ``INDEX/COUNT``.

    Args:
        option: of ``--worker``.
        tensor: neighbouring ranks that are one worker together.

    Raises:
        ConfigError: anything else, or one share for several workers of this launcher.
    """
    world = read_world()
    if option == "auto":
        return Share(world.rank // tensor, world.size // tensor)
    if tensor > 1 and world.size > tensor:
        raise ConfigError(
            [
                f"--worker={option}: names one share, but {world.size} processes with --tensor={tensor} are "
                f"{world.size // tensor} workers. Works: auto, or {tensor} processes"
            ]
        )
    index, _, count = option.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(
            [f"--worker={option}: works auto, or INDEX/COUNT with the index from 0 to COUNT - 1, for example 0/4"]
        )
    return Share(int(index), int(count))


def begin_share(out: Path, prompts: Sequence[str], record: dict[str, Any]) -> None:
    """Make room for this worker's pictures; the record of an earlier call with other settings is set aside."""
    (out / PARTS).mkdir(exist_ok=True)
    _retire(out, _settings(prompts, record))


def finish_share(
    out: Path,
    share: Share,
    prompts: Sequence[str],
    entries: Sequence[dict[str, Any]],
    record: dict[str, Any],
    ids_sha256: str,
) -> bool:
    """Write what this worker drew and, if it is the last one, what belongs to all of them.

    Args:
        out: folder that all workers see; the pictures are there.
        share: whose prompts these are.
        prompts: all prompts of the call.
        entries: of each of this worker's prompts the text, the files and what else there is to say.
        record: settings of the whole call.
        ids_sha256: of this worker's codes.

    Returns:
        Whether the record of the whole call is there now.
    """
    from megatron_vilg.cli.drawn import write_record

    settings = _settings(prompts, record)
    write_record(share.record(out), {"settings": settings, "ids_sha256": ids_sha256, "prompts": list(entries)})
    return _join(out, share.count, settings)


def _settings(prompts: Sequence[str], record: dict[str, Any]) -> dict[str, Any]:
    """What all workers of one call agree on."""
    settings = {key: value for key, value in record.items() if key != "device"}
    return settings | {"prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}


def _retire(out: Path, settings: dict[str, Any]) -> None:
    """Set the record of an earlier call with other settings aside: from now on it would not tell the truth."""
    from megatron_vilg.cli.drawn import RECORD_FILE

    path = out / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    if any(record.get(key) != value for key, value in settings.items()):
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            os.replace(path, out / EARLIER)


def _join(out: Path, count: int, settings: dict[str, Any]) -> bool:
    """Write the record and the grid of all parts if all are there; several workers may do so, with the same result."""
    from megatron_vilg.cli.drawn import GRID_FILE, RECORD_FILE, grid_of_files, remove_pictures, write_record

    parts: list[dict[str, Any]] = []
    for index in range(count):
        path = Share(index, count).record(out)
        part = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if part.get("settings") != settings:
            _log.info("%s: %d of %d parts of this call are there", out, len(parts), count)
            return False
        parts.append(part)
    entries = [entry for part in parts for entry in part["prompts"]]
    written = {name for entry in entries for name in entry["files"]}
    for earlier in (EARLIER, RECORD_FILE):
        remove_pictures(out, but=written, record_file=earlier)
    for path in (out / PARTS).glob("*-of-*.json"):
        if not path.name.endswith(f"-of-{count:05d}.json"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    whole = settings | {"ids_sha256": [part["ids_sha256"] for part in parts], "prompts": entries}
    write_record(out / RECORD_FILE, whole)
    partial = partial_of(out / GRID_FILE, Process.this())
    grid_of_files(out, entries[:GRID_PROMPTS]).save(partial, "PNG")
    os.replace(partial, out / GRID_FILE)
    return True
