"""What lies in a folder of pictures: files, captions beside them or in metadata, masks, and kohya's repeat folders.

Law: nothing is read from outside the folder unless the user follows links, whatever a metadata file or a link says; and
each file that looks like a picture is either listed or refused with a reason.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from flux2_lora.dataset.captions import captions_in, clean, decoded, read_text
from flux2_lora.dataset.pictures import FILM_SUFFIXES, FOREIGN_SUFFIXES, HEIC_SUFFIXES, SUFFIXES, heic_is_read
from flux2_lora.dataset.spec import Source
from flux2_lora.errors import UserError, did_you_mean, listed

VALIDATION = "validation"
MASK_MARK = "-masklabel"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "prompt")
LARGEST_METADATA, MOST_ROWS = 64 << 20, 1_000_000
"""Bytes of a metadata file, and rows of a parquet one, which may hold many in few bytes."""
MOST_REPEATS = 200
"""A larger number in front of a folder's name is taken for a year or a part of the name."""

Refusal = tuple[str, str]
"""(name, reason) of a file that is not used."""


@dataclass(frozen=True)
class Entry:
    """A picture file and what is said about it; captions without trigger words, empty where there are none."""

    path: Path
    name: str
    captions: tuple[str, ...]
    repeats: int
    mask: Path | None


@dataclass
class Listing:
    """The entries of a source in the order of their names, and what was refused."""

    entries: list[Entry] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


class _RefusedError(Exception):
    """A file that must not be used, and why."""


def existing(text: str, what: str) -> Path:
    """The folder of that name; UserError where it is none, with the nearest name."""
    try:
        folder = Path(text).expanduser()
        if folder.is_dir():
            return folder
        if folder.is_file():
            remedy = "name the folder that holds the pictures; unpack an archive"
            raise UserError(f"{what} is a file, not a folder", remedy)
        beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    except (OSError, ValueError, RuntimeError) as error:  # the last is for a ~name without a home
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{shown(what)} cannot be opened: {reason}", "check the path and its permissions") from error
    near = f"in {folder.parent} there is: {listed(sorted(beside))}" if beside else "check the path"
    close = did_you_mean(folder.name, beside)
    raise UserError(f"{shown(what)} does not exist", close if close.startswith("did") else near)


def shown(name: str) -> str:
    """A file's name as it can be printed on one line: control characters and undecodable bytes escaped."""
    plain = name.encode("utf-8", "backslashreplace").decode()
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in plain)


def list_folder(source: Source, others: Sequence[Path] = ()) -> Listing:
    """All pictures below source.folder; folders in `others` (validation, masks) are left to whoever asked for them."""
    listing = Listing()
    root = source.folder.resolve()
    left_out = {path.resolve() for path in others} | ({source.masks.resolve()} if source.masks else set())
    files = list(_walk(root, listing, left_out, follow_links=source.follow_links))
    told = _metadata(root, [file for file in files if file.name in METADATA], source, listing)
    for file in files:
        name = file.relative_to(root).as_posix()
        kind = file.suffix.lower()
        if kind not in (*SUFFIXES, *FOREIGN_SUFFIXES) or file.stem.endswith(MASK_MARK):
            continue
        try:
            listing.entries.append(_entry(file, name, root, source, told.get(file)))
        except _RefusedError as refused:
            listing.refused.append((shown(name), str(refused)))
    return listing


def contents(folder: Path) -> str:
    """Which kinds of files there are, for a folder without pictures."""
    kinds = Counter(file.suffix.lower() or "without suffix" for file in folder.rglob("*") if file.is_file())
    return f", only {listed([f'{count} {kind}' for kind, count in kinds.most_common()])}" if kinds else ": it is empty"


def suffixes() -> str:
    """The suffixes of pictures, as prose."""
    named = [suffix[1:] for suffix in SUFFIXES if suffix not in HEIC_SUFFIXES or heic_is_read()]
    return f"{', '.join(named[:-1])} or {named[-1]}"


