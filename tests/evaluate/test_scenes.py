from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.data.images import to_image
from megatron_vilg.data.scenes import BACKGROUNDS
from megatron_vilg.evaluate.demo_report import make_report
from megatron_vilg.evaluate.pairs import EvalPair, EvalSet, Kind
from megatron_vilg.evaluate.scenes import measure_scenes
from megatron_vilg.evaluate.subject import EvaluationSettings, Subject
from tests.evaluate.toy_world import Flat, toy_pairs, toy_subject

SIDE = 24
COLOURS = ("红色", "绿色", "蓝色", "黑色")


def scene(colour: str, count: int) -> Tensor:
    """``count`` white squares in the cells of a 3 x 3 grid."""
    red, green, blue = BACKGROUNDS[colour]
    pixels = torch.tensor([red, green, blue]).float().div(127.5).sub(1)[:, None, None].expand(3, SIDE, SIDE).clone()
    for cell in range(count):
        top, left = 8 * (cell // 3) + 2, 8 * (cell % 3) + 2
        pixels[:, top : top + 4, left : left + 4] = 1.0
    return pixels


class Codeless:
    """A tokenizer of which only the round trip matters: a code is the number of a scene."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures, self.codebook = pictures, torch.zeros(len(pictures), 1)

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cdist(pixels.flatten(1), self.pictures.flatten(1)).argmin(dim=1, keepdim=True)

    def lookup(self, ids: Tensor) -> Tensor:
        return ids

    def decode(self, z_emb: Tensor) -> Tensor:
        return self.pictures[z_emb[..., 0]]


class OneColour:
    """Draws on red, and one thing; the right number of things when it draws several pictures and keeps the best."""

    def __init__(self, scenes: EvalSet) -> None:
        self.counts = {pair.caption: int((pair.scene or {})["count"]) for pair in scenes.pairs}

    def draw_candidates(
        self, prompts: list[str], *, num_images: int, settings: SampleConfig, seed: int, first_prompt: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        right = torch.tensor([self.counts[prompt] for prompt in prompts])
        if not settings.rerank:
            return torch.ones_like(right)[:, None, None], None
        ids = torch.stack([torch.ones_like(right), right], dim=1)
        return ids[:, :, None], torch.tensor([[0.0, 1.0]]).expand(len(prompts), -1)

    def decode(self, ids: Tensor) -> Tensor:
        return torch.stack([scene("红色", int(count)) for count in ids.flatten()])


@pytest.fixture
def scenes() -> EvalSet:
    pairs, pictures = [], []
    for number in range(16):
        colour, count = COLOURS[number % 4], 1 + number // 4
        spec = {"kind": "count", "background": colour, "count": count}
        kind = Kind.UNSEEN if number % 5 == 0 else Kind.TRAINED
        pairs.append(EvalPair(str(number), f"{colour}背景上的{count}个", kind, None, scene=spec))
        pictures.append(np.asarray(to_image(scene(colour, count))))
    return EvalSet(pairs, np.stack(pictures))


@pytest.fixture
def subject(scenes: EvalSet) -> Subject:
    toy = toy_subject(toy_pairs())
    tokenizer = Codeless(scenes.pixels(range(len(scenes))))
    config = dataclasses.replace(toy.config, sample=SampleConfig(rerank=4))
    return dataclasses.replace(toy, pipeline=OneColour(scenes), image_tokenizer=tokenizer, config=config)


def test_promises_are_counted_apart(subject: Subject, scenes: EvalSet) -> None:
    found = measure_scenes(subject, scenes, EvaluationSettings())
    assert found["trained"]["count"]["share"] == found["unseen"]["count"]["share"] == 1.0
    assert found["trained"]["count"]["count"] == 12 and found["unseen"]["count"]["count"] == 4
    assert found["trained"]["background"]["share"] == pytest.approx(3 / 12), "only red ones are right"
    assert found["ceiling"] == {"background": 1.0, "count": 1.0}
    assert 0.0 < found["chance"]["background"] < 0.4
    assert 0.0 < found["chance"]["count"] < 0.4
    assert found == measure_scenes(subject, scenes, EvaluationSettings())


def test_scenes_are_drawn_with_the_choice_of_the_run_and_without(subject: Subject, scenes: EvalSet) -> None:
    found = measure_scenes(subject, scenes, EvaluationSettings())
    assert found["trained"]["count"]["share"] == 1.0
    assert found["trained"]["count"]["not_reranked"] == pytest.approx(3 / 12), "one of four counts is one"
    plain = dataclasses.replace(subject.config, sample=SampleConfig())
    found = measure_scenes(dataclasses.replace(subject, config=plain), scenes, EvaluationSettings())
    assert found["trained"]["count"]["share"] == pytest.approx(3 / 12)
    assert "not_reranked" not in found["trained"]["count"]


def test_scenes_get_a_table_of_their_own(scenes: EvalSet, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = toy_pairs()
    figures = {"trained": {"count": {"share": 0.5, "interval": (0.2, 0.8), "count": 4, "not_reranked": 0.25}}}
    answer = {**figures, "chance": {"count": 0.24}, "ceiling": {"count": 1.0}}
    monkeypatch.setattr("megatron_vilg.evaluate.demo_report.measure_scenes", lambda *_: answer)
    report = make_report(toy_subject(pairs), pairs, Flat(), EvaluationSettings(shown_prompts=1), scenes=scenes)
    assert report.figures["scenes"] == answer
    assert report.view.tables[-1].rows == (
        ("数量 count", "0.50 (0.20–0.80)", "–", "0.24", "1.00"),
        ("不挑选，数量 count, no choice", "0.25", "–", "–", "–"),
    )
