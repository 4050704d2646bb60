"""Aspect-ratio buckets, and the order in which pictures are trained.

Law: everything here is a pure function of its arguments. A bucket depends on a picture's aspect only, so a landscape
and its transposed portrait get transposed buckets; a batch depends on (seed, step) only, so a resumed run sees what an
uninterrupted one would have seen, without carrying any sampler state.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache, lru_cache

import torch

from flux2_lora.files import digest

LONGEST = 2
"""Long side over short side, at most: past 2:1 the model composes badly and a picture is cropped instead."""


@lru_cache(maxsize=65536)
def bucket_for(width: int, height: int, resolution: int, step: int = 16) -> tuple[int, int]:
    """The (height, width) in px whose aspect is nearest to the picture's.

    Sides are multiples of `step` (16 px = one token), the area is at most resolution^2 and maximal, the aspect at
    most 2:1. Nearest is meant in the ratio of the aspects; a tie goes to the larger area, then to the squarer bucket.
    """

    def distance(blocks: tuple[int, int]) -> tuple[Fraction, int, int]:
        rows, columns = blocks
        ratio = Fraction(width * rows, height * columns)
        return max(ratio, 1 / ratio), -rows * columns, max(blocks)

    rows, columns = min(_shapes(resolution // step), key=distance)
    return rows * step, columns * step


def bucket_within(width: int, height: int, resolution: int, step: int, max_upscale: float) -> tuple[int, int] | None:
    """`bucket_for`, at the highest resolution at which the picture is enlarged at most `max_upscale` times.

    None where even the bucket of one step would enlarge it more.
    """
    side = resolution // step
    while side > 0:
        bucket = bucket_for(width, height, side * step, step)
        enlarged = upscale(width, height, bucket)
        if enlarged <= max_upscale:
            return bucket
        side = min(side - 1, math.ceil(side * max_upscale / enlarged) + 1)  # near the answer, never past it
    return None


def upscale(width: int, height: int, bucket: tuple[int, int]) -> float:
    """How many times the picture's sides are enlarged to fill the bucket; below 1 where they shrink."""
    return max(bucket[0] / height, bucket[1] / width)


@cache
def _shapes(side: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns), in blocks, of at most side^2 blocks that no further row or column fits into.

    The square is always among them, and with each shape its transposed one.
    """
    if side < 1:
        raise ValueError("the resolution is smaller than one step")
    area = side * side
    fits = [(rows, area // rows) for rows in range(1, area + 1)]
    maximal = [(rows, columns) for rows, columns in fits if (rows + 1) * columns > area]
    return tuple(shape for shape in maximal if max(shape) <= LONGEST * min(shape))


def crop_loss(width: int, height: int, bucket: tuple[int, int]) -> float:
    """The part of the picture's area, in [0, 1), that a centre crop to the bucket's aspect cuts off."""
    ratio = (width * bucket[0]) / (height * bucket[1])
    return 1 - min(ratio, 1 / ratio)


def covered(size: tuple[int, int], bucket: tuple[int, int], centering: tuple[float, float]) -> tuple[float, ...]:
    """left, top, right, bottom, as parts of the sides, of what a crop to the bucket's aspect shows of a picture.

    size: (width, height); centering: (x, y) in [0, 1], where the crop lies in what is cut off; 0 is left and top.
    """
    wide, high = _shown(size, bucket)
    left, top = (1 - wide) * centering[0], (1 - high) * centering[1]
    return left, top, left + wide, top + high


def centering_on(point: tuple[float, float], size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float]:
    """The centering whose crop has `point`, (x, y) as parts of the sides, in its middle or as near to it as it can."""
    return tuple(  # type: ignore[return-value]
        min(max((at - part / 2) / (1 - part), 0), 1) if part < 1 else 0.5
        for at, part in zip(point, _shown(size, bucket), strict=True)
    )


def _shown(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float]:
    """Parts of the width and of the height that are not cut off."""
    ratio = (size[0] * bucket[0]) / (size[1] * bucket[1])
    return min(1, 1 / ratio), min(1, ratio)


def epoch_batches(buckets: Sequence[tuple[int, int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: each index once, each batch of one bucket, both orders shuffled.

    buckets[i] is the bucket of picture i. The last batch of a bucket may be short: no picture is dropped or repeated.
    """
    generator = torch.Generator().manual_seed(int(digest("epoch order", str(seed), str(epoch))[:15], 16))
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in _shuffled(len(buckets), generator):
        members[buckets[index]].append(index)
    batches = [
        members[bucket][start : start + batch_size]
        for bucket in sorted(members)
        for start in range(0, len(members[bucket]), batch_size)
    ]
    return [batches[position] for position in _shuffled(len(batches), generator)]


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    return [int(index) for index in torch.randperm(count, generator=generator)]


def batches_between(
    buckets: Sequence[tuple[int, int]], batch_size: int, seed: int, start: int, stop: int
) -> Iterator[tuple[int, list[int]]]:
    """(epoch, batch) of the global steps from `start` up to `stop`, running over epochs. `buckets` is not empty."""
    per_epoch = batches_per_epoch(buckets, batch_size)
    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        order = epoch_batches(buckets, batch_size, seed, epoch)
        first = epoch * per_epoch
        yield from ((epoch, batch) for batch in order[max(start - first, 0) : stop - first])


def batches_per_epoch(buckets: Sequence[tuple[int, int]], batch_size: int) -> int:
    """The same number for each epoch: a bucket of n pictures gives ceil(n / batch_size) batches."""
    return sum(-(-count // batch_size) for count in Counter(buckets).values())
