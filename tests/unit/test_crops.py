"""Where crops lie: a function of picture, mask, options and seed, and never past the picture's edge."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2_lora.buckets import bucket_for, bucket_within, centering_on, covered, upscale
from flux2_lora.dataset.crops import Box, Crop, buckets_of, crops_of

SIDES = st.integers(1, 5_000)
SIZES = st.tuples(SIDES, SIDES)
BUCKETS = st.sampled_from([(64, 64), (48, 80), (80, 48), (512, 1024)])
PARTS = st.floats(0, 1)


def crops(size: tuple[int, int] = (300, 100), mask: Box | None = None, **options: object) -> tuple[Crop, ...]:
    how = {"how": "center", "variants": 1, "flip": False, "key": "a", "seed": 0, **options}
    return crops_of(size, (64, 64), mask=mask, **how)  # type: ignore[arg-type]


@given(SIZES, st.integers(16, 512), st.sampled_from([1.0, 1.5, 4.0]))
def test_no_picture_is_enlarged_beyond_the_factor(size: tuple[int, int], resolution: int, most: float) -> None:
    bucket = bucket_within(*size, resolution, 16, most)
    if bucket is None:
        assert upscale(*size, bucket_for(*size, 16)) > most
    else:
        assert upscale(*size, bucket) <= most


@given(SIZES, st.integers(32, 256))
def test_no_higher_resolution_would_do(size: tuple[int, int], resolution: int) -> None:
    found = bucket_within(*size, resolution, 16, 1.5)
    sides = [side for side in range(16, resolution + 1, 16) if upscale(*size, bucket_for(*size, side)) <= 1.5]
    assert found == (bucket_for(*size, sides[-1]) if sides else None)


def test_a_large_picture_keeps_its_bucket() -> None:
    assert bucket_within(3000, 2000, 1024, 16, 1.0) == bucket_for(3000, 2000, 1024)


def test_resolutions_that_come_to_the_same_count_once() -> None:
    assert buckets_of(100, 100, [512, 768, 1024], 16, 1.0) == ((96, 96),)


@given(SIZES, BUCKETS, PARTS, PARTS)
def test_a_crop_lies_within_its_picture_and_has_the_buckets_aspect(
    size: tuple[int, int], bucket: tuple[int, int], x: float, y: float
) -> None:
    left, top, right, bottom = covered(size, bucket, (x, y))
    assert -1e-9 <= left < right <= 1 + 1e-9
    assert -1e-9 <= top < bottom <= 1 + 1e-9
    aspect = (right - left) * size[0] / ((bottom - top) * size[1])
    assert aspect == pytest.approx(bucket[1] / bucket[0], rel=1e-6)
    assert max(right - left, bottom - top) == pytest.approx(1)


@given(SIZES, BUCKETS, PARTS, PARTS)
def test_a_crop_on_a_point_shows_it_and_has_it_as_near_its_middle_as_can_be(
    size: tuple[int, int], bucket: tuple[int, int], x: float, y: float
) -> None:
    shown = covered(size, bucket, centering_on((x, y), size, bucket))
    for point, low, high in ((x, shown[0], shown[2]), (y, shown[1], shown[3])):
        assert low - 1e-6 <= point <= high + 1e-6
        at_an_edge = low < 1e-6 or high > 1 - 1e-6
        assert at_an_edge or (low + high) / 2 == pytest.approx(point, abs=1e-6)


def test_a_centre_crop_is_in_the_centre() -> None:
    assert crops() == (Crop(64, 64, 500, 500),)


def test_focus_puts_the_crop_on_the_mask() -> None:
    assert crops(mask=(0.0, 0.2, 0.1, 0.4), how="focus") == (Crop(64, 64, 0, 500),)
    assert crops(mask=(0.9, 0.2, 1.0, 0.4), how="focus") == (Crop(64, 64, 1000, 500),)
    assert crops(mask=(0.4, 0.2, 0.6, 0.4), how="focus") == (Crop(64, 64, 500, 500),)


def test_focus_without_a_mask_is_the_centre() -> None:
    assert crops(how="focus") == crops()


def test_a_centre_crop_that_would_miss_the_mask_goes_there() -> None:
    assert crops(mask=(0.0, 0.2, 0.3, 0.4)) == (Crop(64, 64, 0, 500),)
    assert crops(mask=(0.0, 0.2, 0.5, 0.4)) == (Crop(64, 64, 500, 500),)


def test_random_crops_are_keyed_by_picture_and_seed() -> None:
    first = crops(how="random", variants=5)
    assert first == crops(how="random", variants=5)
    assert len({crop.x for crop in first}) == 5
    assert first[:2] == crops(how="random", variants=2)
    assert set(first).isdisjoint(crops(how="random", variants=5, seed=1))
    assert set(first).isdisjoint(crops(how="random", variants=5, key="b"))


def test_no_random_crop_misses_the_mask() -> None:
    for crop in crops(how="random", variants=40, mask=(0.0, 0.0, 0.1, 1.0)):
        assert covered((300, 100), (64, 64), crop.centering)[0] < 0.1


def test_a_flip_doubles_the_crops() -> None:
    still, turned = crops(flip=True)
    assert (still.mirrored, turned.mirrored) == (False, True)
    assert (still.x, still.y) == (turned.x, turned.y)


def test_any_part_of_a_crop_makes_another_spelling() -> None:
    spelled = [
        c.spelled() for c in (Crop(1, 2), Crop(2, 1), Crop(1, 2, 3), Crop(1, 2, 3, 4), Crop(1, 2, mirrored=True))
    ]
    assert len(set(spelled)) == 5
    assert all(one != other for one, other in pairwise(spelled))
