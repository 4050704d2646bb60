"""What a picture is drawn from, made ready for the model: one value for image to image, inpaint, outpaint and upscale.

Law: a `Start` holds all that drawing takes from pictures, so whoever draws from these again, here or in another
program, gets the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from flux2_lora.families import ModelFamily
from flux2_lora.inference.edit import Box, keep_outside, lay_over, padded
from flux2_lora.inference.pictures import decoded, encoded, fit
from flux2_lora.inference.sampling import Prompted, generate, start_and_noise
from flux2_lora.samplers import SAMPLERS, USUAL, Filling, from_level


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """Where alone a picture is painted.

    mask: grey, 255 = new, of the size that is worked on; tokens: the same, one pixel a token, each its brightest.
    original: RGB, into which the result is laid at `box`; shown: what it replaces there, 255 where the mask is not 0.
    """

    mask: Image.Image
    tokens: Image.Image
    original: Image.Image
    box: Box
    shown: Image.Image


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """picture: RGB, its sides whole tokens; height, width: px of it that are worked on, the rest repeats its edges.

    tile: tokens along a side that the model sees at once, None for all; with it `strength` is the noise level to refine
    from.
    """

    picture: Image.Image
    height: int
    width: int
    region: Region | None = None
    tile: int | None = None

    def finished(self, drawn: Image.Image) -> Image.Image:
        """The result, of what was decoded: cut to size, and laid into the original where there is a region."""
        box = (0, 0, self.width, self.height)
        part, region = drawn.crop(box), self.region
        if region is None:
            return part
        left, top, right, bottom = region.box
        painted = lay_over(self.picture.crop(box), part, region.mask)
        result = region.original.copy()
        painted = painted.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        result.paste(painted, (left, top), region.shown)
        return result


def of_size(picture: Image.Image, height: int, width: int) -> Start:
    """The picture scaled and cut to a size of whole tokens."""
    return Start(picture=fit(picture, height, width).convert("RGB"), height=height, width=width)


def whole(picture: Image.Image, step_px: int) -> Start:
    """The picture as large as it is; step_px: of a token."""
    return Start(picture=padded(picture.convert("RGB"), step_px), height=picture.height, width=picture.width)


def enlarged(picture: Image.Image, height: int, width: int, step_px: int, tile: int) -> Start:
    """The picture at a larger size, to be refined in tiles of so many tokens a side."""
    large = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return Start(picture=padded(large, step_px), height=height, width=width, tile=tile)


def under_mask(picture: Image.Image, mask: Image.Image, step_px: int, *, box: Box, scale: float = 1.0) -> Start:
    """What lies in `box`, enlarged by `scale`, to be painted where the grey mask, of the picture's size, is bright."""
    part, grey = picture.crop(box), mask.crop(box)
    size = round(part.width * scale), round(part.height * scale)
    bright = grey.resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(padded(bright, step_px))
    tokens = values.reshape(values.shape[0] // step_px, step_px, -1, step_px).max(axis=(1, 3))
    shown = grey.point(lambda value: 255 * (value > 0))
    return Start(
        picture=padded(part.resize(size, Image.Resampling.LANCZOS), step_px),
        height=size[1],
        width=size[0],
        region=Region(mask=bright, tokens=Image.fromarray(tokens), original=picture, box=box, shown=shown),
    )


@torch.no_grad()
def draw_from(
    start: Start,
    family: ModelFamily,
    transformer: nn.Module,
    vae: nn.Module,
    prompted: Prompted,
    steps: int,
    *,
    seed: int = 0,
    strength: float = 1.0,
    sampler: str = "euler",
    fill: Filling = USUAL,
) -> list[Image.Image]:
    """One picture for each prompt of `prompted`, all of the same noise. strength: how much is redrawn, in [0, 1].

    fill: of the region, where there is one.
    """
    device = prompted.positive.embeds.device
    latents, noise = start_and_noise(family, encoded(family, vae, start.picture, device), seed)
    kept, taken = None, SAMPLERS[sampler]
    if start.region is not None:
        grey = torch.from_numpy(np.array(start.region.tokens))[None, None].float().to(device) / 255
        kept = keep_outside(grey, latents, noise)
        taken = fill.sampler(taken, grey, latents, seed)
    result = generate(
        family,
        transformer,
        prompted,
        noise.expand(len(prompted.positive), -1, -1, -1),
        steps,
        start=latents,
        strength=strength,
        sampler=taken,
        sigmas=None if start.tile is None else from_level(steps, strength),
        tile=start.tile,
        on_step=kept,
    )
    return [start.finished(one) for one in decoded(family, vae, result)]
