from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.canvas import Canvas, font
from megatron_vilg.evaluate.curves import instrument_plots
from megatron_vilg.evaluate.demo_report import Report, make_report, write_report
from megatron_vilg.evaluate.measure import Measurement
from megatron_vilg.evaluate.pairs import EvalSet, Kind
from megatron_vilg.evaluate.subject import EvaluationSettings
from tests.evaluate.test_curves import metric_line
from tests.evaluate.toy_world import CONCEPTS, SIDE, STYLES, UNSEEN, Flat, toy_pairs, toy_subject

SETTINGS = EvaluationSettings(seed=5, shown_prompts=2, shown_captions=3, shown_samples=2)
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUM_TRAINED = len(CONCEPTS) * len(STYLES) - len(UNSEEN)


@pytest.fixture(scope="module")
def report() -> Report:
    pairs = toy_pairs()
    return make_report(toy_subject(pairs), pairs, Flat(), SETTINGS, seconds={"train": 12.0}, credits=["Toy (MIT)"])


def test_all_promised_keys_are_there(report: Report) -> None:
    figures = report.figures
    for name in ("ce", "ce_unseen"):
        assert set(figures[name]) == {"text_to_image", "image_to_text"}
        assert all(set(test) == {"right", "shuffled", "unigram"} for test in figures[name].values())
    for kind in ("trained", "unseen"):
        assert {"exact_match", "char_f1"} <= set(figures["caption"][kind])
        assert "r_at_1" in figures["retrieval"][kind]
        assert isinstance(figures["style"][kind], float)
    assert isinstance(figures["caption"]["chance"], float)
    for name in ("retrieval", "style"):
        assert {"chance", "ceiling"} <= set(figures[name])
    assert {"l1", "psnr"} <= set(figures["reconstruction"])
    assert figures["seconds"] == {"train": 12.0}
    assert figures["seed"] == 5
    assert figures["config"]["image_tokenizer"]["image_size"] == toy_pairs().picture(0).width
    assert "torch" in figures["versions"]
    assert figures["counts"] == {
        "trained": NUM_TRAINED, "unseen": 3, "held_out_concepts": 0, "concepts": 4, "styles": 3,
    }  # fmt: skip


def test_a_large_gallery_also_says_what_a_small_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("measure", "demo_report", "report_tables"):
        monkeypatch.setattr(f"megatron_vilg.evaluate.{module}.FEW_CONCEPTS", 2)
    pairs = toy_pairs()
    report = make_report(toy_subject(pairs), pairs, Flat(), SETTINGS)
    retrieval = report.figures["retrieval"]
    assert retrieval["trained"]["r_at_1_of_2"] == 1.0
    assert retrieval["unseen"]["r_at_1"] < retrieval["unseen"]["r_at_1_of_2"] < 1.0
    assert retrieval["ceiling_other_pictures_of_2"] >= retrieval["ceiling_other_pictures"]
    assert any("of 2" in row[0] and row[1] == "1.00" and row[3] == "0.50" for row in report.view.tables[0].rows)
    assert "of_2" in report.figures["instrument"]


def test_a_model_that_knows_its_pairs_by_heart(report: Report) -> None:
    figures = report.figures
    assert figures["retrieval"]["trained"]["r_at_1"] == figures["style"]["trained"] == 1.0
    assert figures["retrieval"]["ceiling"] == figures["style"]["ceiling"] == 1.0
    # Forgotten prompts are all drawn as the same picture, which shows a fourth concept.
    assert figures["retrieval"]["unseen"]["r_at_1"] < 0.5
    assert figures["retrieval"]["chance"] == pytest.approx(1 / len(CONCEPTS))
    assert figures["style"]["chance"] == pytest.approx(1 / len(STYLES))
    assert figures["caption"]["trained"] == {
        "exact_match": 1.0, "char_f1": 1.0, "count": NUM_TRAINED, "concept": 1.0, "style": 1.0,
        "greedy_exact_match": 1.0, "exact_match_interval": pytest.approx((0.7009, 1.0), abs=1e-4),
    }  # fmt: skip
    assert figures["caption"]["unseen"]["exact_match"] == 0.0
    assert figures["caption"]["unseen"]["char_f1"] == 0.0, "it says nothing"
    # Nine of the twelve true captions are in the pool, each once.
    assert figures["caption"]["chance"] == pytest.approx(9 / 12 / 9)
    assert figures["reconstruction"]["l1"] < 1e-4
    assert figures["reconstruction"]["psnr"] > 60


def test_cross_entropy_tells_right_from_wrong_conditions(report: Report) -> None:
    for name in ("ce", "ce_unseen"):
        for test in report.figures[name].values():
            assert test["right"] < test["shuffled"]
    right = math.log(math.exp(3.0) + SIDE * SIDE - 1) - 3.0
    assert report.figures["ce"]["text_to_image"]["right"] == pytest.approx(right, abs=1e-5)


