"""The proof that a run learned: ``report.json``, ``report.png`` and ``report.html`` of one trained model."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import sentencepiece
import torch

from megatron_vilg import __version__
from megatron_vilg.config.load import dump_run_config
from megatron_vilg.data.images import to_image
from megatron_vilg.evaluate.measure import Measurement
from megatron_vilg.evaluate.pairs import EvalSet, Kind
from megatron_vilg.evaluate.report_page import render_page
from megatron_vilg.evaluate.report_picture import render_picture
from megatron_vilg.evaluate.report_tables import footer_lines, report_tables
from megatron_vilg.evaluate.retrieval import FEATURE_BLOCKS, FEATURE_CELLS, FEATURE_SIZE, FEW_CONCEPTS
from megatron_vilg.evaluate.scenes import measure_scenes
from megatron_vilg.evaluate.statistics import rounded_figures, sample_indices
from megatron_vilg.evaluate.subject import EvaluationSettings, Subject
from megatron_vilg.evaluate.view import CaptionedPicture, DrawnPrompt, Group, LinePlot, ReportView, Sample
from megatron_vilg.log import get_logger
from megatron_vilg.models.features import Activations

log = get_logger(__name__)

FEATURE_NETWORK = "efficientnet-lite2"
"""Network that judges drawings; training's perceptual loss uses another one."""

_DECIMALS = 4

_TITLES = {
    (Kind.TRAINED, True): ("训练过的组合", "Trained: the model has seen this concept in this style"),
    (Kind.UNSEEN, True): ("没见过的组合", "Unseen: held out of training; concept and style each seen, never together"),
    (Kind.TRAINED, False): ("训练过的图文", "Trained: the model has seen this pair"),
    (Kind.UNSEEN, False): ("没见过的图文", "Unseen: pairs held out of training"),
}
"""Headings by kind of pair, and whether concept and style of its pairs are known."""


@dataclass(frozen=True, slots=True)
class Report:
    """The two faces of one evaluation."""

    figures: dict[str, Any]
    """The contents of ``report.json``."""
    view: ReportView
    """The contents of ``report.png`` and ``report.html``."""


def make_report(
    subject: Subject,
    pairs: EvalSet,
    network: Activations | None,
    settings: EvaluationSettings,
    *,
    scenes: EvalSet | None = None,
    seconds: Mapping[str, float] | None = None,
    started: float | None = None,
    credits: Sequence[str] = (),
    plots: Sequence[LinePlot] = (),
) -> Report:
    """Measure everything and choose what to show.

    Equal arguments give equal figures and pictures on the same machine; ``seconds`` are only passed on.

    Args:
        network: features that training never used, to judge drawings; None leaves that out.
        scenes: composed scenes, whose drawings are checked pixel by pixel.
        seconds: wall seconds by stage.
        started: ``time.perf_counter()`` when the evaluation began, to add it to them as ``evaluate``.
        credits: lines that must stand by the pictures.
        plots: of the run's training, for the page.
    """
    measurement = Measurement(subject, pairs, network, settings)
    figures = _figures(measurement)
    if scenes:
        figures["scenes"] = measure_scenes(subject, scenes, settings)
    groups = tuple(_group(measurement, kind) for kind in (Kind.TRAINED, Kind.UNSEEN) if kind in measurement.kinds)
    figures["seconds"] = dict(seconds or {})
    if started is not None:
        figures["seconds"]["evaluate"] = round(time.perf_counter() - started, 1)
    counts, size = figures["counts"], subject.config.image_tokenizer.image_size
    known = f" ({counts['concepts']} concepts in {counts['styles']} styles)" if counts["concepts"] else ""
    view = ReportView(
        title="一个模型，两个方向：看字画图，看图说话",
        subtitle=f"One transformer, both directions, trained from nothing on {counts[Kind.TRAINED.value]} pairs of "
        f"caption and picture{known}: {size} × {size} pixels, {subject.spec.num_image_tokens} image tokens.",
        groups=groups,
        tables=report_tables(figures),
        footer=footer_lines(figures, credits),
        choice=_choice(subject.config.sample.rerank, settings.shown_samples, subject.reranker is not None),
        plots=tuple(plots),
    )
    return Report(figures, view)


