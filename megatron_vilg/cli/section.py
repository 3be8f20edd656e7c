"""Settings of a command that takes those of one section alone: ``reranker.option=value``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.errors import ConfigError

Section = TypeVar("Section", RerankerConfig, RestylerConfig)


def changed_section(name: str, config: Section, words: Sequence[str], check: Callable[[Section], list[str]]) -> Section:
    """``config``, the section ``name`` of a run, changed by ``words``.

    Raises:
        ConfigError: all broken rules at once.
    """
    from megatron_vilg.config.load import load_run_config
    from megatron_vilg.config.options import all_options

    prefix = f"{name}."
    if wrong := [word for word in words if not word.startswith(prefix)]:
        known = ", ".join(option for option in all_options() if option.startswith(prefix))
        raise ConfigError([f"{word}: this command has settings of the {name} alone. Works: {known}." for word in wrong])
    given = getattr(load_run_config(overrides=list(words)), name)
    names = {word.removeprefix(prefix).partition("=")[0] for word in words}
    config = dataclasses.replace(config, **{option: getattr(given, option) for option in names})
    if problems := check(config):
        raise ConfigError(problems)
    return config
