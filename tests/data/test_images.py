from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from megatron_vilg.data.images import decode_image, load_pixels, random_views, square, to_image, to_rgb, to_tensor
from megatron_vilg.errors import DataError


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 2), (0, 0, 255, 255))
    got = np.asarray(decode_image(file_of(image)))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[2, 1].tolist() == [0, 0, 255]


def test_palette_with_transparency_and_grey() -> None:
    palette = Image.new("P", (3, 3), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    data = io.BytesIO()
    palette.save(data, "PNG", transparency=0)
    assert np.asarray(decode_image(data.getvalue()))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(decode_image(file_of(Image.new("L", (3, 3), 7))))[0, 0].tolist() == [7, 7, 7]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((3, 3), 0x8080, dtype=np.uint16))
    assert np.asarray(decode_image(file_of(image)))[1, 1].tolist() == [128, 128, 128]


@pytest.mark.parametrize("clear", [0, 0x8080, 65535])
def test_the_transparent_grey_of_sixteen_bits_becomes_white(clear: int) -> None:
    image = Image.fromarray(np.full((2, 2), clear, dtype=np.uint16))
    image.putpixel((1, 0), clear ^ 1)  # the same grey in eight bits
    image.putpixel((0, 1), 0x4040)
    data = io.BytesIO()
    image.save(data, "PNG", transparency=clear)
    with Image.open(io.BytesIO(data.getvalue())) as opened:
        assert opened.mode == "I;16" and opened.info["transparency"] == clear
    got = np.asarray(decode_image(data.getvalue()))
    assert got[:, :, 0].tolist() == [[255, (clear ^ 1) // 257], [0x40, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa", "RGBX", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_colours_survive_their_mode() -> None:
    red = Image.new("RGB", (2, 2), (254, 0, 0))
    for mode in ("CMYK", "YCbCr", "HSV"):
        assert np.abs(np.asarray(to_rgb(red.convert(mode)), dtype=int) - np.asarray(red)).max() <= 2, mode
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert("RGBa")
    assert np.asarray(to_rgb(clear)).min() == 255


@pytest.mark.parametrize(
    ("values", "expected"),
    [(np.int32([[0x8080]]), 128), (np.int32([[200]]), 200), (np.int32([[70000]]), 255), (np.float32([[100.0]]), 100)],
)
def test_wide_greys_are_scaled(values: np.ndarray, expected: int) -> None:
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, 0].tolist() == [expected] * 3


def test_a_mode_that_cannot_be_converted_is_a_data_error() -> None:
    with pytest.raises(DataError, match="from mode La into RGB"):
        to_rgb(Image.new("La", (2, 2)))


@pytest.mark.parametrize("data", [b"", b"hello", file_of(Image.new("RGB", (64, 64), "red"))[:60]])
def test_unreadable_bytes_are_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match="not a readable picture"):
        decode_image(data)


def turned(image: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    out = io.BytesIO()
    image.save(out, kind, exif=exif, lossless=True)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_all_orientations_of_cameras_come_upright(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    seen = set()
    for orientation in range(1, 9):
        data = turned(Image.fromarray(values), orientation, kind)
        with Image.open(io.BytesIO(data)) as opened:
            want = ImageOps.exif_transpose(opened).convert("RGB")
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(want)), orientation
        assert want.size == ((14, 9) if orientation < 5 else (9, 14))
        seen.add(want.tobytes())
    assert len(seen) == 8


def with_odd_exif(image: Image.Image, tag: int, kind: int, count: int, orientation: tuple[int, int] = (3, 6)) -> bytes:
    """A JPEG with an orientation (type and value) and one more tag of this type and length, its value all zeros."""
    entries = [(0x0112, *orientation), (tag, kind, count)]
    offset = 8 + 2 + 12 * 2 + 4
    directory = b"".join(
        struct.pack("<HHII", t, k, 1, n) if t == 0x0112 else struct.pack("<HHII", t, k, n, offset)
        for t, k, n in sorted(entries)
    )
    block = b"II*\0" + struct.pack("<IH", 8, 2) + directory + bytes(4 + 64)
    out = io.BytesIO()
    image.save(out, "JPEG", exif=b"Exif\0\0" + block)
    return out.getvalue()


@pytest.mark.parametrize(("tag", "kind", "count"), [(0x100, 2, 8), (0x11A, 2, 8)])
def test_odd_exif_beside_the_orientation_costs_no_picture(tag: int, kind: int, count: int) -> None:
    image = Image.new("RGB", (24, 30), (200, 10, 10))
    data = with_odd_exif(image, tag, kind, count)
    with Image.open(io.BytesIO(data)) as opened, pytest.raises((struct.error, TypeError, AttributeError, ValueError)):
        ImageOps.exif_transpose(opened)  # what reading must not do
    assert decode_image(data).size == (30, 24)


def test_an_orientation_that_is_no_number_is_as_the_picture_is() -> None:
    image = Image.new("RGB", (24, 30))
    assert decode_image(with_odd_exif(image, 0x10E, 2, 8, orientation=(2, 6))).size == (24, 30)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, struct.error, IndexError, ZeroDivisionError])