def write_report(report: Report, out: Path, *, with_page: bool = True) -> None:
    """Write ``report.json``, ``report.png`` and, if asked, ``report.html``; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded_figures(report.figures, _DECIMALS), ensure_ascii=False, indent=1) + "\n"
    _replace(out / "report.json", text.encode())
    partial = out / "report.png.partial"
    render_picture(report.view).save(partial, format="PNG")
    partial.replace(out / "report.png")
    if with_page:
        _replace(out / "report.html", render_page(report.view).encode())


def _figures(measurement: Measurement) -> dict[str, Any]:
    subject, settings = measurement.subject, measurement.settings
    cross_entropy = measurement.cross_entropy()
    captions = measurement.captions()
    drawings = measurement.drawings()
    new_concept = Kind.NEW_CONCEPT.value
    held_out: dict[str, Any] = {"ce": cross_entropy.get(Kind.NEW_CONCEPT), "caption": captions.pop(new_concept, None)}
    figures: dict[str, Any] = {
        "ce": cross_entropy.get(Kind.TRAINED),
        "ce_unseen": cross_entropy.get(Kind.UNSEEN),
        "caption": captions,
        "retrieval": None,
        "style": None,
    }
    if drawings is not None:
        if new_concept in drawings["retrieval"]:
            held_out["retrieval"] = _as_retrieval(drawings["retrieval"].pop(new_concept))
            held_out |= {name: drawings[name].pop(new_concept)["share"] for name in ("style", "concept_and_style")}
        figures |= _drawing_figures(drawings)
    used = measurement.codebook_use()
    counts = measurement.pairs.counts()
    return figures | {
        "reconstruction": measurement.reconstruction(),
        "codebook_use": used,
        "held_out_concepts": held_out if Kind.NEW_CONCEPT in measurement.kinds else None,
        "counts": counts,
        "num_prompts": {kind.value: len(numbers) for kind, numbers in measurement.chosen.items()},
        "instrument": _instrument(measurement) if drawings is not None else None,
        "drawing_settings": dataclasses.asdict(subject.config.sample)
        | {"samples_per_prompt": settings.samples_per_prompt},
        "reranker": None if subject.reranker is None else dataclasses.asdict(subject.reranker),
        "restyler": None if subject.restyler is None else dataclasses.asdict(subject.restyler),
        "seconds": {},
        "versions": _versions(),
        "seed": settings.seed,
        "config": dump_run_config(subject.config),
    }


def _drawing_figures(drawings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Retrieval keeps its details by kind; style is one number per kind with the details beside it."""
    retrieval = {
        name: _as_retrieval(value) if isinstance(value, dict) else value
        for name, value in drawings["retrieval"].items()
    }
    flat = {
        figure: {name: v["share"] if isinstance(v, dict) else v for name, v in drawings[figure].items()}
        | {"intervals": {name: v["interval"] for name, v in drawings[figure].items() if isinstance(v, dict)}}
        | {"not_reranked": {k: v["not_reranked"] for k, v in drawings[figure].items() if "not_reranked" in _dict(v)}}
        for figure in ("style", "concept_and_style")
    }
    return {"retrieval": retrieval} | flat


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_retrieval(share: dict[str, Any]) -> dict[str, Any]:
    return {"r_at_1": share["share"]} | {name: value for name, value in share.items() if name != "share"}


