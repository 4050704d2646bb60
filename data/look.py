"""Look at a folder before training on it: what will be cropped, skipped, held out, and what is odd in the captions.

Nothing is trained or cached; the one file written is a contact sheet of the very crops that training would see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flux2_lora.buckets import assign, crop_loss
from flux2_lora.config import program
from flux2_lora.dataset import DatasetSpec, Record, Scan, crop_to, open_rgb, scan, scan_validation
from flux2_lora.errors import listed
from flux2_lora.families import ModelSpec, load_family
from flux2_lora.files import write_bytes
from flux2_lora.options import option

LONGEST_CAPTION = 350
"""Words. Text encoders read 512 tokens and English takes about 1.4 tokens a word: what comes later is cut off."""
SHEET_PICTURES = 60
CELL_PX, GAP_PX, TEXT_PX, TEXT_LINES = 288, 20, 16, 4
PAPER, INK, GREY, TAG = "#ffffff", "#111111", "#666666", "#0b57d0"


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """configs/inspect.yaml. output: the contact sheet, a PNG file."""

    model: ModelSpec
    dataset: DatasetSpec
    seed: int = option(0, at_least=0)
    output: str = "outputs/inspect.png"


@program("inspect")
def main(config: InspectConfig) -> None:
    family = load_family(config.model.family)
    inspect(config.dataset, config.seed, Path(config.output).expanduser(), family.pixels_per_token)


def inspect(spec: DatasetSpec, seed: int, output: Path, step: int) -> None:
    """Print the report on dataset.folder and write the contact sheet (PNG) to `output`; `step` is the bucket step."""
    # File names and captions hold brackets and colons, which are not meant as rich's markup.
    console = Console(markup=False, emoji=False, highlight=False)
    found = scan(spec)
    training, validation = scan_validation(spec, found, seed)
    console.print(f"{spec.folder}: {len(training)} pictures to train on, {len(validation)} for validation")
    records = sorted(training + validation, key=lambda record: record.path)
    console.print(bucket_table(records, spec.resolution, step))
    for line in caption_problems(records) + same_pictures(records):
        console.print(line, style="yellow")
    if found.skipped:
        console.print(skipped_table(found))
    write_sheet(output, records, validation, spec.resolution, step)
    console.print(f"contact sheet: {output}")


def bucket_table(records: Sequence[Record], resolution: int, step: int) -> Table:
    """One row a bucket: pictures in it, how much of them a crop cuts off, how many must be enlarged."""
    members: dict[tuple[int, int], list[Record]] = defaultdict(list)
    for record, bucket in zip(records, buckets_of(records, resolution, step), strict=True):
        members[bucket].append(record)
    table = Table(title=f"buckets at {resolution} px", title_justify="left")
    for heading in ("height x width", "pictures", "cropped away", "enlarged"):
        table.add_column(heading, justify="right")
    for (height, width), group in sorted(members.items()):
        loss = mean(crop_loss(record.width, record.height, (height, width)) for record in group)
        enlarged = sum(record.width < width or record.height < height for record in group)
        table.add_row(f"{height} x {width}", str(len(group)), f"{loss:.1%}", str(enlarged or "-"))
    return table


def buckets_of(records: Sequence[Record], resolution: int, step: int) -> list[tuple[int, int]]:
    return assign([(record.width, record.height) for record in records], resolution, step)


def caption_problems(records: Sequence[Record]) -> list[str]:
    """One line a problem: empty captions, captions that encoders will cut off, captions shared by pictures."""
    lines = []
    if empty := [record.path.name for record in records if not record.caption]:
        lines.append(f"empty caption: {listed(empty)}")
    if long := [record.path.name for record in records if len(record.caption.split()) > LONGEST_CAPTION]:
        lines.append(f"caption of more than {LONGEST_CAPTION} words, its end may be cut off: {listed(long)}")
    for caption, names in shared(records, lambda record: record.caption):
        lines.append(f'one caption for {len(names)} pictures, "{caption[:60]}": {listed(names)}')
    return lines


def same_pictures(records: Sequence[Record]) -> list[str]:
    return [f"the same picture {len(n)} times: {listed(n)}" for _, n in shared(records, lambda record: record.digest)]


def shared(records: Iterable[Record], of: Callable[[Record], str]) -> list[tuple[str, list[str]]]:
    """Values, not empty, that several records have, with the names of these records."""
    names: dict[str, list[str]] = defaultdict(list)
    for record in records:
        names[of(record)].append(record.path.name)
    return [(value, group) for value, group in names.items() if value and len(group) > 1]


def skipped_table(found: Scan) -> Table:
    table = Table(title=f"{len(found.skipped)} skipped", title_justify="left")
    table.add_column("file")
    table.add_column("reason")
    for name, reason in found.skipped:
        table.add_row(name, reason)
    return table


def write_sheet(
    path: Path, records: Sequence[Record], validation: Sequence[Record], resolution: int, step: int
) -> None:
    """A PNG of all crops with their captions; of a large folder, a spread of SHEET_PICTURES."""
    count = min(len(records), SHEET_PICTURES)
    chosen = [records[position * len(records) // count] for position in range(count)]
    cells = [
        cell(record, bucket, held_out=record in validation)
        for record, bucket in zip(chosen, buckets_of(chosen, resolution, step), strict=True)
    ]
    title = f"{len(chosen)} of {len(records)} pictures as training sees them, at {resolution} px"
    content = BytesIO()
    sheet(title, cells).save(content, "PNG")
    write_bytes(path, content.getvalue())


def sheet(title: str, cells: Sequence[Image.Image]) -> Image.Image:
    """Cells in rows below a title; each row is as high as its highest cell."""
    columns = next(count for count in (1, 2, 3, 4, 5, 6) if count == 6 or count * count >= len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(each.height for each in row) for row in rows]
    width = max(columns * (CELL_PX + GAP_PX), 2 * CELL_PX) + GAP_PX
    page = Image.new("RGB", (width, sum(heights) + GAP_PX * (len(rows) + 3)), PAPER)
    ImageDraw.Draw(page).text((GAP_PX, GAP_PX), title, INK, ImageFont.load_default(TEXT_PX + 2))
    top = 3 * GAP_PX
    for row, height in zip(rows, heights, strict=True):
        for column, each in enumerate(row):
            page.paste(each, (GAP_PX + column * (CELL_PX + GAP_PX), top))
        top += height + GAP_PX
    return page


def cell(record: Record, bucket: tuple[int, int], *, held_out: bool) -> Image.Image:
    """The crop as large as the cell allows, above its label."""
    picture = ImageOps.contain(to_image(crop_to(open_rgb(record.path), *bucket)), (CELL_PX, CELL_PX))
    below = label(record, bucket, held_out=held_out)
    made = Image.new("RGB", (CELL_PX, picture.height + below.height), PAPER)
    made.paste(picture, ((CELL_PX - picture.width) // 2, 0))
    made.paste(below, (0, picture.height))
    return made


def label(record: Record, bucket: tuple[int, int], *, held_out: bool) -> Image.Image:
    """The file's name, what became of the picture, and the first lines of its caption."""
    font, small, pitch = ImageFont.load_default(TEXT_PX), ImageFont.load_default(TEXT_PX - 3), TEXT_PX + 5
    loss = crop_loss(record.width, record.height, bucket)
    notes = ["validation"] * held_out + [f"{loss:.0%} cut off"] * (loss >= 0.05) + [f"{bucket[0]} x {bucket[1]}"]
    right = ", ".join(notes)
    name = wrapped(record.path.name, small, CELL_PX - int(small.getlength(right)) - 12, 1)[0]
    lines = wrapped(record.caption or "(empty caption)", font, CELL_PX, TEXT_LINES)
    made = Image.new("RGB", (CELL_PX, 10 + pitch * (len(lines) + 1)), PAPER)
    draw = ImageDraw.Draw(made)
    draw.text((0, 6), name, GREY, small)
    draw.text((CELL_PX, 6), right, TAG if held_out else GREY, small, anchor="ra")
    for number, line in enumerate(lines, start=1):
        draw.text((0, 6 + number * pitch), line, INK if record.caption else GREY, font)
    return made


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels [3 h w] in [-1, 1] as 8-bit RGB."""
    values = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """At most `most` lines of at most `width` px, broken between words where possible, cut short with dots."""
    lines: list[str] = []
    while text and len(lines) < most:
        end = next(n for n in range(len(text), 0, -1) if n == 1 or font.getlength(text[:n]) <= width)
        space = text.rfind(" ", 0, end + 1)
        end = space if end < len(text) and space > 0 else end
        lines.append(text[:end])
        text = text[end:].lstrip()
    if text:
        while font.getlength(f"{lines[-1]}...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


if __name__ == "__main__":
    main()
