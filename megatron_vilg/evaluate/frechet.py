"""Frechet distance between two sets of pictures, on the features of a named network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vilg.models.features import FeatureNetwork

FEATURE_SIDE = 112
"""Pixels that pictures are brought to: the network was trained at more, small pictures leave it one position."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """A set of features [n, d] by its mean and its centred rows; the covariance is never written out."""

    mean: np.ndarray
    rows: np.ndarray
    """float64 [min(n, d), d] with ``rows.T @ rows`` the covariance: centred features divided by ``sqrt(n - 1)``, or the
    triangle of their QR decomposition where there are more of them than numbers."""

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Describe features [n, d].

        Raises:
            ValueError: fewer than two rows have no covariance.
        """
        if len(features) < 2:
            raise ValueError(f"{len(features)} feature rows have no covariance; at least two are needed")
        values = features.astype(np.float64)
        mean = values.mean(axis=0)
        rows = (values - mean) / np.sqrt(len(values) - 1)
        if len(rows) > rows.shape[1]:
            _, rows = np.linalg.qr(rows)
        return cls(mean, rows)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, exactly, also with fewer rows than numbers.

    ``tr (C1 C2)^(1/2)`` is the sum of the singular values of ``rows1 @ rows2.T``, which needs no matrix root and is
    small when the sets are. With few pictures the distance is too large, by an amount that depends on their number:
    compare sets of equal size only.
    """
    traces = np.square(first.rows).sum() + np.square(second.rows).sum()
    cross = np.linalg.svd(first.rows @ second.rows.T, compute_uv=False).sum()
    return float(np.square(first.mean - second.mean).sum() + traces - 2.0 * cross)


def features_of(network: FeatureNetwork, pixels: Tensor, *, batch_size: int = 64) -> np.ndarray:
    """Pictures [n, 3, S, S] in [-1, 1] to pooled features of the network's last layer: float32 [n, 1280]."""
    parts = [network.pooled(part, resize=FEATURE_SIDE) for part in pixels.split(batch_size)]
    return torch.cat(parts).cpu().numpy()
