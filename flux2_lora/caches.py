"""A content-addressed store of tensors that heals itself.

Law: what `load` returns is, bit for bit, what `store` was given under that key. safetensors carries no checksum and
loads 98 % of single flipped bits silently, so each entry has its own; a damaged, truncated or foreign entry is deleted,
counted and made again. A key spells everything that the entry depends on: nothing is ever stale, only unused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2_lora.files import digest, tensors_digest, write_tensors

FORMAT = "1"
"""Part of each key; to be raised when the meaning of stored tensors changes."""


class TensorCache:
    """One kind of tensors ("latents", "text"), one file an entry: <folder>/<kind>/<key[:2]>/<key>.safetensors.

    Two runs may share a folder: entries are written atomically, and equal keys mean equal contents.
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
        path = self._path(key)
        try:
            return _verified(path, key)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError):
            path.unlink(missing_ok=True)
            self.healed += 1
            return None

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry atomically."""
        write_tensors(self._path(key), tensors, {"checksum": _checksum(key, tensors)})

    def fetch(self, parts: Sequence[str], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The entry of `parts` on the CPU, made and stored where it is not there yet."""
        key = self.key(*parts)
        found = self.load(key)
        if found is None:
            found = {name: tensor.detach().cpu() for name, tensor in make().items()}
            self.store(key, found)
        return found

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _verified(path: Path, key: str) -> dict[str, Tensor]:
    """Read an entry; raises SafetensorError or ValueError where it is not whole, or not the one of `key`."""
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata() or {}, file.keys()
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    if metadata.get("checksum") != _checksum(key, tensors):
        raise ValueError(f"{path} fails its checksum")
    return tensors


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Covers the key too, so that an entry renamed to another key is found out."""
    return digest(key, tensors_digest(tensors))
