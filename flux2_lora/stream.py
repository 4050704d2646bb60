"""The frozen blocks of a transformer streamed through a few slots of device memory, in the order of their use.

Law: streaming changes no number. A block computes only after its copy was waited for, and a slot is filled anew only
after all work on what it held was given to the device. Frozen weights never travel back. Each block asks for itself
just before it runs, forward, in the recomputation that backward asks for, or in sampling, and while it runs the blocks
that follow are on their way: up and down again in training (the last blocks stay for the turn), round and round in
sampling. In training n blocks and k slots make n - k copies a direction.

A block that keeps its activations runs under `kept`: what autograd would save of its slot is saved as a place in the
block, and asked for again when backward needs it. Small tensors (biases, norms, scales) and adapters never leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flux2_lora.copiers import Copier
from flux2_lora.devices import in_backward
from flux2_lora.host import Host, Leaf, Packed, frozen


class Phase(Enum):
    """What kind of pass a block is asked for in."""

    FORWARD = "forward, to be followed by backward"
    BACKWARD = "backward"
    SAMPLING = "forward only"


def phase() -> Phase:
    """The pass that this thread is in."""
    if in_backward():
        return Phase.BACKWARD
    return Phase.FORWARD if torch.is_grad_enabled() else Phase.SAMPLING


def use_order(block: int, blocks: int, passing: Phase) -> list[int]:
    """All of `blocks` in the order of their next use, from `block` on: backward descends, and a new forward follows."""
    below, above = range(block), range(block + 1, blocks)
    if passing is Phase.SAMPLING:
        return [block, *above, *below]
    if passing is Phase.FORWARD:
        return [block, *above, *reversed(below)]
    return [block, *reversed(below), *above]


def spread(count: int, blocks: int) -> frozenset[int]:
    """`count` of the numbers below `blocks`, as evenly as it goes; all of them where there are no more.

    Blocks that stay on the device, or are not recomputed, so lie between others.
    """
    if count >= blocks:
        return frozenset(range(blocks))
    return frozenset((2 * place + 1) * blocks // (2 * count) for place in range(count))


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A view into a block's slot as autograd keeps it: where it lies in the block, and not its bytes."""

    block: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


@dataclass(kw_only=True)
class _Block:
    """A streamed block: its weights' places, and the tensors that its modules compute with in each slot."""

    leaves: list[tuple[nn.Module, Leaf]]
    views: list[list[Tensor]] = field(default_factory=list)
    absent: list[Tensor] = field(default_factory=list)
    slot: int | None = None

    def bind(self, slot: int | None) -> None:
        """Let the modules compute with what is in a slot; without one their weights are on no device at all."""
        for (module, leaf), tensor in zip(self.leaves, self.absent if slot is None else self.views[slot], strict=True):
            setattr(module, leaf.attribute, tensor)
        self.slot = slot


