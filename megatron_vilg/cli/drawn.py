"""What ``vilg generate`` leaves behind: pictures, a grid of them, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vilg.checkpoint.owner import Process, partial_of
from megatron_vilg.cli.outputs import require_writable
from megatron_vilg.cli.shares import GRID_IMAGES, GRID_PROMPTS, Share, begin_share, finish_share
from megatron_vilg.data.images import to_image
from megatron_vilg.errors import ConfigError, MissingPackageError
from megatron_vilg.evaluate.canvas import Canvas, font_file
from megatron_vilg.log import get_logger

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_log = get_logger(__name__)

RECORD_FILE, GRID_FILE = "generate.json", "grid.png"
_MARGIN, _GAP, _TEXT = 16, 8, 18
_COLUMNS = 16
"""Pictures side by side; a prompt with more of them has several lines."""
_SMALLEST_SIDE = 96
"""Smaller pictures are enlarged in the grid by a whole factor."""


class PictureFolder:
    """Writes ``PROMPT-IMAGE.png`` as pictures come and, last, the grid and ``generate.json``.

    Pictures of an earlier call stay until the first new ones are there to be written.

    Args:
        out: folder, made with the first picture.
        share: the worker that this process is.
        prompts: all prompts of the call, those of other workers too.

    Raises:
        ConfigError: the folder cannot be made or written, or holds the record of something else.
    """

    def __init__(self, out: Path, share: Share, prompts: Sequence[str]) -> None:
        require_writable(out, f"--out={out}")
        pictures_of(out)
        self.out, self.share, self.prompts = out, share, prompts
        self.entries: list[dict[str, Any]] = []
        self._has_begun = False

    def add(self, pixels: Tensor, facts: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
        """Write the pictures of this worker's next prompts.

        Args:
            pixels: [B, n, 3, S, S] in [-1, 1].
            facts: what else there is to say about each of the B prompts.
            record: settings of the whole call.

        Raises:
            ConfigError: the folder cannot be written.
        """
        first = self.share.prompts(len(self.prompts)).start
        with self._writing(record):
            for row, fact in zip(pixels, facts, strict=True):
                number = first + len(self.entries)
                files = write_png_row(self.out, number, row)
                self.entries.append({"prompt": self.prompts[number], "files": files, **fact})

    def finish(self, record: dict[str, Any], ids_sha256: str) -> bool:
        """Write grid and record; of several workers the last one does so for all.

        Returns:
            Whether the record of the whole call is there now.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with self._writing(record):  # also of a worker that had no prompts
            if self.share.count > 1:
                return finish_share(self.out, self.share, self.prompts, self.entries, record, ids_sha256)
            write_record(self.out / RECORD_FILE, record | {"ids_sha256": ids_sha256, "prompts": self.entries})
            _save(grid_of_files(self.out, self.entries[:GRID_PROMPTS]), self.out / GRID_FILE)
            return True

    @contextmanager
    def _writing(self, record: dict[str, Any]) -> Iterator[None]:
        try:
            if not self._has_begun:
                self.out.mkdir(parents=True, exist_ok=True)
                if self.share.count > 1:
                    begin_share(self.out, self.prompts, record)
                else:
                    remove_pictures(self.out)
                self._has_begun = True
            yield
        except OSError as error:
            raise ConfigError([f"--out={self.out}: cannot be written ({error}); name another folder"]) from error


def write_png_row(out: Path, number: int, row: Tensor) -> list[str]:
    """Write the pictures [n, 3, S, S] of prompt ``number``; returns their file names."""
    names = [f"{number:05d}-{index:02d}.png" for index in range(len(row))]
    for name, image in zip(names, row, strict=True):
        _save(to_image(image), out / name)
    return names


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    partial = partial_of(path, Process.this())  # process numbers alone are the same on several nodes
    partial.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def grid_of_files(out: Path, entries: Sequence[dict[str, Any]]) -> Image.Image:
    """The grid of pictures that were written: entries with ``prompt`` and ``files``."""
    from PIL import Image

    def opened(name: str) -> Image.Image:
        with Image.open(out / name) as picture:
            return picture.convert("RGB")

    rows = [[opened(name) for name in entry["files"][:GRID_IMAGES]] for entry in entries]
    return picture_grid([entry["prompt"] for entry in entries], rows)


def picture_grid(prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The pictures of each prompt, the prompt above them if there is a font that can write it."""
    side = pictures[0][0].width
    side *= max(1, -(-_SMALLEST_SIDE // side))
    columns = min(_COLUMNS, max(len(row) for row in pictures))
    width = 2 * _MARGIN + columns * (side + _GAP) - _GAP
    canvas = Canvas(width)
    has_font = _has_font()
    y = _MARGIN
    for prompt, row in zip(prompts, pictures, strict=True):
        if has_font:
            y = round(canvas.paragraph(_MARGIN, y, prompt, _TEXT, width - 2 * _MARGIN)) + _GAP // 2
        for index, picture in enumerate(row):
            line, column = divmod(index, columns)
            canvas.picture(_MARGIN + column * (side + _GAP), y + line * (side + _GAP), picture, side)
        y += -(-len(row) // columns) * (side + _GAP) + _GAP
    return canvas.finish(_MARGIN)


def _has_font() -> bool:
    try:
        font_file()
    except MissingPackageError as error:
        _log.warning("the grid has no prompts written on it: %s", error)
        return False
    return True


def _save(picture: Image.Image, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    picture.save(partial, "PNG")
    partial.replace(path)


def pictures_of(out: Path, record_file: str = RECORD_FILE) -> set[str]:
    """Files that the record of an earlier call says it wrote; none where there is no record.

    Raises:
        ConfigError: the record there is not one of ours.
    """
    try:
        prompts = json.loads((out / record_file).read_text(encoding="utf-8"))["prompts"]
        return {name for entry in prompts for name in entry["files"] if name == Path(name).name}
    except FileNotFoundError:
        return set()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"--out={out}: its {record_file} is not one of ours ({error}); name another folder"]
        ) from error


def remove_pictures(out: Path, but: Collection[str] = (), record_file: str = RECORD_FILE) -> None:
    """Delete what the record of an earlier call says it wrote, the record first; pictures named in ``but`` stay.

    Raises:
        ConfigError: the record there is not one of ours.
    """
    names = pictures_of(out, record_file)
    (out / record_file).unlink(missing_ok=True)
    for name in names - set(but):
        (out / name).unlink(missing_ok=True)
