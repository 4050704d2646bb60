"""A caching allocator that replays a step event by event: the planner's judge, which shares no sum with it.

As PyTorch's CUDA allocator with expandable segments: sizes are rounded up to 512 bytes, the best fitting free range is
split, free neighbours join, tensors up to 1 MiB have a pool of their own, and memory is taken from the device in pages
of 2 MiB that are never given back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flux2_lora.planning.memory import Layout, Learning
from flux2_lora.planning.sketch import Costs, Pass

ROUNDING, SMALL, PAGE = 512, 1 << 20, 2 << 20
GRADIENT = 400 << 10  # bytes of a LoRA matrix of rank 16, or so


class Pool:
    """One range of addresses with holes. top: its end."""

    def __init__(self) -> None:
        self.holes: dict[int, int] = {}  # start -> size
        self.taken: dict[object, tuple[int, int]] = {}
        self.top = 0

    def take(self, key: object, size: int) -> None:
        fitting = [(room, start) for start, room in self.holes.items() if room >= size]
        if fitting:
            room, start = min(fitting)
            del self.holes[start]
            if room > size:
                self.holes[start + size] = room - size
        else:
            last = max(self.holes, default=-1)
            start = last if last >= 0 and last + self.holes[last] == self.top else self.top
            self.holes.pop(start, None)
            self.top = start + size
        self.taken[key] = (start, size)

    def give_back(self, key: object) -> int:
        start, size = freed = self.taken.pop(key)
        before = next((s for s, room in self.holes.items() if s + room == start), None)
        if before is not None:
            size += self.holes.pop(before)
            start = before
        size += self.holes.pop(start + size, 0)
        self.holes[start] = size
        return freed[1]


class Arena:
    """A pool for small tensors and one for large ones. most: bytes in tensors at their peak; reserved: holes too."""

    def __init__(self) -> None:
        self.small, self.large = Pool(), Pool()
        self.alive = self.most = 0

    @property
    def reserved(self) -> int:
        return sum(-(-pool.top // PAGE) * PAGE for pool in (self.small, self.large))

    @property
    def taken(self) -> dict[object, tuple[int, int]]:
        return self.small.taken | self.large.taken

    def take(self, key: object, size: int) -> None:
        size = -(-size // ROUNDING) * ROUNDING
        (self.small if size <= SMALL else self.large).take(key, size)
        self.alive += size
        self.most = max(self.most, self.alive)

    def give_back(self, key: object) -> None:
        self.alive -= (self.small if key in self.small.taken else self.large).give_back(key)


def replayed(costs: Costs, layout: Layout, learning: Learning, steps: int = 2) -> Arena:
    """The allocator after whole steps under a layout, context aside."""
    arena = Arena()
    count = len(costs.kinds)
    arena.take("outside", costs.outside_bytes)
    for index in range(count):
        block = costs.block(index)
        arena.take(("small", index), block.small_bytes)
        arena.take(("adapter", index), int((4 + learning.state_bytes) * costs.adapted[index]))
        if index in (layout.residents(count) if layout.resident else ()):
            arena.take(("resident", index), block.frozen_bytes)
    for slot in range(layout.slots):
        arena.take(("slot", slot), max(block.frozen_bytes for block in costs.blocks.values()))
    for _ in range(steps):
        _step(arena, costs, layout)
    return arena


def _step(arena: Arena, costs: Costs, layout: Layout) -> None:
    count = len(costs.kinds)
    plain = range(count - layout.plain, count)
    away = range(count - layout.plain if layout.inputs_on_host else 0)
    _play(arena, costs.stem, "stem")
    for index in range(count):
        if index in away:
            _clear(arena, [index - 2])  # the input of the block before: it has left by now
        block = costs.block(index)
        _play(arena, block.kept if index in plain else block.forward, index)
    _play(arena, costs.head, "head")
    _play(arena, costs.turn, "turn")
    for index in reversed(range(count)):
        block = costs.block(index)
        if index in plain:
            _play(arena, block.backward, index)
            _clear(arena, [index])
        else:
            if index in away:
                _clear(arena, [index - 1])  # the last input that was on its way
                for back in {index, max(index - 1, 0)}:
                    if ("input", back) not in arena.taken:
                        arena.take(("input", back), block.forward.net)
            _play(arena, block.kept, ("again", index))
            _play(arena, block.backward, ("again", index))
            _clear(arena, [index, ("again", index)])
            if index in away:
                arena.give_back(("input", index))
        for piece in range(0, 4 * costs.adapted[index], GRADIENT):
            arena.take(("gradient", index, piece), min(GRADIENT, 4 * costs.adapted[index] - piece))
    _clear(arena, ["stem", "head", "turn"])
    arena.take(("update", 0), 4 * sum(costs.adapted))
    _clear(arena, ["update", "gradient"])


def _play(arena: Arena, part: Pass, owner: object) -> None:
    """Take and give back in the order of the pass; what was taken by another owner is given back at its own end."""
    for number, size in part.events:
        key = (owner, number)
        if size > 0:
            arena.take(key, size)
        elif key in arena.small.taken or key in arena.large.taken:
            arena.give_back(key)


def _clear(arena: Arena, owners: Iterable[object]) -> None:
    gone = set(owners)
    for key in list(_owned(arena, gone)):
        arena.give_back(key)


def _owned(arena: Arena, owners: set[object]) -> Iterator[object]:
    for key in arena.taken:
        if isinstance(key, tuple) and key[0] in owners:
            yield key
