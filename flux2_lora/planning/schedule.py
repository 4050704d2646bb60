"""Seconds of a pass over the blocks, copies beside computation.

Law: computation goes through the uses of the blocks in order; the copier brings the next blocks that are missing, in
the order of their use, into slots whose block is not among the next ones. A block's use waits for its copy, a copy for
its slot, and nothing else waits. At the turn from forward to backward, and from a step to the next, the blocks that are
in slots are the next ones, so they are not copied again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice

Use = tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """Seconds of one block: forward alone, backward (with the second forward where it is recomputed), and its copy."""

    forward_s: float
    backward_s: float
    copy_s: float


def training_uses(blocks: Sequence[BlockTimes]) -> list[Use]:
    """(block, seconds) of a step in order: forward, then backward from the last."""
    forward = [(index, block.forward_s) for index, block in enumerate(blocks)]
    backward = [(index, block.backward_s) for index, block in enumerate(blocks)]
    return forward + backward[::-1]


def drawing_uses(blocks: Sequence[BlockTimes]) -> list[Use]:
    """(block, seconds) of a forward pass without gradients."""
    return [(index, block.forward_s) for index, block in enumerate(blocks)]


def seconds(uses: Sequence[Use], copies_s: Sequence[float], resident: Collection[int], slots: int) -> float:
    """Seconds that `uses` take when they are repeated for long. copies_s: of every block; slots: 0 streams nothing."""
    if slots == 0:
        return sum(taken for _, taken in uses)
    rounds = 3
    order = list(uses) * rounds
    upcoming = _upcoming([block for block, _ in order], resident, slots)
    ready: dict[int, float] = {}
    clock = copier = 0.0
    ends = []
    for place, (block, taken) in enumerate(order):
        wanted = upcoming[place]
        for one in wanted:
            if one not in ready:
                if len(ready) == slots:
                    del ready[next(held for held in ready if held not in wanted)]
                copier = max(copier, clock) + copies_s[one]
                ready[one] = copier
        clock = max(clock, ready.get(block, 0.0)) + taken
        if (place + 1) % len(uses) == 0:
            ends.append(clock)
    return ends[-1] - ends[-2]


def _upcoming(order: Sequence[int], resident: Collection[int], slots: int) -> list[tuple[int, ...]]:
    """At each place, the next `slots` different streamed blocks."""
    found: list[tuple[int, ...]] = []
    following: dict[int, None] = {}
    for block in reversed(order):
        if block not in resident:
            following = {block: None, **{other: None for other in following if other != block}}
            following = dict.fromkeys(islice(following, slots))
        found.append(tuple(following))
    return found[::-1]
