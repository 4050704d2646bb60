"""What was painted laid over a picture, so that no seam shows: kept pixels come back as they were.

Two membranes (after Pérez et al. 2003, Poisson image editing, section 3) take the seam off what was painted: what the
autoencoder changed in the kept region, continued into the mask; and what still steps at the border itself, which fades
within a few pixels. Needs PyTorch alone: a copy of this module lies beside the Diffusers scripts of painted pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FADE_PX, _ALONG_PX = 12, 9


def lay_over(below: Tensor, above: Tensor, weight: Tensor) -> Tensor:
    """below where weight is 0 (unchanged), above where it is 1, mixtures between.

    below, above: pixels [1 3 h w] in [-1, 1]; weight: [1 1 h w] in [0, 1].
    """
    kept = weight == 0
    if kept.any():
        above = above + _membrane(below - above, kept)
        above = above + _fading(kept) * _membrane(*_steps(below, above, kept))
    return torch.where(kept, below, below + weight * (above - below))


def _steps(below: Tensor, above: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(kept neighbours minus what was painted, where that is known: along the border).

    Averaged along the border, so that a line which crosses it is no step.
    """
    border = ~kept & (F.max_pool2d(kept.float(), 3, stride=1, padding=1) > 0)
    steps = _mean_nearby(below, kept, 3) - above
    return torch.where(border, _mean_nearby(steps, border, _ALONG_PX), 0.0), border


def _mean_nearby(values: Tensor, there: Tensor, window: int) -> Tensor:
    """The mean of the values that are there, within a window about each pixel; 0 where none is."""
    part = F.avg_pool2d(there.float(), window, stride=1, padding=window // 2)
    total = F.avg_pool2d(values * there, window, stride=1, padding=window // 2)
    return total / part.clamp_min(1e-6)


def _fading(kept: Tensor) -> Tensor:
    """[1 1 h w]: 1 at the border of what is kept, falling to 0 over `_FADE_PX` into the mask."""
    inside, weight = kept.float(), torch.zeros_like(kept, dtype=torch.float32)
    for _ in range(_FADE_PX):
        inside = F.max_pool2d(inside, 3, stride=1, padding=1)
        weight += inside / _FADE_PX
    return weight


def _membrane(values: Tensor, known: Tensor) -> Tensor:
    """values [1 c h w] where known [1 1 h w], elsewhere a smooth field between them: pull to a pyramid's top, push."""
    if bool(known.all()) or not bool(known.any()):
        return values
    pool = {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False}
    counts = F.avg_pool2d(known.float(), **pool)  # type: ignore[arg-type]
    smaller = F.avg_pool2d(values * known, **pool) / counts.clamp_min(1e-6)  # type: ignore[arg-type]
    coarse = _membrane(smaller, counts > 0)
    spread = F.interpolate(coarse, size=values.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(known, values, spread)
