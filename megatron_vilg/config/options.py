"""The list of all options, read from the schema: path, type in words, default, meaning."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from megatron_vilg.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Option:
    """One ``section.option``."""

    path: str
    """``section.option``, or the bare name of a field of ``RunConfig`` itself."""
    type_in_words: str
    """What values it takes, for messages: ``a whole number above 0``."""
    is_list: bool
    """Whether it takes several values."""
    is_text: bool
    """Whether it takes free text, which is then not read as a number or a truth value."""
    meaning: str
    """The text below the field in ``config/schema.py``."""

    @property
    def section(self) -> str:
        """What stands before the point; empty for a field of ``RunConfig`` itself."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """What stands behind the point."""
        return self.path.rpartition(".")[2]


@functools.cache
def all_options() -> dict[str, Option]:
    """Every option by path, in the order of the schema."""
    options: dict[str, Option] = {}
    for name, field in _fields(RunConfig).items():
        if dataclasses.is_dataclass(field.annotation):
            for inner_name, inner in _fields(field.annotation).items():
                options[f"{name}.{inner_name}"] = _option(f"{name}.{inner_name}", inner)
        else:
            options[name] = _option(name, field)
    return options


@functools.cache
def section_meanings() -> dict[str, str]:
    """What each section is about, in the order of the schema."""
    fields = _fields(RunConfig).items()
    return {name: field.description or "" for name, field in fields if dataclasses.is_dataclass(field.annotation)}


def nearest(path: str) -> str:
    """What someone who typed ``path`` most likely meant (``a`` or ``a or b``), or an empty text.

    The same name in other sections comes first, then a similar one in the section meant, then one anywhere.
    """
    options = all_options()
    section, _, name = path.rpartition(".")
    same = [option.path for option in options.values() if option.name == name and option.section]
    if same:
        return " or ".join(same)
    meant = section if section in section_meanings() else nearest_section(section)
    for candidates in (
        {option.name: option.path for option in options.values() if option.section == meant},
        {option.name: option.path for option in options.values()},
    ):
        if near := _closest(name, candidates, 0.65):
            return candidates[near]
    return ""


def nearest_section(section: str) -> str:
    """The section with the most similar name, or an empty text."""
    return _closest(section, section_meanings(), 0.5)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The most similar of ``names``, or an empty text."""
    return _closest(name, names, 0.5)


def _closest(word: str, words: Iterable[str], cutoff: float) -> str:
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return found[0] if found else ""


def _fields(cls: Any) -> dict[str, FieldInfo]:
    return cls.__pydantic_fields__


def _option(path: str, field: FieldInfo) -> Option:
    annotation: Any = field.annotation
    return Option(
        path=path,
        type_in_words=_in_words(annotation, field.metadata),
        is_list=get_origin(annotation) is tuple,
        is_text=annotation is str,
        meaning=" ".join((field.description or "").split()),
    )


def _in_words(annotation: Any, metadata: Iterable[object] = ()) -> str:
    """A type with its bounds as a reader of the message would say it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        return _in_words(inner, [bound for mark in marks for bound in getattr(mark, "metadata", [mark])])
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if origin is tuple:
        parts = get_args(annotation)
        if parts[-1] is types.EllipsisType or parts[-1] is ...:
            return f"a list such as [1, 2], each {_in_words(parts[0])}"
        return f"a list of {len(parts)}, each {_in_words(parts[0])}"
    nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return nouns[annotation] + _bounds(metadata)


def _bounds(metadata: Iterable[object]) -> str:
    low, high = "", ""
    for mark in metadata:
        match mark:
            case annotated_types.Gt(gt=limit):
                low = f" above {limit:g}"
            case annotated_types.Ge(ge=limit):
                low = f" of at least {limit:g}"
            case annotated_types.Le(le=limit):
                high = f" to {limit:g}"
    return low.replace("of at least", "from") + high if high else low
