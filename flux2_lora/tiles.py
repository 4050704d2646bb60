"""A velocity for pictures larger than the model knows: that of overlapping tiles, faded into each other.

Bar-Tal et al. 2023 (arXiv:2302.08113), eq. 5, with weights that fall towards a tile's edges. Needs PyTorch alone: a
copy of this module lies beside the Diffusers scripts of pictures that were refined in tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def tiled(velocity: Callable[[Tensor, float], Tensor], tile: int, overlap: int) -> Callable[[Tensor, float], Tensor]:
    """The same of x [b c h w] and a noise level, asked for no more than `tile` x `tile` of x at once.

    tile, overlap: tokens along a side. Tiles are as large as the model draws well, and no step needs more memory than
    one of them.
    """

    def whole(x: Tensor, sigma: float) -> Tensor:
        height, width = x.shape[2:]
        total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        for top, left in itertools.product(_starts(height, tile, overlap), _starts(width, tile, overlap)):
            part = x[:, :, top : top + tile, left : left + tile]
            faded = _faded(part.shape[2], overlap, x)[:, None] * _faded(part.shape[3], overlap, x)
            place = (..., slice(top, top + tile), slice(left, left + tile))
            total[place] += faded * velocity(part, sigma)
            weight[place] += faded
        return total / weight

    return whole


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, the last one flush with the end."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _faded(length: int, overlap: int, like: Tensor) -> Tensor:
    """[length]: 1 inside, falling over `overlap` towards both ends, never to 0."""
    from_edge = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 1
    return (from_edge / (overlap + 1)).clamp(max=1).to(like)
