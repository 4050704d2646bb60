"""What decoding a picture told, remembered by its content: a folder that was read once is known without decoding it.

Law: every file is read and hashed each time, so what is known of a content can be neither stale nor another file's.
Nothing is written before `save`: a run that is refused leaves no trace.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image

from flux2_lora.ahead import ahead
from flux2_lora.dataset.crops import Box
from flux2_lora.dataset.pictures import UnreadableError, file_bytes, open_mask, open_picture
from flux2_lora.files import digest, write_text

_VERSION = "1"


@dataclass(frozen=True)
class Seen:
    """Size in px as seen; moving: of several frames; box: where a mask, or an alpha, is not black; None where opaque.

    The box of one that is black everywhere is empty: (0, 0, 0, 0).
    """

    digest: str
    width: int
    height: int
    moving: bool
    box: Box | None


class Memory:
    """Seen pictures and masks by digest, kept in one JSON file with a checksum of its own."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = _read(file)
        self._fresh: dict[str, Seen] = {}

    def look(self, path: Path, *, max_pixels: int, mask: bool = False) -> Seen:
        """Read, hash, and decode unless that content is known. Raises UnreadableError."""
        with file_bytes(path) as raw:
            content = digest(raw)
            key = f"{'mask' if mask else 'picture'} {content}"
            seen = self._known.get(key) or self._fresh.get(key)
            if seen is None or seen.width * seen.height > max_pixels:
                seen = _mask(raw, content, max_pixels) if mask else _picture(raw, content, max_pixels)
                self._fresh[key] = seen
            return seen

    def look_at_all(self, paths: Sequence[Path], *, max_pixels: int, mask: bool = False) -> Iterator[Seen | str]:
        """`look` for each path in turn, decoded ahead in threads; in place of an unreadable one, the reason."""

        def attempt(path: Path) -> Seen | str:
            try:
                return self.look(path, max_pixels=max_pixels, mask=mask)
            except UnreadableError as error:
                return str(error)

        return ahead(attempt, paths)

    def save(self) -> None:
        """Add what was newly seen to the file; of two processes that save at once, one may decode again next time."""
        if self._fresh:
            known = {key: dataclasses.astuple(seen) for key, seen in {**_read(self.file), **self._fresh}.items()}
            content = json.dumps(known)
            write_text(self.file, json.dumps({"checksum": digest(_VERSION, content), "seen": content}))


def _read(file: Path) -> dict[str, Seen]:
    """What `save` wrote; nothing where the file is absent, damaged or of another version."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["checksum"] != digest(_VERSION, stored["seen"]):
            return {}
        entries = json.loads(stored["seen"])
        return {key: _seen(*entry) for key, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _seen(content: str, width: int, height: int, moving: Any, box: list[float] | None) -> Seen:
    return Seen(content, width, height, moving, cast("Box", tuple(box)) if box is not None else None)


def _picture(raw: bytes, content: str, max_pixels: int) -> Seen:
    opened = open_picture(raw, max_pixels=max_pixels)
    return Seen(content, *opened.image.size, opened.moving, None if opened.alpha is None else _box(opened.alpha))


def _mask(raw: bytes, content: str, max_pixels: int) -> Seen:
    opened = open_mask(raw, max_pixels=max_pixels)
    return Seen(content, *opened.size, False, _box(opened))


def _box(mask: Image.Image) -> Box:
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    return left / mask.width, top / mask.height, right / mask.width, bottom / mask.height
