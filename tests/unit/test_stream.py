"""Streamed blocks against resident ones, bit for bit, under a copier that does its worst; and what is copied when."""

from __future__ import annotations

import copy
import errno
import os
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux2_lora import host, stream
from flux2_lora.adapters import AdapterSpec, Lora, LoraWeights, attach, attach_loras, lora_layers, merge_loras
from flux2_lora.conditioning import Conditioning
from flux2_lora.copiers import AtOnce, Copier
from flux2_lora.errors import RunError
from flux2_lora.families import Model, load_family
from flux2_lora.files import FileDigests
from flux2_lora.host import Host, InMemory, Packed, pack
from flux2_lora.networks.transformers import block_linears, blocks_in
from flux2_lora.placement import Placement, streamer_on
from flux2_lora.quantize import FrozenLinear, PrecisionSpec, load_frozen
from flux2_lora.stream import Phase, Streamer, attach_streamer, spread, streamer_of, use_order
from flux2_lora.training.memory import MemorySpec, compile_blocks, recompute_blocks
from flux2_lora.weights import Weights
from tests.conftest import quantised

CPU = torch.device("cpu")
BLOCKS = 5
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


@dataclass
class Adversary:
    """Ruins a slot as soon as a copy is submitted, and copies then, at the wait, or at random; notes all in `trace`."""

    host: Host
    slots: Sequence[Tensor]
    when: str = "wait"
    trace: list[tuple[str, int]] = field(default_factory=list)
    pending: dict[int, int] = field(default_factory=dict)
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def submit(self, slot: int, block: int) -> None:
        self.trace.append(("submit", slot))
        self.slots[slot].fill_(0x7F)
        self.pending[slot] = block
        if self.when == "submit" or (self.when == "random" and self.chance.random() < 0.5):
            self.copy(slot)

    def wait(self, slot: int) -> None:
        self.trace.append(("wait", slot))
        self.copy(slot)

    def copy(self, slot: int) -> None:
        if slot in self.pending:
            self.host.read(self.pending.pop(slot), self.slots[slot])


class Careless(Adversary):
    """Forgets the copies that it should have finished at the wait."""

    def wait(self, slot: int) -> None:
        """Too late."""


class Hasty(Adversary):
    """Begins the next copy into a slot when it was just waited for, and is about to be used."""

    def wait(self, slot: int) -> None:
        super().wait(slot)
        self.slots[slot].fill_(0x7F)


def flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    model: nn.Module = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return model


def flux1() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model: nn.Module = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    return model


@dataclass(frozen=True)
class Case:
    """A base, and how it is driven."""

    architecture: str
    base: nn.Module

    def adapted(self, rank: int = 2) -> nn.Module:
        """A copy with adapters that do something."""
        transformer = copy.deepcopy(self.base)
        attach(transformer, self.architecture, AdapterSpec(rank=rank), seed=0)
        noise = torch.Generator().manual_seed(1)
        for _, layer in lora_layers(transformer):
            up = layer.lora_B["default"].weight
            with torch.no_grad():
                up.copy_(0.1 * torch.randn(up.shape, generator=noise))
        return transformer

    def velocity(self, transformer: nn.Module, seed: int = 0) -> Tensor:
        """What the model says of a noisy picture of six tokens."""
        family = load_family("flux1" if self.architecture == "flux1" else "flux2_small")
        noise = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, family.latent_channels, 2, 3, generator=noise)
        pooled = torch.randn(1, 20, generator=noise) if self.architecture == "flux1" else None
        text = Conditioning(embeds=torch.randn(1, 4, 24, generator=noise), pooled=pooled)
        return family.velocity(transformer, latents, torch.tensor([0.6]), text)

    def step(self, transformer: nn.Module, seed: int = 0) -> list[Tensor]:
        """Loss and gradients of a step, which is taken."""
        loss = self.velocity(transformer, seed).square().mean()
        loss.backward()
        found = [loss.detach()]
        for parameter in (p for p in transformer.parameters() if p.requires_grad):
            assert parameter.grad is not None
            found.append(parameter.grad.clone())
            with torch.no_grad():
                parameter.sub_(0.1 * parameter.grad)
            parameter.grad = None
        return found

    def lived(self, transformer: nn.Module) -> Tensor:
        """All that a step, a validation, two sampling steps and another step give."""
        found = self.step(transformer)
        with torch.no_grad():
            found += [self.velocity(transformer, seed) for seed in (1, 2, 3)]
        return torch.cat([tensor.flatten().float() for tensor in [*found, *self.step(transformer, 4)]])


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, str], Case]:
    made = {}
    for architecture, build in (("flux2", flux2), ("flux1", flux1)):
        for kind in ("fp8", "int8", "nf4", "bf16", "fp32"):
            torch.manual_seed(0)
            base = build().eval().requires_grad_(False)
            base = quantised(base, kind) if kind in ("fp8", "int8", "nf4") else base
            made[architecture, kind] = Case(architecture, base.bfloat16() if kind == "bf16" else base)
    return made


