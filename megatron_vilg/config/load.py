"""From preset, file and command line to one checked ``RunConfig``, and to and from a run folder.

Precedence, the last one wins: the field's default, the preset, the file, ``section.option=value``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_vilg.config.aliases import split_settings
from megatron_vilg.config.markup import MarkupError, read_file_text, read_yaml
from megatron_vilg.config.options import all_options, nearest, nearest_name, nearest_section, section_meanings
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.errors import ConfigError

RUN_FILE = "config.json"
"""Name of the resolved configuration in a run folder."""
COMMAND_LINE = "command line"
"""Origin of values given as ``section.option=value``."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and for each option that is not at its default the place its value came from."""

    run: RunConfig
    origins: dict[str, str]

    def origin(self, path: str) -> str:
        """``default``, ``preset demo``, the file's name, or ``command line``."""
        return self.origins.get(path, "default")


@dataclass(slots=True)
class _Setting:
    """One value before it is checked."""

    value: object
    origin: str
    text: str = ""
    """The value as it was typed."""


def load_run_config(preset: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that preset, file and ``section.option=value`` give together.

    Args:
        preset: a name of ``PRESETS``; None: the one that ``file`` names, if any.
        file: YAML or JSON with sections as keys; the ``config.json`` of a run folder works too.
        overrides: ``section.option=value``, or aliases such as ``--lr=1e-4``.

    Raises:
        ConfigError: with every unknown name and wrong value at once.
    """
    return load_with_origins(preset, file, overrides).run


def load_with_origins(preset: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """Like ``load_run_config``, and says where each value came from."""
    problems: list[str] = []
    settings: dict[str, _Setting] = {}
    from_file = _read_file(file, problems) if file is not None else {}
    from_command = _read_overrides(overrides, problems)
    name = preset or _named_preset(from_command) or _named_preset(from_file)
    if name and name not in PRESETS:
        near = nearest_name(name, PRESETS)
        hint = f" Did you mean {near}?" if near else ""
        problems.append(f"preset={_short(name)}: no such preset.{hint} Works: {', '.join(PRESETS)}.")
        name = None
        for settings_of in (from_file, from_command):  # one problem is enough
            settings_of.pop("preset", None)
    if name:
        settings.update(_settings_of_preset(name))
    settings.update(from_file)
    settings.update(from_command)
    if name:
        settings["preset"] = _Setting(name, f"preset {name}")
    run = _validate(settings, problems)
    if problems or run is None:
        raise ConfigError(problems)
    return Loaded(run, {path: setting.origin for path, setting in settings.items()})


def dump_run_config(run: RunConfig) -> dict[str, Any]:
    """Every option as plain data for JSON or YAML; ``load_run_config`` reads it back unchanged."""
    return _adapter().dump_python(run, mode="json")


def write_run_folder_config(run: RunConfig, run_dir: Path) -> Path:
    """Write ``RUN/config.json``, whole or not at all; returns its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / RUN_FILE
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(dump_run_config(run), indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else a node that is lost now may leave an empty file under the name
    os.replace(partial, path)
    return path


def read_run_folder_config(run_dir: Path) -> RunConfig:
    """The configuration that a run was started with.

    Raises:
        ConfigError: no such file, or it was written by a version with other options.
    """
    path = run_dir / RUN_FILE
    problems: list[str] = []
    if not path.is_file():
        raise ConfigError([f"{path}: no such file. Works: the folder that `vilg train --out RUN` wrote."])
    settings = _read_file(path, problems)
    run = _validate(settings, problems)
    if problems or run is None:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return run


def _named_preset(settings: Mapping[str, _Setting]) -> str | None:
    setting = settings.get("preset")
    return str(setting.value) if setting is not None and setting.value else None


def _settings_of_preset(name: str) -> dict[str, _Setting]:
    """Values in which the preset differs from the fields' defaults."""
    defaults = _flatten(dump_run_config(RunConfig()))
    values = _flatten(dump_run_config(PRESETS[name]()))
    return {path: _Setting(value, f"preset {name}") for path, value in values.items() if value != defaults[path]}


def _flatten(sections: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, content in sections.items():
        if isinstance(content, Mapping):
            flat.update({f"{name}.{option}": value for option, value in content.items()})
        else:
            flat[name] = content
    return flat


def _read_file(file: Path, problems: list[str]) -> dict[str, _Setting]:
    """Settings of a YAML or JSON file."""
    try:
        content = read_file_text(file.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{file}: cannot be read ({error.strerror}). Works: a YAML or JSON file.")
        return {}
    except MarkupError as error:
        problems.append(f"{file}: {error}")
        return {}
    except UnicodeDecodeError as error:
        problems.append(f"{file}: is not UTF-8 text (byte {error.start}). Works: a YAML or JSON file in UTF-8.")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file}: must hold sections such as `model:`, got {_kind(content)}.")
        return {}
    settings: dict[str, _Setting] = {}
    for section, values in content.items():
        if section in section_meanings() and not isinstance(values, dict):
            if values is not None:
                problems.append(f"{section}={_dumped(values)}: is a section; write its options below it ({file}).")
        elif isinstance(values, dict):
            settings.update({f"{section}.{option}": _Setting(value, str(file)) for option, value in values.items()})
        else:
            settings[str(section)] = _Setting(values, str(file))
    return settings


def _read_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, _Setting]:
    rest, words = split_settings(overrides)
    for word in rest:
        if word.startswith("preset="):
            words.append(word)
        else:
            problems.append(f"{word}: must read section.option=value, for example optim.lr=1e-4.")
    settings: dict[str, _Setting] = {}
    for word in words:
        path, _, text = word.partition("=")
        option = all_options().get(path)
        value: object = text
        if option is None or not option.is_text:
            value = _parsed(text)
        if option is not None and option.is_list and not isinstance(value, list):
            values = _parsed(f"[{text.strip('()')}]")
            value = values if isinstance(values, list) else text
        settings[path] = _Setting(value, COMMAND_LINE, text)
    return settings


def _parsed(text: str) -> object:
    """What ``text`` means as YAML; itself if it is none."""
    try:
        return read_yaml(text)
    except MarkupError:
        return text


def _validate(settings: Mapping[str, _Setting], problems: list[str]) -> RunConfig | None:
    """Check names, then types; adds to ``problems``."""
    nested: dict[str, Any] = {}
    wrong: dict[str, None] = {}
    for path, setting in settings.items():
        if path not in all_options():
            problems.append(_unknown(path, setting))
            continue
        if not _is_value(setting.value):
            wrong[path] = None
            continue
        section, _, name = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = setting.value
    run = None
    try:
        # Strict JSON mode: true is no number and "12" no integer, while 1 is a float and a list a tuple.
        run = _adapter().validate_json(json.dumps(nested, default=str), strict=True)
    except ValidationError as error:
        for detail in error.errors():
            wrong[".".join(str(part) for part in detail["loc"][:2])] = None
    problems.extend(_wrong_value(path, settings.get(path)) for path in wrong)
    return None if wrong else run


def _is_value(value: object) -> bool:
    """Whether an option could have it: a number, a text that JSON can hold, or a list of them, but no section."""
    if isinstance(value, list):
        return not any(isinstance(each, list) or not _is_value(each) for each in value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, dict)


def _unknown(path: str, setting: _Setting) -> str:
    section, _, _ = path.rpartition(".")
    shown = f"{path}={_shown(setting)}"
    where = "" if setting.origin == COMMAND_LINE else f" ({setting.origin})"
    if section and section not in section_meanings():
        near = nearest(path)
        section_hint = nearest_section(section)
        hint = f" Did you mean {near}?" if near else (f" Did you mean {section_hint}?" if section_hint else "")
        return f"{shown}: no section {section!r}{where}.{hint} Works: {', '.join(section_meanings())}."
    near = nearest(path)
    hint = f" Did you mean {near}?" if near else " `vilg config` lists all options."
    return f"{shown}: no such option{where}.{hint}"


def _wrong_value(path: str, setting: _Setting | None) -> str:
    option = all_options()[path]
    if setting is None:
        return f"{path}: must be {option.type_in_words}."
    where = "" if setting.origin == COMMAND_LINE else f" ({setting.origin})"
    return f"{path}={_shown(setting)}: must be {option.type_in_words}, got {_kind(setting.value)}{where}."


def _shown(setting: _Setting) -> str:
    return _short(setting.text) if setting.text or setting.origin == COMMAND_LINE else _dumped(setting.value)


def _dumped(value: object) -> str:
    """The value as JSON; as much of it as tells where it is, if that is not possible."""
    if _is_deep(value):
        return reprlib.repr(value)  # which ends, where a list holds itself too
    try:
        return _short(json.dumps(value, default=str))
    except (TypeError, ValueError):  # keys that are no texts
        return reprlib.repr(value)


def _is_deep(value: object, most: int = 3) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (most == 0 or any(_is_deep(each, most - 1) for each in inner))


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _kind(value: object) -> str:
    """The value with the name of its type, as a message shows it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int():
            return f"the whole number {_short(str(value))}"
        case float():
            return f"the number {value}" + ("" if math.isfinite(value) else ", which is not finite")
        case str():
            coding = "" if _is_value(value) else ", which is not UTF-8"
            return f"the text {_short(repr(value))}{coding}"
        case list():
            return f"the list {_dumped(value)}"
        case dict():
            return "a section"
    return repr(value)


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)
