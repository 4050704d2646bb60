"""What is traded for memory and speed: where frozen blocks lie, which keep their activations, and compilation."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flux2_lora.networks.transformers import blocks_in
from flux2_lora.offload import Offload, OnStream
from flux2_lora.options import option
from flux2_lora.placement import HOSTS, Placement, pinned_as_asked
from flux2_lora.stream import spread, streamer_of

_SLOTS = 2  # one that computes, one that is filled


class Choice(Protocol):
    """Numbers that were chosen for a model and a device."""

    @property
    def resident_blocks(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def plain_blocks(self) -> int: ...

    @property
    def inputs_on_host(self) -> bool: ...

    @property
    def host(self) -> str:
        """Where streamed blocks lie, as `Placement` names it."""


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """resident_blocks: blocks whose frozen weights stay on the device; the others are streamed through `slots` buffers.

    plain_blocks: blocks that keep their activations for backward; the others are computed again there. More than the
    model has means all. Where null, a choice made for the device counts, and without one all weights stay and all
    blocks are computed again but on a CPU. block_inputs: where the inputs of blocks that are computed again wait for
    backward: on the device, or in pinned host memory; auto is the device where nothing else was chosen. host: where
    streamed weights wait: pinned memory, staged (memory that is not pinned, and two pinned buffers), or a file in
    `folder`. compile: torch.compile of every block; its first steps take minutes, and it needs a compiler that PyTorch
    can use.
    """

    resident_blocks: int | None = option(None, at_least=0)
    slots: int | None = option(None, at_least=1)
    plain_blocks: int | None = option(None, at_least=0)
    block_inputs: str = option("auto", one_of=("auto", "device", "host"))
    host: str = option("auto", one_of=HOSTS)
    folder: str = "outputs/cache/blocks"
    compile: bool = False

    def placement(self, blocks: int, choice: Choice | None = None) -> Placement | None:
        """Where the frozen weights of so many blocks lie; None for all of them on the device."""
        resident = _first(self.resident_blocks, choice.resident_blocks if choice else None, blocks)
        if resident >= blocks:
            return None
        return Placement(
            resident=spread(resident, blocks),
            slots=_first(self.slots, choice.slots if choice else None, _SLOTS),
            host=choice.host if self.host == "auto" and choice else self.host,
            folder=Path(self.folder),
        )

    def plain(self, blocks: int, device: torch.device, choice: Choice | None = None) -> frozenset[int]:
        """Numbers of the blocks that keep their activations: the last ones, whose backward comes first.

        What they keep is gone when earlier blocks are computed again, and need room for that.
        """
        usual = blocks if device.type == "cpu" else 0
        count = min(_first(self.plain_blocks, choice.plain_blocks if choice else None, usual), blocks)
        return frozenset(range(blocks - count, blocks))

    def inputs_leave(self, device: torch.device, choice: Choice | None = None) -> bool:
        """Whether inputs wait in host memory; never where a device shares it."""
        chosen = choice is not None and choice.inputs_on_host
        return device.type == "cuda" and (chosen if self.block_inputs == "auto" else self.block_inputs == "host")

    def offload(self, device: torch.device, choice: Choice | None = None) -> Offload | None:
        """What takes inputs to host memory; None where they stay on the device."""
        allocate = partial(pinned_as_asked, option="memory.block_inputs=host", remedy="set memory.block_inputs=device")
        return Offload(OnStream(device), allocate) if self.inputs_leave(device, choice) else None


def recompute_blocks(transformer: nn.Module, plain: Collection[int], offload: Offload | None = None) -> None:
    """Let every block be computed again in backward, but those whose numbers are in `plain`.

    offload: what takes the inputs of the others to host memory meanwhile.
    """
    blocks, streamer = list(blocks_in(transformer).values()), streamer_of(transformer)
    kept = {blocks[number] for number in plain}
    if streamer is None and len(kept) == len(blocks):
        transformer.disable_gradient_checkpointing()  # type: ignore[operator]
        return

    def run(block: nn.Module, *inputs: Any) -> Any:
        if block not in kept:
            with nullcontext() if offload is None else offload.inputs():
                return checkpoint(block, *inputs, use_reentrant=False)
        if streamer is None:
            return block(*inputs)
        with streamer.kept():
            return block(*inputs)

    transformer.enable_gradient_checkpointing(run)  # type: ignore[operator]


def compile_blocks(transformer: nn.Module, backend: str = "inductor", *, fullgraph: bool = False) -> None:
    """Compile the forward of every block; blocks of one kind share the compiled code.

    Frozen Linears keep their bytes in the graph: nothing that autograd saves is as wide as W. What asks for a streamed
    block's weights before it runs stays outside.
    """
    for block in blocks_in(transformer).values():
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=fullgraph)


def _first(*numbers: int | None) -> int:
    """The first number that was given."""
    return next(number for number in numbers if number is not None)
