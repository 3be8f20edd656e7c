"""``vilg config``: every option with its value, where the value came from, and what it means."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from megatron_vilg.cli.options import add_config_options, load_from_args
from megatron_vilg.config.check import check
from megatron_vilg.config.load import Loaded, dump_run_config
from megatron_vilg.config.options import all_options, section_meanings
from megatron_vilg.errors import ConfigError

_WIDTH = 110


def add_parser(subparsers: Any) -> None:
    """Register the verb; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "config",
        help="print every option",
        description="Print every option, its value, where the value came from, and its meaning.",
        epilog="example: vilg config --preset demo optim.lr=1e-3",
    )
    add_config_options(parser)
    parser.add_argument("--json", action="store_true", help="values only, in the form that --config reads")
    parser.add_argument("--changed", action="store_true", help="only options that are not at their default")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the configuration; combinations that cannot run are an error after it."""
    loaded = load_from_args(args)
    if args.json:
        print(json.dumps(dump_run_config(loaded.run), indent=2, ensure_ascii=False))
    else:
        print(_as_text(loaded, only_changed=args.changed))
    # The number of processes is not known here: whether the layout fits it is asked when the work starts.
    if problems := check(loaded.run, world_size=None):
        raise ConfigError(problems)


def _as_text(loaded: Loaded, *, only_changed: bool) -> str:
    values = dump_run_config(loaded.run)
    lines: list[str] = []
    for section, meaning in section_meanings().items():
        options = [option for option in all_options().values() if option.section == section]
        if only_changed:
            options = [option for option in options if option.path in loaded.origins]
        if not options:
            continue
        lines += ["", f"{section}: {meaning}"]
        for option in options:
            value = json.dumps(values[section][option.name], ensure_ascii=False)
            lines.append(f"  {option.path}={value}   [{loaded.origin(option.path)}]")
            if not only_changed:
                text = f"{option.meaning.replace('``', '')} ({option.type_in_words})"
                lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:]) or "every option is at its default"
