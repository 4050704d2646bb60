"""A personal folder of pictures and captions, read once and checked before anything is trained.

Law: `scan` decodes every picture by the very function that training uses, so a picture that it accepts cannot fail
later, and every picture that it leaves out has a reason a person can act on. Records are known by their content
(sha256), not by name or date.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from flux2_lora.errors import UserError, did_you_mean, listed
from flux2_lora.files import digest
from flux2_lora.options import option

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Named, because Pillow goes by content: an EPS file called .png would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# What Pillow 12 and 13 raise on damaged files; RuntimeError is libavif's, the first five are all that 7,000 mutated
# files of these formats gave, the rest is named in Pillow's decoders.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
    EOFError,
    OverflowError,
    struct.error,
)
CAPTION_SUFFIXES = (".txt", ".caption")
TRIGGER = "[trigger]"
VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What to train on. `resolution` is in px: each picture is trained at an area of about resolution^2.

    `holdout` is the part of the pictures kept for validation where the folder has no `validation/` of its own;
    pictures of more than `max_pixels` are refused before they are decoded.
    """

    folder: str
    resolution: int = option(1024, at_least=16)
    trigger_word: str | None = None
    default_caption: str | None = None
    flip: bool = False
    holdout: float = option(0.1, at_least=0, at_most=0.9)
    max_pixels: int = option(64_000_000, at_least=1)


@dataclass(frozen=True)
class Record:
    """One readable picture: its size in px as seen (after EXIF orientation), and the sha256 of its file."""

    path: Path
    caption: str
    width: int
    height: int
    digest: str


@dataclass(frozen=True)
class Scan:
    """The pictures of a folder in the order of their names, and (name, reason) of those left out."""

    records: tuple[Record, ...]
    skipped: tuple[tuple[str, str], ...]


def scan(spec: DatasetSpec) -> Scan:
    """Read all pictures and captions of dataset.folder, but for its validation/.

    Raises UserError for a folder without pictures, without one readable picture, or with pictures without a caption.
    """
    folder = _folder(spec)
    files = [file for file in _pictures(folder) if file.relative_to(folder).parts[0] != VALIDATION]
    return _read(spec, folder, files, f"dataset.folder={spec.folder}")


