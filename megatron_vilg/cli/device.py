"""The option ``--device``, which every verb that computes shares."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_vilg.errors import ConfigError
from megatron_vilg.log import get_logger

if TYPE_CHECKING:
    import torch

_log = get_logger(__name__)


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--device`` to a verb."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ConfigError: torch cannot use it.
    """
    import torch

    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "cpu"
        _log.info("device: %s (torch %s a GPU)", found, "sees" if found == "cuda" else "does not see")
        return torch.device(found)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError([f"--device={name}: torch cannot use it ({error}). Works: auto, cpu"]) from error
