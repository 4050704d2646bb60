"""The split of memory that trains fastest among those that fit, what else there is, and what to change where none fits.

Law: every layout of the search is timed by the same schedule and weighed by the same sum, so more memory is never
slower. With given slots and residents the most plain blocks that fit are the fastest, since each saves its second
forward; and where no copy is waited for, more residents can only take memory from plain blocks. Inputs of blocks wait
in host memory only where nothing fits otherwise, or where the user says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from flux2_lora.adapters import AdapterSpec
from flux2_lora.errors import UserError
from flux2_lora.families import Outline
from flux2_lora.placement import MEMORY
from flux2_lora.planning.hardware import Card
from flux2_lora.planning.memory import (
    Layout,
    Learning,
    Vram,
    drawing_bytes,
    frozen_bytes,
    holes,
    input_bytes,
    peaks_by_plain,
    vram,
)
from flux2_lora.planning.schedule import BlockTimes, Use, drawing_uses, seconds, training_uses
from flux2_lora.planning.sketch import Costs, Pass, measure
from flux2_lora.quantize import PrecisionSpec

SLOTS = (2, 3, 4)
_LIBRARIES_BYTES = int(2e9)  # of host memory: Python, PyTorch and what it loads for a card
_STAGED = 2  # blocks that wait in host memory between disk and card: one is read while one is copied
_PIXELS_A_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Previews:
    """A round of pictures. passes: forward passes of a step of a picture, two under CFG; every: 0 for none."""

    every: int = 0
    pictures: int = 4
    steps: int = 20
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Given:
    """What of a layout the user has settled; None and auto are open. host, block_inputs: as `MemorySpec` names them."""

    resident: int | None = None
    slots: int | None = None
    plain: int | None = None
    host: str = "auto"
    block_inputs: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run as the planner sees it. resolution: px of a square's side; matmul: of the frozen products, bf16 or fp8."""

    outline: Outline
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    precision: PrecisionSpec = field(default_factory=PrecisionSpec)
    learning: Learning = field(default_factory=Learning)
    previews: Previews = field(default_factory=Previews)
    resolution: int = 1024
    batch_size: int = 1
    grad_accumulation: int = 1
    max_steps: int = 1000
    matmul: str = "bf16"
    given: Given = field(default_factory=Given)

    def costs(self, card: Card) -> Costs:
        """What a step of this run takes on a card."""
        side = self.resolution // _PIXELS_A_TOKEN
        return measure(
            self.outline,
            self.adapter,
            self.precision,
            dtype=card.dtype,
            height=side,
            width=side,
            text_tokens=self.outline.text_tokens,
            batch=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to run. host: where streamed blocks lie, memory or disk; device: none is streamed.

    step_s: of an optimizer step; draw_s: of a forward pass over a batch; preview_s: of a round of previews.
    plain_bytes: what one more plain block keeps.
    """

    name: str
    layout: Layout
    host: str
    matmul: str
    vram: Vram
    host_bytes: int
    disk_bytes: int
    step_s: float
    draw_s: float
    preview_s: float
    run_s: float
    plain_bytes: int
    blocks: int

    @property
    def slots(self) -> int:
        return self.layout.slots

    @property
    def resident_blocks(self) -> int:
        return self.layout.resident

    @property
    def plain_blocks(self) -> int:
        return self.layout.plain

    @property
    def inputs_on_host(self) -> bool:
        return self.layout.inputs_on_host

    @property
    def words(self) -> str:
        """ "planned   streamed: 0 of 57 blocks stay, 24 keep their activations; 7.2 GB, 2.76 s a step"."""
        inputs = ", inputs of the others wait in host memory" if self.inputs_on_host else ""
        return (
            f"planned   {self.name}: {self.resident_blocks} of {self.blocks} blocks stay, {self.plain_blocks} keep "
            f"their activations{inputs}; {self.vram.peak / 1e9:.1f} GB, {self.step_s:.2f} s a step"
        )

    @property
    def checkpointing(self) -> bool:
        """Whether any block is recomputed in backward."""
        return self.plain_blocks < self.blocks

    def fits(self, card: Card) -> bool:
        return self.vram.peak <= card.vram_bytes and (not card.streams or self.host_bytes <= card.host_bytes)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """chosen is the fastest that fits; others are shown beside it, whether they fit or not."""

    card: Card
    chosen: Plan
    others: tuple[Plan, ...]


def choose(work: Work, card: Card, costs: Costs | None = None) -> Choice:
    """The fastest plan, with the alternatives; UserError, naming the change that would fit, where nothing does."""
    if work.matmul == "fp8" and card.fp8_flops_s is None:
        raise UserError(
            f"precision.matmul=fp8, and {card.name} multiplies no FP8 matrices", "use precision.matmul=dequantize"
        )
    costs = costs or work.costs(card)
    found = list(plans(work, card, costs))
    fitting = [plan for plan in found if plan.fits(card) and plan.matmul == work.matmul]
    if not fitting:
        raise refusal(work, card, found)
    # Sums of seconds differ in their last digits, which is no reason to read a disk.
    chosen = min(
        fitting,
        key=lambda plan: (plan.inputs_on_host, round(plan.step_s, 4), plan.host == "disk", plan.vram.peak),
    )
    return Choice(card=card, chosen=chosen, others=tuple(plan for plan in found if plan is not chosen))


def plans(work: Work, card: Card, costs: Costs) -> Iterator[Plan]:
    """The best of every kind; of a kind that does not fit, the smallest."""
    search, wish = Search(work=work, card=card, costs=costs), work.given.block_inputs
    usual = list(_kinds(search, inputs_on_host=wish == "host" and card.streams))
    yield from usual
    if wish == "auto" and not any(plan.fits(card) for plan in usual):
        yield from _streamed(search, inputs_on_host=True)


def _kinds(search: Search, *, inputs_on_host: bool) -> Iterator[Plan]:
    given, card, everything = (
        search.work.given,
        search.card,
        Layout(resident=search.count, inputs_on_host=inputs_on_host),
    )
    if search.stays or given.resident is None:
        most = search.most_plain(everything) if given.plain is None else min(given.plain, search.count)
        if given.plain is None:
            yield search.plan("resident, recomputed", everything, "device")
        if most or given.plain is not None:
            yield search.plan("resident", replace(everything, plain=most or 0), "device")
    if given.plain is None and given.host != "disk" and card.streams and not search.stays:
        yield search.fastest("streamed, recomputed", MEMORY, plain=0, inputs_on_host=inputs_on_host)
    yield from _streamed(search, inputs_on_host=inputs_on_host)
    if card.fp8_flops_s is not None and search.work.matmul != "fp8" and given.host != "disk" and not search.stays:
        faster = replace(search, work=replace(search.work, matmul="fp8"))
        yield faster.fastest("streamed, fp8 matmul", MEMORY, inputs_on_host=inputs_on_host)


def _streamed(search: Search, *, inputs_on_host: bool) -> Iterator[Plan]:
    """From each place that the user leaves open."""
    if search.stays or not search.card.streams:
        return
    inputs = ", inputs on host" if inputs_on_host else ""
    if search.work.given.host != "disk":
        yield search.fastest(f"streamed{inputs}", MEMORY, inputs_on_host=inputs_on_host)
    if search.work.given.host in ("auto", "disk"):
        yield search.fastest(f"streamed off disk{inputs}", "disk", inputs_on_host=inputs_on_host)


def drawing_plan(work: Work, card: Card, costs: Costs) -> tuple[Layout, float]:
    """For drawing without training: the layout with the most residents that fit, and seconds of a forward pass.

    UserError where none fits.
    """
    search = Search(work=work, card=card, costs=costs)
    layouts = [Layout(resident=search.count)]
    layouts += [Layout(slots=k, resident=r) for k in SLOTS for r in reversed(range(search.count - k))]
    fitting = [one for one in layouts if drawing_bytes(costs, one, card.context_bytes) <= card.vram_bytes]
    if not fitting:
        least = min(drawing_bytes(costs, one, card.context_bytes) for one in layouts)
        raise UserError(
            f"drawing at {work.resolution} px needs {least / 1e9:.1f} GB at least, and {card.name} has "
            f"{card.vram_bytes / 1e9:.1f} GB to give",
            "close other programs, choose precision=nf4 or a smaller model, or device=cpu",
        )
    timed = [(search.draw_s(one, MEMORY), place) for place, one in enumerate(fitting)]
    best, place = min(timed)
    return fitting[place], best


@dataclass(frozen=True, kw_only=True)
class Search:
    """A run on a card, and what any layout of its blocks holds and takes there."""

    work: Work
    card: Card
    costs: Costs

    @property
    def count(self) -> int:
        return len(self.costs.kinds)

    def plan(self, name: str, layout: Layout, host: str) -> Plan:
        """A layout, weighed and timed."""
        work, costs = self.work, self.costs
        micro_s, draw_s = self.step_s(layout, host), self.draw_s(layout, host)
        preview = work.previews
        batches = -(-preview.pictures // work.batch_size)
        preview_s = batches * preview.steps * preview.passes * draw_s
        rounds = 1 + -(-work.max_steps // preview.every) if preview.every else 0  # at step 0, and at the last one
        # Each graph is a forward and a backward; to preserve is also to ask the base, without a graph.
        graphs = work.learning.graphs
        step_s = work.grad_accumulation * (graphs * micro_s + (graphs - 1) * draw_s)
        memory = vram(costs, layout, work.learning, self.card.context_bytes)
        return Plan(
            name=name,
            layout=layout,
            host=host,
            matmul=work.matmul,
            vram=memory,
            host_bytes=self._host_bytes(layout, host) if self.card.streams else memory.peak,
            disk_bytes=self._disk_bytes(host),
            step_s=step_s,
            draw_s=draw_s,
            preview_s=preview_s,
            run_s=work.max_steps * step_s + rounds * preview_s,
            plain_bytes=max(block.kept.net - block.forward.net for block in costs.blocks.values()),
            blocks=self.count,
        )

    def fastest(self, name: str, host: str, plain: int | None = None, *, inputs_on_host: bool = False) -> Plan:
        """The best over slots and residents that are open, with as many plain blocks as fit or as said."""
        given, plain = self.work.given, self.work.given.plain if plain is None else plain
        all_slots = SLOTS if given.slots is None else (given.slots,)
        plain = None if plain is None else min(plain, self.count)
        least = Layout(
            slots=all_slots[0], resident=given.resident or 0, plain=plain or 0, inputs_on_host=inputs_on_host
        )
        best = (float("inf"), least)
        for slots in all_slots:
            residents = range(max(self.count - slots, 1)) if given.resident is None else (given.resident,)
            for resident in residents:
                layout = replace(least, slots=slots, resident=resident)
                fitting = self.fitting_plain(layout)
                if not fitting or (plain is not None and plain not in fitting):
                    break
                layout = replace(layout, plain=max(fitting) if plain is None else plain)
                if best[0] <= self.step_s(replace(layout, slots=0), host):  # faster than without any copy from here on
                    break
                best = min(best, (self.step_s(layout, host), layout), key=lambda one: one[0])
        return self.plan(name, best[1], host)

    def most_plain(self, layout: Layout) -> int | None:
        """The most plain blocks that fit; None where not even a step without any does."""
        return max(self.fitting_plain(layout), default=None)

    def fitting_plain(self, layout: Layout) -> list[int]:
        """Numbers of plain blocks that fit beside what never changes."""
        learning = int((4 + self.work.learning.state_bytes) * sum(self.costs.adapted))
        fixed = self.card.context_bytes + sum(frozen_bytes(self.costs, layout)) + learning + holes(self.costs)
        room = self.card.vram_bytes - fixed
        peaks = self._peaks_with_inputs_on_host if layout.inputs_on_host else self._peaks
        return [plain for plain, peak in enumerate(peaks) if peak <= room]

    @property
    def stays(self) -> bool:
        """Whether the user wants all blocks on the card."""
        return self.work.given.resident is not None and self.work.given.resident >= self.count

    @cached_property
    def _peaks(self) -> Sequence[int]:
        return peaks_by_plain(self.costs, Layout(), self.work.learning)

    @cached_property
    def _peaks_with_inputs_on_host(self) -> Sequence[int]:
        return peaks_by_plain(self.costs, Layout(inputs_on_host=True), self.work.learning)

    def step_s(self, layout: Layout, host: str) -> float:
        """Seconds of forward and backward of one batch."""
        around = sum(self._seconds(one) for one in (self.costs.stem, self.costs.head, self.costs.turn))
        return around + self._blocks_s(training_uses(self._times(layout, host)), layout, host)

    def draw_s(self, layout: Layout, host: str) -> float:
        """Seconds of a forward pass of one batch."""
        around = sum(self._seconds(one) for one in (self.costs.stem, self.costs.head))
        return around + self._blocks_s(drawing_uses(self._times(layout, host)), layout, host)

    def _blocks_s(self, uses: Sequence[Use], layout: Layout, host: str) -> float:
        copies = [block.copy_s for block in self._times(layout, host)]
        return seconds(uses, copies, layout.residents(self.count) if layout.resident else (), layout.slots)

    def _times(self, layout: Layout, host: str) -> list[BlockTimes]:
        rate = min(self.card.copy_bytes_s, self.card.disk_bytes_s) if host == "disk" else self.card.copy_bytes_s
        inputs = self.work.learning.graphs if layout.inputs_on_host else 0
        times = {
            (kind, plain): BlockTimes(
                forward_s=self._seconds(block.forward),
                backward_s=self._seconds(block.backward) + (0 if plain else self._seconds(block.kept)),
                copy_s=block.frozen_bytes / rate
                + (0 if plain else inputs * block.forward.net / self.card.copy_bytes_s),
            )
            for kind, block in self.costs.blocks.items()
            for plain in (True, False)
        }
        first_plain = self.count - layout.plain
        return [times[kind, index >= first_plain] for index, kind in enumerate(self.costs.kinds)]

    def _seconds(self, part: Pass) -> float:
        linear = self.card.fp8_flops_s if self.work.matmul == "fp8" else self.card.flops_s
        assert linear is not None
        return part.linear_flops / linear + part.attention_flops / self.card.flops_s

    def _host_bytes(self, layout: Layout, host: str) -> int:
        streamed = sum(block.frozen_bytes for block in map(self.costs.block, range(self.count)))
        streamed -= frozen_bytes(self.costs, layout)[2]
        staged = _STAGED * max(block.frozen_bytes for block in self.costs.blocks.values())
        inputs = self.work.learning.graphs * input_bytes(self.costs, layout)
        return _LIBRARIES_BYTES + inputs + {"device": 0, "disk": staged, MEMORY: streamed}[host]

    def _disk_bytes(self, host: str) -> int:
        """The model as released, five checkpoints, and where blocks are streamed from disk, the file of them."""
        checkpoint = (4 + self.work.learning.state_bytes) * sum(self.costs.adapted)
        packed = sum(self.costs.block(index).frozen_bytes for index in range(self.count)) if host == "disk" else 0
        return int(self.work.outline.released_bytes + 5 * checkpoint + packed)


def refusal(work: Work, card: Card, found: Sequence[Plan]) -> UserError:
    """What is missing, and the smallest change of the run after which it fits."""
    least = min(found, key=lambda plan: plan.vram.peak)
    what = (
        f"{work.resolution} px, batch_size={work.batch_size} and precision.base={work.precision.base} need "
        f"{least.vram.peak / 1e9:.1f} GB at least, and {card.name} has {card.vram_bytes / 1e9:.1f} GB to give"
    )
    short = [plan for plan in found if plan.vram.peak <= card.vram_bytes]
    if short:
        host = min(plan.host_bytes for plan in short)
        what = f"blocks that do not stay on {card.name} need {host / 1e9:.1f} GB of host memory, "
        ways = ["close other programs"]
        ways += ["memory.host=disk"] if work.given.host not in ("auto", "disk") else []
        ways += ["memory.block_inputs=device"] if work.given.block_inputs == "host" else []
        return UserError(f"{what}and there are {card.host_bytes / 1e9:.1f} GB", f"{', or '.join(ways)}")
    changes = list(_changes(work))
    for words, name, value in changes:
        if _fits_somehow(replace(work, **{name: value}), card):
            return UserError(what, f"{words} fits")
    said: dict[str, str] = {}
    together: dict[str, Any] = {}
    for words, name, value in changes:
        said[name], together[name] = words, value
        if len(said) > 1 and _fits_somehow(replace(work, **together), card):
            return UserError(what, f"{' '.join(said.values())} fits")
    return UserError(what, "choose a smaller model, or device=cpu")


def _changes(work: Work) -> Iterator[tuple[str, str, Any]]:
    """(as the user would write it, field, value) of changes that cut memory, those that cost least first."""
    given = work.given
    if given.plain is not None or given.resident is not None or given.block_inputs == "device":
        settled = {"plain_blocks": given.plain, "resident_blocks": given.resident}
        words = [f"memory.{name}=null" for name, value in settled.items() if value is not None]
        words += ["memory.block_inputs=auto"] if given.block_inputs == "device" else []
        yield " ".join(words), "given", Given(slots=given.slots, host=given.host)
    if work.batch_size > 1:
        yield "batch_size=1", "batch_size", 1
    for side in (768, 512, 256):
        if side < work.resolution:
            yield f"dataset.resolution={side}", "resolution", side
    if work.precision.base != "nf4":
        yield "precision.base=nf4", "precision", PrecisionSpec(base="nf4")
    if work.adapter.rank > 8:
        yield "adapter.rank=8", "adapter", replace(work.adapter, rank=8)


def _fits_somehow(work: Work, card: Card) -> bool:
    """Whether the layout that holds least fits, of those that the user leaves open."""
    search, given = Search(work=work, card=card, costs=work.costs(card)), work.given
    plain, on_host = min(given.plain or 0, search.count), given.block_inputs != "device"
    if not card.streams or search.stays:
        on_host = card.streams and given.block_inputs == "host"
        return search.plan("", Layout(resident=search.count, plain=plain, inputs_on_host=on_host), "device").fits(card)
    layout = Layout(slots=given.slots or SLOTS[0], resident=given.resident or 0, plain=plain)
    host = "disk" if given.host in ("auto", "disk") else MEMORY
    return any(search.plan("", replace(layout, inputs_on_host=on), host).fits(card) for on in {on_host, False})


def correct(plan: Plan, card: Card, *, step_s: float, peak_bytes: int) -> list[str]:
    """What the first steps say of a plan, and the option to change; nothing where it holds within a tenth.

    peak_bytes: most allocated on the device, the driver's context aside.
    """
    lines = []
    ratio, usable = step_s / plan.step_s, card.vram_bytes - plan.vram.context
    free = usable - plan.vram.holes - peak_bytes
    if not 0.9 <= ratio <= 1.1:
        hours = plan.run_s * ratio / 3600
        lines.append(
            f"a step takes {step_s:.2f} s, planned {plan.step_s:.2f} s: the run takes {hours:.1f} h at this rate; "
            f"hardware.bf16_tflops={card.flops_s / ratio / 1e12:.3g} hardware.utilisation=1 plans with it"
        )
    if peak_bytes > usable:
        fewer = min(-(-(peak_bytes - usable) // max(plan.plain_bytes, 1)), plan.plain_blocks)
        option = f"memory.plain_blocks={plan.plain_blocks - fewer}" if fewer else "a smaller batch_size or resolution"
        lines.append(
            f"{peak_bytes / 1e9:.1f} GB are held where {usable / 1e9:.1f} GB fit: the driver moves the rest to shared "
            f"memory, many times slower; set {option}"
        )
    elif plan.checkpointing and free > plan.plain_bytes:
        more = min(free // plan.plain_bytes, plan.blocks - plan.plain_blocks)
        lines.append(f"{free / 1e9:.1f} GB stay free; memory.plain_blocks={plan.plain_blocks + more} uses them")
    return lines
