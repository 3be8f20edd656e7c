"""Which real picture does a drawn one resemble most? Concept retrieval and style choice, by frozen features.

Two questions about a picture drawn for "concept c in style s":

- concept: is the nearest of *all* real pictures one of c?
- style: is the nearest of the real pictures *of c* the one in s? A choice among the styles of one concept, because
  no classifier that is blind to the concept tells styles apart well at this size: flat sets look alike.

The features come from a network that training never used (EfficientNet-Lite2; the perceptual loss uses Lite0):
mean activations of two middle blocks over a 4 x 4 grid, from pictures brought to 64 x 64 pixels and 8 bits. On 720
emoji of 48 pixels sent through an image tokenizer that gave 0.996 for the concept and 0.97 for the style, where the
pooled last layer gave 0.82 and 0.75; pictures shifted by two pixels and zoomed by a tenth still gave 0.996 and 0.94.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.models.features import Activations, cell_features

FEATURE_BLOCKS = (8, 12)
"""Blocks of the network (counted from 0) whose outputs are compared."""
FEATURE_SIZE = 64
"""Side in pixels to which pictures are brought first."""
FEATURE_CELLS = 4
"""Cells along one side over which activations are averaged."""
FEW_CONCEPTS = 120
"""Larger galleries also say how drawings fare among so many concepts: as many as the quick demo has."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a picture shows."""

    concept: str
    style: str


@dataclass(frozen=True, slots=True)
class Hits:
    """Answers for Q pictures."""

    concept: Tensor
    """bool [Q]: the nearest real picture shows the asked concept."""
    style: Tensor
    """bool [Q]: among the real pictures of the asked concept, the nearest has the asked style."""
    nearest: Tensor
    """int64 [Q]: place of the nearest picture in the gallery."""
    rivals: Tensor
    """int64 [Q]: how many other concepts have a picture that is nearer than all of the asked concept."""


def picture_features(network: Activations, pixels: Tensor, *, batch_size: int = 64) -> list[Tensor]:
    """Describe pictures float32 [B, 3, S, S] in [-1, 1] for comparison, as ``models.features.cell_features`` does: one
    float32 [B, C * FEATURE_CELLS ** 2] per block of ``FEATURE_BLOCKS``."""
    return cell_features(network, pixels, FEATURE_BLOCKS, side=FEATURE_SIZE, cells=FEATURE_CELLS, batch_size=batch_size)


class Gallery:
    """Real pictures and what they show; judges other pictures by cosine similarity."""

    def __init__(self, features: Sequence[Tensor], labels: Sequence[Label]) -> None:
        """Keep G pictures.

        Args:
            features: of those pictures, from ``picture_features``.
            labels: one per picture.

        Raises:
            ValueError: no pictures, or another number of labels.
        """
        if not labels or any(len(part) != len(labels) for part in features):
            raise ValueError(f"{len(labels)} labels for {[len(part) for part in features]} pictures")
        self.labels = tuple(labels)
        self._scale = [(part.mean(dim=0), part.std(dim=0, unbiased=False) + 1e-3) for part in features]
        self._vectors = self._embed(features)
        self._concepts = {name: i for i, name in enumerate(sorted({label.concept for label in labels}))}
        self._concept_of = torch.tensor([self._concepts[label.concept] for label in labels])

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts in the gallery, sorted."""
        return tuple(self._concepts)

    def judge(self, features: Sequence[Tensor], asked: Sequence[Label]) -> Hits:
        """Find the nearest real pictures of Q pictures.

        Args:
            features: of the pictures, from ``picture_features``.
            asked: what each should show; its concept must be in the gallery.

        Raises:
            KeyError: a concept that the gallery lacks.
        """
        similarity = self._embed(features) @ self._vectors.T
        wanted = torch.tensor([self._concepts[label.concept] for label in asked])
        nearest = similarity.argmax(dim=1)
        same_concept = self._concept_of[None, :] == wanted[:, None]
        of_concept = similarity.masked_fill(~same_concept, -torch.inf).argmax(dim=1)
        style = [self.labels[g].style == label.style for g, label in zip(of_concept.tolist(), asked, strict=True)]
        return Hits(
            concept=self._concept_of[nearest] == wanted,
            style=torch.tensor(style),
            nearest=nearest,
            rivals=self._rivals(similarity, wanted),
        )

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """The gallery's pictures judged by all others.

        Returns:
            bool [G]: whether the nearest *other* picture shows the same concept; int64 [G]: rivals, as in ``Hits``.
        """
        hits, rivals = [], []
        for place in torch.arange(len(self.labels)).split(1024):
            similarity = self._vectors[place] @ self._vectors.T
            similarity[torch.arange(len(place)), place] = -torch.inf
            wanted = self._concept_of[place]
            hits.append(self._concept_of[similarity.argmax(dim=1)] == wanted)
            rivals.append(self._rivals(similarity, wanted))
        return torch.cat(hits), torch.cat(rivals)

    def share_among(self, rivals: Tensor, choices: int) -> float:
        """How often the asked concept would be the nearest of ``choices`` concepts: itself and others drawn at random.

        Shares of galleries with different numbers of concepts can be compared by it: the more concepts, the more look
        like the asked one. Exact (hypergeometric), nothing is drawn.

        Args:
            rivals: int64 [Q], from ``Hits`` or ``leave_one_out``.
            choices: from 1 to the gallery's number of concepts.
        """
        others = len(self._concepts) - 1
        taken = torch.arange(choices - 1)
        spared = (others - rivals[:, None] - taken).clamp(min=0) / (others - taken)
        return spared.double().prod(dim=1).mean().item()

    def chance(self, asked: Sequence[Label]) -> tuple[float, float]:
        """Concept and style hits to expect of pictures that have nothing to do with what was asked."""
        concept, style = 0.0, 0.0
        for label in asked:
            rivals = [other for other in self.labels if other.concept == label.concept]
            concept += len(rivals) / len(self.labels)
            style += sum(other.style == label.style for other in rivals) / max(len(rivals), 1)
        return concept / len(asked), style / len(asked)

    def _rivals(self, similarity: Tensor, wanted: Tensor) -> Tensor:
        """Of similarities [Q, G] and asked concepts int64 [Q]: ``Hits.rivals``."""
        best = torch.full((len(wanted), len(self._concepts)), -torch.inf)
        best.scatter_reduce_(1, self._concept_of.expand(len(wanted), -1), similarity, "amax")
        return (best > best.gather(1, wanted[:, None])).sum(dim=1)

    def _embed(self, features: Sequence[Tensor]) -> Tensor:
        # Each block is standardised and has length 1, so that the widest one does not decide alone.
        parts = [
            F.normalize((part - mean) / std, dim=1) for part, (mean, std) in zip(features, self._scale, strict=True)
        ]
        return torch.cat(parts, dim=1)
