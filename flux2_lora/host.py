"""Where the frozen weights of blocks lie while the device does not hold them: in host memory, or in a file.

Law: a block is one flat run of bytes with each weight at a multiple of 256, so that one copy moves all of it and every
view into the copy is aligned as kernels ask. Bytes go in and come out as they are. The file is keyed by the content of
what it was made from and gets its name by a rename: it is whole, and never stale; what was cut short since is made
again. Reading it takes memory of the reader's own, so that a model of any size needs no more of the host than its
largest block.
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import IO, Protocol, cast

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux2_lora.errors import RunError
from flux2_lora.files import room_for, sync_folder, write_tensors

_ALIGNED, _PAGE = 256, 4096
_BYTES, _SCALES = "blocks.bin", "scales.safetensors"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One weight inside a block: `attribute` of the module at `path` below it, at byte `start`."""

    path: str
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def view(self, flat: Tensor) -> Tensor:
        """The weight inside the block's bytes, on their device."""
        return flat[self.start : self.start + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How the weights of one block lie in its bytes. size: of the whole, in bytes."""

    leaves: tuple[Leaf, ...]
    size: int

    def fill(self, flat: Tensor, block: nn.Module) -> Tensor:
        """Copy a block's weights into `flat`, wherever both lie; returns it cut to the block's size."""
        for leaf in self.leaves:
            leaf.view(flat).copy_(getattr(block.get_submodule(leaf.path), leaf.attribute))
        return flat[: self.size]

    def bind(self, block: nn.Module, flat: Tensor) -> None:
        """Let the block compute with the weights in `flat`."""
        for leaf in self.leaves:
            setattr(block.get_submodule(leaf.path), leaf.attribute, frozen(leaf.attribute, leaf.view(flat)))


class Host(Protocol):
    """Keeps the bytes of blocks, by number. words: what it is, for people."""

    @property
    def words(self) -> str: ...

    def read(self, block: int, into: Tensor) -> int:
        """Copy a block's bytes to the front of `into`, which is host memory; returns how many there are."""

    def write(self, block: int, start: int, content: Tensor) -> None:
        """Replace some bytes of a block by `content`, uint8 [n] on any device."""


def pack(block: nn.Module) -> Packed:
    """The layout of a block's frozen Linears: their stored bytes where they are quantised, their weights elsewhere."""
    leaves, start = [], 0
    for path, module in block.named_modules():
        attribute = "values" if hasattr(module, "values") else "weight"
        weight = getattr(module, attribute, None)
        if isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.requires_grad:
            leaf = Leaf(path=path, attribute=attribute, shape=tuple(weight.shape), dtype=weight.dtype, start=start)
            leaves.append(leaf)
            start += -(-leaf.size // _ALIGNED) * _ALIGNED
    return Packed(leaves=tuple(leaves), size=start)


def frozen(attribute: str, weight: Tensor) -> Tensor:
    """A tensor as a module takes it: quantised values as they are, a weight as a parameter without gradient."""
    return nn.Parameter(weight, requires_grad=False) if attribute == "weight" else weight


class InMemory:
    """Blocks in host memory, one buffer each. `read` also fills memory of a device, and does not wait for it."""

    def __init__(self, words: str, allocate: Callable[[int], Tensor]) -> None:
        """allocate: size -> uint8 [size], pinned or not."""
        self.words, self._allocate = words, allocate
        self._flat: dict[int, Tensor] = {}

    def add(self, number: int, block: nn.Module, packed: Packed) -> None:
        """Take a copy of a block's weights."""
        self._flat[number] = packed.fill(self._allocate(packed.size), block)

    def read(self, block: int, into: Tensor) -> int:
        flat = self._flat[block]
        into[: len(flat)].copy_(flat, non_blocking=True)
        return len(flat)

    def write(self, block: int, start: int, content: Tensor) -> None:
        self._flat[block][start : start + len(content)].copy_(content)


class OnDisk:
    """Blocks in the file that `written` made. What `write` changes goes to a file of this object's own."""

    def __init__(self, folder: Path) -> None:
        with safe_open(folder / _SCALES, framework="pt") as file:
            told = json.loads(file.metadata()["blocks"])
            self.scales = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        self.blocks = [_packed(block) for block in told]
        starts = _starts(self.blocks)
        self.words = str(folder / _BYTES)
        self._original = (folder / _BYTES).open("rb", buffering=0)
        self._places: dict[int, tuple[IO[bytes], int]] = {i: (self._original, at) for i, at in enumerate(starts)}
        self._changed: IO[bytes] | None = None
        self._folder, self._lock = folder, Lock()  # a copier reads ahead in a thread of its own
        weakref.finalize(self, self._original.close)

    def read(self, block: int, into: Tensor) -> int:
        """RunError where the disk fails."""
        size = self.blocks[block].size
        try:
            with self._lock:
                file, start = self._places[block]
                _fill_from(file, start, into[:size])
        except OSError as error:
            raise RunError(
                f"memory.host=disk: {self.words} cannot be read ({error})",
                "check the disk and run the same command again; what is not whole is then made again",
            ) from error
        return size

    def write(self, block: int, start: int, content: Tensor) -> None:
        size = self.blocks[block].size
        if self._changed is None:
            self._changed = TemporaryFile(dir=self._folder.parent, buffering=0)  # noqa: SIM115 - closed with its owner
            weakref.finalize(self, self._changed.close)
        whole = torch.empty(size, dtype=torch.uint8)
        self.read(block, whole)
        whole[start : start + len(content)].copy_(content)
        with self._lock, room_for(self._folder, size):
            if self._places[block][0] is not self._changed:
                self._places[block] = (self._changed, self._changed.seek(0, os.SEEK_END))
            _write_at(self._changed, self._places[block][1], whole)

    def renumber(self, blocks: Sequence[int]) -> None:
        """Count these blocks from 0 on, and no others."""
        self._places = {new: self._places[old] for new, old in enumerate(blocks)}
        self.blocks = [self.blocks[old] for old in blocks]


def written(folder: Path, key: str, blocks: Callable[[], Iterator[nn.Module]]) -> OnDisk:
    """The file of `key`, made of `blocks` if it is not there, one block in memory at a time.

    RunError where the disk is full. Processes that want the same file wait for the one that writes it.
    """
    place, part = folder / key, folder / f".{key}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{key}.lock"):
        if not _is_whole(place):
            for left in (place, part):  # by who cut it short, or by a killed process
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir()
            try:
                _write_blocks(part, blocks())
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)  # a full disk is not to stay full
                raise
            os.replace(part, place)
            sync_folder(folder)
    return OnDisk(place)