@pytest.mark.parametrize("step", ["open", "load"])
def test_whatever_a_reader_of_pillow_raises_is_a_data_error(
    monkeypatch: pytest.MonkeyPatch, step: str, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("damaged")

    data = file_of(Image.new("RGB", (4, 4)))
    with Image.open(io.BytesIO(data)) as opened:
        monkeypatch.setattr(*((Image, "open") if step == "open" else (type(opened), "load")), fail)
    with pytest.raises(DataError, match="not a readable picture .*damaged"):
        decode_image(data)


def test_a_full_memory_is_not_the_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        decode_image(file_of(Image.new("RGB", (4, 4))))


def test_a_picture_of_a_kind_that_pillow_knows_in_part_is_a_data_error() -> None:
    data = bytearray(file_of(Image.new("RGB", (4, 4)), "DDS"))
    data[80:88] = struct.pack("<I4s", 4, b"ABCD")  # a compression that is none: NotImplementedError
    with pytest.raises(DataError, match="not a readable picture"):
        decode_image(bytes(data))


def test_centre_crop_keeps_the_middle() -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert np.asarray(square(image, 10)).min() == 255
    assert square(image, 6).size == (6, 6)


def test_tensor_round_trip_is_exact() -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = to_tensor(Image.fromarray(values))
    assert pixels.shape == (3, 8, 8)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(np.asarray(to_image(pixels)), values)


def test_load_pixels_stacks_and_accepts_none() -> None:
    files = [file_of(Image.new("RGB", (9, 5), "white")), file_of(Image.new("RGB", (20, 20), "black"), "JPEG")]
    pixels = load_pixels(files, 8)
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels[0].min() == 1 and pixels[1].max() == -1
    assert load_pixels([], 8).shape == (0, 3, 8, 8)


def dot_picture(count: int, side: int = 16) -> torch.Tensor:
    pixels = torch.ones(count, 3, side, side)
    pixels[:, :, 4:8, 4:8] = -1
    return pixels


def test_views_without_amounts_change_nothing() -> None:
    pixels = torch.rand(2, 3, 12, 12) * 2 - 1
    got = random_views(pixels, torch.Generator().manual_seed(0), shift_pixels=0, zoom=0, flip=False)
    torch.testing.assert_close(got, pixels, atol=1e-5, rtol=0)


def test_views_differ_per_picture_repeat_per_seed_and_stay_in_range() -> None:
    pixels = dot_picture(8)
    views = [
        random_views(pixels, torch.Generator().manual_seed(seed), shift_pixels=3, zoom=0.1, flip=False)
        for seed in (5, 5, 6)
    ]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert not torch.equal(views[0][0], views[0][1])
    assert views[0].min() >= -1 - 1e-5 and views[0].max() <= 1 + 1e-5


def test_views_shift_at_most_as_far_as_asked_and_fill_with_white() -> None:
    black = torch.full((64, 3, 16, 16), -1.0)
    got = random_views(black, torch.Generator().manual_seed(1), shift_pixels=2, zoom=0, flip=False)
    assert got[:, :, 2:-2, 2:-2].max() < -0.999
    assert got[:, :, 0].max() > 0.9


def test_flip_mirrors_about_half_of_the_pictures() -> None:
    pixels = dot_picture(64)
    got = random_views(pixels, torch.Generator().manual_seed(2), shift_pixels=0, zoom=0, flip=True)
    mirrored = sum(torch.allclose(view, pixels[0].flip(-1), atol=1e-4) for view in got)
    kept = sum(torch.allclose(view, pixels[0], atol=1e-4) for view in got)
    assert mirrored + kept == 64
    assert 20 < mirrored < 44
