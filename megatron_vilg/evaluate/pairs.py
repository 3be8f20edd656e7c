"""The pairs that an evaluation looks at, read from the data set itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vilg.data.images import square
from megatron_vilg.data.records import Record, find_records, read_parts
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.cached_pairs import CachedPairs
from megatron_vilg.evaluate.retrieval import Label
from megatron_vilg.log import get_logger


class Kind(StrEnum):
    """How much of a pair training has seen."""

    TRAINED = "trained"
    UNSEEN = "unseen"
    """Held out; of the demo's pairs: concept and style each seen, never together."""
    NEW_CONCEPT = "held_out_concepts"
    """The concept was never seen in any style."""


logger = get_logger(__name__)
_SHOWN = 3
_NEW_CONCEPTS = "val-concepts"
"""Split of the demo's pairs whose concepts were never trained; every other held-out split counts as unseen."""


@dataclass(frozen=True, slots=True)
class EvalPair:
    """One pair without its pixels."""

    key: str
    caption: str
    kind: Kind
    label: Label | None
    """Concept and style; None where the data set does not say."""
    concept_name: str = ""
    """The concept as captions name it."""
    style_name: str = ""
    """The style as captions name it."""
    note: str = ""
    """Concept and style for readers without Chinese."""
    scene: Mapping[str, Any] | None = None
    """What a composed scene promises (``data.scenes``); None for other pairs."""


class EvalSet:
    """All pairs of a data set, pictures as bytes until they are asked for."""

    def __init__(self, pairs: Sequence[EvalPair], pictures: np.ndarray) -> None:
        """Keep P pairs and their pictures, uint8 [P, S, S, 3]."""
        self.pairs = tuple(pairs)
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self.pairs)

    def of_kind(self, *kinds: Kind) -> list[int]:
        """Numbers of the pairs of these kinds, in the order of the data set."""
        return [number for number, pair in enumerate(self.pairs) if pair.kind in kinds]

    def labelled(self, numbers: Iterable[int]) -> list[int]:
        """Those of ``numbers`` whose concept and style are known."""
        return [number for number in numbers if self.pairs[number].label is not None]

    def labels(self, numbers: Iterable[int]) -> list[Label]:
        """Concept and style of labelled pairs."""
        return [label for number in numbers if (label := self.pairs[number].label) is not None]

    def captions(self, numbers: Iterable[int]) -> list[str]:
        """Canonical captions."""
        return [self.pairs[number].caption for number in numbers]

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """float32 [len(numbers), 3, S, S] in [-1, 1]."""
        chosen = torch.from_numpy(self._pictures[np.asarray(numbers, dtype=np.int64)])
        return chosen.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0

    def picture(self, number: int) -> Image.Image:
        """One picture as the model sees it, S pixels a side."""
        return Image.fromarray(self._pictures[number])

    def subset(self, numbers: Sequence[int]) -> EvalSet:
        """The pairs with these numbers, in this order."""
        return EvalSet([self.pairs[n] for n in numbers], self._pictures[np.asarray(numbers, dtype=np.int64)])

    def counts(self) -> dict[str, int]:
        """Pairs of each kind, and different concepts and styles among the trained ones."""
        kinds = Counter(pair.kind for pair in self.pairs)
        known = self.labels(self.of_kind(Kind.TRAINED))
        return {
            **{kind.value: kinds.get(kind, 0) for kind in Kind},
            "concepts": len({label.concept for label in known}),
            "styles": len({label.style for label in known}),
        }


def read_eval_set(
    data: Path | str, image_size: int, *, max_bad_share: float = 0.01, val_share: float = 0.0
) -> tuple[EvalSet, EvalSet]:
    """Read a data set for evaluation.

    Args:
        data: folder, ``.jsonl`` or tar shards, as ``read_records`` takes them.
        image_size: side S to which pictures are brought.
        max_bad_share: share of unreadable records above which reading stops.
        val_share: share of keys that training left out where the data set names no splits.

    Returns:
        the pairs, and the composed scenes apart from them: those are judged in another way.

    Raises:
        DataError: nothing to read, too many bad records, or no pair that training has seen.
    """
    pairs: list[EvalPair] = []
    pictures: list[np.ndarray] = []
    parts = find_records(data, val_share=val_share)
    for split, record in read_parts(parts, data, max_bad_share=max_bad_share):
        pairs.append(_describe(record, split))
        pictures.append(np.asarray(square(record.decode(), image_size), dtype=np.uint8))
    plain = [number for number, pair in enumerate(pairs) if pair.scene is None]
    if not any(pairs[number].kind == Kind.TRAINED for number in plain):
        raise DataError(
            f"data: {str(data)!r} has no training pairs, only held-out ones or scenes; evaluation compares what was "
            "trained with what was not, so give it the folder that `vilg train --data` had"
        )
    scenes = [number for number, pair in enumerate(pairs) if pair.scene is not None]
    return _subset(pairs, pictures, plain), _subset(pairs, pictures, scenes)


