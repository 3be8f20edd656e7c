"""Compare a file of generated captions with a file of true ones.

BLEU-4, ROUGE-L and CIDEr are those of pycocoevalcap (the COCO caption evaluation), fed with single characters: figures
for Chinese depend on how words are cut, so the unit is part of the name. METEOR and SPICE need Java and English.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vilg.errors import DataError, MissingPackageError
from megatron_vilg.evaluate.captions import char_f1, normalise

_SCORERS = {
    "bleu_4_char": ("pycocoevalcap.bleu.bleu", "Bleu"),
    "rouge_l_char": ("pycocoevalcap.rouge.rouge", "Rouge"),
    "cider_char": ("pycocoevalcap.cider.cider", "Cider"),
}


def read_references(path: Path) -> dict[str, list[str]]:
    """Lines ``{"id": .., "captions": [..]}``; at least one caption each.

    Raises:
        DataError: no such file, a line of another form, an id twice, or no line.
    """
    references: dict[str, list[str]] = {}
    for number, entry in _lines(path):
        captions = entry.get("captions")
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise DataError(f'{path}:{number}: needs "captions", a list with at least one text, got {captions!r}')
        _put(references, path, number, entry, captions)
    return _filled(references, path)


def read_candidates(path: Path) -> dict[str, str]:
    """Lines ``{"id": .., "caption": ..}``.

    Raises:
        DataError: as for ``read_references``.
    """
    candidates: dict[str, str] = {}
    for number, entry in _lines(path):
        caption = entry.get("caption")
        if not isinstance(caption, str):
            raise DataError(f'{path}:{number}: needs "caption", a text, got {caption!r}')
        _put(candidates, path, number, entry, caption)
    return _filled(candidates, path)


def compare_captions(references: Mapping[str, Sequence[str]], candidates: Mapping[str, str]) -> dict[str, Any]:
    """Score candidates against one or more references each.

    Returns:
        ``count``; means of ``exact_match`` and ``char_f1`` against the best reference of each picture; ``bleu_4_char``
        (of all captions together), ``rouge_l_char`` and ``cider_char`` (usually below 10; rare words count more, by the
        references of this very set).

    Raises:
        DataError: the two do not hold the same ids.
        MissingPackageError: pycocoevalcap is not installed.
    """
    lost, extra = sorted(references.keys() - candidates.keys()), sorted(candidates.keys() - references.keys())
    if lost or extra:
        raise DataError(
            f"references and candidates must have the same ids; {len(lost)} without a candidate {lost[:3]}, "
            f"{len(extra)} without a reference {extra[:3]}"
        )
    pairs = [(candidates[key], references[key]) for key in references]
    exact = [any(normalise(said) == normalise(text) for text in true) for said, true in pairs]
    overlap = [max(char_f1(said, text) for text in true) for said, true in pairs]
    figures: dict[str, Any] = {
        "count": len(pairs),
        "exact_match": sum(exact) / len(pairs),
        "char_f1": sum(overlap) / len(pairs),
    }
    spaced_true = {key: [_spaced(text) for text in true] for key, true in references.items()}
    spaced_said = {key: [_spaced(candidates[key])] for key in references}
    for name, (module, scorer) in _SCORERS.items():
        settings = {"verbose": 0} if scorer == "Bleu" else {}
        score, _ = getattr(_import(module), scorer)().compute_score(spaced_true, spaced_said, **settings)
        figures[name] = float(score[3] if scorer == "Bleu" else score)
    return figures


def _spaced(text: str) -> str:
    return " ".join(normalise(text))


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            "BLEU, ROUGE-L and CIDEr need a package that is not installed: pip install 'megatron_vilg[eval]' "
            "(or pip install pycocoevalcap)"
        ) from error


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); needs a JSON object per line") from error
    if text.lstrip().startswith("["):
        return _list(path, text)
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):  # other line separators may stand in a JSON string
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        entries.append((number, _entry(path, number, entry)))
    return entries


def _list(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """One JSON list, as ``vilg caption --json`` writes it; entries are numbered from 1, as lines are."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    return [(number, _entry(path, number, entry)) for number, entry in enumerate(found, start=1)]


def _entry(path: Path, number: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), (str, int)):
        shown = json.dumps(entry, ensure_ascii=False)[:80]
        raise DataError(f'{path}:{number}: needs an object with "id", a text or a number, got {shown!r}')
    return entry


def _put(into: dict[str, Any], path: Path, number: int, entry: Mapping[str, Any], value: object) -> None:
    key = str(entry["id"])
    if key in into:
        raise DataError(f"{path}:{number}: id {key!r} stands here a second time; ids must differ")
    into[key] = value


def _filled(entries: dict[str, Any], path: Path) -> dict[str, Any]:
    if not entries:
        raise DataError(f"{path}: no captions in it; needs a JSON object per line")
    return entries