def _walk(root: Path, listing: Listing, left_out: set[Path], *, follow_links: bool) -> Iterator[Path]:
    """Files below the root, sorted, without hidden ones; links that lead nowhere good are refused."""

    def unreadable(error: OSError) -> None:
        where = Path(error.filename).relative_to(root).as_posix() if error.filename else "."
        listing.refused.append((f"{shown(where)}/", error.strerror or "cannot be read"))

    found: list[Path] = []
    met: set[Path] = set()
    for place, folders, names in os.walk(root, onerror=unreadable, followlinks=follow_links):
        here = Path(place)
        if here.resolve() in met:  # a link to a folder above
            folders.clear()
            continue
        met.add(here.resolve())
        for name in [*folders]:
            inner = here / name
            linked = inner.is_symlink() and not follow_links
            if linked and not name.startswith("."):
                reason = "a link to a folder; dataset.follow_links=true follows it"
                listing.refused.append((f"{shown(inner.relative_to(root).as_posix())}/", reason))
            if linked or name.startswith(".") or inner.resolve() in left_out:
                folders.remove(name)
        found += [here / name for name in names if not name.startswith(".")]
    return iter(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _entry(file: Path, name: str, root: Path, source: Source, told: tuple[str, ...] | None) -> Entry:
    _check_link(file, root, source)
    if shown(name) != name:
        raise _RefusedError("its name holds control characters or undecodable bytes")
    kind = file.suffix.lower()
    if kind in FOREIGN_SUFFIXES:
        film = kind in FILM_SUFFIXES
        raise _RefusedError("a film" if film else f"{kind[1:]} is not read; save it as PNG or JPEG")
    if kind in HEIC_SUFFIXES and not heic_is_read():
        raise _RefusedError("HEIC needs pillow-heif: install flux2-lora[heic]")
    repeats, class_name = _repeats(file, root, source)
    if repeats == 0:
        raise _RefusedError("its folder's name says 0 repeats")
    captions = told or _captions_beside(file, root, source) or ()
    default = source.default_caption or class_name
    return Entry(
        path=file,
        name=name,
        captions=captions or ((clean(default),) if default else ()),
        repeats=repeats,
        mask=_mask_of(file, root, source),
    )


def _repeats(file: Path, root: Path, source: Source) -> tuple[int, str | None]:
    """kohya's `10_my class`: (10, "my class") from the nearest folder of that form, up to the root itself; else 1."""
    if not source.named_repeats:
        return 1, None
    for folder in [place for place in file.parents if place == root or root in place.parents]:
        found = re.fullmatch(r"(\d+)_(.+)", folder.name)
        if found and int(found[1]) <= MOST_REPEATS:
            return int(found[1]), found[2].strip()
    return 1, None


def _captions_beside(file: Path, root: Path, source: Source) -> tuple[str, ...]:
    """The captions of the first caption file of the same stem that is not blank."""
    for suffix in [kind for written in source.caption_suffixes for kind in (written, written.upper())]:
        beside = file.with_suffix(suffix)
        if not os.path.isfile(beside):  # noqa: PTH113 - False for a name that is too long, where Path raises
            continue
        _check_link(beside, root, source, "its caption ")
        try:
            captions = captions_in(read_text(beside), lines=source.caption_lines)
        except OSError as error:
            raise _RefusedError(f"its caption {shown(beside.name)} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise _RefusedError(str(error)) from error
        if captions:
            return captions
    return ()


def _mask_of(file: Path, root: Path, source: Source) -> Path | None:
    """x-masklabel.png beside x.png, else the picture of the same name in the folder of masks."""
    beside = _sibling(file.with_name(file.stem + MASK_MARK))
    if beside is not None:
        _check_link(beside, root, source, "its mask ")
        return beside
    if source.masks is None:
        return None
    masks = source.masks.resolve()
    found = _sibling((masks / file.relative_to(root)).with_suffix(""))
    if found is not None:
        _check_link(found, masks, source, "its mask ")
    return found


def _sibling(stem: Path) -> Path | None:
    """The picture file of that stem, whatever its suffix."""
    kinds = (*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES))
    return next((path for kind in kinds if os.path.isfile(path := stem.with_name(stem.name + kind))), None)  # noqa: PTH113


def _check_link(file: Path, root: Path, source: Source, what: str = "") -> None:
    try:
        inside, there = file.resolve().is_relative_to(root), file.is_file()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise _RefusedError(f"{what}is a link that leads nowhere") from error
    if not source.follow_links and not inside:
        raise _RefusedError(f"{what}links out of the folder; dataset.follow_links=true allows that")
    if not there:
        raise _RefusedError(f"{what}is no file, or a link that leads nowhere")


def _metadata(root: Path, files: Sequence[Path], source: Source, listing: Listing) -> dict[Path, tuple[str, ...]]:
    """Picture -> captions, from the metadata files of an imagefolder; rows that name no picture here are refused."""
    told: dict[Path, tuple[str, ...]] = {}
    for file in files:
        name = file.relative_to(root).as_posix()
        rows: list[Any] = []
        try:
            _check_link(file, root, source)
            if file.stat().st_size > LARGEST_METADATA:
                raise _RefusedError(f"has more than {LARGEST_METADATA:,} bytes")
            rows = _READERS[file.suffix](file)
        except _RefusedError as refused:
            listing.refused.append((name, str(refused)))
        except Exception as error:  # noqa: BLE001 - pyarrow has its own kinds of errors, and they change
            listing.refused.append((name, f"cannot be read: {' '.join(str(error).split())[:200]}"))
        for number, row in enumerate(rows, start=1):
            try:
                picture, captions = _row(row, file.parent, root, source)
                told[picture] = (*told.get(picture, ()), *captions)  # several rows are several captions
            except _RefusedError as refused:
                listing.refused.append((f"{name} row {number}", str(refused)))
    return told


def _row(row: Any, folder: Path, root: Path, source: Source) -> tuple[Path, tuple[str, ...]]:
    if isinstance(row, str):
        raise _RefusedError(row)
    if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
        raise _RefusedError("it has no file_name")
    picture = _inside(row["file_name"], folder, root, source)
    column = source.caption_column or next((name for name in CAPTION_COLUMNS if name in row), None)
    told = [name for name, value in row.items() if name != "file_name" and isinstance(value, str | list)]
    if (column is None and told) or (source.caption_column and source.caption_column not in row):
        named = listed([str(name) for name in told]) or "none but file_name"
        raise _RefusedError(f"has the columns {named}; dataset.caption_column names that of the captions")
    value = row.get(column) if column else None
    texts = value if isinstance(value, list | tuple) else [value]
    captions = tuple(clean(text) for text in texts if isinstance(text, str) and clean(text))
    return picture, captions


def _inside(text: str, folder: Path, root: Path, source: Source) -> Path:
    """The picture that a metadata row names, which must lie below its folder."""
    parts = PurePosixPath(text.replace("\\", "/")).parts
    if shown(text) != text:
        raise _RefusedError(f"file_name={shown(text)!r} holds control characters")
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or PureWindowsPath(text).root:
        raise _RefusedError(f"file_name={text} is an absolute path; it must be relative to the metadata file")
    if ".." in parts or "~" in parts[:1]:
        raise _RefusedError(f"file_name={text} leads out of the folder")
    picture = folder.joinpath(*parts)
    try:
        if not parts or not picture.exists():
            raise _RefusedError(f"file_name={text} is not there")
        _check_link(picture, root, source, f"file_name={text} ")
    except (OSError, ValueError) as error:  # a name that is too long, or that the file system does not take
        reason = getattr(error, "strerror", None) or str(error)
        raise _RefusedError(f"file_name={text[:80]} cannot be opened: {reason}") from error
    if picture.suffix.lower() not in SUFFIXES:
        raise _RefusedError(f"file_name={text} is no picture")
    return picture


def _json_rows(file: Path) -> list[Any]:
    """One object a line; a line that is none stands in the list as its error."""
    return [_json_row(line) for line in decoded(file.read_bytes()).split("\n") if line.strip()]


def _json_row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {' '.join(str(error).split())[:200]}"


def _csv_rows(file: Path) -> list[Any]:
    return list(csv.DictReader(io.StringIO(decoded(file.read_bytes()), newline="")))


def _parquet_rows(file: Path) -> list[Any]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    if table.metadata.num_rows > MOST_ROWS:
        raise _RefusedError(f"has more than {MOST_ROWS:,} rows")
    plain = [field.name for field in table.schema_arrow if not str(field.type).startswith("struct")]
    return list(table.read(columns=plain).to_pylist())


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