class Streamer:
    """Blocks that share slots. The number of a block is its place among them, in the order of their run."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        layouts: Sequence[Packed],
        host: Host,
        slots: Sequence[Tensor],
        copier: Copier,
    ) -> None:
        """host, copier: number the blocks likewise. slots: uint8 on the device, each as large as the largest block."""
        self._host, self._slots, self._copier = host, slots, copier
        self._blocks = [_Block(leaves=_leaves(*pair)) for pair in zip(blocks, layouts, strict=True)]
        self._place_of = {module: n for n, block in enumerate(self._blocks) for module, _ in block.leaves}
        self._slot_of_storage = {slot.untyped_storage().data_ptr(): place for place, slot in enumerate(slots)}
        self._wanted = {p: [use_order(n, len(blocks), p)[: len(slots)] for n in range(len(blocks))] for p in Phase}
        self._held: list[int | None] = [None] * len(slots)
        self._arrived = [False] * len(slots)
        self._latest: tuple[int, Phase] | None = None
        for number, module in enumerate(blocks):
            self._see(number)
            module.register_forward_pre_hook(partial(self._before, number))

    @property
    def words(self) -> str:
        """ "55 blocks are streamed from pinned memory through 2 slots of 340.1 MB"."""
        slots = f"{len(self._slots)} slots of {len(self._slots[0]) / 1e6:.1f} MB"
        return f"{len(self._blocks)} blocks are streamed from {self._host.words} through {slots}"

    def need(self, number: int) -> None:
        """Let work given to the device from here on find the block in its modules, and begin the copies that follow.

        Called before the block runs, and when backward asks for what it kept of its weights.
        """
        asked = number, phase()
        if asked == self._latest:
            return
        self._latest, wanted = None, self._wanted[asked[1]][number]
        for one in wanted:
            if one not in self._held:
                self._fetch(one, wanted)
        slot = self._held.index(number)
        if not self._arrived[slot]:
            self._held[slot] = None  # a copy that failed is begun anew by who asks next
            self._copier.wait(slot)
            self._held[slot], self._arrived[slot] = number, True
            self._blocks[number].bind(slot)
        self._latest = asked

    def kept(self) -> AbstractContextManager[None]:
        """While active, autograd keeps places in blocks where it would keep views into slots."""
        return saved_tensors_hooks(self._pack, self._unpack)

    @contextmanager
    def opened(self, linear: nn.Module) -> Iterator[None]:
        """While active, a Linear has its weight, and what it is changed to is kept."""
        number = self._place_of.get(linear)
        if number is None:
            yield
            return
        self.need(number)
        yield
        self._keep(number, linear)

    def _before(self, number: int, *_: object) -> None:
        self.need(number)

    def _fetch(self, number: int, wanted: Sequence[int]) -> None:
        slot = next(place for place, held in enumerate(self._held) if held not in wanted)
        before = self._held[slot]
        self._held[slot], self._arrived[slot] = None, False  # what fails, or is interrupted, leaves an empty slot
        if before is not None:
            self._blocks[before].bind(None)
        self._copier.submit(slot, number)
        self._held[slot] = number

    def _see(self, number: int) -> None:
        """Make the tensors of a block in every slot once: a step makes none."""
        block = self._blocks[number]
        nowhere = torch.empty(max(len(slot) for slot in self._slots), dtype=torch.uint8, device="meta")
        *block.views, block.absent = [
            [frozen(leaf.attribute, leaf.view(flat)) for _, leaf in block.leaves] for flat in (*self._slots, nowhere)
        ]
        block.bind(block.slot)

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        slot = self._slot_of_storage.get(tensor.untyped_storage().data_ptr())
        held = None if slot is None else self._held[slot]
        if held is None:
            return tensor
        return _Kept(
            block=held,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            start=int(tensor.storage_offset()),
        )

    def _unpack(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.need(kept.block)
        flat = self._slots[self._held.index(kept.block)]
        return flat.view(kept.dtype).as_strided(kept.shape, kept.stride, kept.start)

    @torch.no_grad()
    def _keep(self, number: int, linear: nn.Module) -> None:
        """Write a weight back into the host's bytes, in whatever type of the same size it is now."""
        block = self._blocks[number]
        place = next(place for place, (module, _) in enumerate(block.leaves) if module is linear)
        leaf = block.leaves[place][1]
        changed = getattr(linear, leaf.attribute).detach()
        leaf = replace(leaf, dtype=changed.dtype)
        content = changed.contiguous().view(-1).view(torch.uint8)
        self._host.write(number, leaf.start, content)
        for slot in [self._slots[place] for place, held in enumerate(self._held) if held == number]:
            slot[leaf.start : leaf.start + leaf.size].copy_(content)
        block.leaves[place] = linear, leaf
        self._see(number)


def attach_streamer(transformer: nn.Module, streamer: Streamer) -> None:
    """Let `streamer_of` find it."""
    transformer.streamer = streamer  # type: ignore[assignment]


def streamer_of(transformer: nn.Module) -> Streamer | None:
    """What streams the transformer's blocks, if any are streamed."""
    return getattr(transformer, "streamer", None)


def opened(transformer: nn.Module, linear: nn.Module) -> AbstractContextManager[None]:
    """While active, a Linear of the transformer has its weight, and what it is changed to is kept; streamed or not."""
    streamer = streamer_of(transformer)
    return nullcontext() if streamer is None else streamer.opened(linear)


def _leaves(block: nn.Module, layout: Packed) -> list[tuple[nn.Module, Leaf]]:
    return [(block.get_submodule(leaf.path), leaf) for leaf in layout.leaves]
