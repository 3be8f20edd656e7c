"""The options of ``vilg generate`` and ``vilg caption`` that say how tokens are drawn."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from pydantic import ValidationError

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.errors import ConfigError

_FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "rerank": "--rerank",
    "rerank_contrastive_weight": "--reranker-weight",
    "restyle": "--restyle",
    "min_p": "--min-p",
    "guidance": "--cfg-scale",
    "guidance_schedule": "--cfg-schedule",
    "manner_guidance": "--manner-scale",
    "thing_guidance": "--thing-scale",
}
"""Field of ``SampleConfig`` to the option that sets it."""


def add_sampling_options(parser: argparse.ArgumentParser, *, default: str, with_guidance: bool) -> None:
    """Add the options; they stay None where they are not given, and ``default`` says what that means."""
    group = parser.add_argument_group("sampling", f"Default: {default}.")
    group.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: all")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that together have P")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    if with_guidance:
        group.add_argument(
            "--cfg-scale", dest="guidance", type=float, metavar="X", help="classifier-free guidance; 1: off"
        )
        group.add_argument(
            "--cfg-schedule",
            dest="guidance_schedule",
            choices=("constant", "linear", "cosine"),
            help="at full scale from the start, or growing from 1",
        )
        for part in ("manner", "thing"):
            group.add_argument(
                f"--{part}-scale",
                dest=f"{part}_guidance",
                type=float,
                metavar="X",
                help=f"how much {part.upper()} of a prompt MANNER的THING pulls on its own; 0: off",
            )


def problems_of_sampling(args: argparse.Namespace) -> list[str]:
    """One line for each sampling option with a value that cannot work."""
    try:
        SampleConfig(**_given(args))
    except ValidationError as error:
        return [
            f"{_FLAGS[str(detail['loc'][0])]}={detail['input']}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
            for detail in error.errors()
        ]
    return []


def sampling_from_args(args: argparse.Namespace, default: SampleConfig) -> SampleConfig:
    """``default`` with what was given on the command line; check it with ``problems_of_sampling`` first."""
    return dataclasses.replace(default, **_given(args))


def require_none(problems: list[str]) -> None:
    """Report all problems at once.

    Raises:
        ConfigError: there are some.
    """
    if problems:
        raise ConfigError(problems)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _FLAGS if (value := getattr(args, name, None)) is not None}
