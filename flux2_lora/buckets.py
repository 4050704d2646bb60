"""Aspect-ratio buckets, and the order in which pictures are trained.

Law: everything here is a pure function of its arguments. A bucket depends on a picture's aspect only, so a landscape
and its transposed portrait get transposed buckets; a batch depends on (seed, step) only, so a resumed run sees what an
uninterrupted one would have seen, without carrying any sampler state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import torch

from flux2_lora.files import digest

LONGEST = 2
"""Long side over short side, at most: past 2:1 the model composes badly and a picture is cropped instead."""


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


def assign(sizes: Sequence[tuple[int, int]], resolution: int, step: int = 16) -> list[tuple[int, int]]:
    """The bucket (height, width) of each picture size (width, height), in order."""
    return [bucket_for(width, height, resolution, step) for width, height in sizes]


def crop_loss(width: int, height: int, bucket: tuple[int, int]) -> float:
    """The part of the picture's area, in [0, 1), that a centre crop to the bucket's aspect cuts off."""
    ratio = (width * bucket[0]) / (height * bucket[1])
    return 1 - min(ratio, 1 / ratio)


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


def batch_at(buckets: Sequence[tuple[int, int]], batch_size: int, seed: int, step: int) -> list[int]:
    """The batch of a global step (from 0), running over epochs. `buckets` must not be empty."""
    epoch, position = divmod(step, batches_per_epoch(buckets, batch_size))
    return epoch_batches(buckets, batch_size, seed, epoch)[position]


def batches_per_epoch(buckets: Sequence[tuple[int, int]], batch_size: int) -> int:
    """The same number for each epoch: a bucket of n pictures gives ceil(n / batch_size) batches."""
    return sum(-(-buckets.count(bucket) // batch_size) for bucket in set(buckets))
