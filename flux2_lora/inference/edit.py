"""Inpaint and outpaint: generate inside a mask, and give back the rest as it came.

At every step the kept region is put back at the current noise level (Lugmayr et al. 2022, arXiv:2201.09865, alg. 1
without resampling), so what is painted meets what is kept. In the end the decoded picture is laid over the original
through the mask: where the mask is 0 the original's bytes come back untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.families import ModelFamily
from flux2_lora.flow import mix
from flux2_lora.inference.pictures import to_pictures, to_pixels
from flux2_lora.inference.pipeline import Prompted, generate
from flux2_lora.options import option
from flux2_lora.samplers import OnStep


@dataclass(frozen=True, kw_only=True)
class Border:
    """Pixels to add on each side."""

    left: int = option(0, at_least=0)
    right: int = option(0, at_least=0)
    top: int = option(0, at_least=0)
    bottom: int = option(0, at_least=0)


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
    inner = mask.filter(ImageFilter.MinFilter(2 * (feather_px // 2) + 1))
    faded = np.asarray(inner.filter(ImageFilter.GaussianBlur(feather_px / 2)))
    return Image.fromarray(np.where(np.asarray(mask) > 0, faded, 0).astype("uint8"))


def extend(picture: Image.Image, border: Border) -> tuple[Image.Image, Image.Image]:
    """A larger canvas whose edges repeat the picture's, and the mask (255 = new) of what is to be painted."""
    pad = ((border.top, border.bottom), (border.left, border.right))
    values = np.asarray(picture)
    canvas = np.pad(values, (*pad, (0, 0)) if values.ndim == 3 else pad, mode="edge")
    mask = np.pad(np.zeros((picture.height, picture.width), dtype="uint8"), pad, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def lay_over(original: Image.Image, painted: Image.Image, mask: Image.Image) -> Image.Image:
    """original where mask is 0 (bytes unchanged), painted where it is 255, rounded mixtures between."""
    weight = np.asarray(mask, dtype="float64")[..., None] / 255
    below, above = np.asarray(original, dtype="float64"), np.asarray(painted, dtype="float64")
    return Image.fromarray((below + weight * (above - below)).round().astype("uint8"))


@torch.no_grad()
def inpaint(
    family: ModelFamily,
    transformer: nn.Module,
    vae: nn.Module,
    prompted: Prompted,
    picture: Image.Image,
    mask: Image.Image,
    noise: Tensor,
    steps: int,
    *,
    strength: float = 1.0,
) -> Image.Image:
    """Repaint `picture` where the grey `mask` is bright; both of noise's size in pixels."""
    device = noise.device
    latents = family.encode_pixels(vae, to_pixels(picture).to(device)).mean
    bright = torch.from_numpy(np.array(mask.convert("L")))[None, None].float().to(device) / 255
    touched = F.max_pool2d(bright, family.pixels_per_token)
    result = generate(
        family,
        transformer,
        prompted,
        noise,
        steps,
        start=latents,
        strength=strength,
        on_step=keep_outside(touched, latents, noise),
    )
    painted = to_pictures(family.decode_latents(vae, result))[0]
    return lay_over(picture, painted, mask.convert("L"))
