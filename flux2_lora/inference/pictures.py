"""Between files, Pillow's pictures, tensors in [-1, 1] and latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from flux2_lora.dataset.pictures import UnreadableError, open_picture
from flux2_lora.devices import free_bytes
from flux2_lora.errors import UserError
from flux2_lora.families import ModelFamily
from flux2_lora.latents import Posterior

_TILE_PX, SMALL_TILE_PX = 1024, 512  # what the autoencoder works on at once; the small one where memory is short
_NUMBERS_A_PIXEL = 10  # and channel of the largest layers: measured 3 to 9, of which the last up block holds 8


def read_picture(place: str, option: str) -> Image.Image:
    """An upright sRGB picture, RGB, or RGBA where something of it is transparent; UserError that names `option`."""
    path = Path(place).expanduser()
    if not path.is_file():
        raise UserError(f"{option}={place} does not exist", "give the path of a picture")
    try:
        picture = open_picture(path)
    except UnreadableError as error:
        raise UserError(f"{option}={place} cannot be read: {error}", "give a PNG, JPEG or WebP file") from error
    seen = picture.image.copy()
    if picture.alpha is not None and picture.alpha.getextrema() != (255, 255):
        seen.putalpha(picture.alpha)
    return seen


def mask_of(picture: Image.Image) -> Image.Image:
    """A grey mask, 255 = repaint: what was made transparent, else what was painted in any colour on black."""
    if "A" in picture.getbands() and picture.getchannel("A").getextrema() != (255, 255):
        return ImageOps.invert(picture.getchannel("A"))
    return Image.fromarray(np.asarray(picture.convert("RGB")).max(axis=2))


def to_pixels(picture: Image.Image) -> Tensor:
    """RGB picture -> [1 3 h w] float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(picture.convert("RGB")))
    return values.permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """[b 3 h w] in [-1, 1] -> pictures, rounded as diffusers' VaeImageProcessor does."""
    values = (pixels.float().cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return [Image.fromarray(one) for one in (values.numpy() * 255).round().astype("uint8")]


def fit(picture: Image.Image, height_px: int, width_px: int) -> Image.Image:
    """Scale and centre-crop to a size."""
    return ImageOps.fit(picture, (width_px, height_px), Image.Resampling.LANCZOS)


@torch.no_grad()
def encoded(family: ModelFamily, vae: nn.Module, picture: Image.Image, device: torch.device) -> Posterior:
    """A picture's latents [1 c h w]; its sides are whole tokens."""
    with _tiles(vae, device):
        return family.encode_pixels(vae, to_pixels(picture).to(device))


@torch.no_grad()
def decoded(family: ModelFamily, vae: nn.Module, latents: Tensor) -> list[Image.Image]:
    """Latents [b c h w] -> b pictures, decoded one by one so that memory holds one."""
    with _tiles(vae, latents.device):
        return [to_pictures(family.decode_latents(vae, one))[0] for one in latents.split(1)]


def coding_bytes(vae: nn.Module, pixels: int) -> int:
    """About what the autoencoder holds at most while it codes so many pixels at once."""
    autoencoder: Any = vae
    return _NUMBERS_A_PIXEL * int(autoencoder.config.block_out_channels[0]) * pixels * 4


@contextmanager
def _tiles(vae: nn.Module, device: torch.device) -> Iterator[None]:
    """Pictures above 1024 px go through the autoencoder in overlapping tiles; smaller ones as if this were not here."""
    autoencoder: Any = vae
    scale = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    tile = _TILE_PX if coding_bytes(vae, _TILE_PX**2) < free_bytes(device) else SMALL_TILE_PX
    autoencoder.enable_tiling()
    autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = tile, tile // scale
    try:
        yield
    finally:
        autoencoder.disable_tiling()
