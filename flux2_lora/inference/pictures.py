"""Between Pillow's pictures and tensors in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flux2_lora.errors import UserError


def read_picture(place: str, option: str) -> Image.Image:
    """An upright RGB picture; UserError that names `option` when there is none."""
    path = Path(place).expanduser()
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{option}={place} does not exist", "give the path of a picture") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{option}={place} cannot be read as a picture", "give a PNG, JPEG or WebP file") from error


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
