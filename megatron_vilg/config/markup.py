"""Settings as people write them: YAML with the numbers of version 1.2, and JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml


class MarkupError(ValueError):
    """The text is neither, or says something that cannot be meant; the message is a clause about it."""


class RepeatedKeyError(MarkupError):
    """A section or an option that a file has twice; YAML says that this is an error, PyYAML forgets the first."""


class TooDeepError(MarkupError):
    """Lists or sections in each other, more of them than could be read."""


def read_file_text(text: str) -> object:
    """What a YAML or JSON file says.

    JSON comes first: it may be indented with tabs, which YAML forbids, and escapes characters in its own way.

    Raises:
        RepeatedKeyError: a key is there twice in one section.
        TooDeepError: it is nested too deeply.
        MarkupError: it is neither YAML nor JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise TooDeepError(_TOO_DEEP) from error
    except RepeatedKeyError:
        # Which says the lines, too. Outside of texts, where JSON has none, a tab is a space.
        read_yaml(text.replace("\t", " "))
        raise
    except ValueError:
        return read_yaml(text)


def read_yaml(text: str) -> object:
    """What YAML means: numbers are those of version 1.2, and ``1_000`` is one.

    Raises:
        RepeatedKeyError, TooDeepError, MarkupError: as ``read_file_text``.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise TooDeepError(_TOO_DEEP) from error
    except MarkupError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # a ValueError also of a date that does not exist
        raise MarkupError(f"is not YAML or JSON: {' '.join(str(error).split())}") from error


_MOST_DIGITS = 1000
"""Of a whole number; Python refuses to print some thousands of them."""
_TOO_DEEP = "is nested too deeply. Works: sections with options below them, and lists of numbers"


def _repeated(name: str, where: str = "") -> RepeatedKeyError:
    rule = f"is there twice{where}, and only one could count"
    return RepeatedKeyError(f"{name}: {rule}. Works: one {name} with everything in it.")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, value in pairs:
        if name in section:
            raise _repeated(name)
        section[name] = value
    return section


class _Loader(yaml.SafeLoader):
    """PyYAML without version 1.1's numbers, in which ``010`` is 8, ``1:30`` is 90, and ``1e-4`` is a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A section as a dictionary."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise _repeated(name, f" (lines {lines[name]} and {line})")
            lines[name] = line
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Decimal also with leading zeros; 0o and 0x say another base."""
        text = str(self.construct_scalar(node))
        if len(text) > _MOST_DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """Of Python's own words for numbers that are not finite YAML has a point in front."""
        return float(str(self.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DIGITS = "[0-9]+(?:_[0-9]+)*"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(rf"(?:[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        rf"(?:[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor(_INT, _Loader.construct_int)
_Loader.add_constructor(_FLOAT, _Loader.construct_float)
