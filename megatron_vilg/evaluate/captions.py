"""How close generated captions come to the true ones, character by character.

Chinese has no spaces between words, so the character is the unit: the figures need no word list and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """Means over pictures, each between 0 and 1."""

    exact_match: float
    """Share of captions equal to the true one."""
    char_f1: float
    """Mean F1 of the two captions as multisets of characters."""
    count: int
    """Pictures."""


def normalise(caption: str) -> str:
    """Remove white space, which Chinese captions do not use, so that a stray blank does not count as a mistake."""
    return "".join(caption.split())


def longest_named(text: str, names: Iterable[str]) -> set[str]:
    """The longest of ``names`` that occur in ``text``, several if equally long; of 鱼 and 章鱼 in 章鱼 only that."""
    found = {name for name in names if name and name in text}
    most = max(map(len, found), default=0)
    return {name for name in found if len(name) == most}


def char_f1(candidate: str, reference: str) -> float:
    """F1 of two captions as multisets of characters: 1 for the same characters in any order, 0 for none in common.

    Two empty captions give 1, one empty caption gives 0.
    """
    candidate, reference = normalise(candidate), normalise(reference)
    if not candidate and not reference:
        return 1.0
    shared = (Counter(candidate) & Counter(reference)).total()
    return 2.0 * shared / (len(candidate) + len(reference))


def score_captions(candidates: Sequence[str], references: Sequence[str]) -> CaptionScore:
    """Compare each candidate with the reference at the same place.

    Raises:
        ValueError: the two lists differ in length, or are empty.
    """
    if len(candidates) != len(references) or not references:
        raise ValueError(f"need as many candidates as references, at least one: {len(candidates)}, {len(references)}")
    exact = [normalise(c) == normalise(r) for c, r in zip(candidates, references, strict=True)]
    overlap = [char_f1(c, r) for c, r in zip(candidates, references, strict=True)]
    return CaptionScore(exact_match=float(np.mean(exact)), char_f1=float(np.mean(overlap)), count=len(exact))


def chance_score(references: Sequence[str], pool: Sequence[str]) -> CaptionScore:
    """What a captioner would score that ignores the picture and names a caption of ``pool`` at random.

    The expectation itself, not one random draw: every reference against every caption of the pool.

    Args:
        references: the true captions of the pictures judged.
        pool: captions to draw from, usually those of the training pairs.
    """
    if not references or not pool:
        raise ValueError(f"need references and a pool: {len(references)}, {len(pool)}")
    references, pool = [normalise(r) for r in references], [normalise(p) for p in pool]
    characters = {c: i for i, c in enumerate(sorted({c for text in [*references, *pool] for c in text}))}
    left, right = _character_counts(references, characters), _character_counts(pool, characters)
    # Multiset overlap is a sum over thresholds of products of 0/1 matrices: sum_k [a >= k][b >= k] = min(a, b).
    shared = np.zeros((len(references), len(pool)), dtype=np.float32)
    for threshold in range(1, int(min(left.max(initial=0), right.max(initial=0))) + 1):
        shared += (left >= threshold).astype(np.float32) @ (right >= threshold).astype(np.float32).T
    lengths = left.sum(axis=1)[:, None] + right.sum(axis=1)[None, :]
    frequency = Counter(pool)
    return CaptionScore(
        exact_match=float(np.mean([frequency[r] / len(pool) for r in references])),
        char_f1=float(np.mean(np.where(lengths > 0, 2.0 * shared / np.maximum(lengths, 1), 1.0))),
        count=len(references),
    )


def _character_counts(texts: Sequence[str], characters: dict[str, int]) -> np.ndarray:
    counts = np.zeros((len(texts), max(len(characters), 1)), dtype=np.int32)
    for row, text in enumerate(texts):
        for character in text:
            counts[row, characters[character]] += 1
    return counts
