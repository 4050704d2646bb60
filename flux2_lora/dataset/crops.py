"""Which part of a picture is trained, and at which size.

Law: a crop is a function of the picture, its mask, the options and the seed. It is never redrawn: several positions are
several crops, each cached, and a crop that would miss its picture's mask goes where the mask is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flux2_lora.buckets import bucket_within, centering_on, covered
from flux2_lora.flow import generator

Box = tuple[float, float, float, float]
"""left, top, right, bottom as parts of the sides, in [0, 1]."""

_FINE = 1000  # positions are rounded to thousandths of the way, so that keys of caches spell them exactly


@dataclass(frozen=True, order=True)
class Crop:
    """height, width in px; x, y in thousandths of what a crop can move: 500 is the centre; mirrored: left is right."""

    height: int
    width: int
    x: int = _FINE // 2
    y: int = _FINE // 2
    mirrored: bool = False

    @property
    def centering(self) -> tuple[float, float]:
        """As `pictures.crop_to` takes it."""
        return self.x / _FINE, self.y / _FINE

    def spelled(self) -> str:
        """For keys: everything that makes it another crop."""
        return f"{self.height}x{self.width} at {self.x},{self.y}{' mirrored' * self.mirrored}"


def buckets_of(
    width: int, height: int, resolutions: Sequence[int], step: int, max_upscale: float
) -> tuple[tuple[int, int], ...]:
    """The (height, width) of a picture at each resolution, each once; none where it is too small for one step."""
    found = [bucket_within(width, height, resolution, step, max_upscale) for resolution in resolutions]
    return tuple(dict.fromkeys(bucket for bucket in found if bucket is not None))


def crops_of(
    size: tuple[int, int],
    bucket: tuple[int, int],
    *,
    how: str,
    variants: int,
    flip: bool,
    mask: Box | None,
    key: str,
    seed: int,
) -> tuple[Crop, ...]:
    """The crops of a picture of `size` (width, height) in one bucket; the first is the one that validation sees.

    how: center, focus (on the middle of the mask, if there is one) or random (`variants` positions drawn by seed and
    `key`, the picture's digest).
    """
    places = [_place(size, bucket, how, mask, (key, seed, n)) for n in range(variants if how == "random" else 1)]
    still = [Crop(*bucket, round(x * _FINE), round(y * _FINE)) for x, y in dict.fromkeys(places)]
    turned = [Crop(c.height, c.width, c.x, c.y, mirrored=True) for c in still] if flip else []
    return (*still, *turned)


def _place(
    size: tuple[int, int], bucket: tuple[int, int], how: str, mask: Box | None, draw: tuple[str, int, int]
) -> tuple[float, float]:
    key, seed, number = draw
    stream = generator("crop", seed, key, number)
    x, y = torch.rand(2, generator=stream).tolist() if how == "random" else (0.5, 0.5)
    left, top, right, bottom = covered(size, bucket, (0, 0))
    x, y = (x if right < 1 else 0.5), (y if bottom < 1 else 0.5)  # where nothing is cut off, all are one crop
    if mask is None:
        return x, y
    left, top, right, bottom = mask
    shown = covered(size, bucket, (x, y))
    missed = right <= shown[0] or left >= shown[2] or bottom <= shown[1] or top >= shown[3]
    if how == "focus" or missed:
        return centering_on(((left + right) / 2, (top + bottom) / 2), size, bucket)
    return x, y
