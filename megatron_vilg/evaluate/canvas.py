"""A white page to write Chinese and English on, with Pillow alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_vilg.errors import MissingPackageError

INK, GREY, LINE, PAPER, SHADE = "#1d2733", "#67727f", "#dfe4ea", "#ffffff", "#f5f7f9"
GREEN, AMBER, RED = "#168a47", "#dd950c", "#c9362c"

_FONT_PACKAGE = "pylopdf_fonts_zh_cn"


def font_file() -> Path:
    """A font with Chinese and Latin glyphs: Noto Sans SC, from an installed package.

    Raises:
        MissingPackageError: the package is not there.
    """
    try:
        package = importlib.import_module(_FONT_PACKAGE)
    except ImportError as error:
        raise MissingPackageError(
            "pictures with Chinese writing need a package that is not installed: pip install pylopdf-fonts-zh-cn"
        ) from error
    return Path(package.sans_path())


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """That font at ``size`` pixels."""
    return ImageFont.truetype(str(font_file()), size, layout_engine=ImageFont.Layout.BASIC)


def wrap(text: str, size: int, width: float, max_lines: int = 3) -> list[str]:
    """Break a text into lines no wider than ``width`` pixels: between words, and anywhere between Chinese characters.

    What does not fit into ``max_lines`` is cut, which an ellipsis shows.
    """
    face = font(size)
    lines: list[str] = []
    line = ""
    for piece in _pieces(text):
        if line and face.getlength(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = piece.lstrip()
        else:
            line += piece
        while face.getlength(line.rstrip()) > width and len(line) > 1:
            cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or face.getlength(line[:n]) <= width)
            lines.append(line[:cut])
            line = line[cut:]
    if line.strip():
        lines.append(line.rstrip())
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last + "…"]
    return lines


def _pieces(text: str) -> list[str]:
    """Words with the blank behind them; every wide character is a word of its own."""
    pieces: list[str] = []
    for character in " ".join(text.split()):
        joins = pieces and not pieces[-1].endswith(" ") and ord(character) < 0x2E80 and ord(pieces[-1][-1]) < 0x2E80
        if joins or (pieces and character == " "):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


class Canvas:
    """Draws on a page that grows downwards as needed; everything is placed by its top left corner."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._image = Image.new("RGB", (width, 256), PAPER)
        self._bottom = 0

    def text(self, x: float, y: float, text: str, size: int, colour: str = INK, *, align: str = "left") -> None:
        """One line; ``align`` says whether ``x`` is its left end, its middle or its right end."""
        anchor = {"left": "la", "middle": "ma", "right": "ra"}[align]
        self._reach(y + size * 1.5)
        ImageDraw.Draw(self._image).text((x, y), text, font=font(size), fill=colour, anchor=anchor)

    def paragraph(
        self, x: float, y: float, text: str, size: int, width: float, colour: str = INK, *, max_lines: int = 3
    ) -> float:
        """Wrapped lines; returns the y below them."""
        for line in wrap(text, size, width, max_lines):
            self.text(x, y, line, size, colour)
            y += round(size * 1.38)
        return y

    def picture(self, x: int, y: int, picture: Image.Image, side: int) -> None:
        """A picture scaled to ``side`` pixels, with a hairline around it."""
        self._reach(y + side + 1)
        scaled = picture if picture.size == (side, side) else picture.resize((side, side), Image.Resampling.LANCZOS)
        self._image.paste(scaled, (x, y))
        self.box(x - 1, y - 1, side + 2, side + 2, outline=LINE)

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str | None = None, outline: str | None = None
    ) -> None:
        """A rectangle."""
        self._reach(y + height)
        ImageDraw.Draw(self._image).rectangle((x, y, x + width - 1, y + height - 1), fill=fill, outline=outline)

    def rule(self, x: float, y: float, width: float, colour: str = LINE) -> None:
        """A horizontal hairline."""
        self.box(x, y, width, 1, fill=colour)

    def finish(self, margin: int) -> Image.Image:
        """The page, cut ``margin`` pixels below the last thing drawn."""
        page = Image.new("RGB", (self.width, self._bottom + margin), PAPER)
        page.paste(self._image, (0, 0))
        return page

    def _reach(self, bottom: float) -> None:
        self._bottom = max(self._bottom, round(bottom))
        if self._bottom > self._image.height:
            grown = Image.new("RGB", (self.width, self._bottom * 2), PAPER)
            grown.paste(self._image, (0, 0))
            self._image = grown


def column_widths(rows: Sequence[Sequence[str]], size: int, gap: int) -> list[int]:
    """Widths in pixels that let every cell of a table stand on one line."""
    face = font(size)
    return [round(max(face.getlength(row[column]) for row in rows)) + gap for column in range(len(rows[0]))]
