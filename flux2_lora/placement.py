"""Which blocks of the frozen base stay on the device, where the others wait, and what brings them.

Law: the choice changes time and memory, and no number. Blocks are counted in the order of their run, double and single
ones as one sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from flux2_lora.copiers import AtOnce, Copier, OnStream, Staged
from flux2_lora.devices import host_bytes, pinned
from flux2_lora.errors import UserError
from flux2_lora.host import Host, InMemory, Packed
from flux2_lora.stream import Streamer

HOSTS = ("auto", "pinned", "staged", "disk")
MEMORY = "memory"
_MOST_OF_HOST = 0.8  # of what is free: text and picture caches, and the system, need some too


@dataclass(frozen=True, kw_only=True)
class Placement:
    """resident: numbers of the blocks that stay; slots: how many blocks the device holds of the others.

    host: pinned, staged (memory that is not pinned), memory (the one of the two that the system allows), disk, or auto;
    folder: of the disk's files.
    """

    resident: frozenset[int]
    slots: int
    host: str
    folder: Path

    def host_for(self, size: int, device: torch.device) -> str:
        """The host that `auto`, or `memory`, means for blocks of `size` bytes.

        Disk where memory does not hold them; not pinned where Windows allows but half of the memory to be.
        """
        if self.host not in ("auto", MEMORY):
            return self.host
        if self.host == "auto" and size > _MOST_OF_HOST * host_bytes():
            return "disk"
        most = psutil.virtual_memory().total / 2 if sys.platform == "win32" else size
        return "pinned" if device.type == "cuda" and size <= most else "staged"


def memory_host(kind: str, device: torch.device) -> InMemory:
    """Host memory for blocks: pinned for a CUDA device if so asked, plain for any other."""
    if kind == "pinned" and device.type == "cuda":
        return InMemory("pinned memory", _pinned)
    return InMemory("memory", _plain)


def streamer_on(
    device: torch.device, blocks: Sequence[nn.Module], layouts: Sequence[Packed], host: Host, slots: int, kind: str
) -> Streamer:
    """Stream blocks through so many slots. kind: of the host."""
    size = max(layout.size for layout in layouts)
    flats = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(slots, len(blocks)))]
    return Streamer(blocks, layouts, host, flats, _copier(host, flats, kind))


def _copier(host: Host, slots: Sequence[Tensor], kind: str) -> Copier:
    if slots[0].device.type == "cuda":
        return OnStream(host, slots) if kind == "pinned" else Staged(host, slots, _pinned)
    return AtOnce(host, slots, _plain(len(slots[0])) if kind == "disk" else None)


def _plain(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _pinned(size: int) -> Tensor:
    return pinned_as_asked(size, "memory.host=pinned", "set memory.host=staged, or disk; both need two blocks of it")


def pinned_as_asked(size: int, option: str, remedy: str) -> Tensor:
    """uint8 [size] that a CUDA device copies from by itself; UserError, naming the option, where the system refuses."""
    try:
        return pinned(size)
    except RuntimeError as error:
        raise UserError(
            f"{option}: the system does not pin {size / 1e9:.2f} GB more of host memory ({error})", remedy
        ) from error
