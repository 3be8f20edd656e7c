from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vilg.errors import DataError
from megatron_vilg.generate.picture_input import read_picture

ROTATE = 0x0112


def sides(mode: str) -> Image.Image:
    """Left half dark, right half bright."""
    image = Image.new("L", (8, 8), 20)
    image.paste(200, (4, 0, 8, 8))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "F", "I", "LA", "P"])
def test_pictures_in_every_mode(mode: str) -> None:
    pixels = read_picture(sides(mode), 8)
    assert pixels.shape == (1, 3, 8, 8)
    assert torch.allclose(pixels, read_picture(sides("RGB"), 8), atol=0.03)


def test_a_picture_and_its_path_give_the_same_pixels_rotation_included(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ROTATE] = 6
    sides("RGB").save(tmp_path / "a.png", exif=exif)
    from_path = read_picture(tmp_path / "a.png", 8)
    with Image.open(tmp_path / "a.png") as opened:
        assert torch.equal(read_picture(opened, 8), from_path)
    upright = read_picture(sides("RGB"), 8)
    assert not torch.equal(from_path, upright) and torch.equal(from_path, upright.transpose(2, 3))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.png: cannot be read"):
        read_picture(tmp_path / "none.png", 8)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="a.png: not a readable picture"):
        read_picture(tmp_path / "a.png", 8)
    sides("RGB").resize((64, 64)).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    with Image.open(tmp_path / "b.png") as opened, pytest.raises(DataError, match="cannot be turned"):
        read_picture(opened, 8)
