"""One picture file, opened as a person sees it: upright, in 8-bit sRGB, its transparency apart, its first frame.

Law: the pixel limit is checked before anything is decoded, decoding is shared between threads by pixels in flight, and
whatever a damaged file makes Pillow raise comes out as UnreadableError, worded on one line.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from flux2_lora.errors import UserError

HEIC_SUFFIXES = (".heic", ".heif", ".hif")
SUFFIXES = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jpe",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    *HEIC_SUFFIXES,
)
FILM_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
FOREIGN_SUFFIXES = (
    *(".jxl", ".jp2", ".psd", ".svg", ".tga", ".ico", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"),
    *FILM_SUFFIXES,
)
"""Pictures and films that people keep among the others, and that are not read."""

# Named, because Pillow goes by content: an EPS file called .png would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
LARGEST_FILE = 512 << 20
"""Bytes: 64 Mpx of four 16-bit channels. What is larger is no picture that anybody trains on."""
_IN_FLIGHT_PX = 64_000_000
_STRIP_PX = 4_000_000
_LARGE, _LARGE_BYTES = threading.RLock(), 32 << 20

Image.MAX_IMAGE_PIXELS = None  # ours is checked first, and may be higher
# Blocks this large go back to the system when they are freed, and do not stay in the arena of a thread.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]
# Pillow's notes on sizes and odd metadata: the limit is ours, and the reasons are too.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableError(Exception):
    """A picture that cannot be used, and why, on one line without its path."""


@dataclass(frozen=True)
class Picture:
    """image: RGB, composited where it was transparent; alpha: L of that size, None where opaque; moving: has frames."""

    image: Image.Image
    alpha: Image.Image | None = None
    moving: bool = False


@contextmanager
def file_bytes(path: Path) -> Iterator[bytes]:
    """The bytes of a picture file; raises UnreadableError, also for a file of more than LARGEST_FILE.

    Of large files one is in memory at a time, over all threads.
    """
    with _worded():
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UnreadableError(f"a file of {size / 1e9:.1f} GB is no picture")
    with _LARGE if size > _LARGE_BYTES else nullcontext():
        with _worded():
            content = path.read_bytes()
        yield content


def open_picture(source: Path | bytes, *, max_pixels: int | None = None, background: str = "white") -> Picture:
    """Decode a picture; `background` shows where it is transparent.

    Raises UnreadableError, also for more than `max_pixels` (before decoding).
    """
    file = BytesIO(source) if isinstance(source, bytes) else source
    with _worded(), Image.open(file, formats=_formats()) as opened:
        if max_pixels is not None and opened.width * opened.height > max_pixels:
            raise UnreadableError(f"{opened.width} x {opened.height} is more than dataset.max_pixels={max_pixels}")
        # A phone's JPEG with a depth or gain map calls itself MPO: its first frame is the picture, not a film's.
        moving = opened.format != "MPO" and getattr(opened, "is_animated", False)
        profile = opened.info.get("icc_profile")
        with _decoding(opened.width * opened.height):
            return Picture(*_seen(_upright(opened), profile, background), moving)


def open_mask(source: Path | bytes, *, max_pixels: int | None = None) -> Image.Image:
    """A painted mask as L: white is trained, black is not, transparent counts as black. Raises as `open_picture`."""
    return open_picture(source, max_pixels=max_pixels, background="black").image.convert("L")


def crop_to(image: Image.Image, height: int, width: int, centering: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Pixels [3 h w] float32 in [-1, 1]: the largest crop of that aspect, resized by Lanczos.

    centering: (x, y) in [0, 1], where the crop lies in what is too wide or too high; 0 is left and top.
    """
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=centering)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32) / 255)
    return (2 * pixels - 1).permute(2, 0, 1).contiguous()


