"""Memory of a training step by part, at the moment of its peak.

Law: what is alive at a moment is the sum of what the passes before it left behind; the peak is the largest such sum
and what the pass of that moment holds for itself. Blocks that keep their activations are the last ones: their backward
comes first, so none of them is left when the earlier blocks are recomputed. Where inputs of recomputed blocks wait in
host memory (`flux2_lora.offload`), the device has in forward that of the block which runs, and in backward that one's
and the one of the block that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from flux2_lora.planning.sketch import Block, Costs
from flux2_lora.stream import spread

_NUMBER = 4  # bytes of a LoRA number and of its gradient: both are float32
# Room that a caching allocator leaves between tensors, as a part of what the largest pass holds. Replayed steps leave
# 0.2 to 1.3 of it (tests/allocator.py); with expandable segments whole pages of it are moved before memory runs out.
_HOLES = 0.4


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What the optimizer holds: bytes of state for every LoRA number, its moving average included.

    graphs: forward passes that one backward goes through; accumulates: gradients of earlier batches are there.
    """

    state_bytes: float = 8.0
    graphs: int = 1
    accumulates: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How memory is split: device slots that blocks are streamed through, blocks that stay, and blocks that keep all.

    resident blocks are spread evenly; plain blocks are the last ones; the others are recomputed in backward.
    inputs_on_host: of those others, while they wait for backward.
    """

    slots: int = 0
    resident: int = 0
    plain: int = 0
    inputs_on_host: bool = False

    @property
    def host(self) -> str:
        """Where blocks lie that do not stay is left to the loader."""
        return "auto"

    @property
    def resident_blocks(self) -> int:
        return self.resident

    @property
    def plain_blocks(self) -> int:
        return self.plain

    def residents(self, blocks: int) -> frozenset[int]:
        """Which blocks stay."""
        return spread(self.resident, blocks)


@dataclass(frozen=True, kw_only=True)
class Vram:
    """Bytes on the device by part, as they are when their sum, `peak`, is largest.

    outside: what is in no block, and small tensors of all; adapter: LoRA, gradients, optimizer; activations: what is
    kept between blocks and by plain ones; working: what one pass holds meanwhile; holes: between tensors.
    """

    context: int
    outside: int
    slots: int
    resident: int
    adapter: int
    activations: int
    working: int
    holes: int

    @property
    def peak(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What varies during a step."""

    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.working


def frozen_bytes(costs: Costs, layout: Layout) -> tuple[int, int, int]:
    """Bytes of the base on the device: outside of what is streamed, in slots, in resident blocks."""
    count = len(costs.kinds)
    outside = costs.outside_bytes + sum(costs.block(index).small_bytes for index in range(count))
    largest = max(block.frozen_bytes for block in costs.blocks.values())
    return outside, layout.slots * largest, sum(costs.block(i).frozen_bytes for i in layout.residents(count))


def moments(costs: Costs, layout: Layout, learning: Learning | None = None) -> Iterator[Moment]:
    """The moments of a step that may be its peak: each pass of the forward and of the backward, and the update.

    Backward takes the latest graph first, while those before it wait.
    """
    learning, whole = learning or Learning(), _NUMBER * sum(costs.adapted)
    for graph in reversed(range(learning.graphs)):
        latest = graph + 1 == learning.graphs
        there = whole if learning.accumulates or not latest else 0
        yield from _of_one_graph(costs, layout, there, graph * _left_for_backward(costs, layout))
    # AdamW computes all its steps before it takes them.
    yield Moment(gradients=whole, activations=0, working=whole)


