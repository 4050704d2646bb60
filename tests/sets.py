"""Folders of pictures as tests make them, and what `scan` says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flux2_lora.dataset import DatasetSpec, Record, Scan
from flux2_lora.dataset.scan import scan as scan_all
from flux2_lora.dataset.seen import Memory
from flux2_lora.errors import UserError


def picture(
    path: Path, caption: str | bytes | None = "a caption", size: tuple[int, int] = (80, 64), **how: Any
) -> Path:
    """A picture of one colour, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, how.pop("colour", "red")).save(path, **how)
    if caption is not None:
        raw = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(raw)
    return path


def spec(folder: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(folder=str(folder), **{"resolution": [64], "holdout": 0.0, **options})


def scanned(options: DatasetSpec, seed: int = 0) -> Scan:
    """What a run would see; beside the folder, or where there is none beside the sources, lie cache and report."""
    beside = Path(options.folder if Path(options.folder).is_dir() else ".").resolve().parent
    memory = Memory(beside / "cache" / "pictures.json")
    report = beside / "skipped.txt"
    return scan_all(options, seed=seed, step=16, memory=memory, cache=beside / "cache", report=report)


def records(folder: Path, **options: Any) -> tuple[Record, ...]:
    return scanned(spec(folder, **options)).training


def captions(folder: Path, **options: Any) -> list[str]:
    return [record.caption for record in records(folder, **options)]


def names(folder: Path, **options: Any) -> list[str]:
    return [record.name for record in records(folder, **options)]


def skipped(folder: Path, **options: Any) -> dict[str, str]:
    return dict(scanned(spec(folder, **options)).skipped)


def error_of(action: Callable[[], object]) -> UserError:
    """The UserError that an action ends in; both of its lines are lines."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in caught.value.what + caught.value.remedy
    return caught.value
