"""Inpaint and outpaint: generate inside a mask, and give back the rest as it came.

At every step the kept region is put back at the current noise level (Lugmayr et al. 2022, arXiv:2201.09865, alg. 1
without resampling), so what is painted meets what is kept. In the end the decoded picture is laid over the original
through the mask: where the mask is 0 the original's bytes come back untouched, and what the autoencoder changed along
the border is taken off what was painted, so no seam shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.families import ModelFamily
from flux2_lora.flow import mix
from flux2_lora.inference.pictures import decoded, encoded, to_pictures, to_pixels
from flux2_lora.inference.sampling import Prompted, generate, start_and_noise
from flux2_lora.options import option
from flux2_lora.samplers import OnStep

Box = tuple[int, int, int, int]
_FADE_PX, _ALONG_PX = 12, 9


@dataclass(frozen=True, kw_only=True)
class Border:
    """Pixels to add on each side."""

    left: int = option(0, at_least=0)
    right: int = option(0, at_least=0)
    top: int = option(0, at_least=0)
    bottom: int = option(0, at_least=0)


def border_for(width: int, height: int, ratio: float) -> Border:
    """The least border, equal on both sides, that makes a picture's width / height `ratio`; ValueError for none."""
    if not 0 < ratio < math.inf:
        raise ValueError(f"{ratio} is no ratio")
    wider, taller = max(round(height * ratio) - width, 0), max(round(width / ratio) - height, 0)
    return Border(left=wider // 2, right=wider - wider // 2, top=taller // 2, bottom=taller - taller // 2)


def keep_outside(mask: Tensor, latents: Tensor, noise: Tensor) -> OnStep:
    """A sampler callback that restores `latents` where mask [1 1 h w] is 0; between 0 and 1 it mixes."""

    def on_step(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x),), sigma, device=x.device)
        return mask * x + (1 - mask) * mix(latents.expand_as(x), noise, level)

    return on_step


def soften(mask: Image.Image, feather_px: int) -> Image.Image:
    """Fade a grey mask inwards over about `feather_px`: pixels that were 0 stay 0."""
    if feather_px <= 0:
        return mask
    inner = mask
    for _ in range(feather_px // 2):  # as one filter of that width, whose cost grows with its square
        inner = inner.filter(ImageFilter.MinFilter(3))
    faded = np.asarray(inner.filter(ImageFilter.GaussianBlur(feather_px / 2)))
    return Image.fromarray(np.where(np.asarray(mask) > 0, faded, 0).astype("uint8"))


def extend(picture: Image.Image, border: Border) -> tuple[Image.Image, Image.Image]:
    """A larger canvas whose edges repeat the picture's, and the mask (255 = new) of what is to be painted."""
    pad = ((border.top, border.bottom), (border.left, border.right))
    values = np.asarray(picture)
    canvas = np.pad(values, (*pad, (0, 0)) if values.ndim == 3 else pad, mode="edge")
    mask = np.pad(np.zeros((picture.height, picture.width), dtype="uint8"), pad, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def padded(picture: Image.Image, step_px: int) -> Image.Image:
    """Repeat the right and bottom edges up to whole tokens."""
    right, bottom = -picture.width % step_px, -picture.height % step_px
    return extend(picture, Border(right=right, bottom=bottom))[0] if right or bottom else picture


def around(mask: Image.Image, padding_px: int) -> Box | None:
    """(left, top, right, bottom) of what is to be painted and `padding_px` about it; None for an empty mask."""
    box = mask.getbbox()
    if box is None:
        return None
    left, top, right, bottom = box
    return (
        *(max(left - padding_px, 0), max(top - padding_px, 0)),
        *(min(right + padding_px, mask.width), min(bottom + padding_px, mask.height)),
    )


def lay_over(original: Image.Image, painted: Image.Image, mask: Image.Image) -> Image.Image:
    """original where mask is 0 (bytes unchanged), painted where it is 255, rounded mixtures between.

    Two membranes (after Pérez et al. 2003, Poisson image editing, section 3) take the seam off what was painted: what
    the autoencoder changed in the kept region, continued into the mask; and what still steps at the border itself,
    which fades within a few pixels.
    """
    weight = torch.from_numpy(np.array(mask))[None, None].float() / 255
    below, above = to_pixels(original), to_pixels(painted)
    kept = weight == 0
    if kept.any():
        above = above + _membrane(below - above, kept)
        above = above + _fading(kept) * _membrane(*_steps(below, above, kept))
    mixed = below + weight * (above - below)
    return to_pictures(torch.where(kept, below, mixed))[0]


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


@torch.no_grad()
def inpaint(
    family: ModelFamily,
    transformer: nn.Module,
    vae: nn.Module,
    prompted: Prompted,
    picture: Image.Image,
    mask: Image.Image,
    steps: int,
    *,
    seed: int = 0,
    strength: float = 1.0,
    sampler: str = "euler",
) -> Image.Image:
    """Repaint `picture` where the grey `mask`, of its size, is bright; an empty mask gives the picture back."""
    if mask.getbbox() is None:
        return picture
    side, device = family.pixels_per_token, prompted.positive.embeds.device
    whole, bright = padded(picture, side), padded(mask, side)
    latents, noise = start_and_noise(family, encoded(family, vae, whole, device), seed)
    grey = torch.from_numpy(np.array(bright))[None, None].float().to(device) / 255
    result = generate(
        family,
        transformer,
        prompted,
        noise,
        steps,
        start=latents,
        strength=strength,
        sampler=sampler,
        on_step=keep_outside(F.max_pool2d(grey, side), latents, noise),
    )
    painted = decoded(family, vae, result)[0].crop((0, 0, picture.width, picture.height))
    return lay_over(picture, painted, mask)
