"""Masks and canvases of inpaint and outpaint: what is painted, and how the rest comes back as it was.

At every step the kept region is put back at the current noise level (Lugmayr et al. 2022, arXiv:2201.09865, alg. 1), so
what is painted meets what is kept, the better the more a `Filling` asks for. In the end the decoded picture is laid
over the original through the mask: where the mask is 0 the original's bytes come back untouched, and no seam shows (see
`seams`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from flux2_lora.flow import mix
from flux2_lora.inference import seams
from flux2_lora.inference.pictures import to_pictures, to_pixels
from flux2_lora.options import option
from flux2_lora.samplers import OnStep

Box = tuple[int, int, int, int]


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
    """original where the grey mask is 0 (bytes unchanged), painted where it is 255, rounded mixtures between."""
    weight = torch.from_numpy(np.array(mask))[None, None].float() / 255
    return to_pictures(seams.lay_over(to_pixels(original), to_pixels(painted), weight))[0]