@pytest.fixture
def case(cases: dict[tuple[str, str], Case]) -> Case:
    return cases["flux2", "fp8"]


def stream_blocks(
    transformer: nn.Module,
    *,
    slots: int,
    resident: int = 0,
    copier: Callable[[Host, Sequence[Tensor]], Copier] = AtOnce,
) -> Any:
    """Stream a transformer that is there already; returns the copier."""
    stay, host = spread(resident, BLOCKS), InMemory("memory", partial(torch.empty, dtype=torch.uint8))
    blocks = [block for number, block in enumerate(blocks_in(transformer).values()) if number not in stay]
    layouts = [pack(block) for block in blocks]
    for number, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
        host.add(number, block, layout)
    flats = [torch.empty(max(layout.size for layout in layouts), dtype=torch.uint8) for _ in range(slots)]
    made = copier(host, flats)
    attach_streamer(transformer, Streamer(blocks, layouts, host, flats, made))
    return made


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


def some_lora(transformer: nn.Module) -> Lora:
    noise = torch.Generator().manual_seed(2)
    linears = {
        path: m for path, m in transformer.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in path
    }
    weights = {
        path: LoraWeights(
            down=torch.randn(2, linear.in_features, generator=noise),
            up=torch.randn(linear.out_features, 2, generator=noise),
            scale=0.1,
        )
        for path, linear in linears.items()
    }
    return Lora(modules=weights, naming="ours", total=len(weights), architecture="flux2")


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


def placed(folder: Path, host: str, resident: int = 2) -> Placement:
    return Placement(resident=spread(resident, 6), slots=2, host=host, folder=folder)


def said(transformer: nn.Module) -> Tensor:
    family, noise = load_family("flux2_small"), torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 128, 2, 2, generator=noise), torch.randn(1, 3, 128, generator=noise)
    with torch.no_grad():
        once = [family.velocity(transformer, latents, torch.tensor([s]), Conditioning(embeds=text)) for s in (0.9, 0.4)]
    return torch.cat(once)


