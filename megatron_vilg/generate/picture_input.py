"""A picture that a user names or hands over, as the tensor that the image tokenizer takes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from megatron_vilg.data.images import load_pixels, square, to_rgb, to_tensor
from megatron_vilg.errors import DataError

Picture = Image.Image | Path | str | Tensor
"""A picture, the path of one, or one that ``read_picture`` has read."""


def read_picture(image: Picture, size: int) -> Tensor:
    """A picture as float32 [1, 3, size, size] in [-1, 1], in RGB on white and upright like pictures in training.

    Raises:
        DataError: the file is missing or no picture, or Pillow cannot convert it.
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, Image.Image):
        return to_tensor(square(to_rgb(image), size))[None]
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error.strerror}); name a picture file") from error
    try:
        return load_pixels([data], size)
    except DataError as error:
        raise DataError(f"{image}: {error}") from error