def _is_whole(folder: Path) -> bool:
    """Whether a folder has all that `OnDisk` asks of it."""
    try:
        blocks = OnDisk(folder).blocks
        return (folder / _BYTES).stat().st_size == _starts(blocks)[-1] + blocks[-1].size
    except (OSError, SafetensorError):
        return False


def _write_blocks(folder: Path, blocks: Iterator[nn.Module]) -> None:
    layouts: list[Packed] = []
    scales: dict[str, Tensor] = {}
    with (folder / _BYTES).open("wb", buffering=0) as file:
        for number, block in enumerate(blocks):
            packed = pack(block)
            flat = packed.fill(torch.empty(packed.size, dtype=torch.uint8), block)
            layouts.append(packed)
            with room_for(folder / _BYTES, packed.size):
                _write_at(file, _starts(layouts)[-1], flat)
            scales |= {f"{number}.{path}": scale for path, scale in block.named_buffers() if path.endswith("scale")}
        os.fsync(file.fileno())
    told = [{**asdict(packed), "leaves": [_told(leaf) for leaf in packed.leaves]} for packed in layouts]
    write_tensors(folder / _SCALES, scales, {"blocks": json.dumps(told)})


def _starts(blocks: Sequence[Packed]) -> list[int]:
    """Where each block begins in the file, at whole pages."""
    starts = [0]
    for packed in blocks:
        starts.append(starts[-1] + -(-packed.size // _PAGE) * _PAGE)
    return starts[: len(blocks)]


def _told(leaf: Leaf) -> dict[str, object]:
    return {**asdict(leaf), "dtype": str(leaf.dtype).removeprefix("torch.")}


def _packed(told: dict[str, object]) -> Packed:
    leaves = [Leaf(**leaf) for leaf in cast("list[dict[str, object]]", told["leaves"])]  # type: ignore[arg-type]
    typed = [replace(leaf, shape=tuple(leaf.shape), dtype=getattr(torch, str(leaf.dtype))) for leaf in leaves]
    return Packed(leaves=tuple(typed), size=cast("int", told["size"]))


def _fill_from(file: IO[bytes], start: int, into: Tensor) -> None:
    """Read as many bytes as `into` has; systems hand out less than 2 GiB at once."""
    view = _bytes(into)
    file.seek(start)
    while view:
        view = view[file.readinto(view) or _end(file) :]  # type: ignore[attr-defined]


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _end(file: IO[bytes]) -> int:
    raise OSError(f"{file.name} ends before its last block")


def _write_at(file: IO[bytes], start: int, flat: Tensor) -> None:
    view = _bytes(flat)
    file.seek(start)
    while view:
        view = view[file.write(view) :]
