"""The pairs that an evaluation looks at, read from the data set itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vilg.data.images import square
from megatron_vilg.data.records import Record, find_records, read_records
from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.retrieval import Label


class Kind(StrEnum):
    """How much of a pair training has seen."""

    TRAINED = "trained"
    UNSEEN = "unseen"
    """Held out; of the demo's pairs: concept and style each seen, never together."""
    NEW_CONCEPT = "held_out_concepts"
    """The concept was never seen in any style."""


_KIND_OF_SPLIT = {
    "train": Kind.TRAINED,
    "heldout-pair": Kind.UNSEEN,
    "heldout-concept": Kind.NEW_CONCEPT,
    "val": Kind.UNSEEN,
}


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

    def counts(self) -> dict[str, int]:
        """Pairs of each kind, and different concepts and styles among the labelled ones."""
        kinds = Counter(pair.kind for pair in self.pairs)
        known = [pair.label for pair in self.pairs if pair.label is not None]
        return {
            **{kind.value: kinds.get(kind, 0) for kind in Kind},
            "concepts": len({label.concept for label in known}),
            "styles": len({label.style for label in known}),
        }


def read_eval_set(data: Path | str, image_size: int, *, max_bad_share: float = 0.01, val_share: float = 0.0) -> EvalSet:
    """Read a data set for evaluation.

    Pairs of the demo say in their field ``split`` how they were held out; others count as unseen when they stand in
    the data set's ``val`` part, and as trained otherwise.

    Args:
        data: folder, ``.jsonl`` or tar shards, as ``read_records`` takes them.
        image_size: side S to which pictures are brought.
        max_bad_share: share of unreadable records above which reading stops.
        val_share: share of keys that training left out where the data set names no splits.

    Raises:
        DataError: nothing to read, too many bad records, or no pair that training has seen.
    """
    pairs: list[EvalPair] = []
    pictures: list[np.ndarray] = []
    for part in find_records(data, val_share=val_share):
        for record in read_records(data, part, max_bad_share=max_bad_share, val_share=val_share):
            pairs.append(_describe(record, part))
            pictures.append(np.asarray(square(record.decode(), image_size), dtype=np.uint8))
    if not any(pair.kind == Kind.TRAINED for pair in pairs):
        raise DataError(
            f"data: {str(data)!r} has no training pairs, only held-out ones; evaluation compares the two, "
            "so give it the folder that `vilg train --data` had"
        )
    return EvalSet(pairs, np.stack(pictures))


def _describe(record: Record, part: str) -> EvalPair:
    fields = record.fields
    split = str(fields.get("split", part))
    if split not in _KIND_OF_SPLIT:
        raise DataError(
            f"data: record {record.key!r} has split={split!r}; known are {', '.join(map(repr, _KIND_OF_SPLIT))}"
        )
    concept, style = fields.get("concept"), fields.get("style")
    known = isinstance(concept, str) and isinstance(style, str) and bool(concept) and bool(style)
    return EvalPair(
        key=record.key,
        caption=record.caption,
        kind=_KIND_OF_SPLIT[split],
        label=Label(str(concept), str(style)) if known else None,
        concept_name=str(fields.get("label_zh", "")),
        style_name=str(fields.get("style_zh", "")),
        note=" · ".join(str(name) for name in (fields.get("label_en"), fields.get("style_en", style)) if name),
    )
