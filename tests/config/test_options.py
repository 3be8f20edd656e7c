from __future__ import annotations

import dataclasses

from megatron_vilg.config.aliases import ALIASES, split_settings
from megatron_vilg.config.load import dump_run_config
from megatron_vilg.config.options import all_options, section_meanings
from megatron_vilg.config.schema import RunConfig


def test_every_field_is_an_option_with_a_meaning_and_a_type() -> None:
    values = dump_run_config(RunConfig())
    paths = [f"{section}.{name}" for section, inner in values.items() if isinstance(inner, dict) for name in inner]
    assert list(all_options()) == ["preset", *paths]
    assert [path for path, option in all_options().items() if not option.meaning or not option.type_in_words] == []
    assert [section for section, meaning in section_meanings().items() if not meaning] == []
    assert list(section_meanings()) == [f.name for f in dataclasses.fields(RunConfig) if f.name != "preset"]


def test_aliases_are_few_and_name_options() -> None:
    assert len(ALIASES) <= 20
    assert [target for target in ALIASES.values() if target not in all_options()] == []


def test_settings_are_told_from_flags_and_their_values() -> None:
    words = ["--out", "runs/a=b.c", "optim.lr=1", "--lr=2", "--config", "x.yaml", "--seed", "3", "--tp"]
    rest, settings = split_settings(words)
    assert rest == ["--out", "runs/a=b.c", "--config", "x.yaml", "--tp"]
    assert settings == ["optim.lr=1", "optim.lr=2", "train.seed=3"]
    assert split_settings(["--lr=2", "optim.lr=1"], {}) == (["--lr=2"], ["optim.lr=1"])
