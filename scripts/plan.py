"""Will it fit on my card, and how long will it take: the split of memory that trains fastest, and what else there is.

    flux2-lora plan                                                        the embedded demo on this computer
    flux2-lora plan model=flux2_klein_base_4b hardware=rtx4060_8gb         a model that is not here, a card that is not
    flux2-lora plan model=flux1_dev hardware=12gb dataset.resolution=768 optimizer=adamw8bit output=plan.json

Takes every option of train. Nothing is fetched and no weight is read: a page of configs/model says what shape its model
has. A card of configs/hardware is a budget; what it leaves open is measured on this computer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2_lora.config import program
from flux2_lora.devices import pick_device
from flux2_lora.families import outline
from flux2_lora.files import as_asked, write_text
from flux2_lora.planning.choose import choose, drawing_plan
from flux2_lora.planning.hardware import Card, card_of
from flux2_lora.planning.work import Choice, Plan, Work
from flux2_lora.run_options import RunOptions
from flux2_lora.training.progress import console
from flux2_lora.training.report import duration

HEADINGS = ("", "resident", "slots", "plain", "GB", "host GB", "disk GB", "s/step", "run", "s/drawing")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunOptions):
    """configs/plan.yaml: the options of train, most of which change no plan, and what is asked of the planner."""

    output: str | None = None


@program("plan")
def main(config: PlanConfig) -> None:
    work = config.work(outline(config.model))
    card = card_of(config.hardware, pick_device(config.device))
    costs = work.costs(card)
    choice = choose(work, card, costs)
    console.print(heading(config, work, card))
    console.print(alternatives(choice))
    console.print(memory_of(choice.chosen))
    for line in remarks(work, choice, drawing_plan(work, card, costs)[1]):
        console.print(line)
    if config.output:
        path = Path(config.output).expanduser()
        with as_asked(path, "output"):
            write_text(path, json.dumps(contract(choice.chosen), indent=2) + "\n")
        console.print(f"plan      {path}")


def heading(config: PlanConfig, work: Work, card: Card) -> str:
    """What is planned, on what, and where its rates are from."""
    rates = "timed here" if card.measured else "assumed until a step is timed"
    return (
        f"{config.model.title} at {work.resolution} px, batch {work.batch_size}, rank {config.adapter.rank}, "
        f"{config.precision.base} base, {config.optimizer.kind}\n"
        f"{card.name}: {gigabytes(card.vram_bytes)} to give, {gigabytes(card.copy_bytes_s)}/s copied, "
        f"{card.flops_s / 1e12:.3g} TFLOP/s {rates}, {gigabytes(card.host_bytes)} of host memory"
    )


def alternatives(choice: Choice) -> str:
    """Aligned text: a row for each plan, the chosen one first and marked."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    rows += [
        (
            ("> " if plan is choice.chosen else "  ") + plan.name,
            f"{plan.resident_blocks}/{plan.blocks}",
            str(plan.slots),
            str(plan.plain_blocks),
            *(f"{size / 1e9:.1f}" for size in (plan.vram.peak, plan.host_bytes, plan.disk_bytes)),
            f"{plan.step_s:.2f}",
            duration(plan.run_s) if plan.fits(choice.card) else "too big",
            f"{plan.draw_s:.2f}",
        )
        for plan in (choice.chosen, *choice.others)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([f"{row[0]:<{widths[0]}}", *line[1:]]) for row, line in zip(rows, lines, strict=True))


def memory_of(plan: Plan) -> str:
    """The parts of the chosen plan's memory at its peak."""
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in vars(plan.vram).items() if size)
    return f"memory    {parts}: {gigabytes(plan.vram.peak)} at the peak"


def remarks(work: Work, choice: Choice, alone_s: float) -> list[str]:
    """What drawing costs, in the run and by itself. alone_s: of a forward pass with nothing to train beside it."""
    plan, previews = choice.chosen, work.previews
    lines = [f"drawing   {alone_s:.2f} s a forward pass with all of the card, {plan.draw_s:.2f} s while training"]
    if previews.every:
        share = 1 - work.max_steps * plan.step_s / plan.run_s
        lines.append(
            f"previews  {duration(plan.preview_s)} every {previews.every} steps, {100 * share:.0f} % of the run; "
            "preview.steps, preview.count and preview.every change that"
        )
    return lines


def contract(plan: Plan) -> dict[str, Any]:
    """The chosen plan as other programs read it."""
    return {
        "vram_bytes": {**vars(plan.vram), "peak": plan.vram.peak},
        "host_bytes": plan.host_bytes,
        "disk_bytes": plan.disk_bytes,
        "step_s": plan.step_s,
        "resident_blocks": plan.resident_blocks,
        "plain_blocks": plan.plain_blocks,
        "slots": plan.slots,
        "checkpointing": plan.checkpointing,
        "host": plan.host,
        "inputs_on_host": plan.inputs_on_host,
        "matmul": plan.matmul,
        "draw_s": plan.draw_s,
        "preview_s": plan.preview_s,
        "run_s": plan.run_s,
    }


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