def scan_validation(spec: DatasetSpec, scan: Scan, seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(training, validation) records: validation/ where the folder has one, else a part held out by seed.

    Raises UserError for an unreadable picture in validation/ too: a set chosen by hand must not shrink unseen.
    """
    folder = _folder(spec) / VALIDATION
    if not folder.is_dir():
        return hold_out(scan.records, spec.holdout, seed)
    where = f"dataset.folder={spec.folder}/{VALIDATION}"
    validation = _read(spec, folder, _pictures(folder), where)
    if validation.skipped:
        raise UserError(f"{where} has unreadable pictures: {_reasons(validation.skipped)}", "replace or remove them")
    return scan.records, validation.records


def hold_out(records: Sequence[Record], part: float, seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(training, validation) records, chosen by content: other file names or another order give the same choice.

    Validation has round(part * n) pictures, at least 1 of 8 and more; one picture always stays for training.
    """
    count = round(part * len(records))
    if part > 0 and len(records) >= 8:
        count = max(count, 1)
    ranked = sorted(records, key=lambda record: (digest("hold out", str(seed), record.digest), record.path))
    held = set(ranked[: min(count, len(records) - 1)])
    return tuple(r for r in records if r not in held), tuple(r for r in records if r in held)


def preview_prompts(spec: DatasetSpec) -> list[str]:
    """The lines of dataset.folder/prompts.txt, for previews; empty lines and lines with # left out."""
    file = _folder(spec) / "prompts.txt"
    lines = _decoded(file.read_bytes()).splitlines() if file.is_file() else []
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def open_rgb(path: Path, *, max_pixels: int | None = None) -> Image.Image:
    """The picture as a person sees it: upright, in 8-bit sRGB, on white where it is transparent, its first frame.

    Raises one of UNREADABLE, and ValueError for more than `max_pixels` (before decoding).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's notes on size and odd metadata: the limit is ours, reasons are too
        with Image.open(path, formats=FORMATS) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise ValueError(f"{opened.width} x {opened.height} is more than dataset.max_pixels={max_pixels}")
            profile = opened.info.get("icc_profile")
            image = _eight_bit(ImageOps.exif_transpose(opened))
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")
    colours = _srgb(image, profile)
    if not image.has_transparency_data:
        return colours
    white = Image.new("RGB", image.size, "white")
    return Image.composite(colours, white, image.convert("RGBA").getchannel("A"))


def crop_to(image: Image.Image, height: int, width: int) -> Tensor:
    """Pixels [3 h w] float32 in [-1, 1]: the largest centred crop of that aspect, resized by Lanczos."""
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32) / 255)
    return (2 * pixels - 1).permute(2, 0, 1).contiguous()


def _folder(spec: DatasetSpec) -> Path:
    folder = Path(spec.folder).expanduser()
    what = f"dataset.folder={spec.folder}"
    if folder.is_file():
        raise UserError(f"{what} is a file, not a folder", "name the folder that holds the pictures; unpack an archive")
    if not folder.is_dir():
        beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
        near = f"in {folder.parent} there is: {listed(sorted(beside))}" if beside else "check the path"
        close = did_you_mean(folder.name, beside)
        raise UserError(f"{what} does not exist", close if close.startswith("did") else near)
    return folder


def _pictures(folder: Path) -> list[Path]:
    """Picture files below a folder, sorted; hidden files and masks (x-masklabel.png) are none."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not file.stem.endswith("-masklabel")
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _read(spec: DatasetSpec, folder: Path, files: Sequence[Path], where: str) -> Scan:
    """Captions before pictures: they are read in no time, and are what most users have to mend."""
    if not files:
        raise UserError(f"{where} holds no pictures{_contents(folder)}", f"put {_suffixes()} files there")
    captions = _captions(spec, folder, files, where)
    records: list[Record] = []
    skipped: list[tuple[str, str]] = []
    for file, caption in zip(files, captions, strict=True):
        try:
            width, height = open_rgb(file, max_pixels=spec.max_pixels).size
            records.append(Record(file, caption, width, height, digest(file.read_bytes())))
        except UNREADABLE as error:
            skipped.append((file.relative_to(folder).as_posix(), _reason(error)))
    if not records:
        what = f"{where} holds {len(files)} images but none can be read: {_reasons(skipped)}"
        raise UserError(what, "save them again as PNG or JPEG, or raise dataset.max_pixels if they are too large")
    return Scan(tuple(records), tuple(skipped))


def _contents(folder: Path) -> str:
    kinds = Counter(file.suffix.lower() or "without suffix" for file in folder.rglob("*") if file.is_file())
    return f", only {listed([f'{count} {kind}' for kind, count in kinds.most_common()])}" if kinds else ": it is empty"


def _suffixes() -> str:
    return ", ".join(suffix[1:] for suffix in SUFFIXES[:-1]) + f" or {SUFFIXES[-1][1:]}"


def _reason(error: BaseException) -> str:
    """One line without the file's path, which Pillow and the system put into theirs."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, whatever its name says"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _reasons(skipped: Sequence[tuple[str, str]]) -> str:
    return listed([f"{name} ({reason})" for name, reason in skipped])


def _captions(spec: DatasetSpec, folder: Path, files: Sequence[Path], where: str) -> list[str]:
    """The caption of each picture; raises UserError where one has none, or needs a trigger word that is not set."""
    texts = [_caption_beside(file) or spec.default_caption for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    bare = [name for name, text in zip(names, texts, strict=True) if text is None]
    if bare:
        what = f"{where} holds {len(files)} images but {len(bare)} have no caption: {listed(bare)}"
        beside = Path(bare[0]).with_suffix(".txt").name
        remedy = f'write {beside} beside the image, or set dataset.default_caption="a photo in mystyle"'
        raise UserError(what, remedy)
    captions = [with_trigger(text or "", spec.trigger_word) for text in texts]
    unset = [name for name, caption in zip(names, captions, strict=True) if TRIGGER in caption]
    if unset:
        what = f"{where} has captions with {TRIGGER}, but dataset.trigger_word is not set: {listed(unset)}"
        raise UserError(what, "set dataset.trigger_word=mystyle")
    return captions


def _caption_beside(picture: Path) -> str | None:
    """The first caption file of the same stem, on one line; None where there is none or it is blank."""
    for suffix in CAPTION_SUFFIXES:
        file = picture.with_suffix(suffix)
        if file.is_file():
            try:
                return " ".join(_decoded(file.read_bytes()).replace("\0", " ").split()) or None
            except OSError as error:
                raise UserError(f"the caption {file} cannot be read: {error.strerror}", "make it readable") from error
    return None


def _decoded(raw: bytes) -> str:
    """UTF-8, UTF-16 where a byte-order mark says so, else what older Windows editors write."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger word in it: in place of [trigger], else in front unless it is there as a word."""
    if not trigger:
        return caption
    caption = caption.replace(TRIGGER, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep greys (16-bit, 32-bit, float) scaled to 8 bits, where Pillow would clip them to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max())
    # I;16 says its range; I and F do not, so theirs is the smallest usual one that holds the brightest pixel.
    white = 65535.0 if image.mode.startswith("I;16") else next((w for w in (1.0, 255.0, 65535.0) if top <= w), top)
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours in sRGB, alpha dropped; raises ValueError or PyCMSError for a profile that does not fit."""
    plain = image.convert({"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    if not profile:
        return plain.convert("RGB")
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space == "RGB" and plain.mode == "L":
        plain = plain.convert("RGB")
    if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != plain.mode:
        raise ValueError(f"its colour profile is for {space}, its pixels are {plain.mode}")
    converted = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # None is for in-place conversions only
    return converted
