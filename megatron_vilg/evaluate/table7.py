"""The paper's Table 7 on our own pairs: which part gains from end-to-end training, generator or reconstructor.

A *joint* run trained both end to end; a *detached* run trained the same reconstructor on states that passed no gradient
back, so that its generator is the two-stage one. One of each per seed gives all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vilg.config.schema import RunConfig, SampleConfig
from megatron_vilg.errors import ConfigError, DataError
from megatron_vilg.evaluate.frechet import Gaussian, features_of, frechet_distance
from megatron_vilg.evaluate.pairs import EvalSet, Kind
from megatron_vilg.evaluate.reconstruction import SSIM_WINDOW, encode, score_reconstruction, structural_similarity
from megatron_vilg.evaluate.statistics import mean_interval, sample_indices
from megatron_vilg.log import get_logger
from megatron_vilg.models.features import FeatureNetwork
from megatron_vilg.models.image_tokenizer import ImageTokenizer

log = get_logger(__name__)

JOINT, DETACHED = "joint", "detached"
MIN_PAIRS = 2
"""Fewer pictures have no covariance."""


class Contestant(Protocol):
    """A trained run (``generate.pipeline.Pipeline``)."""

    config: RunConfig
    image_tokenizer: ImageTokenizer

    def draw_ids(self, prompts: Sequence[str], *, num_images: int, settings: SampleConfig, seed: int) -> Tensor:
        """Prompts to codes int64 [B, n, N]."""
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., N] through the image tokenizer: pixels [..., 3, S, S] in [-1, 1]."""
        ...

    def decode_end_to_end(self, ids: Tensor, prompts: Sequence[str]) -> Tensor:
        """Codes [B, n, N] through the hidden states: pixels [B, n, 3, S, S] in [-1, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: whose codes, and which decoder."""

    name: str
    codes: str
    """``gold``, or the run that draws them: ``joint`` or ``detached``."""
    decoder: str
    """``codebook``, or the run whose reconstructor decodes: ``joint`` or ``detached``."""
    paper: float | None
    """The paper's Frechet distance, where it has this row."""


ROWS = (
    Row("two-stage G, two-stage R", DETACHED, "codebook", 41.4),
    Row("end-to-end G, two-stage R", JOINT, "codebook", 40.5),
    Row("end-to-end G, end-to-end R", JOINT, JOINT, 39.9),
    Row("two-stage G, detached R", DETACHED, DETACHED, None),
    Row("gold codes, two-stage R", "gold", "codebook", 21.7),
    Row("gold codes, end-to-end R", "gold", JOINT, 18.6),
    Row("gold codes, detached R", "gold", DETACHED, None),
)
DIFFERENCES = (
    ("better generator", 1, 0),
    ("better reconstructor, drawn codes", 2, 1),
    ("end to end, drawn codes", 2, 0),
    ("end to end, gold codes", 5, 4),
    ("of that without gradient to the generator", 6, 4),
    ("gradient to the generator, gold codes", 5, 6),
)
"""Name, row, and the row that is subtracted from it, within each seed."""


@dataclass(slots=True)
class Table7:
    """Figures by group of pairs, row and seed; and pictures to look at."""

    figures: dict[str, Any]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """By row, of the first seed: the first held-out pairs, [n, 3, S, S]."""
    captions: list[str] = field(default_factory=list)
    real: Tensor | None = None


def role_of(config: RunConfig) -> str:
    """Whether a run is the joint or the detached one of its seed.

    Raises:
        ConfigError: it has no reconstructor.
    """
    if not config.reconstructor.enabled:
        raise ConfigError(
            [
                "--load: this run has no reconstructor. Works: runs of `vilg train reconstructor.enabled=true`, with "
                "reconstructor.detach=false and =true, the same train.seed for each two"
            ]
        )
    return DETACHED if config.reconstructor.detach else JOINT


def pair_up(runs: Sequence[Contestant]) -> dict[int, dict[str, Contestant]]:
    """Runs by seed and role.

    Raises:
        ConfigError: a role occurs twice with one seed, or is missing, or the runs have different image tokenizers.
    """
    found: dict[int, dict[str, Contestant]] = {}
    codebook = runs[0].image_tokenizer.codebook
    if not all(torch.equal(run.image_tokenizer.codebook, codebook) for run in runs):
        raise ConfigError(
            ["--load: the runs have different image tokenizers. Works: vilg train --image-tokenizer SAME"]
        )
    for run in runs:
        part = found.setdefault(run.config.train.seed, {})
        role = role_of(run.config)
        if role in part:
            raise ConfigError([f"--load: two {role} runs have train.seed={run.config.train.seed}"])
        part[role] = run
    missing = [
        f"{role} run with train.seed={s}" for s, p in found.items() for role in (JOINT, DETACHED) if role not in p
    ]
    if missing:
        raise ConfigError([f"--load: no {what} (reconstructor.detach tells them apart)" for what in missing])
    return dict(sorted(found.items()))


