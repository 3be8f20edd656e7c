from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_vilg.evaluate.retrieval import FEATURE_CELLS, FEATURE_SIZE, Gallery, Label, picture_features

CONCEPTS, STYLES = ("bear", "cat", "dog"), ("flat", "round")


class Pixels:
    """Stands in for the network: the picture itself is every block's output."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def activations(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        self.sizes.append(tuple(pixels.shape))
        return [pixels for _ in blocks]


@pytest.fixture
def pictures() -> tuple[Tensor, list[Label]]:
    """Six pictures; those of one concept are alike up to a stripe that is the style."""
    generator = torch.Generator().manual_seed(0)
    rows, labels = [], []
    for concept in CONCEPTS:
        base = torch.rand(3, 16, 16, generator=generator) * 2 - 1
        for number, style in enumerate(STYLES):
            picture = base.clone()
            picture[:, 6 * number : 6 * number + 2, :4] = 1.0
            rows.append(picture)
            labels.append(Label(concept, style))
    return torch.stack(rows), labels


def test_features_are_resized_pooled_and_batched(pictures: tuple[Tensor, list[Label]]) -> None:
    network = Pixels()
    features = picture_features(network, pictures[0], batch_size=4)
    assert network.sizes == [(4, 3, FEATURE_SIZE, FEATURE_SIZE), (2, 3, FEATURE_SIZE, FEATURE_SIZE)]
    assert [tuple(part.shape) for part in features] == [(6, 3 * FEATURE_CELLS**2)] * 2


def test_pictures_find_themselves_and_their_kin(pictures: tuple[Tensor, list[Label]]) -> None:
    pixels, labels = pictures
    features = picture_features(Pixels(), pixels)
    gallery = Gallery(features, labels)
    own = gallery.judge(features, labels)
    assert own.nearest.tolist() == list(range(6))
    assert own.concept.all() and own.style.all()
    assert not own.rivals.any()
    hits, rivals = gallery.leave_one_out()
    assert hits.all() and not rivals.any()


def test_rivals_are_the_concepts_that_are_nearer() -> None:
    corners = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    labels = [Label(concept, "flat") for concept in "abcd"]
    gallery = Gallery([corners], labels)
    similarity = gallery._embed([torch.tensor([[1.0, 0.2, 0.1]])]) @ gallery._vectors.T
    order = [labels[place].concept for place in similarity[0].argsort(descending=True).tolist()]
    for concept in "abcd":
        hits = gallery.judge([torch.tensor([[1.0, 0.2, 0.1]])], [Label(concept, "flat")])
        assert hits.rivals.tolist() == [order.index(concept)] and hits.concept.tolist() == [order[0] == concept]


def test_a_share_among_fewer_concepts_is_what_drawing_them_gives() -> None:
    gallery = Gallery([torch.eye(6)], [Label(concept, "flat") for concept in "abcdef"])
    rivals = torch.tensor([0, 1, 3, 5])
    for choices in range(1, 7):
        found = []
        for count in rivals.tolist():
            draws = list(itertools.combinations(range(5), choices - 1))  # of the five others, the first are rivals
            found.append(sum(all(other >= count for other in draw) for draw in draws) / len(draws))
        assert gallery.share_among(rivals, choices) == pytest.approx(sum(found) / len(found))


def test_style_is_judged_within_the_asked_concept(pictures: tuple[Tensor, list[Label]]) -> None:
    pixels, labels = pictures
    features = picture_features(Pixels(), pixels)
    hits = Gallery(features, labels).judge([part[:1] for part in features], [Label("cat", "flat")])
    assert not hits.concept.any(), "a bear is not a cat"
    assert hits.style.any(), "but its stripe is the cat's flat stripe"


def test_chance_counts_the_gallery(pictures: tuple[Tensor, list[Label]]) -> None:
    pixels, labels = pictures
    gallery = Gallery(picture_features(Pixels(), pixels), labels)
    assert gallery.chance(labels) == pytest.approx((1 / 3, 1 / 2))
    assert gallery.concepts == CONCEPTS


def test_labels_must_match_pictures(pictures: tuple[Tensor, list[Label]]) -> None:
    with pytest.raises(ValueError, match="5 labels"):
        Gallery(picture_features(Pixels(), pictures[0]), pictures[1][:5])
