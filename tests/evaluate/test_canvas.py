from __future__ import annotations

import sys

import pytest
from PIL import Image

from megatron_vilg.errors import MissingPackageError
from megatron_vilg.evaluate.canvas import Canvas, font, font_file, wrap


def test_font_has_chinese_glyphs() -> None:
    face = font(32)
    pictures = {face.getmask(text).getbbox() and bytes(face.getmask(text)) for text in ("熊", "猫", "的", "a")}
    assert len(pictures) == 4, "missing glyphs would all look alike"


def test_a_missing_font_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pylopdf_fonts_zh_cn", None)
    with pytest.raises(MissingPackageError, match="pip install pylopdf-fonts-zh-cn"):
        font_file()


def test_wrapping() -> None:
    assert wrap("立体三维风格的熊", 20, 500) == ["立体三维风格的熊"]
    assert "".join(wrap("立体三维风格的熊", 20, 70)) == "立体三维风格的熊"
    assert wrap("a glossy 3D style picture", 20, 120) == ["a glossy 3D", "style picture"]
    assert all(font(20).getlength(line) <= 60 for line in wrap("unbreakablelongword", 20, 60, max_lines=9))
    cut = wrap("立体三维风格的熊在红色背景上", 20, 70, max_lines=2)
    assert len(cut) == 2 and cut[-1].endswith("…")


def test_the_page_grows_and_is_cut_below_the_last_thing() -> None:
    canvas = Canvas(100)
    canvas.box(0, 900, 10, 20, fill="#000000")
    canvas.picture(20, 5, Image.new("RGB", (4, 4), "#ff0000"), 8)
    page = canvas.finish(margin=5)
    assert page.size == (100, 925)
    assert page.getpixel((5, 910)) == (0, 0, 0)
    assert page.getpixel((24, 9)) == (255, 0, 0)
    assert page.getpixel((50, 500)) == (255, 255, 255)
