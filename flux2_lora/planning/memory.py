"""Memory of a training step by part, at the moment of its peak.

Law: what is alive at a moment is the sum of what the passes before it left behind; the peak is the largest such sum
and what the pass of that moment holds for itself. Blocks that keep their activations are the last ones: their backward
comes first, so none of them is left when the earlier blocks are recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from flux2_lora.planning.sketch import Block, Costs
from flux2_lora.stream import spread

_NUMBER = 4  # bytes of a LoRA number and of its gradient: both are float32
# Room that a caching allocator leaves between tensors, as a part of what the largest pass holds. Replayed steps leave
# 0.4 to 1.3 of it (tests/allocator.py); with expandable segments whole pages of it are moved before memory runs out.
_HOLES = 0.4


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What the optimizer holds: bytes of state for every LoRA number, its moving average included."""

    state_bytes: float = 8.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How memory is split: device slots that blocks are streamed through, blocks that stay, and blocks that keep all.

    resident blocks are spread evenly; plain blocks are the last ones; the others are recomputed in backward.
    """

    slots: int = 0
    resident: int = 0
    plain: int = 0

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


def moments(costs: Costs, plain: int) -> Iterator[Moment]:
    """The moments of a step that may be its peak: each pass of the forward and of the backward, and the update."""
    count, alive, gradients = len(costs.kinds), costs.stem.net, 0
    first_plain = count - plain
    for index in range(count):
        taken = costs.block(index).kept if index >= first_plain else costs.block(index).forward
        yield Moment(gradients=0, activations=alive, working=taken.peak)
        alive += taken.net
    yield Moment(gradients=0, activations=alive, working=costs.head.peak)
    alive += costs.head.net
    yield Moment(gradients=0, activations=alive, working=costs.turn.peak)
    alive += costs.turn.net
    for index in reversed(range(count)):
        block = costs.block(index)
        if index >= first_plain:
            yield Moment(gradients=gradients, activations=alive, working=block.backward.peak)
            alive -= block.kept.net
        else:
            yield Moment(gradients=gradients, activations=alive, working=_recomputed(block))
            alive -= block.forward.net
        gradients += _NUMBER * costs.adapted[index]
    # AdamW computes all its steps before it takes them.
    yield Moment(gradients=gradients, activations=0, working=_NUMBER * sum(costs.adapted))


def holes(costs: Costs) -> int:
    """Bytes between tensors that no tensor fits into."""
    return int(_HOLES * max(map(_recomputed, costs.blocks.values())))


def _recomputed(block: Block) -> int:
    """The most that a block holds while it is recomputed and differentiated."""
    return max(block.kept.peak, block.kept.net + block.backward.peak)


def vram(costs: Costs, layout: Layout, learning: Learning, context: int) -> Vram:
    """Memory of a training step under a layout."""
    most = max(moments(costs, layout.plain), key=lambda moment: moment.total)
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


def peaks_by_plain(costs: Costs) -> Sequence[int]:
    """The varying part of the peak for 0, 1, ... plain blocks."""
    return [max(moment.total for moment in moments(costs, plain)) for plain in range(len(costs.kinds) + 1)]
