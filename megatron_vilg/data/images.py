"""Picture files to tensors in [-1, 1] on white ground, and their randomly shifted, zoomed, mirrored views."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from megatron_vilg.errors import DataError

WHITE = 1.0
"""What transparent pixels and the margin of a shifted picture become, in the range [-1, 1]."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its orientation in EXIF; 1 is upright."""


def decode_image(data: bytes) -> Image.Image:
    """Decode a picture file to RGB, as :func:`to_rgb` does.

    Raises:
        DataError: the bytes are no complete picture that Pillow can read.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return to_rgb(opened)
    except UnidentifiedImageError as error:
        raise DataError(f"not a readable picture ({len(data)} bytes): no format that Pillow knows") from error
    except MemoryError:  # this machine's fault, not the picture's
        raise
    except Exception as error:  # every reader of Pillow has its own: RuntimeError for AVIF, NotImplementedError for DDS
        raise DataError(f"not a readable picture ({len(data)} bytes): {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture in any of Pillow's modes as RGB; transparency is laid on white, the camera's rotation is applied.

    Greys of more than 8 bits are scaled from 0 to 65535, floating-point ones are taken to go from 0 to 255.

    Raises:
        DataError: its file is cut off, or Pillow cannot convert the mode.
    """
    try:
        image.load()
        turn = _turn_upright(image)
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max(initial=0) > 255):
            # Pillow would clip 16-bit greys at 255 instead of scaling them.
            wide, clear = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray((wide.astype(np.float32) / 257.0).clip(0, 255).astype(np.uint8))
            if clear is not None:  # one of the 16-bit greys
                image.putalpha(Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8)))
        if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
            ground.alpha_composite(image)
            image = ground
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"it cannot be turned from mode {image.mode} into RGB: {error}") from error


def _turn_upright(image: Image.Image) -> Image.Transpose | None:
    """By the orientation in EXIF or XMP; None where there is none, or it cannot be read.

    ``ImageOps.exif_transpose`` also writes all of EXIF anew, which fails where any other tag has an odd type.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - malformed EXIF: struct.error, TypeError, AttributeError, ...
        return None


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of an RGB picture, brought to ``size`` pixels a side.

    Smaller by area averaging: a sharper filter rings at edges, and an image tokenizer spends its codes on the rings
    (2 dB on the demo set). Larger by bicubic interpolation.
    """
    side = min(image.size)
    if image.size != (side, side):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side == size:
        return image
    return image.resize((size, size), Image.Resampling.BOX if size < side else Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, H, W] in [-1, 1]."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float() / 127.5 - 1.0


def to_image(pixels: Tensor) -> Image.Image:
    """One picture [3, H, W] in [-1, 1] (clamped) back to RGB."""
    values = ((pixels.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


def load_pixels(files: Sequence[bytes], size: int) -> Tensor:
    """Picture files to float32 [B, 3, size, size] in [-1, 1].

    Raises:
        DataError: one of them cannot be read.
    """
    if not files:
        return torch.empty(0, 3, size, size)
    return torch.stack([to_tensor(square(decode_image(data), size)) for data in files])


def random_views(pixels: Tensor, generator: torch.Generator, *, shift_pixels: float, zoom: float, flip: bool) -> Tensor:
    """Shift, zoom and maybe mirror each picture by amounts of its own; what comes in from outside is white.

    Args:
        pixels: [B, 3, S, S] in [-1, 1], on any device.
        generator: a CPU generator, so that every device draws the same views.
        shift_pixels: largest shift along either axis, in pixels.
        zoom: largest change of scale: factors are uniform in [1 - zoom, 1 + zoom].
        flip: mirror half of the pictures left to right.

    Returns:
        [B, 3, S, S], of the type and on the device of ``pixels``.
    """
    count, side = pixels.shape[0], pixels.shape[-1]
    draws = torch.rand(count, 4, generator=generator)  # always four numbers a picture: options do not move the others
    signed = draws[:, :3] * 2 - 1
    scale = 1.0 / (1.0 + zoom * signed[:, 0])
    mirror = torch.where(draws[:, 3] < 0.5, -1.0, 1.0) if flip else torch.ones(count)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = scale * mirror
    theta[:, 1, 1] = scale
    theta[:, :, 2] = signed[:, 1:3] * (2.0 * shift_pixels / side)
    grid = torch.nn.functional.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    # Sampled as a difference to white, so that the zeros outside the picture are white.
    moved = torch.nn.functional.grid_sample(
        pixels.float() - WHITE, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return (moved + WHITE).to(pixels.dtype)
