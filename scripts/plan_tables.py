"""The tables of docs/memory.md: steps, what streaming adds, what memory buys, and drawing; of models and cards by name.

    python scripts/plan_tables.py            some minutes on one core; nothing is fetched
    python scripts/plan_tables.py --models flux2_klein_base_4b --px 512

All is planned and nothing timed: see flux2_lora/planning.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import yaml  # type: ignore[import-untyped]

from flux2_lora.bundled import share
from flux2_lora.errors import UserError
from flux2_lora.families import Geometry, ModelSpec, Outline, outline
from flux2_lora.planning.choose import choose, drawing_plan
from flux2_lora.planning.hardware import Card, HardwareSpec, card_of
from flux2_lora.planning.memory import Layout, Learning
from flux2_lora.planning.search import Search
from flux2_lora.planning.sketch import Costs
from flux2_lora.planning.work import Work

MODELS = ("flux1_dev", "flux2_klein_base_9b", "flux2_klein_base_4b", "flux2_dev")
SIDES = (512, 768, 1024)
STREAMED = ("rtx3060_12gb", "rtx4060_8gb", "rtx4070_12gb", "rtx4090_24gb", "h200")
BOUGHT = ("rtx4060_8gb", "rtx3060_12gb", "rtx4070_12gb")
ADAMW_8BIT = Learning(state_bytes=2.03)
DRAWN_MODEL, DRAWN_ON, DRAWN_STEPS = "flux1_dev", "rtx4060_8gb", 20


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--models", nargs="+", default=MODELS)
    given.add_argument("--px", nargs="+", type=int, default=SIDES)
    chosen = given.parse_args()
    runs = [(model, px) for model in chosen.models for px in chosen.px]
    for title, head, rows in (
        ("Seconds of a step, all resident, and times as long streamed", ["TFLOP", *STREAMED], map(streaming, runs)),
        ("The chosen plan, and its step over all resident", [*BOUGHT], map(bought, runs)),
    ):
        print(f"\n{title}\n\n| model, px | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
        for (model, px), cells in zip(runs, rows, strict=True):
            print(f"| {model} {px} | {' | '.join(cells)} |", flush=True)
    print(f"\nSeconds of a step of drawing with {DRAWN_MODEL} on {DRAWN_ON}\n")
    print("| px | matmul | planned | at the card's peak | 20 steps |\n|---|---|---|---|---|")
    for row in drawing(chosen.px):
        print(row, flush=True)


def streaming(run: tuple[str, int]) -> list[str]:
    """TFLOP of a recomputed step; for each card the resident step, and the factor with two slots and no resident."""
    work, costs = planned(*run)
    passes = [costs.blocks[kind] for kind in costs.kinds]
    flops = sum(p.linear_flops + p.attention_flops for b in passes for p in (b.forward, b.kept, b.backward))
    cells = [f"{flops / 1e12:.1f}"]
    for name in STREAMED:
        budget = {"copy_gb_s": 12.0} if name == "rtx3060_12gb" else {}  # in a slot of PCIe 3.0
        search = Search(work=work, card=card(name, **budget), costs=costs)
        whole = search.step_s(Layout(resident=search.count), "device")
        cells.append(f"{whole:.2f} x{search.step_s(Layout(slots=2), 'pinned') / whole:.2f}")
    return cells


def bought(run: tuple[str, int]) -> list[str]:
    work, costs = planned(*run)
    return [best(work, costs, card(name)) for name in BOUGHT]


def best(work: Work, costs: Costs, on: Card) -> str:
    """What is chosen, its step, and that over everything resident and recomputed; or why nothing fits."""
    try:
        plan = choose(work, on, costs).chosen
    except UserError as error:
        return error.what
    whole = Search(work=work, card=on, costs=costs).step_s(Layout(resident=plan.blocks), "device")
    resident = f", {plan.resident_blocks} resident" if plan.resident_blocks else ""
    disk = (", inputs on host" if plan.inputs_on_host else "") + (", disk" if plan.host == "disk" else "")
    size = f"{plan.vram.peak / 1e9:.1f} GB"
    return f"{plan.plain_blocks} plain{resident}: {plan.step_s:.2f} s x{plan.step_s / whole:.2f}, {size}{disk}"


def drawing(sides: Sequence[int]) -> Iterator[str]:
    for px in sides:
        for matmul in ("bf16", "fp8"):
            work, costs = planned(DRAWN_MODEL, px, matmul)
            _, taken = drawing_plan(work, card(DRAWN_ON), costs)
            ideal = Search(work=work, card=card(DRAWN_ON, utilisation=1.0), costs=costs)
            peak = ideal.draw_s(Layout(resident=ideal.count), "device")
            yield f"| {px} | {matmul} | {taken:.2f} s | {peak:.2f} s | {DRAWN_STEPS * taken:.0f} s |"


@cache
def planned(model: str, px: int, matmul: str = "bf16") -> tuple[Work, Costs]:
    """A run of rank 16 and batch 1 on a model by the page of its name, and what a step takes on a CUDA card."""
    work = Work(outline=shape_of(model), resolution=px, matmul=matmul, learning=ADAMW_8BIT)
    return work, work.costs(card(DRAWN_ON))


@cache
def shape_of(model: str) -> Outline:
    page = yaml.safe_load((share() / "configs" / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    names = {key: page[key] for key in ("family", "path", "title", "architecture_name")}
    return outline(ModelSpec(**names, geometry=Geometry(**page["geometry"])))


@cache
def card(name: str, **changes: float) -> Card:
    """A page of configs/hardware with some of its numbers changed."""
    page = yaml.safe_load((share() / "configs" / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"))
    return card_of(HardwareSpec(**{**page, **changes}), torch.device("cpu"))


if __name__ == "__main__":
    main()
