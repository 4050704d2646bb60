"""A dataset of the hub as a folder: its pictures' very bytes, never decoded and written again, and a metadata.jsonl.

Law: files are named by their content, so a dataset that changed on the hub changes the pictures that changed and no
others. `datasets` does the fetching and reads every form that the hub has; no code of a dataset is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux2_lora.dataset.folders import CAPTION_COLUMNS
from flux2_lora.errors import UserError, listed
from flux2_lora.files import digest, write_bytes, write_text

_MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def fetch_hub(name: str, split: str, cache: Path, caption_column: str | None) -> Path:
    """The folder of `split` of the dataset `name` (a hub id, or a folder in a hub dataset's form), below `cache`.

    Raises UserError where there is no such dataset or split, no column of pictures, or no `caption_column`.
    """
    option = f"dataset.hub={name}"
    table = _load(name, split, cache, option)
    pictures = next((column for column, kind in table.features.items() if type(kind).__name__ == "Image"), None)
    if pictures is None:
        raise UserError(f"{option} has no column of pictures, only {listed(list(table.features))}", "name another set")
    if caption_column and caption_column not in table.features:
        columns = listed(list(table.features))
        raise UserError(f"{option} has no column {caption_column}", f"dataset.caption_column is one of: {columns}")
    captions = caption_column or next((column for column in CAPTION_COLUMNS if column in table.features), None)
    folder = cache / "hub" / digest(name, split, captions or "")
    roots = [
        cache.resolve(),
        _hub_cache(),
        *([Path(name).expanduser().resolve()] if Path(name).expanduser().is_dir() else []),
    ]
    rows = list(_written(table, pictures, captions, folder, roots))
    there = {"metadata.jsonl", *(row["file_name"] for row in rows)}
    for file in folder.iterdir():
        if file.name not in there and not file.name.startswith("."):
            file.unlink(missing_ok=True)
    write_text(folder / "metadata.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in rows))
    return folder


def _hub_cache() -> Path:
    """Where the hub's own client keeps files that it fetched."""
    import datasets

    return Path(datasets.config.HF_CACHE_HOME).expanduser().resolve()


def _load(name: str, split: str, cache: Path, option: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    place = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        table = datasets.load_dataset(place, split=split, cache_dir=str(cache / "datasets"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{option} (split {split}) cannot be loaded: {reason}",
            "check the id and dataset.split; private datasets need `hf auth login`, offline ones an earlier download",
        ) from error
    pictures = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    for column in pictures:
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _written(
    table: Any, pictures: str, captions: str | None, folder: Path, roots: list[Path]
) -> Iterator[dict[str, Any]]:
    """Write each picture that is not there yet; its row of metadata.jsonl. A path is read below `roots` only."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(table):
        cell = row[pictures] or {}
        raw = cell.get("bytes") or _read(cell.get("path"), roots)
        file = folder / f"{number:06}-{digest(raw)[:16]}{_suffix(raw)}"
        if not file.is_file() or file.stat().st_size != len(raw):
            write_bytes(file, raw)
        yield {"file_name": file.name} | ({captions: row[captions]} if captions else {})


def _read(path: str | None, roots: list[Path]) -> bytes:
    """The bytes of a picture that a table only names; none where it is absent, or lies where no dataset has files."""
    file = Path(path or "").resolve()
    inside = any(file.is_relative_to(root) for root in roots)
    return file.read_bytes() if inside and file.is_file() else b""


def _suffix(raw: bytes) -> str:
    """By content, since a table may hold bytes without a name."""
    if raw[:4] == b"RIFF":
        return ".webp"
    if raw[4:8] == b"ftyp":
        return ".avif" if b"avi" in raw[8:24] else ".heic"
    return next((suffix for start, suffix in _MAGIC.items() if raw.startswith(start)), ".png")
