"""Look inside a LoRA file: of which model it is, what it changes and how much, and which clients will load it.

flux2-lora inspect style.safetensors
flux2-lora inspect outputs/mine output=norms.png      its norms by block as a picture too
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from flux2_lora.adapters import Lora, find_adapter
from flux2_lora.config import program
from flux2_lora.export import table
from flux2_lora.export.clients import file_of
from flux2_lora.export.header import RUN_CARD
from flux2_lora.export.proof import norm, proofs_of
from flux2_lora.export.survival import block_of, in_order
from flux2_lora.files import as_asked, write_bytes
from flux2_lora.keys import kinds_of
from flux2_lora.lora_files import read_any, read_tensors
from flux2_lora.lora_origin import origin_of, width_of
from flux2_lora.publish.run_card import read_card

BARS = "▁▂▃▄▅▆▇█"
BAR_PX, HIGH_PX, GAP_PX, TEXT_PX = 14, 160, 24, 14
PAPER, INK, GREY, BLUE = "#ffffff", "#111111", "#666666", "#0b57d0"
LONGEST = 100
"""Characters of a value of the header that are shown."""


@dataclass(frozen=True, kw_only=True)
class InsideConfig:
    """configs/look_inside.yaml. adapter: file, run or checkpoint; output: a PNG of the norms by block."""

    adapter: str
    output: str | None = None


@program("look_inside")
def main(config: InsideConfig) -> None:
    # Headers hold brackets, which are not meant as rich's markup.
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    path, lora = find_adapter(config.adapter), read_any(config.adapter)
    tensors, told = read_tensors(path)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    types = sorted({str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items() if "alpha" not in key})
    console.print(f"file      {path.name}, {size}, {', '.join(types)}, {lora.naming} names")
    for line in facts_of(lora):
        console.print(line)
    norms = norms_of(lora)
    for stack, values in by_stack(norms).items():
        console.print(
            f"norm      {stack:<6} {bars(values, max(norms.values()))}  {min(values):.3g} to {max(values):.3g}"
        )
    console.print(table(proofs_of(file_of(tensors, told), lora.modules, lora.architecture, dtype=torch.float32)))
    for line in header_lines(path, told):
        console.print(line)
    if config.output:
        picture = Path(config.output).expanduser()
        content = BytesIO()
        norm_picture(path.name, by_stack(norms)).save(content, "PNG")
        with as_asked(picture, "output"):
            write_bytes(picture, content.getvalue())
        console.print(f"picture   {picture}")


def facts_of(lora: Lora) -> list[str]:
    """Model, rank, targets and trigger, a line each."""
    ranks = sorted({len(pair.down) for pair in lora.modules.values()})
    scales = sorted({pair.scale for pair in lora.modules.values()})
    kinds = sorted({kind for module in lora.modules for kind in kinds_of(lora.architecture, module)})
    width = width_of(lora)
    return [
        f"model     {origin_of(lora).title}{f', {width} wide' if width else ''}",
        f"rank      {spread(ranks)}, scale {spread(scales)}",
        f"targets   {len(lora.modules)} Linears, {' and '.join(kinds)}, in {len(norms_of(lora))} blocks",
        *([f"trigger   {lora.trigger_word}"] if lora.trigger_word else []),
    ]


def norms_of(lora: Lora) -> dict[str, float]:
    """Block -> the Frobenius norm of all that is added to it."""
    squares: dict[str, float] = {}
    for module, pair in lora.modules.items():
        squares[block_of(module)] = squares.get(block_of(module), 0.0) + norm(pair) ** 2
    return {block: squares[block] ** 0.5 for block in sorted(squares, key=in_order)}


def by_stack(norms: Mapping[str, float]) -> dict[str, list[float]]:
    """double, single, other -> the norms in the order of their blocks; a block that is not adapted has none."""
    stacks: dict[str, dict[int, float]] = {}
    for block, value in norms.items():
        stack, _, number = block.partition(" ")
        place = stacks.setdefault(stack if number else "other", {})
        place[int(number) if number else len(place)] = value
    return {stack: [values.get(i, 0.0) for i in range(max(values) + 1)] for stack, values in stacks.items()}


def bars(values: Sequence[float], largest: float) -> str:
    """A bar a block, a blank for none."""
    return "".join(BARS[round(v / largest * (len(BARS) - 1))] if v else " " for v in values) if largest else ""


def spread(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def header_lines(path: Path, told: Mapping[str, str]) -> list[str]:
    """The metadata, long values cut, and what the run card says."""
    lines = [
        f"  {key}: {value if len(value) <= LONGEST else f'{value[:LONGEST]}... ({len(value)} characters)'}"
        for key, value in sorted(told.items())
        if key != RUN_CARD
    ]
    if RUN_CARD in told:
        card = read_card(path)
        learned = f", {card.learned.count} pictures" if card.learned else ""
        lines.append(f"run card  step {card.step}{learned}; flux2-lora train from={path} makes it again")
    return ["metadata", *lines] if lines else ["metadata  none"]


def norm_picture(title: str, stacks: Mapping[str, Sequence[float]]) -> Image.Image:
    """Bars from left to right, stack beside stack, each above its name."""
    font = ImageFont.load_default(TEXT_PX)
    largest = max(max(values) for values in stacks.values()) or 1.0
    heading = f"{title}: norm of the update by block, at most {largest:.3g}"
    labels = {stack: f"{stack} 0-{len(values) - 1}" for stack, values in stacks.items()}
    widths = {stack: max(len(stacks[stack]) * BAR_PX, int(font.getlength(label))) for stack, label in labels.items()}
    width = max(sum(widths.values()) + GAP_PX * len(stacks), int(font.getlength(heading)) + GAP_PX) + GAP_PX
    page = Image.new("RGB", (width, HIGH_PX + 4 * GAP_PX), PAPER)
    draw, left, bottom = ImageDraw.Draw(page), GAP_PX, HIGH_PX + 2 * GAP_PX
    draw.text((GAP_PX, GAP_PX / 2), heading, INK, font)
    for stack, values in stacks.items():
        for number, value in enumerate(values):
            x, high = left + number * BAR_PX, value / largest * HIGH_PX
            draw.rectangle((x, bottom - high, x + BAR_PX - 3, bottom), fill=BLUE)
        draw.text((left, bottom + 6), labels[stack], GREY, font)
        left += widths[stack] + GAP_PX
    return page


if __name__ == "__main__":
    main()
