"""The split of memory that trains fastest among those that fit, what else there is, and what the first steps say of it.

Inputs of blocks wait in host memory only where nothing fits otherwise, or where the user says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flux2_lora.errors import UserError
from flux2_lora.placement import MEMORY
from flux2_lora.planning.hardware import Card
from flux2_lora.planning.memory import Layout, drawing_bytes
from flux2_lora.planning.refuse import refusal
from flux2_lora.planning.search import SLOTS, Search
from flux2_lora.planning.sketch import Costs
from flux2_lora.planning.work import Choice, Plan, Work


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
