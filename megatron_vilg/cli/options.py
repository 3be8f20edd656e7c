"""The options that every verb with a configuration shares: preset, file, overrides."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from megatron_vilg.config.check import require
from megatron_vilg.config.load import COMMAND_LINE, Loaded, load_with_origins
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import ReconstructorConfig, RunConfig
from megatron_vilg.config.world import read_world
from megatron_vilg.log import get_logger

_log = get_logger(__name__)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--preset``, ``--config`` and ``section.option=value`` to a verb."""
    parser.add_argument("--preset", metavar="NAME", help=f"starting point: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML or JSON; wins over the preset")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.option=value",
        help="wins over both; `vilg config` lists all options",
    )


def load_from_args(args: argparse.Namespace) -> Loaded:
    """The configuration that the options of ``add_config_options`` give, types checked, rules not yet.

    Raises:
        ConfigError: unknown names, wrong values.
    """
    loaded = load_with_origins(args.preset, args.config, args.overrides)
    # No error: the configuration of a generator that was taken out of an end-to-end run has them.
    if idle := _idle(loaded.run.reconstructor):
        names = ", ".join(f"reconstructor.{name}" for name in idle)
        _log.warning("%s: nothing reads this without reconstructor.enabled=true", names)
    return loaded


def _idle(options: ReconstructorConfig) -> list[str]:
    """Options of a reconstructor that there is not, at other values than their defaults."""
    usual = ReconstructorConfig()
    names = [field.name for field in dataclasses.fields(options)]
    return [] if options.enabled else [name for name in names if getattr(options, name) != getattr(usual, name)]


def run_config_from_args(args: argparse.Namespace, *, is_joint: bool = False) -> RunConfig:
    """The configuration of a verb that is about to work: loaded, checked with all rules, its origins logged.

    Args:
        args: what the parser read.
        is_joint: whether all processes of a launcher work on one model together, so that the layout must fit them.

    Raises:
        ConfigError: unknown names, wrong values, or combinations that cannot run.
    """
    loaded = load_from_args(args)
    require(loaded.run, world_size=read_world().size if is_joint else None)
    given = sum(origin == COMMAND_LINE for origin in loaded.origins.values())
    parts = ["defaults", f"preset {loaded.run.preset}" if loaded.run.preset else "", str(args.config or "")]
    parts.append(f"{given} from the command line" if given else "")
    _log.info("configuration: %s", " < ".join(part for part in parts if part))
    return loaded.run