def hold_against_training(
    pairs: EvalSet, scenes: EvalSet, data: Path | str, tokens: Path, max_share: float
) -> tuple[EvalSet, EvalSet]:
    """Refuse a data set that calls pairs held out which a run was trained on, or trained which it was not.

    A pair is known by its caption and the end of its key (``CachedPairs``). Which pairs are held out may depend on
    where the data lies: where names say no split, the path below ``data`` does. Training pairs that were added to the
    data set since the run was trained are left out.

    Args:
        pairs: what is to be evaluated.
        scenes: the composed ones, apart.
        data: where they were read, for messages.
        tokens: the run's token cache.
        max_share: share of the pairs up to which a warning is enough (pairs may be there twice).

    Returns:
        ``pairs`` and ``scenes`` without training pairs that the run does not know.

    Raises:
        DataError: more held-out pairs were trained; or training pairs were not, while others that were are missing.
    """
    cached = CachedPairs(TokenCache.open(tokens))
    everything = (*pairs.pairs, *scenes.pairs)
    _require_unseen([pair for pair in everything if pair.kind != Kind.TRAINED], cached, data, tokens, max_share)
    claimed = [pair for pair in everything if pair.kind == Kind.TRAINED]
    unknown = [pair.key for pair in claimed if not cached.was_trained(pair.key, pair.caption)]
    if not unknown:
        return pairs, scenes
    missing = cached.num_missing((pair.key, pair.caption) for pair in claimed)
    problem = (
        f"--data={data}: {len(unknown)} of {len(claimed)} training pairs are not among the {len(cached)} pairs in "
        f"{tokens} that were trained ({_first(unknown)})"
    )
    if missing > max_share * len(cached):
        raise DataError(
            f"{problem}, and {missing} of those are not in the data. Works: the very folder or file that "
            "`vilg train --data` had, to which pairs may have been added"
        )
    logger.warning("%s: they are left out", problem)

    def known(of: EvalSet) -> EvalSet:
        return of.subset(
            [
                number
                for number, pair in enumerate(of.pairs)
                if pair.kind != Kind.TRAINED or cached.was_trained(pair.key, pair.caption)
            ]
        )

    return known(pairs), known(scenes)


def _require_unseen(
    held_out: Sequence[EvalPair], cached: CachedPairs, data: Path | str, tokens: Path, max_share: float
) -> None:
    seen = [pair.key for pair in held_out if not cached.was_held_out(pair.key, pair.caption)]
    if not seen:
        return
    problem = (
        f"--data={data}: {len(seen)} of {len(held_out)} held-out pairs are among the training pairs in {tokens} "
        f"({_first(seen)})"
    )
    if len(seen) > max_share * len(held_out):
        raise DataError(f"{problem}. Works: the very folder or file that `vilg train --data` had")
    logger.warning("%s", problem)


def _first(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"


def _subset(pairs: Sequence[EvalPair], pictures: Sequence[np.ndarray], numbers: Sequence[int]) -> EvalSet:
    shape = pictures[0].shape
    chosen = np.stack([pictures[n] for n in numbers]) if numbers else np.empty((0, *shape), dtype=np.uint8)
    return EvalSet([pairs[n] for n in numbers], chosen)


def _describe(record: Record, split: str) -> EvalPair:
    fields = record.fields
    concept, style = fields.get("concept"), fields.get("style")
    scene = fields.get("scene")
    known = isinstance(concept, str) and isinstance(style, str) and bool(concept) and bool(style)
    unseen = Kind.NEW_CONCEPT if split == _NEW_CONCEPTS else Kind.UNSEEN
    return EvalPair(
        key=record.key,
        caption=record.caption,
        kind=Kind.TRAINED if split == "train" else unseen,
        label=Label(str(concept), str(style)) if known else None,
        concept_name=str(fields.get("label_zh", "")),
        style_name=str(fields.get("style_zh", "")),
        note=" · ".join(str(name) for name in (fields.get("label_en"), fields.get("style_en", style)) if name),
        scene=scene if isinstance(scene, dict) else None,
    )