@pytest.mark.parametrize("kind", ["fp8", "nf4", "bf16"])
def test_a_model_is_loaded_to_memory_or_disk_block_by_block_and_says_the_same(
    tiny_model: Model, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux2_lora.quantize.compute_dtype", lambda _: torch.float32)
    spec = PrecisionSpec(base=kind)
    expected = said(load_frozen(tiny_model, spec, CPU))
    assert torch.equal(said(load_frozen(tiny_model, spec, CPU, placed(tmp_path, "pinned"))), expected)
    assert torch.equal(said(load_frozen(tiny_model, spec, CPU, placed(tmp_path, "disk"))), expected)
    read, names = Weights.read, []
    monkeypatch.setattr(Weights, "read", lambda self, name: names.append(name) or read(self, name))
    again = load_frozen(tiny_model, spec, CPU, placed(tmp_path, "disk", resident=0))
    assert torch.equal(said(again), expected)
    assert names
    assert not [name for name in names if "transformer_blocks" in name and "norm" not in name]
    assert len(list(tmp_path.glob("*/blocks.bin"))) == 1


def test_what_is_merged_on_disk_leaves_the_shared_file_as_it_is(tiny_model: Model, tmp_path: Path) -> None:
    results = []
    for placement in (None, placed(tmp_path, "disk")):
        transformer = load_frozen(tiny_model, PrecisionSpec(), CPU, placement)
        before = [file.read_bytes() for file in tmp_path.glob("*/blocks.bin")]
        merge_loras(transformer, dict.fromkeys(attach_loras(transformer, {"a": some_lora(transformer)}), 1.0))
        results.append(said(transformer))
    assert torch.equal(*results)
    assert [file.read_bytes() for file in tmp_path.glob("*/blocks.bin")] == before


def test_a_file_of_blocks_is_made_with_one_block_in_memory(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = weakref.WeakSet[FrozenLinear]()
    most, made = 0, host.pack

    def packed(block: nn.Module) -> Packed:
        nonlocal most
        alive.update(module for module in block.modules() if isinstance(module, FrozenLinear))
        most = max(most, len(alive))
        return made(block)

    monkeypatch.setattr(host, "pack", packed)
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    of_a_block = [
        sum(".0." in path for path in block_linears(tiny_model.empty_transformer()) if path.startswith(kind))
        for kind in ("transformer_blocks", "single_transformer_blocks")
    ]
    assert most == max(of_a_block)


def test_a_file_of_blocks_that_was_not_finished_is_made_again(tiny_model: Model, tmp_path: Path) -> None:
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    place = next(tmp_path.glob("*/blocks.bin")).parent
    whole = (place / "blocks.bin").read_bytes()
    place.rename(tmp_path / f".{place.name}.part")
    (tmp_path / f".{place.name}.part" / "blocks.bin").write_bytes(b"half")
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    assert (place / "blocks.bin").read_bytes() == whole


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", ["blocks.bin", "scales.safetensors"])
@pytest.mark.parametrize("harm", [Path.unlink, cut_in_half])
def test_a_file_of_blocks_that_was_harmed_is_made_again(
    tiny_model: Model, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    (file,) = tmp_path.glob(f"*/{name}")
    whole = file.read_bytes()
    harm(file)
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    assert file.read_bytes() == whole


def test_a_file_of_blocks_that_fails_while_it_is_read_is_told(tiny_model: Model, tmp_path: Path) -> None:
    transformer = load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    (file,) = tmp_path.glob("*/blocks.bin")
    os.truncate(file, 4096)
    with pytest.raises(RunError, match=r"memory.host=disk: .*blocks.bin cannot be read .*ends before its last block"):
        said(transformer)


def test_a_disk_that_is_full_keeps_nothing_of_the_file(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flux2_lora.host._write_at", full)
    with pytest.raises(RunError, match="the disk is full"):
        load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    assert not [path for path in tmp_path.rglob("*") if path.is_dir()]


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


def test_memory_options_come_before_a_choice_and_a_choice_before_what_is_usual() -> None:
    class Chosen:
        resident_blocks, slots, plain_blocks, inputs_on_host, host = 3, 4, 1, False, "memory"

    cuda = torch.device("cuda")
    assert MemorySpec().placement(6) is None
    assert (MemorySpec().plain(6, CPU), MemorySpec().plain(6, cuda)) == (frozenset(range(6)), frozenset())
    chosen = MemorySpec().placement(6, Chosen())
    assert chosen is not None
    assert (len(chosen.resident), chosen.slots, len(MemorySpec().plain(6, cuda, Chosen()))) == (3, 4, 1)
    given = MemorySpec(resident_blocks=1, slots=2, plain_blocks=0).placement(6, Chosen())
    assert given is not None
    assert (len(given.resident), given.slots) == (1, 2)
    assert (chosen.host, given.host) == ("memory", "memory")
    asked = MemorySpec(host="disk").placement(6, Chosen())
    assert asked is not None
    assert asked.host == "disk"
    assert MemorySpec(resident_blocks=1000).placement(6, Chosen()) is None


def test_auto_takes_the_disk_where_host_memory_does_not_hold_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux2_lora.placement.host_bytes", lambda: 10_000)
    auto = placed(tmp_path, "auto")
    assert auto.host_for(8_001, CPU) == "disk"
    assert auto.host_for(8_000, CPU) == "staged"
    assert auto.host_for(8_000, torch.device("cuda")) == "pinned"


def test_a_plan_that_counted_on_memory_gets_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux2_lora.placement.host_bytes", lambda: 10_000)
    planned = placed(tmp_path, "memory")
    assert planned.host_for(9_000, CPU) == "staged"
    assert planned.host_for(9_000, torch.device("cuda")) == "pinned"


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


def test_a_single_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.safetensors", "same.safetensors", "other.safetensors"))
    for file, content in ((one, b"a"), (same, b"a"), (other, b"b")):
        file.write_bytes(content)
    digests = FileDigests(tmp_path / "files.json")
    assert digests.of(one) == digests.of(same) != digests.of(other)
