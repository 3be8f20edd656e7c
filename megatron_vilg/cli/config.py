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
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import RunConfig
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
        values = _changed(loaded) if args.changed else dump_run_config(loaded.run)
        print(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        print(_as_text(loaded, only_changed=args.changed))
    # The number of processes is not known here: whether the layout fits it is asked when the work starts.
    if problems := check(loaded.run, world_size=None):
        raise ConfigError(problems)


def _changed(loaded: Loaded) -> dict[str, Any]:
    """The options that are not at their defaults, or not at the value of the preset, which stays named."""
    usual = [dump_run_config(RunConfig())]
    if loaded.run.preset:
        usual.append(dump_run_config(PRESETS[loaded.run.preset]()))
    changed: dict[str, Any] = {}
    for name, content in dump_run_config(loaded.run).items():
        if isinstance(content, dict):
            content = {key: value for key, value in content.items() if any(value != u[name][key] for u in usual)}
        if content and content != usual[0][name]:
            changed[name] = content
    return changed


def _as_text(loaded: Loaded, *, only_changed: bool) -> str:
    values = _changed(loaded) if only_changed else dump_run_config(loaded.run)
    lines: list[str] = []
    for section, meaning in section_meanings().items():
        shown = values.get(section, {})
        options = [option for option in all_options().values() if option.section == section and option.name in shown]
        if not options:
            continue
        lines += ["", f"{section}: {meaning}"]
        for option in options:
            value = json.dumps(shown[option.name], ensure_ascii=False)
            lines.append(f"  {option.path}={value}   [{loaded.origin(option.path)}]")
            if not only_changed:
                text = f"{option.meaning.replace('``', '')} ({option.type_in_words})"
                lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:]) or "every option is at its default"