def choose_pairs(pairs: EvalSet, max_pairs: int) -> dict[str, list[int]]:
    """Equally many numbers of held-out and of trained pairs, at most ``max_pairs`` of each.

    Raises:
        ConfigError: ``max_pairs`` is below ``MIN_PAIRS``.
        DataError: fewer than ``MIN_PAIRS`` held-out or trained pairs, or pictures too small for structural similarity.
    """
    require_enough(max_pairs)
    groups = {"held_out": pairs.of_kind(Kind.UNSEEN, Kind.NEW_CONCEPT), "trained": pairs.of_kind(Kind.TRAINED)}
    counts = {group: len(numbers) for group, numbers in groups.items()}
    if min(counts.values()) < MIN_PAIRS:
        raise DataError(
            f"--data: {counts['held_out']} held-out and {counts['trained']} trained pairs; a Frechet distance needs at "
            f"least {MIN_PAIRS} of each. Works: the data that the runs were trained on, with held-out pairs"
        )
    side = pairs.picture(0).width
    if side < SSIM_WINDOW:
        raise DataError(
            f"image_tokenizer.image_size={side}: structural similarity looks through a window of {SSIM_WINDOW} pixels. "
            f"Works: runs with pictures of at least {SSIM_WINDOW} pixels a side"
        )
    count = min(max_pairs, *counts.values())
    return {group: sample_indices(numbers, count, 0) for group, numbers in groups.items()}


def require_enough(max_pairs: int) -> None:
    """Refuse fewer pairs than a Frechet distance needs.

    Raises:
        ConfigError: ``max_pairs`` is below ``MIN_PAIRS``.
    """
    if max_pairs < MIN_PAIRS:
        raise ConfigError(
            [f"--max-prompts={max_pairs}: a Frechet distance needs at least {MIN_PAIRS} pictures. Works: 160 (default)"]
        )


def measure_table7(
    runs: Sequence[Contestant],
    pairs: EvalSet,
    network: FeatureNetwork,
    *,
    max_pairs: int,
    settings: SampleConfig,
    num_shown: int = 8,
) -> Table7:
    """Draw, decode and compare.

    Args:
        runs: one joint and one detached run per seed.
        pairs: held-out and trained pairs.
        network: of the Frechet distance.
        max_pairs: most pairs of each group; both groups get equally many, because the distance depends on it.
        settings: how codes are drawn.
        num_shown: pictures of every row that are kept.

    Raises:
        ConfigError: runs that do not go together (``pair_up``).
        DataError: pairs that give no distance (``choose_pairs``).
    """
    by_seed = pair_up(runs)
    table = Table7({})
    for group, numbers in choose_pairs(pairs, max_pairs).items():
        count = len(numbers)
        real, prompts = pairs.pixels(numbers), pairs.captions(numbers)
        reference = Gaussian.of(features_of(network, real))
        results: dict[str, dict[int, dict[str, float]]] = {row.name: {} for row in ROWS}
        for seed, part in by_seed.items():
            pictures = _decoded(part, real, prompts, settings, seed)
            for row in ROWS:
                scores = {"frechet": frechet_distance(reference, Gaussian.of(features_of(network, pictures[row.name])))}
                if row.codes == "gold":
                    scores |= _errors(real, pictures[row.name])
                results[row.name][seed] = scores
                log.info("%s, seed %d, %s: %s", group, seed, row.name, {k: round(v, 4) for k, v in scores.items()})
            if not table.pictures:
                shown = torch.linspace(0, count - 1, min(num_shown, count)).long()
                table.pictures = {name: value[shown] for name, value in pictures.items()}
                table.real, table.captions = real[shown], [prompts[i] for i in shown.tolist()]
        table.figures[group] = {"pairs": count, "rows": _summary(results), "differences": _differences(results)}
    return table


def _decoded(
    part: Mapping[str, Contestant], real: Tensor, prompts: list[str], settings: SampleConfig, seed: int
) -> dict[str, Tensor]:
    """Pictures [n, 3, S, S] of every row. Joint and detached run draw with the same random numbers."""
    codes = {
        role: run.draw_ids(prompts, num_images=1, settings=settings, seed=seed).cpu() for role, run in part.items()
    }
    codes["gold"] = encode(part[JOINT].image_tokenizer, real)[:, None]
    found = {}
    for row in ROWS:
        ids = codes[row.codes]
        if row.decoder == "codebook":
            pixels = part[JOINT].decode(ids)
        else:
            pixels = part[row.decoder].decode_end_to_end(ids, prompts)
        found[row.name] = pixels[:, 0].float().cpu()
    return found


def _errors(real: Tensor, pictures: Tensor) -> dict[str, float]:
    score = score_reconstruction(real, pictures)
    return {"l1": score.l1, "psnr": score.psnr, "ssim": structural_similarity(real, pictures)}


def _summary(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for row in ROWS:
        by_seed = results[row.name]
        names = next(iter(by_seed.values()))
        means = {name: mean_interval([scores[name] for scores in by_seed.values()]) for name in names}
        rows.append(
            {
                "row": row.name,
                "paper_fid": row.paper,
                "seeds": {str(seed): dict(scores) for seed, scores in by_seed.items()},
                "mean": {name: mean for name, (mean, _) in means.items()},
                "interval95": {name: half for name, (_, half) in means.items()},
            }
        )
    return rows


def _differences(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Differences within seeds: what both rows share (pairs, random numbers) is not in their interval."""
    found = []
    for name, minuend, subtrahend in DIFFERENCES:
        first, second = results[ROWS[minuend].name], results[ROWS[subtrahend].name]
        entry: dict[str, Any] = {"name": name, "row": ROWS[minuend].name, "minus": ROWS[subtrahend].name}
        papers = ROWS[minuend].paper, ROWS[subtrahend].paper
        entry["paper_fid"] = None if papers[0] is None or papers[1] is None else round(papers[0] - papers[1], 1)
        shared = [key for key in next(iter(first.values())) if key in next(iter(second.values()))]
        for key in shared:
            mean, half = mean_interval([first[seed][key] - second[seed][key] for seed in first])
            entry[key] = {"mean": mean, "interval95": half, "beyond_interval": half is not None and abs(mean) > half}
        found.append(entry)
    return found
