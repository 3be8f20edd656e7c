"""Drawing behind pictures of the same thing: by steps as by the whole model, and only what training did not show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.data.library import Library
from megatron_vilg.generate.pipeline import Pipeline
from megatron_vilg.generate.restyle import Restyling, draw_with_restyled
from megatron_vilg.models.restyler import Restyler
from tests.styled_run import Levels, write_styled_run

SETTINGS = SampleConfig(
    temperature=0.9, top_k=5, restyle=3, restyle_manner_guidance=0.7, restyle_reference_guidance=1.2
)
UNSEEN = ["扁平风格的苹果", "猫，立体风格", "线描风格的树"]
SHOWN = ["线描风格的苹果", "一棵树", "扁平风格的猫"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Library]:
    folder = tmp_path_factory.mktemp("restyle")
    cache = write_styled_run(folder / "run", folder / "pairs", Levels().encode)
    return folder / "run", Library.of(cache.split("train"))[0]


@pytest.fixture(scope="module")
def restyling(run: tuple[Path, Library]) -> Restyling:
    torch.manual_seed(0)
    config = RestylerConfig(num_layers=2, width=16, num_heads=2, num_references=2)
    model = Restyler(config, Levels().lookup(torch.arange(11)), 4, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return Restyling(model.requires_grad_(False).eval(), run[1])


def test_it_is_for_what_training_did_not_show(restyling: Restyling) -> None:
    assert restyling.asked_by([*UNSEEN, *SHOWN]) == {0: (0, 0), 1: (1, 2), 2: (2, 1)}


def _whole(restyling: Restyling, thing: int, manner: int, settings: SampleConfig, stream: tuple[int, int]) -> Tensor:
    """The likeliest codes, from all rows through the whole model at every place."""
    model = restyling.model
    references, shown_in = restyling._references(thing, manner, settings.restyle, stream)
    blind, nobody = torch.full_like(references[:1], model.hidden_code), torch.full_like(shown_in[:1], model.num_manners)
    ids = torch.zeros(1, 1, model.num_codes, dtype=torch.int64)
    for place in range(model.num_codes):

        def likely(codes: Tensor, shown: Tensor, wanted: int, place: int = place) -> Tensor:
            rows = len(codes)
            pictures, manners = torch.cat([codes, ids.expand(rows, 1, -1)], dim=1), F.pad(shown, (0, 1), value=wanted)
            logits = model(pictures, manners, pictures, manners)
            return logits[:, -1, place].log_softmax(dim=-1).mean(dim=0)

        told = likely(references, shown_in, manner)
        mixed = told + settings.restyle_manner_guidance * (told - likely(references, shown_in, model.num_manners))
        mixed = mixed + settings.restyle_reference_guidance * (told - likely(blind, nobody, manner))
        ids[0, 0, place] = mixed.argmax()
    return ids[0, 0]


@pytest.mark.parametrize("without", [{}, {"restyle_manner_guidance": 0.0}, {"restyle_reference_guidance": 0.0}])
def test_steps_draw_what_the_whole_model_finds_likeliest(restyling: Restyling, without: dict[str, float]) -> None:
    settings = dataclasses.replace(SETTINGS, temperature=0.0, **without)
    asked = [(0, 0), (1, 2), (2, 1)]
    drawn = restyling.draw_ids(asked, [4, 5, 9], settings, num_images=2, seed=3)
    for row, (wanted, stream) in enumerate(zip(asked, [4, 5, 9], strict=True)):
        expected = _whole(restyling, *wanted, settings, (3, stream))
        assert torch.equal(drawn[row, 0], expected) and torch.equal(drawn[row, 1], expected)


def test_a_picture_depends_on_seed_prompt_and_number_alone(
    restyling: Restyling, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, streams = [(0, 0), (1, 2), (2, 1)], [4, 5, 9]
    drawn = restyling.draw_ids(asked, streams, SETTINGS, num_images=3, seed=3)
    assert len({tuple(row) for row in drawn.flatten(0, 1).tolist()}) > 6
    assert torch.equal(restyling.draw_ids(asked[1:], streams[1:], SETTINGS, num_images=3, seed=3), drawn[1:])
    assert torch.equal(restyling.draw_ids(asked, streams, SETTINGS, num_images=2, seed=3), drawn[:, :2])
    monkeypatch.setattr("megatron_vilg.generate.restyle._AT_ONCE", 2)
    assert torch.equal(restyling.draw_ids(asked, streams, SETTINGS, num_images=3, seed=3), drawn)
    assert not torch.equal(restyling.draw_ids(asked, streams, SETTINGS, num_images=3, seed=4), drawn)


def test_references_are_the_things_other_pictures_in_several_orders(restyling: Restyling) -> None:
    library = restyling.library
    codes, shown_in = restyling._references(0, 0, 20, (1, 2))
    assert codes.shape == (20, 2, 16) and {tuple(row) for row in shown_in.tolist()} == {(1, 2), (2, 1)}
    for row, manner in zip(codes.flatten(0, 1), shown_in.flatten(), strict=True):
        picture = next(n for n in library.pictures(0) if library.manner[n] == manner)
        assert row.tolist() == library.codes[picture].tolist()
    codes, shown_in = restyling._references(4, 1, 3, (1, 2))  # one picture for two references
    assert (shown_in == torch.tensor([3, 0])).all() and (codes[:, 0] == 11).all()


def test_the_others_are_drawn_as_without_it(run: tuple[Path, Library], restyling: Restyling) -> None:
    pipeline = Pipeline.load(run[0])
    assert pipeline.restyling is None
    prompts = [SHOWN[0], UNSEEN[0], UNSEEN[1], SHOWN[1], SHOWN[2], UNSEEN[2]]
    plain = pipeline.draw_ids(prompts, num_images=2, settings=SETTINGS, seed=3, first_prompt=7)
    pipeline.restyling = restyling
    ids = pipeline.draw_ids(prompts, num_images=2, settings=SETTINGS, seed=3, first_prompt=7)
    assert torch.equal(ids[[0, 3, 4]], plain[[0, 3, 4]])
    expected = restyling.draw_ids([(0, 0), (1, 2), (2, 1)], [8, 9, 12], SETTINGS, num_images=2, seed=3)
    assert torch.equal(ids[[1, 2, 5]], expected)
    off = dataclasses.replace(SETTINGS, restyle=0)
    assert torch.equal(pipeline.draw_ids(prompts, num_images=2, settings=off, seed=3, first_prompt=7), plain)
    prefix = plain[:, 0, :4]
    continued = pipeline.draw_ids(prompts, num_images=2, settings=SETTINGS, seed=3, image_prefix=prefix)
    assert torch.equal(continued[:, 0, :4], prefix)  # the generator's alone


def test_ranks_go_on_with_the_codes_of_one_of_them(restyling: Restyling) -> None:
    drawn = draw_with_restyled(
        restyling, UNSEEN[:1], SETTINGS, lambda _: torch.empty(0),
        num_images=2, seed=0, first_prompt=0, same=lambda ids: torch.full_like(ids, 7),
    )  # fmt: skip
    assert (drawn == 7).all() and drawn.shape == (1, 2, 16)


def test_pixels_are_those_of_the_codes(run: tuple[Path, Library], restyling: Restyling) -> None:
    pipeline = Pipeline.load(run[0])
    pipeline.restyling = restyling
    prompts = [SHOWN[0], UNSEEN[0]]
    ids, pixels = pipeline.draw_pixels(prompts, num_images=2, settings=SETTINGS, seed=3)
    assert torch.equal(ids, pipeline.draw_ids(prompts, num_images=2, settings=SETTINGS, seed=3))
    assert torch.equal(pixels, pipeline.decode(ids))


def test_no_prompts_are_no_pictures(restyling: Restyling) -> None:
    empty = torch.empty(0, 2, 16, dtype=torch.int64)
    drawn = draw_with_restyled(restyling, [], SETTINGS, lambda _: empty, num_images=2, seed=0, first_prompt=0)
    assert drawn is empty
