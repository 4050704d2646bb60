"""Files that are whole or absent: atomic writes and content hashes.

Law: a reader never sees half of a file. Everything is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor


def write_bytes(path: Path, content: bytes) -> None:
    """Write atomically and durably; creates parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, written atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata or {})))


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


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Digest of the files of a folder (names and bytes): what a cache key says of a model's weights."""
    parts: list[bytes | str] = []
    for file in sorted(p for p in folder.glob(pattern) if p.is_file()):
        with file.open("rb") as opened:
            parts += [file.name, hashlib.file_digest(opened, "sha256").hexdigest()]
    return digest(*parts)
