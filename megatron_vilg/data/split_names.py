"""Which split a name stands for, and which keys are held out where names say nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from megatron_vilg.log import get_logger

logger = get_logger(__name__)

_SHARD_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?$")
_HEAD = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev(?:elopment)?)|(?P<test>test(?:ing)?)"
    r"|(?P<eval>eval(?:uation)?)|(?P<heldout>(?:held|hold)[-_. ]?out))(?:[-_. ]?(?:set|data))?(?![a-z])"
)
"""A known word, and no letter after it: ``val2017`` is one, ``valley`` is not."""
_HELD_OUT_INSIDE = re.compile(r"(?<![a-z])(?:val|valid|validation|dev|test|testing|eval|evaluation|heldout)(?![a-z])")
_NAMES_SHOWN = 3
_RULE = "a name says its split if it starts with train, val, valid, validation, dev, test, eval or heldout"


def split_from_name(name: str) -> str | None:
    """``train-00001`` -> ``train``, ``val-pairs-00000`` -> ``val-pairs``, ``00003`` -> None.

    Everything that starts with the word ``train`` is the split ``train`` (``train-scenes-00000`` too). Names that are
    nothing but a word for held-out pairs and a shard's number become ``val``, ``test``, ``eval`` or ``heldout``; what
    has more after such a word is a split of its own (``validation-coco-00000`` -> ``validation-coco``). The word ends
    where no letter follows, so ``valley`` and ``testament`` name no split.
    """
    stem = _SHARD_NUMBER.sub("", name.lower())
    found = _HEAD.match(stem)
    if found is None:
        return None
    word = str(found.lastgroup)
    if word == "train" or found.end() == len(stem):
        return word
    return re.sub(r"[^\w.-]+", "-", stem)  # it becomes part of file names


def hash_split(key: str, val_share: float) -> str:
    """``val`` for about ``val_share`` of all keys, ``train`` for the rest; depends on the key alone."""
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_share else "train"


def warn_of_doubt(where: str, splits: Mapping[str, str | None]) -> None:
    """Name what is trained on although its name may mean something else.

    Args:
        where: the source.
        splits: the split that each name stands for; None: it says none, so its pairs are training pairs if other
            names do, and are split by the hash of their keys if none does.
    """
    doubtful = [name for name, split in splits.items() if split is None]
    named = sorted({split for split in splits.values() if split is not None})
    if named and doubtful:
        logger.warning(
            "%s: %d of %d names say no split and are trained on (%s), beside the splits %s; %s",
            where,
            len(doubtful),
            len(splits),
            _some(doubtful),
            ", ".join(named),
            _RULE,
        )
    elif inside := [name for name in doubtful if _looks_held_out(name)]:
        logger.warning(
            "%s: %d of %d names look held out but do not start so, and are trained on (%s); %s",
            where,
            len(inside),
            len(splits),
            _some(inside),
            _RULE,
        )


def warn_of_splits_in_splits(where: str, splits: Mapping[str, str | None]) -> None:
    """Name folders that lie in one split and are called like another.

    Args:
        where: the source.
        splits: the split that the pictures in each folder were given.
    """
    doubtful = [
        folder
        for folder, split in splits.items()
        if any(inner not in (None, split) for inner in map(split_from_name, folder.split("/")))
    ]
    if doubtful:
        logger.warning(
            "%s: %d of %d folders are called like one split and lie in another, which they are taken for (%s). If that "
            "is wrong, name one folder as the source, or rename the outer one",
            where,
            len(doubtful),
            len(splits),
            _some([f"{folder} in {splits[folder]}" for folder in doubtful]),
        )


def warn_of_picture_names(where: str, names: Sequence[str]) -> None:
    """Say that names of pictures are no splits, if some look held out.

    Args:
        where: the source, none of whose folders names a split.
        names: of the pictures.
    """
    held_out = [name for name in names if split_from_name(name) not in (None, "train") or _looks_held_out(name)]
    if held_out:
        logger.warning(
            "%s: the names of %d of %d pictures look held out (%s), but those of pictures say no split: all are "
            "divided by data.val_share. To hold these out, put them into a folder val, and the others into train",
            where,
            len(held_out),
            len(names),
            _some(held_out),
        )


def _looks_held_out(name: str) -> bool:
    return _HELD_OUT_INSIDE.search(name.lower()) is not None


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_NAMES_SHOWN]) + more
