"""Files that are whole or absent: atomic writes and content hashes.

Law: a reader never sees half of a file. Everything is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write atomically; creates parent folders. durable: safe from a power cut too, and slower."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
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
    """A safetensors file, written as by `write_bytes`."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata or {})), durable=durable)


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


class FileDigests:
    """Digests of large files, read once: what a cache key says of a model's weights.

    memory: a JSON file that keeps the digest of each (path, size, time of change), so that a text encoder of 10 GB is
    not read again at every start. A file that was only touched is read once more and gives the same digest.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory

    def of_folder(self, folder: Path) -> str:
        """Digest of the files of a folder (names and bytes)."""
        known = self._known()
        parts: list[str] = []
        fresh: dict[str, str] = {}
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            place = file.resolve()
            if re.fullmatch("[0-9a-f]{64}", place.name):  # a large file in the hub's cache is named by its SHA-256
                parts += [file.name, place.name]
                continue
            state = file.stat()  # on POSIX the time of change betrays even a file whose date was put back
            stamp = f"{place}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}"
            if stamp not in known:
                with file.open("rb") as opened:
                    fresh[stamp] = hashlib.file_digest(opened, "sha256").hexdigest()
            parts += [file.name, known.get(stamp) or fresh[stamp]]
        if fresh:
            write_text(self._memory, json.dumps({**self._known(), **fresh}, indent=0))
        return digest(*parts)

    def _known(self) -> dict[str, str]:
        try:
            content = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
