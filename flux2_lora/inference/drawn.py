"""What previews leave in a run's folder, and where: the one place that knows the names of these files.

previews/prompts.json             what the pictures show: the prompts, and the caption of the picture that is edited
previews/inpaint-picture.png      what an edit row begins from, and inpaint-mask.png; outpaint likewise
previews/training/000.webp        thumbnails of pictures that the run learns from
previews/step-000100.png          the grid of a step
previews/step-000100/0000.png     its pictures by prompt, and inpaint.png and outpaint.png
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from flux2_lora.files import write_text

EDITS = ("inpaint", "outpaint")
Item = TypeVar("Item")
_TEXTS, _TRAINING = "prompts.json", "training"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """prompts: one a row; edited: the caption under which a picture is edited."""

    prompts: list[str]
    edited: str


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit row: what is there, and the mask (255 = to be painted) over the whole of what comes out."""

    picture: Image.Image
    mask: Image.Image


def step_folder(previews: Path, step: int) -> Path:
    """Where the pictures of a step lie; the grid has that name with .png."""
    return previews / f"step-{step:06d}"


def drawn_steps(previews: Path) -> list[int]:
    """The steps that have pictures, in order."""
    folders = (folder for folder in previews.glob("step-*") if any(picture_files(folder)))
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, evenly spread, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a step, by the rows of the prompts."""
    return sorted(folder.glob("[0-9][0-9][0-9][0-9].png"))


def forget_steps(previews: Path) -> None:
    """Delete what was drawn at any step: a run that begins has drawn nothing yet."""
    for place in previews.glob("step-*"):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()


def write_texts(previews: Path, texts: Texts) -> None:
    content = {"prompts": texts.prompts, "edited": texts.edited}
    write_text(previews / _TEXTS, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_texts(previews: Path) -> Texts | None:
    """None where a run has not said them; runs of earlier versions have not."""
    try:
        content = json.loads((previews / _TEXTS).read_text(encoding="utf-8"))
        return Texts(prompts=list(map(str, content["prompts"])), edited=str(content["edited"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def edit_files(previews: Path, name: str) -> tuple[Path, Path]:
    """(picture, mask) of an edit row."""
    return previews / f"{name}-picture.png", previews / f"{name}-mask.png"


def write_thumbnails(previews: Path, thumbnails: Sequence[Image.Image]) -> None:
    """In place of those that are there."""
    folder = previews / _TRAINING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, thumbnail in enumerate(thumbnails):
        thumbnail.save(folder / f"{index:03d}.webp", quality=80)


def thumbnail_files(previews: Path) -> list[Path]:
    return sorted((previews / _TRAINING).glob("*.webp"))
