"""Streamed blocks against resident ones, bit for bit, under a copier that does its worst; and what is copied when."""

from __future__ import annotations

import copy
import random
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flux2_lora import stream
from flux2_lora.adapters import attach_loras, merge_loras
from flux2_lora.host import pack
from flux2_lora.networks.transformers import blocks_in
from flux2_lora.quantize import FrozenLinear
from flux2_lora.stream import Phase, spread, streamer_of, use_order
from flux2_lora.training.memory import compile_blocks, recompute_blocks
from tests.streamed import BLOCKS, Adversary, Case, some_lora, stream_blocks

# Slots, resident blocks, blocks that keep their activations, when copies happen: any two values meet in some row.
CHOICES = [
    (1, 0, 0, "submit"),
    (1, 1, 2, "wait"),
    (1, 3, 5, "random"),
    (2, 0, 2, "random"),
    (2, 1, 5, "submit"),
    (2, 3, 0, "wait"),
    (3, 0, 5, "wait"),
    (3, 1, 0, "random"),
    (3, 3, 2, "submit"),
]


class Careless(Adversary):
    """Forgets the copies that it should have finished at the wait."""

    def wait(self, slot: int) -> None:
        """Too late."""


class Hasty(Adversary):
    """Begins the next copy into a slot when it was just waited for, and is about to be used."""

    def wait(self, slot: int) -> None:
        super().wait(slot)
        self.slots[slot].fill_(0x7F)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*(("flux2", kind) for kind in ("fp8", "int8", "nf4", "bf16", "fp32")), ("flux1", "fp8"), ("flux1", "bf16")],
)
def test_streamed_blocks_give_the_bits_of_resident_ones(
    cases: dict[tuple[str, str], Case], architecture: str, kind: str
) -> None:
    case = cases[architecture, kind]
    expected = case.lived(case.adapted())
    assert expected.isfinite().all()
    for slots, resident, plain, when in CHOICES:
        transformer = case.adapted()
        stream_blocks(transformer, slots=slots, resident=resident, copier=partial(Adversary, when=when))
        recompute_blocks(transformer, spread(plain, BLOCKS))
        assert torch.equal(case.lived(transformer), expected), (slots, resident, plain, when)


@pytest.mark.parametrize("broken", [Careless, Hasty])
@pytest.mark.parametrize("plain", [0, BLOCKS])
def test_a_copy_that_is_not_waited_for_or_comes_too_early_is_noticed(
    case: Case, broken: type[Adversary], plain: int
) -> None:
    expected = case.lived(case.adapted())
    transformer = case.adapted()
    stream_blocks(transformer, slots=2, copier=broken)
    recompute_blocks(transformer, spread(plain, BLOCKS))
    assert not torch.equal(case.lived(transformer), expected)


