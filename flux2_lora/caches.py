"""A content-addressed store of tensors that heals itself.

Law: what `load` returns is, bit for bit, what `store` was given under that key. safetensors carries no checksum and
loads 98 % of single flipped bits silently, so each entry has its own; a damaged, truncated or foreign entry is deleted,
counted and made again. A key spells everything that the entry depends on: nothing is ever stale, only unused.
"""

from __future__ import annotations

import json
import os
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from flux2_lora.files import digest, tensors_digest, write_tensors
from flux2_lora.options import option

FORMAT = "2"
"""Part of each key; to be raised when the meaning of stored tensors, or the code that makes them, changes."""

KINDS = ("latents", "texts")
IN_USE_S = 3600
"""Seconds: an entry used more recently than this may be another run's, and is not pruned."""


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """folder holds the caches, shared by all runs; entries beyond max_gb, or unused for max_days, are pruned."""

    folder: str
    max_gb: float | None = option(None, above=0)
    max_days: float | None = option(None, above=0)

    @property
    def place(self) -> Path:
        return Path(self.folder).expanduser()


class TensorCache:
    """One kind of tensors (of KINDS), one file an entry: <folder>/<kind>/<key[:2]>/<key>.safetensors.

    Runs and processes may share a folder: entries are written atomically, and equal keys mean equal contents. The time
    of access of an entry is that of its last use, whatever the file system does by itself.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder / kind
        self.kind = kind
        self.healed = 0
        """Damaged entries met and deleted so far."""

    def key(self, *parts: str) -> str:
        """32 hex digits for all that an entry depends on: content digests, sizes, the model, the number type."""
        return digest("flux2-lora cache", FORMAT, self.kind, *parts)

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors on the CPU, or None where it is absent or was damaged (and is now deleted)."""
        return self._read(key, whole=True)

    def has(self, key: str) -> bool:
        """Whether the entry is there, by its header alone: complete and of this key, its numbers not yet checked."""
        return self._read(key, whole=False) is not None

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry atomically; after a power cut it may be damaged, and heals."""
        metadata = {"key": key, "checksum": _checksum(key, tensors)}
        write_tensors(self.path(key), tensors, metadata, durable=False)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str, *, whole: bool) -> dict[str, Tensor] | None:
        path = self.path(key)
        try:
            tensors = _verified(path, key) if whole else _headed(path, key)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError):
            path.unlink(missing_ok=True)
            self.healed += 1
            return None
        with suppress(OSError):  # another run may have pruned it in this moment
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return tensors


@dataclass(frozen=True)
class Pruned:
    """What `prune` deleted."""

    entries: int
    size: int


class Held:
    """The entries that were used last, in memory up to `most_bytes`: reading and checking one again costs time."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.size = most_bytes, 0
        self._entries: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The entry, None where it is not held."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: str, entry: Mapping[str, Tensor]) -> None:
        """Hold an entry, and let go of those that were not used for longest."""
        if key in self._entries:
            return
        self._entries[key] = entry
        self.size += _bytes_of(entry)
        while self.size > self.most_bytes:
            self.size -= _bytes_of(self._entries.popitem(last=False)[1])


def _bytes_of(entry: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def prune(folder: Path, *, max_bytes: float | None, max_age_s: float | None, keep: Collection[Path] = ()) -> Pruned:
    """Delete entries unused for max_age_s, then the longest unused until at most max_bytes are left.

    Entries in `keep`, and those used within the last hour, stay, whatever the limits say. So do files that are no
    entries; what a killed process left half written goes.
    """
    now, kept = time.time(), {path.absolute() for path in keep}
    states = {
        path: state for kind in KINDS for path in folder.glob(f"{kind}/??/*") if (state := _state(path)) is not None
    }
    idle = {path: state for path, state in states.items() if now - state.st_atime > IN_USE_S}
    halves = [path for path in idle if path.name.startswith(".")]
    entries = sorted(
        (path for path in idle if path.suffix == ".safetensors" and path.absolute() not in kept),
        key=lambda path: idle[path].st_atime,
    )
    total = sum(state.st_size for state in states.values())
    gone: list[Path] = []
    for path in [*halves, *entries]:
        old = max_age_s is not None and now - idle[path].st_atime > max_age_s
        crowded = max_bytes is not None and total > max_bytes
        if old or crowded or path in halves:
            path.unlink(missing_ok=True)
            total -= idle[path].st_size
            gone.append(path)
    return Pruned(len(gone), sum(idle[path].st_size for path in gone))


def _state(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _headed(path: Path, key: str) -> dict[str, Tensor]:
    """No tensors; raises SafetensorError or ValueError unless the header is whole, its file as long, its key ours."""
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("key") != key:
            raise ValueError(f"{path} is another entry")
    return {}


def _verified(path: Path, key: str) -> dict[str, Tensor]:
    """Read an entry; raises SafetensorError or ValueError where it is not whole, or not the one of `key`.

    Read and not mapped: what was checked must not change when the file does.
    """
    raw = path.read_bytes()
    tensors = load(raw)
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    if metadata.get("checksum") != _checksum(key, tensors):
        raise ValueError(f"{path} fails its checksum")
    return tensors


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Covers the key too, so that an entry renamed to another key is found out."""
    return digest(key, tensors_digest(tensors))
