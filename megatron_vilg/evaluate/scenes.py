"""Do drawn scenes keep what their caption promises? Read back from the pixels: ground colour, count, size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.data.scenes import check_scene
from megatron_vilg.evaluate.pairs import EvalSet, Kind
from megatron_vilg.evaluate.reconstruction import decode, encode
from megatron_vilg.evaluate.statistics import derangement, sample_indices, wilson_interval
from megatron_vilg.evaluate.subject import EvaluationSettings, Subject
from megatron_vilg.ops.sampling import keep_best

_SHUFFLES = 8
"""Times that every real scene is held against another one's caption, to find what chance gives."""


def measure_scenes(subject: Subject, scenes: EvalSet, settings: EvaluationSettings) -> dict[str, Any]:
    """Draw scenes from their captions and check them.

    Args:
        scenes: pairs with ``EvalPair.scene``; those that were held out are combinations of things and number, size or
            place that training never saw.

    Returns:
        for ``trained`` and ``unseen`` scenes the share of drawings that keep each promise, with interval and number
        of drawings judged, and where the run's ``sample`` keeps the best of several, ``not_reranked``: the share
        without that choice; ``chance``: real scenes held against the captions of others; ``ceiling``: real scenes
        sent through the image tokenizer.
    """
    found: dict[str, Any] = {}
    chosen: list[int] = []
    for kind in (Kind.TRAINED, Kind.UNSEEN):
        numbers = sample_indices(scenes.of_kind(kind), settings.max_prompts, settings.seed)
        if numbers:
            found[kind.value] = _drawn(subject, scenes, numbers, settings.seed)
            chosen += numbers
    specs, real = [scenes.pairs[number].scene for number in chosen], scenes.pixels(chosen)
    rebuilt = decode(subject.image_tokenizer, encode(subject.image_tokenizer, real))
    found["ceiling"] = _plain(_checked(rebuilt, specs))
    shuffled: list[dict[str, bool]] = []
    if len(chosen) > 1:
        for shuffle in range(_SHUFFLES):
            order = derangement(len(chosen), settings.seed + shuffle)
            shuffled += _checked(real, [specs[other] for other in order])
    found["chance"] = _plain(shuffled)
    return found


def _drawn(subject: Subject, scenes: EvalSet, numbers: Sequence[int], seed: int) -> dict[str, dict[str, Any]]:
    specs = [scenes.pairs[number].scene for number in numbers]

    def answers(ids: Tensor) -> list[dict[str, bool]]:
        return _checked(subject.pipeline.decode(ids[:, 0]).float().cpu(), specs)

    ids, scores = subject.pipeline.draw_candidates(
        scenes.captions(numbers), num_images=1, settings=subject.config.sample, seed=seed
    )
    shares = _shares(answers(keep_best(ids, scores, 1)[0]))
    if scores is not None:
        for name, share in _plain(answers(ids)).items():
            shares[name]["not_reranked"] = share
    return shares


def _checked(pictures: Tensor, specs: Sequence[Any]) -> list[dict[str, bool]]:
    return [check_scene(picture, spec) for picture, spec in zip(torch.unbind(pictures), specs, strict=True)]


def _collect(answers: Iterable[dict[str, bool]]) -> dict[str, list[bool]]:
    collected: dict[str, list[bool]] = {}
    for answer in answers:
        for name, kept in answer.items():
            collected.setdefault(name, []).append(kept)
    return collected


def _plain(answers: Iterable[dict[str, bool]]) -> dict[str, float]:
    return {name: sum(kept) / len(kept) for name, kept in _collect(answers).items()}


def _shares(answers: Iterable[dict[str, bool]]) -> dict[str, dict[str, Any]]:
    shares = {}
    for name, kept in _collect(answers).items():
        share = sum(kept) / len(kept)
        shares[name] = {"share": share, "interval": wilson_interval(share, len(kept)), "count": len(kept)}
    return shares
