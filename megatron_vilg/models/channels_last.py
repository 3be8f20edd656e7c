"""Convolution kernels in the order of memory in which convolutions of pictures are fastest: channels last."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def to_channels_last(network: NetworkT) -> NetworkT:
    """Lay the 4-dimensional parameters and buffers of ``network`` out with channels last, in place; returns it."""
    to: Any = network.to  # the type stubs of torch before 2.14 do not know this form
    to(memory_format=torch.channels_last)
    return network
