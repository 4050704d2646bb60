"""Whether samples are copies: how alike each is to its nearest training picture, and how alike unseen pictures are.

Pictures are compared as the VAE sees them, or by the features of an image encoder where one is at hand. A sample that
is much nearer to a training picture than held-out pictures of the same style are was learned by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_GRID = 8


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Features of the training pictures [n d], centred and normalised, and their mean [d]."""

    features: Tensor
    mean: Tensor

    def nearest(self, features: Tensor) -> Tensor:
        """The cosine of each row of features [m d] to the nearest training picture, [m] in [-1, 1]."""
        return (F.normalize(features - self.mean, dim=1) @ self.features.T).amax(dim=1)


def likeness(features: Tensor) -> Likeness:
    """features: [n d], one row a training picture."""
    mean = features.mean(dim=0)
    return Likeness(features=F.normalize(features - mean, dim=1), mean=mean)


def latent_features(latents: Sequence[Tensor]) -> Tensor:
    """Latents [c h w] of any sizes as rows [n d] of one length: means over 8 x 8 places."""
    return torch.stack([F.adaptive_avg_pool2d(one.float().cpu(), _GRID).flatten() for one in latents])
