"""How well pictures fit their captions, said by any model: as a file of scores, or as a function to call."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vilg.data.source_parts import clean_name
from megatron_vilg.errors import ConfigError, DataError

Scorer = Callable[[Sequence[tuple[Image.Image, str]]], Sequence[float]]
"""RGB pictures with their captions in, as many similarities out."""

_LINE = '{"id": "KEY OF THE PAIR", "score": 0.7}'


class ScoreFile:
    """Scores that a model computed elsewhere: lines ``{"id": KEY, "score": NUMBER}``, optionally with ``"split"``.

    All are held in memory, without pictures.

    Raises:
        DataError: the file cannot be read, a line is none of these, or a pair has two scores.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scores: dict[tuple[str, str], float] = {}
        try:
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._add(line, number)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--scores={path}: cannot be read ({error}); needs lines like {_LINE}") from error
        if not self._scores:
            raise DataError(f"--scores={path}: holds no scores; needs lines like {_LINE}")

    def _add(self, line: str, number: int) -> None:
        where = f"--scores={self.path}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: no JSON ({error}); needs lines like {_LINE}") from error
        key = fields.get("id", fields.get("key")) if isinstance(fields, dict) else None
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise DataError(f"{where}: has no id; needs lines like {_LINE}")
        score = _number(fields.get("score"))
        if score is None:
            raise DataError(f"{where}: score = {fields.get('score')!r} is no finite number; works {_LINE}")
        name = (str(fields.get("split") or ""), clean_name(str(key)))
        if self._scores.setdefault(name, score) != score:
            raise DataError(
                f"{where}: {key!r} has the score {self._scores[name]:g} already. Give one score for each pair, and "
                'where splits share keys also "split"'
            )

    def get(self, split: str, key: str) -> float | None:
        """The score of a pair: by split and key, else by the key alone."""
        return self._scores.get((split, key), self._scores.get(("", key)))

    def example(self) -> str:
        """One of the names in the file, for messages."""
        return next(iter(self._scores))[1]


def load_scorer(name: str) -> Scorer:
    """The function behind ``MODULE:FUNCTION``; modules in the current folder are found too.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, function_name = name.partition(":")
    works = "works MODULE:FUNCTION, a function from a list of (PIL picture, caption) to a list of numbers"
    if not module_name or not function_name:
        raise ConfigError([f"--scorer={name}: {works}"])
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there, python -m does
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError([f"--scorer={name}: {module_name} cannot be imported ({error}); {works}"]) from error
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError([f"--scorer={name}: {module_name} has no function {function_name}; {works}"])
    scorer: Scorer = found
    return scorer


def call_scorer(scorer: Scorer, name: str, pairs: Sequence[tuple[Image.Image, str]]) -> list[float]:
    """The similarities of some pairs.

    Raises:
        DataError: not one finite number for each pair came back.
    """
    returned = scorer(list(pairs))
    try:
        answers = list(returned)
    except TypeError as error:
        raise DataError(f"--scorer={name}: no list of numbers came back ({error})") from error
    scores = [_number(answer) for answer in answers]
    good = [score for score in scores if score is not None]
    if len(good) != len(pairs):
        wrong = [repr(answer) for answer, score in zip(answers, scores, strict=True) if score is None]
        said = f"{len(answers)} answers for {len(pairs)} pairs" + (f", {wrong[0]} among them" if wrong else "")
        raise DataError(f"--scorer={name}: {said}; needs one finite number for each pair")
    return good


def _number(value: object) -> float | None:
    """Also of numpy and of torch, which turn into Python's; None: it is no finite number."""
    if value is None or isinstance(value, (str, bytes, bool)):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
