"""Copies by a stream, by a thread that reads, and at once; and those that fail."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from flux2_lora.host import InMemory, pack
from flux2_lora.networks.transformers import blocks_in
from flux2_lora.placement import streamer_on
from flux2_lora.stream import attach_streamer, spread
from flux2_lora.training.memory import recompute_blocks
from tests.streamed import BLOCKS, CPU, Adversary, Case, stream_blocks


def test_a_copy_on_a_stream_begins_after_what_was_given_and_is_waited_for_by_its_event(
    case: Case, device: list[str]
) -> None:
    from flux2_lora.copiers import OnStream

    expected = case.lived(case.adapted())
    transformer = case.adapted()
    stream_blocks(transformer, slots=2, copier=OnStream)
    recompute_blocks(transformer, spread(2, BLOCKS))
    assert torch.equal(case.lived(transformer), expected)
    assert device[:4] == ["slot", "slot", "after what was given", "event"]
    assert device.count("event") >= device.count("after an event") > 0


def test_staged_copies_give_the_same_bits(case: Case, device: list[str]) -> None:
    from flux2_lora.copiers import Staged

    expected = case.lived(case.adapted())
    transformer = case.adapted()
    allocate = partial(torch.empty, dtype=torch.uint8)
    stream_blocks(transformer, slots=2, copier=partial(Staged, allocate=allocate))
    recompute_blocks(transformer, spread(2, BLOCKS))
    assert torch.equal(case.lived(transformer), expected)


def test_a_disk_that_fails_in_the_copying_thread_is_raised_where_the_block_is_needed(
    case: Case, device: list[str]
) -> None:
    from flux2_lora.copiers import Staged

    class Failing(InMemory):
        def read(self, block: int, into: Tensor) -> int:
            raise OSError("the disk is gone")

    slots = [torch.empty(8, dtype=torch.uint8)]
    allocate = partial(torch.empty, dtype=torch.uint8)
    copier = Staged(Failing("memory", allocate), slots, allocate)
    copier.submit(0, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        copier.wait(0)


class Unsteady(Adversary):
    """Fails once where it is told to, before or after it has ruined the slot."""

    failing = ""

    def fail(self, where: str) -> None:
        if self.failing == where:
            self.failing = ""
            raise OSError("the disk was gone for a moment")

    def submit(self, slot: int, block: int) -> None:
        self.slots[slot].fill_(0x7F)
        self.fail("submit")
        super().submit(slot, block)

    def wait(self, slot: int) -> None:
        if self.failing == "wait":
            self.pending.pop(slot, None)  # what failed is not tried again by itself
        self.fail("wait")
        super().wait(slot)


@pytest.mark.parametrize("failing", ["submit", "wait"])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_run_goes_on_after_a_copy_that_failed_in_a_preview(case: Case, slots: int, failing: str) -> None:
    expected = case.lived(case.adapted())
    transformer = case.adapted()
    copier = stream_blocks(transformer, slots=slots, copier=Unsteady)
    recompute_blocks(transformer, spread(2, BLOCKS))
    with torch.no_grad():
        case.velocity(transformer)
        copier.failing = failing
        with pytest.raises(OSError, match="for a moment"):
            case.velocity(transformer)
    assert torch.equal(case.lived(transformer), expected)


def test_a_device_without_streams_gets_its_blocks_at_once(case: Case) -> None:
    transformer = case.adapted()
    host = InMemory("memory", partial(torch.empty, dtype=torch.uint8))
    blocks = list(blocks_in(transformer).values())
    layouts = [pack(block) for block in blocks]
    for number, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
        host.add(number, block, layout)
    expected = case.velocity(transformer)
    attach_streamer(transformer, streamer_on(CPU, blocks, layouts, host, 2, "staged"))
    assert torch.equal(case.velocity(transformer), expected)
