"""A dual encoder: captions and pictures as unit vectors of one space, near each other where they belong together.

CLIP (arXiv 2103.00020) on top of frozen features: pictures are described by two middle blocks of a network that was
trained on photographs, and one linear map of that is learnt. So a few thousand pairs and minutes on a CPU are enough.
The paper chooses its drawings with an in-house model of this kind (section 4.2), which is not public.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.models.features import FeatureNetwork, build_feature_network, cell_features

FEATURE_BLOCKS = (8, 12)
"""Blocks of the network whose outputs describe a picture."""
FEATURE_SIDE = 64
"""Pixels to which a picture is brought."""
FEATURE_CELLS = 4
"""Cells along one side over which outputs are averaged."""
_SPREAD = 0.05
"""Added to each feature's deviation: some hardly ever change, and would be nothing but noise."""
_FIRST_SCALE, _LARGEST_SCALE = 10.0, 50.0


class DualEncoder(nn.Module):
    """Captions and pictures in one space. Shapes: B pairs, L text slots, S pixels, C features, D = ``config.width``."""

    mean: Tensor
    spread: Tensor

    def __init__(
        self, config: RerankerConfig, text_vocab_size: int, num_text_slots: int, network: FeatureNetwork | None = None
    ) -> None:
        """Lay it out; ``network``: with its weights, or None where ``load_state_dict`` fills them in."""
        super().__init__()
        self.config = config
        self.network = network or build_feature_network(config.feature_network)
        num_features = self.features(torch.zeros(1, 3, FEATURE_SIDE, FEATURE_SIDE)).shape[1]
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("spread", torch.ones(num_features))
        self.dropout = nn.Dropout(config.feature_dropout)
        self.picture = nn.Linear(num_features, config.width)
        self.pieces = nn.Embedding(text_vocab_size, config.width)
        self.places = nn.Embedding(num_text_slots, config.width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width, config.num_heads, 4 * config.width, config.text_dropout, "gelu",
                batch_first=True, norm_first=True,
            )
            for _ in range(config.text_layers)
        )  # fmt: skip
        self.text = nn.Linear(config.width, config.width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))
        nn.init.normal_(self.pieces.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.02)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by to be logits; learnt, and bounded as CLIP's."""
        return self.log_scale.exp().clamp(max=_LARGEST_SCALE)

    def features(self, pixels: Tensor) -> Tensor:
        """Pictures float32 [B, 3, S, S] in [-1, 1] as the frozen network describes them: float32 [B, C]."""
        parts = cell_features(self.network, pixels, FEATURE_BLOCKS, side=FEATURE_SIDE, cells=FEATURE_CELLS)
        return torch.cat(parts, dim=1)

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Mean and standard deviation of the training pictures' features, both float32 [C]."""
        self.mean.copy_(mean)
        self.spread.copy_(deviation + _SPREAD)

    def embed_features(self, features: Tensor) -> Tensor:
        """What ``features`` returned to unit vectors [B, D]."""
        return F.normalize(self.picture(self.dropout((features - self.mean) / self.spread)), dim=-1)

    def embed_texts(self, text_ids: Tensor, text_len: Tensor) -> Tensor:
        """Captions int64 [B, L] of lengths [B] to unit vectors [B, D]; an empty one has one PAD piece."""
        length = text_len.clamp(min=1)
        ids = text_ids[:, : int(length.max())] if len(text_ids) else text_ids
        places = torch.arange(ids.shape[1], device=ids.device)
        is_behind = places >= length[:, None]
        x = self.pieces(ids) + self.places(places)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=is_behind)
        x = x.masked_fill(is_behind[:, :, None], 0.0).sum(dim=1) / length[:, None]
        return F.normalize(self.text(x), dim=-1)

    def score(self, pixels: Tensor, text_ids: Tensor, text_len: Tensor) -> Tensor:
        """How well pictures [B, 3, S, S] fit their captions, as logits (cosine times ``scale``): float32 [B]."""
        pictures, texts = self.embed_features(self.features(pixels)), self.embed_texts(text_ids, text_len)
        return self.scale * (pictures * texts).sum(dim=1)
