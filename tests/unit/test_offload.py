"""Inputs of recomputed blocks that wait in host memory: the same bits under copies that do their worst; what stays."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from flux2_lora.networks.transformers import blocks_in
from flux2_lora.offload import AtOnce, Copies, Offload, OnStream
from flux2_lora.stream import spread
from flux2_lora.training.memory import MemorySpec, recompute_blocks
from tests.streamed import BLOCKS, Adversary, Case, flux1, flux2, stream_blocks


@dataclass
class Late:
    """Ruins the target at once, and copies in order when an end is waited for.

    early: copies whose memory on the device was given up before their end was waited for.
    """

    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    done: int = 0
    early: list[int] = field(default_factory=list)

    def copy(self, source: Tensor, target: Tensor) -> int:
        target.view(torch.uint8).fill_(0x7F)
        self.asked.append((source.detach(), target.detach()))
        mark = len(self.asked)
        on_device = source if target._is_view() else target  # host memory comes as views of bytes
        weakref.finalize(on_device, self.given_up, mark)
        return mark

    def given_up(self, mark: int) -> None:
        if mark > self.done:
            self.early.append(mark)

    def wait(self, mark: int) -> None:
        for source, target in self.asked[self.done : mark]:
            target.copy_(source)
        self.done = max(self.done, mark)


class Careless(Late):
    def wait(self, mark: int) -> None:
        """Copies never."""


class Memory:
    """Host memory, and how often some of it was asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, size: int) -> Tensor:
        self.asked += 1
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture(scope="module", params=["flux2", "flux1"])
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    build = {"flux1": flux1, "flux2": flux2}[request.param]
    return Case(request.param, build().eval().requires_grad_(False))


def offload(copies: Copies, memory: Callable[[int], Tensor] | None = None) -> Offload:
    """Of all that blocks are given, however small."""
    return Offload(copies, memory or Memory(), least=0)


@pytest.mark.parametrize("plain", [0, 2])
def test_inputs_that_waited_in_host_memory_give_the_bits_of_those_that_stayed(case: Case, plain: int) -> None:
    expected = case.lived(case.adapted())
    for copies in (AtOnce(), Late()):
        transformer = case.adapted()
        stream_blocks(transformer, slots=2, copier=partial(Adversary, when="random"))
        recompute_blocks(transformer, spread(plain, BLOCKS), offload(copies))
        assert torch.equal(case.lived(transformer), expected)


def test_memory_of_the_device_is_given_up_when_its_copy_was_waited_for(case: Case) -> None:
    copies = Late()
    transformer = case.adapted()
    recompute_blocks(transformer, (), offload(copies))
    case.lived(transformer)
    case.velocity(transformer)  # a graph that is dropped
    case.step(transformer)
    assert copies.done > 4 * BLOCKS
    assert copies.early == []


def test_a_copy_that_is_not_waited_for_is_noticed(case: Case) -> None:
    expected = case.lived(case.adapted())
    transformer = case.adapted()
    recompute_blocks(transformer, (), offload(Careless()))
    assert not torch.equal(case.lived(transformer), expected)


def test_two_graphs_come_back_for_one_backward(case: Case) -> None:
    """As where a class is preserved: two forward passes, one loss."""

    def gradients(away: Offload | None) -> Tensor:
        transformer = case.adapted()
        recompute_blocks(transformer, (), away)
        (case.velocity(transformer, 1).square().mean() + case.velocity(transformer, 2).square().mean()).backward()
        return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])

    assert torch.equal(gradients(offload(Late())), gradients(None))


def inputs_left(case: Case, away: Offload | None) -> int:
    """How many inputs of blocks the device has after a forward pass."""
    transformer, seen = case.adapted(), list[StorageWeakRef]()
    recompute_blocks(transformer, (), away)
    for block in blocks_in(transformer).values():
        block.register_forward_pre_hook(lambda _, inputs: seen.append(StorageWeakRef(inputs[0].untyped_storage())))
    loss = case.velocity(transformer).square().mean()
    assert len(seen) == BLOCKS
    left = sum(not one.expired() for one in seen)
    loss.backward()
    return left


def test_the_device_keeps_the_last_input_alone(case: Case) -> None:
    assert inputs_left(case, None) == BLOCKS
    assert inputs_left(case, offload(AtOnce())) <= 1


def test_host_memory_is_taken_in_the_first_step_and_a_dropped_graph_gives_its_part_back(case: Case) -> None:
    transformer, memory = case.adapted(), Memory()
    recompute_blocks(transformer, (), offload(AtOnce(), memory))
    case.step(transformer)
    asked = memory.asked
    assert asked >= BLOCKS
    case.velocity(transformer)  # nobody asks for its gradient
    case.step(transformer)
    assert memory.asked == asked


def test_what_is_small_stays(case: Case) -> None:
    transformer, memory = case.adapted(), Memory()
    recompute_blocks(transformer, (), Offload(AtOnce(), memory))
    case.step(transformer)
    assert memory.asked == 0


def test_a_copy_on_a_stream_follows_what_was_given_and_later_work_waits_for_its_end(
    case: Case, device: list[str]
) -> None:
    expected = case.lived(case.adapted())
    transformer = case.adapted()
    recompute_blocks(transformer, (), offload(OnStream(torch.device("cpu"))))
    assert torch.equal(case.lived(transformer), expected)
    assert device[:2] == ["after what was given", "event"]
    assert device.count("event") == device.count("after an event")


def test_inputs_leave_a_card_where_a_choice_or_the_user_says_so(device: list[str]) -> None:
    class Chosen:
        resident_blocks, slots, plain_blocks, inputs_on_host, host = 0, 2, 0, True, "memory"

    cuda = torch.device("cuda")
    assert isinstance(MemorySpec().offload(cuda, Chosen()), Offload)
    assert isinstance(MemorySpec(block_inputs="host").offload(cuda), Offload)
    assert MemorySpec(block_inputs="device").offload(cuda, Chosen()) is None
    assert MemorySpec().offload(cuda) is None
    assert MemorySpec(block_inputs="host").offload(torch.device("cpu")) is None
