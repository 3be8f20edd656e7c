"""Work that goes on behind the main stream of a GPU while the next piece is prepared; on a CPU it is done at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WorkBehind:
    """Work that runs behind the main stream, one piece at a time; its results are fetched when the next one starts."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: tuple[Tensor, tuple[Tensor, Any]] | None = None

    def start(self, work: Callable[[], Tensor], into: tuple[Tensor, Any]) -> None:
        """Start ``work``; its result is to be written to ``tensor[index]`` for ``into = (tensor, index)``."""
        self.finish()
        if self.stream is None:
            self.waiting = (work(), into)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.waiting = (work(), into)

    def finish(self) -> None:
        """Fetch the result of the last piece."""
        if self.waiting is None:
            return
        if self.stream is not None:
            self.stream.synchronize()
        result, (tensor, index) = self.waiting
        tensor[index] = result.to(tensor)
        self.waiting = None
