"""Any layout of a run's blocks on a card, weighed by one sum and timed by one schedule.

Law: more memory is never slower. With given slots and residents the most plain blocks that fit are the fastest, since
each saves its second forward; and where no copy is waited for, more residents can only take memory from plain blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from flux2_lora.placement import MEMORY
from flux2_lora.planning.hardware import Card
from flux2_lora.planning.memory import Layout, frozen_bytes, holes, input_bytes, peaks_by_plain, vram
from flux2_lora.planning.schedule import BlockTimes, Use, drawing_uses, seconds, training_uses
from flux2_lora.planning.sketch import Costs, Pass
from flux2_lora.planning.work import Plan, Work

SLOTS = (2, 3, 4)
_LIBRARIES_BYTES = int(2e9)  # of host memory: Python, PyTorch and what it loads for a card
_STAGED = 2  # blocks that wait in host memory between disk and card: one is read while one is copied


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