def _of_one_graph(costs: Costs, layout: Layout, gradients: int, before: int) -> Iterator[Moment]:
    """before: bytes of other graphs; gradients: of the adapters, that are there from the start."""
    count, whole = len(costs.kinds), _NUMBER * sum(costs.adapted)
    accumulated, first_plain, alive = gradients == whole, count - layout.plain, before + costs.stem.net
    for index in range(count):
        block = costs.block(index)
        taken = block.kept if index >= first_plain else block.forward
        yield Moment(gradients=gradients, activations=alive, working=taken.peak)
        alive += taken.net - _given_up(costs, layout, index)
    yield Moment(gradients=gradients, activations=alive, working=costs.head.peak)
    alive += costs.head.net
    yield Moment(gradients=gradients, activations=alive, working=costs.turn.peak)
    alive += costs.turn.net
    for index in reversed(range(count)):
        block = costs.block(index)
        if index >= first_plain:
            yield Moment(gradients=gradients, activations=alive, working=block.backward.peak)
            alive -= block.kept.net
        else:
            back = min(index + 1, 2) * block.forward.net if layout.inputs_on_host else 0
            yield Moment(gradients=gradients, activations=alive + back, working=_recomputed(block))
            if not layout.inputs_on_host:
                alive -= block.forward.net
            elif index + 1 == first_plain:
                alive -= min(index + 1, 2) * block.forward.net  # its output, and its input, which was on its way
        gradients += 0 if accumulated else _NUMBER * costs.adapted[index]


def _given_up(costs: Costs, layout: Layout, index: int) -> int:
    """Bytes of a block's input that are given up when the next block begins; the first one's count as the stem's.

    The input of the last recomputed block is given up when backward begins.
    """
    leaves = layout.inputs_on_host and 0 < index < len(costs.kinds) - layout.plain - 1
    return costs.block(index - 1).forward.net if leaves else 0


def _left_for_backward(costs: Costs, layout: Layout) -> int:
    """Bytes that a forward pass leaves on the device."""
    count = len(costs.kinds)
    blocks = [costs.block(i).kept if i >= count - layout.plain else costs.block(i).forward for i in range(count)]
    given_up = sum(_given_up(costs, layout, index) for index in range(count))
    return costs.stem.net + sum(block.net for block in blocks) + costs.head.net - given_up


def input_bytes(costs: Costs, layout: Layout) -> int:
    """Bytes of host memory for the inputs of recomputed blocks, of one graph."""
    recomputed = range(len(costs.kinds) - layout.plain) if layout.inputs_on_host else ()
    return sum(costs.block(index).forward.net for index in recomputed)


def holes(costs: Costs) -> int:
    """Bytes between tensors that no tensor fits into."""
    return int(_HOLES * max(map(_recomputed, costs.blocks.values())))


def _recomputed(block: Block) -> int:
    """The most that a block holds while it is recomputed and differentiated."""
    return max(block.kept.peak, block.kept.net + block.backward.peak)


def vram(costs: Costs, layout: Layout, learning: Learning, context: int) -> Vram:
    """Memory of a training step under a layout."""
    most = max(moments(costs, layout, learning), key=lambda moment: moment.total)
    outside, slots, resident = frozen_bytes(costs, layout)
    return Vram(
        context=context,
        outside=outside,
        slots=slots,
        resident=resident,
        adapter=int((_NUMBER + learning.state_bytes) * sum(costs.adapted)) + most.gradients,
        activations=most.activations,
        working=most.working,
        holes=holes(costs),
    )


def drawing_bytes(costs: Costs, layout: Layout, context: int) -> int:
    """Memory of a forward pass without gradients, adapters aside."""
    working = max(block.forward.peak for block in costs.blocks.values())
    return context + sum(frozen_bytes(costs, layout)) + costs.stem.net + int((1 + _HOLES) * working)


def peaks_by_plain(costs: Costs, layout: Layout | None = None, learning: Learning | None = None) -> Sequence[int]:
    """The varying part of the peak for 0, 1, ... plain blocks of a layout."""
    layouts = [replace(layout or Layout(), plain=plain) for plain in range(len(costs.kinds) + 1)]
    return [max(moment.total for moment in moments(costs, one, learning)) for one in layouts]
