"""Pictures of things in several manners, as codes: what a restyler learns from and looks up when it draws.

A pair belongs to it if its source says what it shows and how, in the fields ``concept`` and ``style``; the words for
both are those of its caption (``prompt_parts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_vilg.data.prompt_parts import prompt_parts
from megatron_vilg.data.token_cache import CachedRecord, SplitTokens

Words = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Library:
    """P pictures of things in M manners, at most one of each thing in each; numbers count from 0."""

    manners: tuple[str, ...]
    """The M manners, as the field ``style`` names them."""
    things: tuple[str, ...]
    """The things, as the field ``concept`` names them."""
    manner_words: Words
    """What captions call each manner."""
    thing_words: Words
    """What captions call each thing."""
    thing: np.ndarray
    """int64 [P], rising."""
    manner: np.ndarray
    """int64 [P]."""
    codes: np.ndarray
    """uint16 [P, N]."""

    @classmethod
    def of(cls, tokens: SplitTokens) -> tuple[Library, np.ndarray]:
        """All that a split of a token cache has, and the pair numbers int64 [P] of its pictures."""
        records = tokens.records()
        chosen = _first_of_each(records)
        manners = sorted({manner for _, manner in chosen})
        things = sorted({thing for thing, _ in chosen})
        manner_words: dict[str, dict[str, None]] = {name: {} for name in manners}
        thing_words: dict[str, dict[str, None]] = {name: {} for name in things}
        for (thing, manner), pair in chosen.items():
            said_manner, said_thing = prompt_parts(records[pair].caption)
            if said_manner:
                manner_words[manner][said_manner] = None
                thing_words[thing][said_thing] = None
        ordered = sorted(chosen)
        pairs = np.array([chosen[key] for key in ordered], np.int64)
        library = cls(
            tuple(manners),
            tuple(things),
            tuple(map(tuple, manner_words.values())),
            tuple(map(tuple, thing_words.values())),
            np.searchsorted(things, [thing for thing, _ in ordered]),
            np.searchsorted(manners, [manner for _, manner in ordered]),
            tokens.images(pairs, np.zeros(len(pairs), np.int64)),
        )
        return library, pairs

    def __len__(self) -> int:
        return len(self.thing)

    def find(self, prompt: str) -> tuple[int, int] | None:
        """Thing and manner that a prompt names in the words of captions; None unless it names both."""
        said_manner, said_thing = prompt_parts(prompt)
        thing, manner = self._thing_called.get(said_thing), self._manner_called.get(said_manner)
        return None if thing is None or manner is None else (thing, manner)

    @cached_property
    def _thing_called(self) -> dict[str, int]:
        return _numbers(self.thing_words)

    @cached_property
    def _manner_called(self) -> dict[str, int]:
        return _numbers(self.manner_words)

    def number(self, label: tuple[str, str] | None) -> tuple[int, int] | None:
        """The same for the names of both; None unless it has both."""
        if label is None or label[0] not in self.things or label[1] not in self.manners:
            return None
        return self.things.index(label[0]), self.manners.index(label[1])

    def pictures(self, thing: int, but: int | None = None) -> np.ndarray:
        """Numbers of the pictures of a thing, int64 [n], without that in the manner ``but``."""
        found = np.arange(*np.searchsorted(self.thing, [thing, thing + 1]))
        return found if but is None else found[self.manner[found] != but]


def label_of(record: CachedRecord) -> tuple[str, str] | None:
    """What a pair shows, and how, as its source says; None where it does not."""
    thing, manner = record.fields.get("concept"), record.fields.get("style")
    return (thing, manner) if isinstance(thing, str) and isinstance(manner, str) and thing and manner else None


def _first_of_each(records: Sequence[CachedRecord]) -> dict[tuple[str, str], int]:
    """The first pair of each thing in each manner."""
    chosen: dict[tuple[str, str], int] = {}
    for pair, record in enumerate(records):
        if (label := label_of(record)) is not None:
            chosen.setdefault(label, pair)
    return chosen


def _numbers(words: Words) -> dict[str, int]:
    """The first number that each word stands for."""
    found: dict[str, int] = {}
    for number, names in enumerate(words):
        for name in names:
            found.setdefault(name, number)
    return found
