"""Files that are whole or absent: atomic writes and content hashes.

Law: a reader never sees half of a file. Everything is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from flux2_lora.errors import RunError, UserError


@contextmanager
def room_for(path: Path, size: int) -> Iterator[None]:
    """A disk that is full, or a quota that is used up, while `size` bytes are written to `path` becomes a RunError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise RunError(
            f"the disk is full: {path} needs {size:,} bytes, {free:,} are free",
            "free some space and run the same command again; what was written before is intact",
        ) from error


@contextmanager
def as_asked(path: Path, option: str) -> Iterator[None]:
    """A place that the user chose and that cannot be written becomes a UserError which names the option."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}={path} cannot be written ({error.strerror})", "give a file in a folder of yours"
        ) from error


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write atomically; creates parent folders. durable: safe from a power cut too, and slower."""
    with room_for(path, len(content)):
        _write_bytes(path, content, durable=durable)


def _write_bytes(path: Path, content: bytes, *, durable: bool) -> None:
    with _in_its_place(path, durable=durable) as file:
        file.write(content)


@contextmanager
def _in_its_place(path: Path, *, durable: bool) -> Iterator[BinaryIO]:
    """A file that appears under `path` when it is whole, and not at all after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable (not possible, and not needed, on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, durable: bool = True
) -> None:
    """A safetensors file, written as by `write_bytes`; the same tensors and metadata give the same bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, _ordered(save(contiguous, metadata=dict(metadata or {}))), durable=durable)


def write_in_turn(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file whose tensors, all of one type, are asked for one after another, so that one is in memory."""
    name_of_type = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of_type, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with room_for(path, 8 + len(text) + end), _in_its_place(path, durable=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = tensor(name).contiguous()
            assert tuple(values.shape) == shape, name
            file.write(values.reshape(-1).view(torch.uint8).numpy().tobytes())


def _ordered(raw: bytes) -> bytes:
    """A safetensors file with its metadata in alphabetical order; the library leaves it in that of a hash map."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    if len(header.get("__metadata__", {})) < 2:
        return raw
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def without_folders(path: str) -> str:
    """The last part of an absolute path, or of one from a home folder; others as they are."""
    for kind in (PurePosixPath(path), PureWindowsPath(path)):
        if kind.is_absolute() or path.startswith("~"):
            return kind.name
    return path


def digest(*parts: bytes | str) -> str:
    """SHA-256 over length-prefixed parts, 32 hex digits: no two lists of parts share a spelling."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "little"))
        total.update(raw)
    return total.hexdigest()[:32]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes, types and bytes, in the order of names."""
    parts: list[bytes | str] = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        flat = tensor.reshape(-1).view(torch.uint8)
        parts += [name, str(tuple(tensor.shape)), str(tensor.dtype), flat.numpy().tobytes()]
    return digest(*parts)


def tensors_hash(path: Path) -> str:
    """SHA-256 of a safetensors file behind its header, which opens with its length: by it LoRAs are found."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigests:
    """Digests of large files, read once: what a cache key says of a model's weights.

    memory: a JSON file that keeps the digest of each (path, size, time of change), so that a text encoder of 10 GB is
    not read again at every start. A file that was only touched is read once more and gives the same digest.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory

    def of(self, place: Path) -> str:
        """Digest of a file's bytes, or of a folder's files."""
        return self._of({"": place}) if place.is_file() else self.of_folder(place)

    def of_folder(self, folder: Path) -> str:
        """Digest of the files of a folder (names and bytes)."""
        return self._of({path.name: path for path in sorted(folder.iterdir()) if path.is_file()})

    def _of(self, files: Mapping[str, Path]) -> str:
        known = self._known()
        parts: list[str] = []
        fresh: dict[str, str] = {}
        for name, file in files.items():
            place = file.resolve()
            if re.fullmatch("[0-9a-f]{64}", place.name):  # a large file in the hub's cache is named by its SHA-256
                parts += [name, place.name]
                continue
            state = file.stat()  # on POSIX the time of change betrays even a file whose date was put back
            stamp = f"{place}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}"
            if stamp not in known:
                with file.open("rb") as opened:
                    fresh[stamp] = hashlib.file_digest(opened, "sha256").hexdigest()
            parts += [name, known.get(stamp) or fresh[stamp]]
        if fresh:
            write_text(self._memory, json.dumps({**self._known(), **fresh}, indent=0))
        return digest(*parts)

    def _known(self) -> dict[str, str]:
        try:
            content = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