def crop_mask(mask: Image.Image, height: int, width: int, centering: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """[1 h w] float32 in [0, 1]: the same crop as `crop_to`'s, averaged over the area of each cell."""
    fitted = ImageOps.fit(mask, (width, height), Image.Resampling.BOX, centering=centering)
    return torch.from_numpy(np.array(fitted, dtype=np.float32) / 255)[None]


@cache
def heic_is_read() -> bool:
    """Whether pillow-heif is installed; it is then made known to Pillow."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def check_colour(text: str) -> None:
    """UserError unless Pillow knows the colour."""
    try:
        ImageColor.getrgb(text)
    except ValueError as error:
        raise UserError(f"dataset.background={text} is not a colour", "write white, grey or '#ff8800'") from error


@contextmanager
def _worded() -> Iterator[None]:
    """Any exception becomes UnreadableError: what decoders raise on damage is as various as the damage."""
    try:
        yield
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not a picture, whatever its name says") from error
    except Exception as error:
        named = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UnreadableError(named or type(error).__name__) from error


def _formats() -> tuple[str, ...]:
    return (*_FORMATS, "HEIF") if heic_is_read() else _FORMATS


class _Pixels:
    """How many pixels are being decoded, over all threads; a large picture waits for the others and goes alone."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.changed = threading.Condition()


_DECODING = _Pixels(_IN_FLIGHT_PX)


@contextmanager
def _decoding(pixels: int) -> Iterator[None]:
    held = min(pixels, _DECODING.most)
    with _DECODING.changed:
        _DECODING.changed.wait_for(lambda: _DECODING.taken + held <= _DECODING.most)
        _DECODING.taken += held
    try:
        yield
    finally:
        with _DECODING.changed:
            _DECODING.taken -= held
            _DECODING.changed.notify_all()


def _upright(opened: Image.Image) -> Image.Image:
    """The decoded pixels as a person sees them, in at most 8 bits a channel."""
    opened.load()
    ImageOps.exif_transpose(opened, in_place=True)
    image = _eight_bit(opened)
    return image.convert("RGBA") if image.mode == "P" and image.has_transparency_data else image


def _seen(image: Image.Image, profile: bytes | None, background: str) -> tuple[Image.Image, Image.Image | None]:
    """(sRGB over the background, alpha or None)."""
    colours = _srgb(image, profile)
    if not image.has_transparency_data:
        return colours, None
    alpha = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")
    seen = Image.new("RGB", image.size, background)
    seen.paste(colours, mask=alpha)
    return seen, alpha


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep greys (16-bit, 32-bit, float) scaled to 8 bits, where Pillow would clip them to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    scaled = np.empty(values.shape, dtype=np.uint8)
    strip = max(1, _STRIP_PX // max(1, image.width))
    strips = [slice(top, top + strip) for top in range(0, image.height, strip)]
    top = max((float(np.nan_to_num(values[rows]).max()) for rows in strips), default=0.0)
    # I;16 says its range; I and F do not, so theirs is the smallest usual one that holds the brightest pixel, where
    # floats may shoot over 1 a little.
    usual = (1.0, 255.0, 65535.0)
    white = next((w for w in usual if top <= (4 * w if image.mode == "F" and w == 1 else w)), top)
    white = 65535.0 if image.mode.startswith("I;16") else white
    for rows in strips:
        part = np.nan_to_num(values[rows].astype(np.float64)).clip(0, white)
        scaled[rows] = (part * (255 / white)).round().astype(np.uint8)
    return Image.fromarray(scaled)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours in sRGB, alpha dropped; raises ValueError or PyCMSError for a profile that does not fit."""
    plain = _as(image, {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    if not profile:
        return _as(plain, "RGB")
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space == "RGB" and plain.mode == "L":
        plain = _as(plain, "RGB")
    if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != plain.mode:
        raise ValueError(f"its colour profile is for {space}, its pixels are {plain.mode}")
    converted = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return cast("Image.Image", converted)  # None is for in-place conversions only


def _as(image: Image.Image, mode: str) -> Image.Image:
    """In that mode; the picture itself where it is, which `convert` would copy."""
    return image if image.mode == mode else image.convert(mode)