def test_same_seed_same_files(report: Report, tmp_path: Path) -> None:
    pairs = toy_pairs()
    again = make_report(toy_subject(pairs), pairs, Flat(), SETTINGS, seconds={"train": 12.0}, credits=["Toy (MIT)"])
    write_report(report, tmp_path / "a")
    write_report(again, tmp_path / "b")
    for name in ("report.json", "report.png", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list((tmp_path / "a").glob("*.partial"))


@pytest.mark.parametrize(("judged", "drawn_again"), [(1, 2), (2, 0), (3, 0)])
def test_what_is_shown_was_judged(judged: int, drawn_again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, settings = toy_pairs(), dataclasses.replace(SETTINGS, samples_per_prompt=judged)
    subject, seeds = toy_subject(pairs), []
    draw, caption, captioned = subject.pipeline.draw_candidates, subject.pipeline.caption, []

    def noted_draw(prompts: Sequence[str], **options: Any) -> tuple[Tensor, Tensor | None]:
        seeds.append(options["seed"])
        ids, scores = draw(prompts, **options)
        # Drawings of a prompt differ: the second and third show other pictures.
        return torch.stack([(ids[:, n] + n) % 16 for n in range(ids.shape[1])], dim=1), scores

    def noted_caption(images: Tensor) -> list[str]:
        captioned.append(len(images))
        return caption(images)

    monkeypatch.setattr(subject.pipeline, "draw_candidates", noted_draw)
    monkeypatch.setattr(subject.pipeline, "caption", noted_caption)
    report = make_report(subject, pairs, Flat(), settings)
    assert seeds == [SETTINGS.seed] * 2 + [SETTINGS.seed + 1] * drawn_again, "of the two kinds"
    rows = [prompt for group in report.view.groups for prompt in group.prompts]
    assert [len(row.samples) for row in rows] == [2] * 4
    assert all(row.samples[0].picture.tobytes() != row.samples[1].picture.tobytes() for row in rows)
    assert rows[0].samples[0].picture.tobytes() == rows[0].reconstruction.tobytes(), "known by heart"
    # As the run says and greedily, each once per kind: none for the picture.
    candidates = subject.config.sample.caption_candidates
    assert captioned == [NUM_TRAINED] * 2 + [3] * 2 and not candidates


def test_written_report_can_be_read(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert figures["retrieval"]["trained"]["r_at_1"] == 1.0
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Toy (MIT)" in page
    assert "扁平风格的" in page
    assert "http" not in page, "the page needs no other file"
    # Two groups of two prompts with two samples, and three captions each.
    assert page.count("data:image/png;base64,") == 2 * (2 * 4) + 2 * 3


def test_the_configuration_in_a_report_can_be_used_again(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, with_page=False)
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (tmp_path / "again.json").write_text(json.dumps(figures["config"]))
    assert load_run_config(file=tmp_path / "again.json") == toy_subject(toy_pairs()).config


@pytest.mark.parametrize("file", sorted(RESULTS.glob("demo*.json")), ids=lambda file: file.stem)
def test_published_configurations_can_be_used(file: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(json.loads(file.read_text(encoding="utf-8"))["config"]))
    run = load_run_config(file=tmp_path / "run.json")
    assert run.model.norm_eps == RunConfig().model.norm_eps and run.optim.eps == RunConfig().optim.eps


def test_captions_name_a_concept_only_by_its_whole_name() -> None:
    pairs = toy_pairs()
    longer = [
        dataclasses.replace(pair, concept_name="熊猫", caption=pair.caption.replace("猫", "熊猫"))
        if pair.concept_name == "猫"
        else pair
        for pair in pairs.pairs
    ]
    world = EvalSet(longer, np.stack([np.asarray(pairs.picture(number)) for number in range(len(pairs))]))
    measurement = Measurement(toy_subject(world), world, None, SETTINGS)
    bears = [number for number, pair in enumerate(longer) if pair.concept_name == "熊"]
    assert measurement._names(["扁平风格的熊猫"] * 3, bears) == {"concept": 0.0, "style": pytest.approx(1 / 3)}
    assert measurement._names(["扁平风格的熊"] * 3, bears)["concept"] == 1.0


def test_page_has_plots_where_the_instruments_looked(report: Report, tmp_path: Path) -> None:
    plots = instrument_plots([json.loads(metric_line(step)) for step in (10, 20)])
    pairs = toy_pairs()
    plotted = make_report(toy_subject(pairs), pairs, Flat(), SETTINGS, plots=plots)
    for name, made in (("without", report), ("with", plotted)):
        write_report(made, tmp_path / name)
    pages = [(tmp_path / name / "report.html").read_text(encoding="utf-8") for name in ("without", "with")]
    assert "Instruments over training" not in pages[0]
    assert pages[1].count("<svg") == len(plots) > 5
    assert "http" not in pages[1]


@pytest.mark.parametrize(
    ("rerank", "chinese", "english"),
    [
        (0, "每行按种子抽取，未经挑选", "rows drawn by seed, not chosen"),
        (2, "每行按种子抽取，未经挑选", "rows drawn by seed, not chosen"),
        (512, "图片由模型自评，512 取 2", "by seed, pictures the best 2 of 512 by the model's own likelihoods"),
    ],
)
def test_headings_say_whether_drawings_were_chosen(
    rerank: int, chinese: str, english: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = toy_pairs()
    subject = toy_subject(pairs)
    sample = dataclasses.replace(subject.config.sample, rerank=rerank)
    subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, sample=sample))
    written: list[tuple[str, float, float]] = []

    def text(self: Canvas, x: float, y: float, words: str, size: int, *_: object, align: str = "left") -> None:
        width = font(size).getlength(words)
        written.append((words, y, x - width if align == "right" else x + width))

    monkeypatch.setattr(Canvas, "text", text)
    write_report(make_report(subject, pairs, Flat(), SETTINGS), tmp_path)
    ((heading, y, left),) = [entry for entry in written if "drawn by seed" in entry[0]]
    assert chinese in heading and heading.endswith(english)
    (title,) = [entry for entry in written if "Text to image" in entry[0]]
    assert abs(title[1] - y) < 10 and title[2] + 20 < left, "they stand on one line, side by side"
    assert html.escape(heading) in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_model_sees_no_more_pairs_at_a_time_than_asked_for(report: Report) -> None:
    pairs = toy_pairs()
    subject, sizes = toy_subject(pairs), []

    def forward(batch: PairBatch) -> tuple[Tensor, Tensor]:
        sizes.append(len(batch))
        return subject.forward(batch)

    watched = dataclasses.replace(subject, forward=forward, max_batch=2)
    again = Measurement(watched, pairs, None, SETTINGS).cross_entropy()
    assert max(sizes) == 2 and sum(sizes) == 2 * len(pairs)
    for direction, test in report.figures["ce"].items():
        assert again[Kind.TRAINED][direction] == pytest.approx(test, abs=1e-6)


def test_shown_pictures_carry_the_verdict(report: Report) -> None:
    trained, unseen = report.view.groups
    assert all(sample.concept and sample.style for prompt in trained.prompts for sample in prompt.samples)
    assert not all(sample.concept for prompt in unseen.prompts for sample in prompt.samples)
    assert all(item.is_right for item in trained.captions)
    assert not any(item.is_right for item in unseen.captions)
    assert len(trained.prompts) == 2 and len(trained.prompts[0].samples) == 2 and len(trained.captions) == 3


def test_new_concepts_are_reported_apart() -> None:
    pairs = toy_pairs(with_new_concept=True)
    figures = make_report(toy_subject(pairs), pairs, Flat(), SETTINGS).figures
    assert figures["counts"] == {
        "trained": 6, "unseen": 3, "held_out_concepts": 3, "concepts": 3, "styles": 3,
    }  # fmt: skip
    held_out = figures["held_out_concepts"]
    assert held_out["retrieval"]["r_at_1"] == held_out["style"] == held_out["concept_and_style"] == 1.0
    assert held_out["caption"]["exact_match"] == 1.0
    assert set(held_out["ce"]) == {"text_to_image", "image_to_text"}
    for name in ("caption", "retrieval", "style"):
        assert "held_out_concepts" not in figures[name]
    assert figures["retrieval"]["chance"] == pytest.approx(1 / 3), "the gallery holds no new concepts"


@pytest.mark.parametrize("kind", [Kind.UNSEEN, Kind.NEW_CONCEPT])
def test_a_kind_of_one_pair_is_named_and_left_out(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    pairs = toy_pairs(with_new_concept=True)
    drop = pairs.of_kind(kind)[1:]
    pairs = pairs.subset([number for number in range(len(pairs)) if number not in drop])
    figures = make_report(toy_subject(pairs), pairs, Flat(), SETTINGS).figures
    assert f"{kind.value}: 1 pair, fewer than 2: left out" in caplog.text
    assert figures["counts"][kind.value] == 1 and kind.value not in figures["num_prompts"]
    assert (figures["ce_unseen"] if kind == Kind.UNSEEN else figures["held_out_concepts"]) is None


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_trained_pairs_are_refused_before_anything_is_encoded(
    count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = toy_pairs()
    pairs = pairs.subset([*pairs.of_kind(Kind.TRAINED)[:count], *pairs.of_kind(Kind.UNSEEN)])
    subject = toy_subject(pairs)
    monkeypatch.setattr("megatron_vilg.evaluate.measure.encode", lambda *_: pytest.fail("it was encoded"))
    with pytest.raises(DataError, match=rf"only {count} was trained on\. Works: data with at least 2 pairs"):
        make_report(subject, pairs, Flat(), SETTINGS)
    assert "left out" not in caplog.text


def test_pairs_without_concepts_are_reported_without_verdicts(tmp_path: Path) -> None:
    pairs = toy_pairs(with_labels=False)
    report = make_report(toy_subject(pairs), pairs, Flat(), SETTINGS)
    assert report.figures["retrieval"] is None and report.figures["style"] is None
    assert report.figures["caption"]["trained"]["exact_match"] == 1.0
    assert report.view.groups[0].prompts[0].samples[0].concept is None
    write_report(report, tmp_path, with_page=False)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.png"}
