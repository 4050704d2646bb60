"""The laws of buckets and of the order of batches."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_lora.buckets import batches_between, batches_per_epoch, bucket_for, crop_loss, epoch_batches

SIDES = st.integers(1, 20_000)
RESOLUTIONS = st.integers(64, 1536)
STEPS = st.sampled_from([8, 16, 32, 64])
BUCKETS = st.lists(st.sampled_from([(512, 512), (384, 672), (672, 384)]), min_size=1, max_size=40)
SEEDS = st.integers(0, 2**63)


@given(SIDES, SIDES, RESOLUTIONS, STEPS)
def test_bucket_sides_are_multiples_of_the_step(width: int, height: int, resolution: int, step: int) -> None:
    rows, columns = bucket_for(width, height, resolution, step)
    assert rows % step == columns % step == 0
    assert min(rows, columns) >= step


@given(SIDES, SIDES, RESOLUTIONS, STEPS)
def test_bucket_area_is_at_most_the_target(width: int, height: int, resolution: int, step: int) -> None:
    rows, columns = bucket_for(width, height, resolution, step)
    assert rows * columns <= resolution**2


@given(SIDES, SIDES, RESOLUTIONS, STEPS)
def test_no_bucket_side_can_grow_within_the_target(width: int, height: int, resolution: int, step: int) -> None:
    rows, columns = bucket_for(width, height, resolution, step)
    area = (resolution // step * step) ** 2
    assert (rows + step) * columns > area
    assert rows * (columns + step) > area


@given(SIDES, SIDES, RESOLUTIONS, STEPS)
def test_no_bucket_is_longer_than_two_to_one(width: int, height: int, resolution: int, step: int) -> None:
    bucket = bucket_for(width, height, resolution, step)
    assert max(bucket) <= 2 * min(bucket)


@given(SIDES, SIDES, RESOLUTIONS, STEPS)
def test_a_transposed_picture_gets_the_transposed_bucket(width: int, height: int, resolution: int, step: int) -> None:
    assert bucket_for(height, width, resolution, step) == bucket_for(width, height, resolution, step)[::-1]


@given(SIDES, SIDES, st.integers(2, 9))
def test_a_bucket_depends_on_the_aspect_only(width: int, height: int, times: int) -> None:
    assert bucket_for(times * width, times * height, 512) == bucket_for(width, height, 512)


@given(SIDES, SIDES, SIDES, RESOLUTIONS)
def test_a_wider_picture_gets_no_narrower_bucket(width: int, more: int, height: int, resolution: int) -> None:
    narrow, wide = bucket_for(width, height, resolution), bucket_for(width + more, height, resolution)
    assert wide[1] / wide[0] >= narrow[1] / narrow[0]


@given(st.integers(8, 90), st.integers(8, 90))
def test_a_bucket_is_its_own_bucket(rows: int, columns: int) -> None:
    height, width = bucket_for(columns, rows, 1024)
    assert bucket_for(width, height, 1024) == (height, width)


def test_a_square_picture_gets_the_resolution() -> None:
    assert bucket_for(3000, 3000, 1024) == (1024, 1024)


def test_a_landscape_of_three_to_two_gets_its_known_bucket() -> None:
    assert bucket_for(3000, 2000, 1024) == (832, 1248)


def test_a_ribbon_of_one_pixel_gets_the_longest_bucket() -> None:
    assert bucket_for(20_000, 1, 1024) == (736, 1424)


def test_a_resolution_under_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than one step"):
        bucket_for(10, 10, 15, 16)


@given(SIDES, SIDES, RESOLUTIONS)
def test_pictures_up_to_two_to_one_lose_little_to_the_crop(width: int, height: int, resolution: int) -> None:
    loss = crop_loss(width, height, bucket_for(width, height, resolution))
    assert 0 <= loss < 1
    if max(width, height) <= 2 * min(width, height) and resolution >= 512:
        assert loss < 0.07  # half the gap between neighbours, and the last bucket's distance from 2:1


def test_crop_loss_is_the_part_of_the_area_cut_off() -> None:
    assert crop_loss(200, 100, (64, 64)) == pytest.approx(0.5)


@given(BUCKETS, st.integers(1, 7), SEEDS, st.integers(0, 1000))
def test_an_epoch_has_each_picture_once(buckets: list[tuple[int, int]], size: int, seed: int, epoch: int) -> None:
    indices = [index for batch in epoch_batches(buckets, size, seed, epoch) for index in batch]
    assert sorted(indices) == list(range(len(buckets)))


@given(BUCKETS, st.integers(1, 7), SEEDS)
def test_a_batch_has_one_bucket_only(buckets: list[tuple[int, int]], size: int, seed: int) -> None:
    assert all(len({buckets[index] for index in batch}) == 1 for batch in epoch_batches(buckets, size, seed, 0))


@given(BUCKETS, st.integers(1, 7), SEEDS)
def test_a_bucket_has_at_most_one_short_batch(buckets: list[tuple[int, int]], size: int, seed: int) -> None:
    batches = epoch_batches(buckets, size, seed, 0)
    short = Counter(buckets[batch[0]] for batch in batches if len(batch) < size)
    assert all(0 < len(batch) <= size for batch in batches)
    assert all(count == 1 for count in short.values())


@settings(max_examples=30)
@given(BUCKETS, st.integers(1, 7), SEEDS, st.integers(0, 40), st.integers(0, 40))
def test_steps_run_through_the_epochs_in_order(
    buckets: list[tuple[int, int]], size: int, seed: int, start: int, count: int
) -> None:
    last = 1 + (start + count) // batches_per_epoch(buckets, size)
    every = [(epoch, batch) for epoch in range(last) for batch in epoch_batches(buckets, size, seed, epoch)]
    assert list(batches_between(buckets, size, seed, start, start + count)) == every[start : start + count]


def test_epochs_and_seeds_give_other_orders() -> None:
    buckets = [(512, 512)] * 50
    orders = {str(epoch_batches(buckets, 1, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_of_a_seed_is_the_one_of_earlier_releases() -> None:
    assert epoch_batches([(64, 64)] * 5 + [(48, 80)] * 3, 2, 42, 1) == [[0, 2], [7], [3], [4, 1], [6, 5]]


def test_buckets_are_mixed_within_an_epoch() -> None:
    buckets = [(512, 512)] * 40 + [(384, 672)] * 40
    order = [buckets[batch[0]] for batch in epoch_batches(buckets, 2, 0, 0)]
    changes = sum(before != after for before, after in pairwise(order))
    assert changes > 8  # 1 when the buckets stand in blocks, 20 expected
