"""Write a caption beside each picture of a folder that has none, by a Florence-2 or BLIP model on this computer.

    flux2-lora caption dataset.folder=~/pictures/mine captioner.path=~/models/florence-2

Captions that are there stay, unless overwrite=true; dry_run=true shows the new ones and writes nothing. A folder that
keeps its captions in metadata.jsonl needs none: those come first.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from flux2_lora.config import program
from flux2_lora.dataset import DatasetSpec
from flux2_lora.dataset.captions import clean, read_text
from flux2_lora.dataset.folders import MASK_MARK, contents, existing, shown, suffixes
from flux2_lora.dataset.pictures import HEIC_SUFFIXES, SUFFIXES, UnreadableError, heic_is_read, open_picture
from flux2_lora.dataset.spec import CAPTION_SUFFIXES
from flux2_lora.devices import pick_device
from flux2_lora.errors import UserError
from flux2_lora.files import write_text
from flux2_lora.networks.captioners import load_captioner
from flux2_lora.options import option
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class CaptionerSpec:
    """path: a transformers folder; prompt: what it is asked, null for its usual; max_new_tokens of a caption."""

    path: str
    prompt: str | None = None
    max_new_tokens: int = option(128, at_least=1, at_most=256)


@dataclass(frozen=True, kw_only=True)
class FolderSpec:
    """folder: pictures, in subfolders too."""

    folder: str


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """configs/caption.yaml."""

    dataset: FolderSpec
    captioner: CaptionerSpec
    overwrite: bool = False
    suffix: str = option(".txt", one_of=CAPTION_SUFFIXES)
    device: str = "auto"
    dry_run: bool = False


@program("caption")
def main(config: CaptionConfig) -> None:
    device, folder = (
        pick_device(config.device),
        existing(config.dataset.folder, f"dataset.folder={config.dataset.folder}"),
    )
    pictures = pictures_in(folder)
    if not pictures:
        raise UserError(
            f"dataset.folder={config.dataset.folder} holds no pictures{contents(folder)}",
            f"put {suffixes()} files in it",
        )
    wanted = targets(pictures, config.suffix, overwrite=config.overwrite)
    written = write_captions(wanted, folder, config, device) if wanted else 0
    verb = "would be written" if config.dry_run else "written"
    console.print(
        f"captions: {written} {verb}, {len(pictures) - len(wanted)} kept, {len(wanted) - written} skipped; "
        f"next: flux2-lora inspect {shlex.quote(f'dataset.folder={folder}')}"
    )


def pictures_in(folder: Path) -> list[Path]:
    """Picture files below the folder in the order of their names; no hidden ones, no masks, no linked folders."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.stem.endswith(MASK_MARK) and path.is_file()
    ]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def targets(pictures: list[Path], suffix: str, *, overwrite: bool) -> dict[Path, Path]:
    """Caption file to write -> its picture; pictures of one stem share the caption of the first."""
    wanted: dict[Path, Path] = {}
    for picture in pictures:
        there = next((file for kind in CAPTION_SUFFIXES if has_words(file := picture.with_suffix(kind))), None)
        if there is None or overwrite:
            wanted.setdefault(there or picture.with_suffix(suffix), picture)
    return wanted


def has_words(file: Path) -> bool:
    """Whether a caption file is there and not blank; one that cannot be read is taken to have words."""
    try:
        return file.is_file() and bool(clean(read_text(file)))
    except (OSError, ValueError):
        return True


def write_captions(wanted: dict[Path, Path], folder: Path, config: CaptionConfig, device: torch.device) -> int:
    """Caption and report picture by picture; returns how many captions were made."""
    spec = config.captioner
    caption = load_captioner(spec.path, device, spec.prompt, spec.max_new_tokens)
    written = 0
    for number, (file, picture) in enumerate(wanted.items(), start=1):
        head = f"{number}/{len(wanted)} {shown(picture.relative_to(folder).as_posix())}"
        try:
            image = opened(picture)
        except UnreadableError as error:
            console.print(f"{head} skipped: {error}")
            continue
        text = clean(caption(image))
        if not text:
            console.print(f"{head} skipped: the captioner has nothing to say")
            continue
        if not config.dry_run:
            save(file, text, config.dataset.folder)
        console.print(f"{head}: {text}")
        written += 1
    return written


def opened(picture: Path) -> Image.Image:
    """The picture as a person sees it; raises UnreadableError."""
    if picture.suffix.lower() in HEIC_SUFFIXES and not heic_is_read():
        raise UnreadableError("HEIC needs pillow-heif: install flux2-lora[heic]")
    return open_picture(picture, max_pixels=DatasetSpec(folder="").max_pixels).image


def save(file: Path, text: str, folder: str) -> None:
    """Write a caption in place of the file or link of that name; UserError where the folder takes no files."""
    try:
        write_text(file, f"{text}\n")
    except OSError as error:
        what = f"dataset.folder={folder}: {shown(file.name)} cannot be written ({error.strerror})"
        raise UserError(what, "make room or get the right to write there; captions so far are kept") from error


if __name__ == "__main__":
    main()
