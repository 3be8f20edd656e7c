"""Which split a pair had when a run was trained, by its name; the folders above a name may have changed since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Flag, auto

from megatron_vilg.data.token_cache import CachedRecord, TokenCache

_TRAIN = "train"
Name = tuple[str, str]
"""The end of a key, from a folder on, and the caption."""


class _Found(Flag):
    TRAINED = auto()
    """A training pair's key ends so."""
    HELD_OUT = auto()
    """This is the whole key of a held-out pair."""


class CachedPairs:
    """The pairs of a token cache, found by caption and the longest end of their key that any pair of the cache has.

    A file name alone is no name where every class has a folder of its own (``train/apple/0`` and ``val/apple/0``), and
    a whole key is none either: it depends on the folder that ``--data`` named.
    """

    def __init__(self, cache: TokenCache) -> None:
        """Read the names of all splits.

        Raises:
            DataError: a shard that is missing or damaged, or no split ``train``.
        """
        self._trained = cache.records(_TRAIN)
        self._known: dict[Name, _Found] = {}
        for record in self._trained:
            for name in _names(record.key, record.caption):
                self._known[name] = _Found.TRAINED
        for split in cache.splits:
            for record in cache.records(split) if split != _TRAIN else ():
                self._add_held_out(record)

    def __len__(self) -> int:
        """Pairs that were trained."""
        return len(self._trained)

    def was_trained(self, key: str, caption: str) -> bool:
        """Whether a training pair is among those that this one may be."""
        return _Found.TRAINED in self._find(key, caption)[1]

    def was_held_out(self, key: str, caption: str) -> bool:
        """Whether no training pair is among them, or a held-out pair has the very key, whatever else has it too.

        Tars may name pairs of all splits alike. Of parts of a key that is no proof: below another folder
        ``apple/0`` may be either.
        """
        found = self._find(key, caption)[1]
        return _Found.TRAINED not in found or _Found.HELD_OUT in found

    def num_missing(self, pairs: Iterable[Name]) -> int:
        """How many trained pairs none of ``pairs`` (keys and captions) may be."""
        found = {self._find(key, caption)[0] for key, caption in pairs}
        return sum(found.isdisjoint(_names(record.key, record.caption)) for record in self._trained)

    def _add_held_out(self, record: CachedRecord) -> None:
        nothing = _Found(0)
        for number, name in enumerate(_names(record.key, record.caption)):
            self._known[name] = self._known.get(name, nothing) | (nothing if number else _Found.HELD_OUT)

    def _find(self, key: str, caption: str) -> tuple[Name, _Found]:
        whole = (key, caption)
        for name in _names(key, caption):
            if name in self._known:
                found = self._known[name]
                return name, found if name == whole else found & _Found.TRAINED
        return whole, _Found(0)


def _names(key: str, caption: str) -> Iterator[Name]:
    """The whole key first, then without its first folder, and so on."""
    yield key, caption
    while "/" in key:
        key = key.partition("/")[2]
        yield key, caption