def _instrument(measurement: Measurement) -> dict[str, Any]:
    gallery = measurement.galleries[Kind.TRAINED]
    training, reranker = measurement.subject.config.image_tokenizer_train, measurement.subject.reranker
    return {
        "network": FEATURE_NETWORK,
        "used_in_training": training.perceptual_weight > 0 and training.perceptual_network == FEATURE_NETWORK,
        "used_in_choice": reranker is not None and reranker.feature_network == FEATURE_NETWORK,
        "features": f"outputs of blocks {', '.join(map(str, FEATURE_BLOCKS))}, averaged over {FEATURE_CELLS} x "
        f"{FEATURE_CELLS} cells, standardised, cosine; pictures of 8 bits brought to {FEATURE_SIZE} x {FEATURE_SIZE}",
        "gallery": f"{len(gallery.labels)} real pictures of {len(gallery.concepts)} concepts: all trained and unseen "
        "pairs",
        "retrieval": "the nearest real picture shows the asked concept",
        f"of_{FEW_CONCEPTS}": f"as in a gallery of {FEW_CONCEPTS} concepts: the asked one and others drawn at random",
        "style": "among the real pictures of the asked concept, the nearest has the asked style",
        "ceiling": "the real pictures of the same prompts sent through the image tokenizer; ceiling_other_pictures: "
        "real pictures against all others, so always in another style",
        "interval": "95 %, Wilson, one answer per prompt",
    }


def _versions() -> dict[str, str]:
    return {
        "megatron_vilg": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "sentencepiece": sentencepiece.__version__,
        "pillow": PIL.__version__,
    }


def _choice(num_candidates: int, num_shown: int, has_reranker: bool) -> str:
    """What a reader must know of the drawings: ``num_shown`` of each prompt, of ``num_candidates`` if more."""
    if num_candidates <= num_shown:  # all that were drawn are shown
        return "每行按种子抽取，未经挑选 · rows drawn by seed, not chosen"
    judges = ("模型与重排器评分", "the model's likelihoods and a reranker")
    chinese, english = judges if has_reranker else ("模型自评", "the model's own likelihoods")
    return (
        f"提示按种子抽取，图片由{chinese}，{num_candidates} 取 {num_shown} · prompts drawn by seed, pictures the best "
        f"{num_shown} of {num_candidates} by {english}"
    )


def _group(measurement: Measurement, kind: Kind) -> Group:
    settings, pairs = measurement.settings, measurement.pairs
    captioned = sample_indices(measurement.chosen[kind], settings.shown_captions, settings.seed + 3)
    title, subtitle = _TITLES[kind, kind in measurement.galleries]
    return Group(
        title=title,
        subtitle=subtitle,
        prompts=_drawn_prompts(measurement, kind),
        captions=tuple(
            CaptionedPicture(pairs.picture(number), pairs.pairs[number].caption, said)
            for number, said in zip(captioned, measurement.said(captioned), strict=True)
        ),
    )


def _drawn_prompts(measurement: Measurement, kind: Kind) -> tuple[DrawnPrompt, ...]:
    each, pairs = measurement.settings.shown_samples, measurement.pairs
    numbers, drawn = measurement.shown_prompts[kind], measurement.shown(kind)
    verdicts: list[tuple[bool | None, bool | None]] = [(None, None)] * len(drawn)
    if kind in measurement.galleries and len(pairs.labelled(numbers)) == len(numbers):
        asked = [label for label in pairs.labels(numbers) for _ in range(each)]
        hits = measurement.judge(kind, drawn, asked)
        verdicts = list(zip(hits.concept.tolist(), hits.style.tolist(), strict=True))
    rebuilt = measurement.rebuilt(numbers)
    samples = [Sample(to_image(picture), *verdict) for picture, verdict in zip(drawn, verdicts, strict=True)]
    return tuple(
        DrawnPrompt(
            prompt=pairs.pairs[number].caption,
            note=pairs.pairs[number].note,
            real=pairs.picture(number),
            reconstruction=to_image(rebuilt[row]),
            samples=tuple(samples[row * each : (row + 1) * each]),
        )
        for row, number in enumerate(numbers)
    )


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