def test_a_wrong_guess_of_the_order_costs_copies_and_changes_no_number(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lived() -> tuple[Tensor, int]:
        transformer = case.adapted()
        copier = stream_blocks(transformer, slots=2, copier=Adversary)
        recompute_blocks(transformer, ())
        return case.lived(transformer), len(copier.trace)

    right, few = lived()
    chance = random.Random(0)
    monkeypatch.setattr(stream, "use_order", lambda block, blocks, _: [block, *chance.sample(range(blocks), blocks)])
    wrong, many = lived()
    assert torch.equal(right, wrong)
    assert many > few


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("plain", [0, 2, BLOCKS])
def test_a_step_copies_all_blocks_but_those_in_slots_each_way(case: Case, slots: int, plain: int) -> None:
    transformer = case.adapted()
    copier = stream_blocks(transformer, slots=slots, copier=Adversary)
    recompute_blocks(transformer, spread(plain, BLOCKS))
    case.step(transformer)
    counts = []
    for _ in range(2):
        copier.trace.clear()
        loss = case.velocity(transformer).square().mean()
        counts.append([what for what, _ in copier.trace].count("submit"))
        copier.trace.clear()
        loss.backward()
        counts.append([what for what, _ in copier.trace].count("submit"))
    assert counts == [BLOCKS - slots] * 4


def test_sampling_copies_each_block_once_a_pass_and_goes_on_with_the_first(case: Case) -> None:
    transformer = case.adapted()
    copier = stream_blocks(transformer, slots=2, copier=Adversary)
    streamer = streamer_of(transformer)
    assert streamer is not None
    with torch.no_grad():
        case.velocity(transformer)
        copier.trace.clear()
        case.velocity(transformer)
    assert [what for what, _ in copier.trace].count("submit") == BLOCKS
    assert set(streamer._held) == {BLOCKS - 1, 0}


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_each_copy_is_waited_for_once_and_each_use_follows_the_wait(case: Case, slots: int) -> None:
    transformer = case.adapted()
    copier = stream_blocks(transformer, slots=slots, copier=Adversary)
    recompute_blocks(transformer, ())
    streamer = streamer_of(transformer)
    assert streamer is not None
    waited: dict[int, bool] = {}
    uses = 0

    def before(number: int, *_: object) -> None:
        nonlocal uses
        uses += 1
        for what, slot in copier.trace:
            assert (what == "wait") is (waited.get(slot) is False)  # by turns: no copy is lost, none waited for twice
            waited[slot] = what == "wait"
        copier.trace.clear()
        assert waited[streamer._held.index(number)]

    for number, block in enumerate(blocks_in(transformer).values()):
        block.register_forward_pre_hook(partial(before, number))
    for seed in range(2):
        case.step(transformer, seed)
    with torch.no_grad():
        case.velocity(transformer)
    assert uses == 5 * BLOCKS


def test_blocks_that_were_recomputed_are_not_where_all_are_plain_later(case: Case) -> None:
    transformer, ran = case.adapted(), []
    next(iter(blocks_in(transformer).values())).register_forward_pre_hook(lambda *_: ran.append(1))
    for plain, runs in (((), 2), (range(BLOCKS), 1)):
        ran.clear()
        recompute_blocks(transformer, plain)
        case.step(transformer)
        assert len(ran) == runs


def test_without_kept_a_block_that_keeps_its_activations_is_refused_by_autograd(case: Case) -> None:
    transformer = case.adapted()
    stream_blocks(transformer, slots=2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.step(transformer)


def test_autograd_keeps_no_bytes_of_a_slot(case: Case) -> None:
    transformer = case.adapted()
    copier = stream_blocks(transformer, slots=2)
    streamer, saved = streamer_of(transformer), []
    assert streamer is not None
    pack_of = streamer._pack
    streamer._pack = lambda tensor: saved.append(pack_of(tensor)) or saved[-1]  # type: ignore[method-assign]
    recompute_blocks(transformer, range(BLOCKS))
    case.velocity(transformer)
    slots = {slot.untyped_storage().data_ptr() for slot in copier._slots}
    kept = [one for one in saved if isinstance(one, Tensor)]
    assert len(kept) < len(saved)
    assert not {tensor.untyped_storage().data_ptr() for tensor in kept} & slots


def test_weights_that_are_in_no_slot_are_on_no_device(case: Case) -> None:
    transformer = case.adapted()
    stream_blocks(transformer, slots=1)
    case_linears = [[m for m in b.modules() if isinstance(m, FrozenLinear)] for b in blocks_in(transformer).values()]
    with torch.no_grad():
        case.velocity(transformer)
    there = [{not linear.values.is_meta for linear in linears} for linears in case_linears]
    assert there.count({True}) == 1
    assert there.count({False}) == BLOCKS - 1


@pytest.mark.slow
@pytest.mark.parametrize("plain", [0, 2])
def test_compiled_streamed_blocks_have_the_bits_of_compiled_resident_ones(case: Case, plain: int) -> None:
    def compiled(*, slots: int | None) -> Tensor:
        torch.compiler.reset()
        transformer = case.adapted()
        if slots is not None:
            stream_blocks(transformer, slots=slots, copier=Adversary)
        recompute_blocks(transformer, spread(plain, BLOCKS))
        compile_blocks(transformer, "aot_eager", fullgraph=True)
        return case.lived(transformer)

    assert torch.equal(compiled(slots=2), compiled(slots=None))


@pytest.mark.parametrize("kind", ["fp8", "nf4", "fp32"])
def test_an_adapter_is_merged_into_streamed_blocks_as_into_resident_ones(
    cases: dict[tuple[str, str], Case], kind: str
) -> None:
    case = cases["flux2", kind]

    def merged(*, streamed: bool) -> Tensor:
        transformer = copy.deepcopy(case.base)
        lora = some_lora(transformer)
        if streamed:
            stream_blocks(transformer, slots=2, resident=1, copier=Adversary)
        merge_loras(transformer, dict.fromkeys(attach_loras(transformer, {"a": lora}), 1.0))
        with torch.no_grad():
            return torch.cat([case.velocity(transformer, seed) for seed in (0, 1)])

    plain = case.velocity(copy.deepcopy(case.base))
    assert torch.equal(merged(streamed=True), merged(streamed=False))
    assert not torch.equal(merged(streamed=True)[:1], plain)


def test_weights_begin_at_multiples_of_256_and_overlap_nowhere(case: Case) -> None:
    for block in blocks_in(case.base).values():
        layout = pack(block)
        ends = [leaf.start + leaf.size for leaf in layout.leaves]
        assert all(leaf.start % 256 == 0 for leaf in layout.leaves)
        assert all(end <= leaf.start for end, leaf in zip(ends, layout.leaves[1:], strict=False))
        assert ends[-1] <= layout.size


@pytest.mark.parametrize("architecture", ["flux2", "flux1"])
def test_blocks_are_listed_in_the_order_in_which_they_run(
    cases: dict[tuple[str, str], Case], architecture: str
) -> None:
    case = cases[architecture, "fp32"]
    transformer, ran = copy.deepcopy(case.base), []
    for name, block in blocks_in(transformer).items():
        block.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    case.velocity(transformer)
    assert ran == list(blocks_in(transformer))
    assert len(ran) == BLOCKS


@pytest.mark.parametrize("blocks", [1, 4, 7])
def test_each_order_of_use_names_every_block_once_and_begins_where_it_is_asked(blocks: int) -> None:
    for passing in Phase:
        for block in range(blocks):
            order = use_order(block, blocks, passing)
            assert sorted(order) == list(range(blocks))
            assert order[0] == block
    last = blocks - 1
    assert use_order(last, blocks, Phase.FORWARD) == use_order(last, blocks, Phase.BACKWARD)
    assert use_order(0, blocks, Phase.BACKWARD) == use_order(0, blocks, Phase.FORWARD)


@pytest.mark.parametrize("blocks", [1, 5, 56])
def test_blocks_are_spread_evenly(blocks: int) -> None:
    for count in range(blocks + 2):
        chosen = sorted(spread(count, blocks))
        gaps = {after - before for before, after in pairwise(chosen)}
        assert len(chosen) == min(count, blocks)
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
