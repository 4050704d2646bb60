"""Copies beside computation: the schedule's laws on a few blocks whose seconds are whole numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_lora.planning.schedule import BlockTimes, drawing_uses, seconds, training_uses

Blocks = list[BlockTimes]


def blocks(count: int, compute: float, copy: float) -> Blocks:
    return [BlockTimes(forward_s=compute, backward_s=2 * compute, copy_s=copy) for _ in range(count)]


def step(given: Blocks, resident: tuple[int, ...] = (), slots: int = 2) -> float:
    return seconds(training_uses(given), [block.copy_s for block in given], resident, slots)


def test_copies_shorter_than_computation_cost_nothing() -> None:
    assert step(blocks(6, compute=3, copy=2)) == 6 * 3 * 3


def test_copies_alone_count_where_they_are_longest_and_slots_save_the_turn() -> None:
    """Of n blocks n - k are copied in each direction."""
    for slots in (2, 3):
        assert step(blocks(8, compute=0, copy=1), slots=slots) == 2 * (8 - slots)


def test_drawing_copies_every_block_in_every_pass() -> None:
    given = blocks(8, compute=0, copy=1)
    assert seconds(drawing_uses(given), [1] * 8, (), 2) == 8


def test_a_single_slot_waits_for_each_copy() -> None:
    assert step(blocks(4, compute=1, copy=5), slots=1) == 4 * 3 + 2 * 3 * 5


def test_resident_blocks_are_not_copied() -> None:
    given = blocks(8, compute=0, copy=1)
    assert step(given, resident=(0, 2, 4, 6)) == 2 * (4 - 2)
    assert step(given, resident=tuple(range(8))) == 0


def test_spread_residents_hide_more_than_the_first_ones() -> None:
    given = blocks(12, compute=1, copy=2)
    assert step(given, resident=(0, 2, 4, 6, 8, 10)) < step(given, resident=(0, 1, 2, 3, 4, 5))


@settings(max_examples=30, deadline=None)
@given(
    times=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=9),
    slots=st.integers(1, 4),
    slower=st.integers(0, 8),
)
def test_a_step_is_bounded_by_its_parts_and_never_faster_with_slower_parts(
    times: list[tuple[int, int, int]], slots: int, slower: int
) -> None:
    given = [BlockTimes(forward_s=f, backward_s=b, copy_s=c) for f, b, c in times]
    taken = step(given, slots=slots)
    compute, copies = sum(f + b for f, b, _ in times), 2 * sum(c for _, _, c in times)
    assert compute <= taken <= compute + copies
    place = slower % len(times)
    f, b, c = times[place]
    given[place] = BlockTimes(forward_s=f + 1, backward_s=b + 1, copy_s=c + 1)
    assert step(given, slots=slots) >= taken


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_another_slot_never_slows_a_step(slots: int) -> None:
    given = [BlockTimes(forward_s=1, backward_s=2, copy_s=place % 3 + 1) for place in range(9)]
    assert step(given, slots=slots + 1) <= step(given, slots=slots)
